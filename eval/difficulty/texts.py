"""Items for a language model: rows of SQuAD and HellaSwag, and pieces of any text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tilelli_jax.data.synthetic import stories
from tilelli_jax.errors import InputError

from ..inputs.rows import columns_of, describe_cell

SQUAD = "context, question, title and answers (whose text is a list; its first entry is the right answer)"
HELLASWAG = "ctx_a, ctx_b, endings (a list), label (the index of the right one), activity_label"
BLOCK = 16  # pieces per group, in a text without document separator


class TextItem(NamedTuple):
    """One item: a prompt, its possible endings, the index of the right one, its topic, group and domain."""

    prompt: str
    endings: tuple[str, ...]
    right: int
    topic: str
    group: str
    domain: str = ""


def squad(rows: Sequence[dict[str, Any]], source: str) -> list[TextItem]:
    """Converts SQuAD's rows. The first answer is the gold answer; rows without answer (SQuAD 2) are skipped.

    Args:
        source: name of the data in error messages.

    Raises:
        InputError: a row lacks a column of SQUAD, or no row has an answer.
    """
    def parse(row: dict[str, Any]) -> TextItem | None:
        if not _has_answer(row):
            return None
        prompt = f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer:"
        return TextItem(prompt, (" " + row["answers"]["text"][0].strip(),), 0, row["title"], row["context"])
    questions = _parse_rows(rows, parse, source, SQUAD, ("context", "question", "title"))
    if not questions:
        raise InputError(f"{source}: expected at least one question with an answer, found none")
    return questions


def _has_answer(row: dict[str, Any]) -> bool:
    return bool(row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"])


def hellaswag(rows: Sequence[dict[str, Any]], source: str) -> list[TextItem]:
    """Converts HellaSwag's rows.

    Args:
        source: name of the data in error messages.

    Raises:
        InputError: a row lacks a column of HELLASWAG, or its label is not the index of an ending.
    """
    def parse(row: dict[str, Any]) -> TextItem:
        prompt = row["ctx_a"] + (" " + row["ctx_b"] if row["ctx_b"] else "")
        endings = tuple(" " + ending.strip() for ending in row["endings"])
        if int(row["label"]) not in range(len(endings)):
            raise ValueError(f"label {row['label']} of {len(endings)} endings")
        origin = str(row.get("source_id", row["activity_label"]))  # activitynet~v_… or wikihow~…
        return TextItem(prompt, endings, int(row["label"]), row["activity_label"], origin,
                        origin.partition("~")[0] if "~" in origin else "")
    return _parse_rows(rows, parse, source, HELLASWAG, ("ctx_a", "ctx_b", "activity_label"))


def _parse_rows(rows: Sequence[dict[str, Any]], parse: Callable[[dict[str, Any]], TextItem | None],
                source: str, columns: str, text_columns: Sequence[str]) -> list[TextItem]:
    questions = []
    for i, row in enumerate(rows, 1):
        where = f"{source}: row {i}"
        for name in text_columns:
            if not isinstance(row.get(name), str):
                raise InputError(f"{where}: {name}: expected text, found {describe_cell(row, name)}; "
                                 f"{columns_of(row)}, expected are {columns}")
        try:
            if (question := parse(row)) is not None:
                questions.append(question)
        except KeyError as error:
            raise InputError(f"{where}: expected the column {error.args[0]}; {columns_of(row)}, expected are "
                             f"{columns}") from None
        except (IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{where}: expected the columns {columns}: {error}") from None
    return questions


def passages(text: str, *, prompt: int, ending: int, separator: str) -> list[TextItem]:
    """Splits a text into items: prompts and endings that do not overlap. The items of a document form a
    group.

    Args:
        prompt, ending: length of a prompt and of an ending, in characters.
        separator: text between two documents; empty: BLOCK consecutive items form a group.
    """
    size = prompt + ending
    block = BLOCK * size
    documents = (text.split(separator) if separator else
                 [text[i:i + block] for i in range(0, len(text), block)])
    return [TextItem(document[i:i + prompt], (document[i + prompt:i + size],), 0, "", str(number))
            for number, document in enumerate(documents)
            for i in range(0, len(document) - size + 1, size)]


def built_in(items: int, size: int) -> str:
    """Returns enough built-in stories for `items` pieces of `size` characters. No run trains on these
    stories.

    The text is longer than the pieces, because the end of a story that is shorter than a piece is lost: up to
    twelve times as long for pieces nearly as long as a story (at most about 1000 characters).
    """
    length = int(1.5 * items * size) + 10_000
    for times in (1, 2, 4, 8):
        text = stories.generate(times * length, 0, "valid").decode("ascii")
        pieces = sum(len(story) // size for story in text.split(stories.SEPARATOR))
        if not 0 < pieces < items:
            break
    return text
