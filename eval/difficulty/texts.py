"""Questions that a language model is asked: rows of SQuAD and HellaSwag, pieces of any text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tilelli_jax.data import stories
from tilelli_jax.errors import InputError

from ..inputs.rows import columns_of

SQUAD = "context, question, title and answers (whose text is a list, the first of it the right one)"
HELLASWAG = "ctx_a, ctx_b, endings (a list), label (the number of the right one), activity_label"
BLOCK = 16  # pieces of a text without documents that are kept together


class Question(NamedTuple):
    """A prompt, its possible continuations and which is right; its topic, its paragraph and its domain."""

    prompt: str
    endings: tuple[str, ...]
    right: int
    topic: str
    group: str
    domain: str = ""


def squad(rows: Sequence[dict[str, Any]], source: str) -> list[Question]:
    """SQuAD's rows; the first answer is the gold one. Those that have none, as in SQuAD 2, are left out.

    Raises:
        InputError: a row has not the columns of SQUAD, or none has an answer.
    """
    def one(row: dict[str, Any]) -> Question:
        prompt = f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer:"
        return Question(prompt, (" " + row["answers"]["text"][0].strip(),), 0, row["title"], row["context"])
    found = _each(rows, lambda row: one(row) if _answered(row) else None, source, SQUAD,
                  ("context", "question", "title"))
    if not found:
        raise InputError(f"{source}: expected a question with an answer at least, found none")
    return found


def _answered(row: dict[str, Any]) -> bool:
    return bool(row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"])


def hellaswag(rows: Sequence[dict[str, Any]], source: str) -> list[Question]:
    """HellaSwag's rows.

    Raises:
        InputError: a row has not the columns of HELLASWAG, or a label that is none of its endings.
    """
    def one(row: dict[str, Any]) -> Question:
        prompt = row["ctx_a"] + (" " + row["ctx_b"] if row["ctx_b"] else "")
        endings = tuple(" " + ending.strip() for ending in row["endings"])
        if int(row["label"]) not in range(len(endings)):
            raise ValueError(f"label {row['label']} of {len(endings)} endings")
        where = str(row.get("source_id", row["activity_label"]))  # activitynet~v_… or wikihow~…
        return Question(prompt, endings, int(row["label"]), row["activity_label"], where,
                        where.partition("~")[0] if "~" in where else "")
    return _each(rows, one, source, HELLASWAG, ("ctx_a", "ctx_b", "activity_label"))


def _each(rows: Sequence[dict[str, Any]], one: Callable[[dict[str, Any]], Question | None], source: str,
          columns: str, texts: Sequence[str]) -> list[Question]:
    found = []
    for i, row in enumerate(rows):
        where = f"{source}: row {i}"
        for name in texts:
            if not isinstance(row.get(name), str):
                raise InputError(f"{where}: {name}: expected text, found {row.get(name, 'nothing')!r:.40}; "
                                 f"{columns_of(row)}, expected are {columns}")
        try:
            if (made := one(row)) is not None:
                found.append(made)
        except KeyError as error:
            raise InputError(f"{where}: there is no {error.args[0]}; {columns_of(row)}, expected are "
                             f"{columns}") from None
        except (IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{where}: expected the columns {columns}: {error}") from None
    return found


def passages(text: str, *, prompt: int, ending: int, separator: str) -> list[Question]:
    """Pieces that do not overlap, each with how it goes on; a document is a paragraph of theirs.

    Args:
        prompt, ending: characters of a piece and of how it goes on.
        separator: between documents; where it is empty, BLOCK pieces are a paragraph.
    """
    whole = prompt + ending
    block = BLOCK * whole
    documents = (text.split(separator) if separator else
                 [text[i:i + block] for i in range(0, len(text), block)])
    return [Question(document[i:i + prompt], (document[i + prompt:i + whole],), 0, "", str(number))
            for number, document in enumerate(documents)
            for i in range(0, len(document) - whole + 1, whole)]


def built_in(items: int, whole: int) -> str:
    """Stories that no run is trained on, enough of them for so many pieces of `whole` characters.

    More is told than the pieces need, as what is left at the end of a story is none: up to twelve times as
    much where they are nearly as long as a story, which has up to some 1000 characters.
    """
    size = int(1.5 * items * whole) + 10_000
    for times in (1, 2, 4, 8):
        text = stories.generate(times * size, 0, "valid").decode("ascii")
        pieces = sum(len(story) // whole for story in text.split(stories.SEPARATOR))
        if not 0 < pieces < items:
            break
    return text
