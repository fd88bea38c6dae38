"""Questions with their correct answers: from the Hugging Face hub, the built-in world of facts, and files.

The layouts are those of the data sets' own files: PopQA, TriviaQA, SQuAD, NQ-open, SelfAware, SimpleQA.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import re
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.data.synthetic import facts
from tilelli_jax.errors import InputError

from ..inputs.rows import Row, columns_of, describe_cell, hugging_face, read_rows
from . import splits
from .config import QuestionsConfig

HUB = {"popqa": ("hf:akariasai/PopQA", "test"),
       "triviaqa": ("hf:mandarjoshi/trivia_qa#rc.nocontext", "validation")}
BUILT_IN = "facts"
COLUMNS = ("question, answers (a list, or texts separated by |), and optionally id, dataset, group, "
           "popularity, category, paraphrases, answerable")


ANSWER_COLUMNS = {"answers", "answer", "possible_answers"}


class Question(NamedTuple):
    """One question.

    `answers` are the correct ones, none if it has no answer; `entity` is what it is about, or None;
    `popularity` is NaN if unknown; `category` is the kind of question, for example a relation.
    """

    id: str
    dataset: str
    text: str
    answers: tuple[str, ...]
    entity: str | None = None
    popularity: float = math.nan
    category: str = ""
    paraphrases: tuple[str, ...] = ()

    @property
    def answerable(self) -> bool:
        return bool(self.answers)


class QuestionSet(NamedTuple):
    """The questions of a study, and those outside of it that are examples in its prompts."""

    questions: list[Question]
    examples: list[Question]


def draw(config: QuestionsConfig, shots: int = 0) -> QuestionSet:
    """Samples equally many questions from each source and shuffles them, both with the configured seed.

    Args:
        shots: number of examples, of all sources together. No question of the study has the text or the
            entity of an example.

    Raises:
        InputError: a source cannot be read, or has too few questions with answers for the examples.
    """
    n, stems = len(config.sources), [Path(source).stem for source in config.sources]
    for source, stem in zip(config.sources, stems, strict=True):
        if stems.count(stem) > 1:
            raise InputError(f"questions.sources: expected files with different names, which name their data "
                             f"sets, found {source} and another '{stem}'")
    per_source = config.items // n
    questions: list[Question] = []
    examples: list[Question] = []
    for i, source in enumerate(config.sources):
        limit = per_source if i < n - 1 else config.items - per_source * (n - 1)
        drawn = _of_source(source, limit, config, shots // n + (i < shots % n))
        questions += drawn.questions
        examples += drawn.examples
    questions = _unrelated(questions, examples)  # also of another source's examples
    order = np.random.default_rng(config.seed).permutation(len(questions))
    return QuestionSet([questions[i] for i in order], examples)


def _of_source(source: str, limit: int, config: QuestionsConfig, shots: int) -> QuestionSet:
    if source == BUILT_IN:
        world = facts.facts(config.facts_seed, config.facts_people)
        available = [Question(f"facts-{i}", BUILT_IN, fact.question, (fact.answer,), fact.entity,
                              float(fact.times)) for i, fact in enumerate(world)]
    elif source in HUB or source.startswith("hf:"):
        name, split = HUB.get(source, (source, "validation"))
        rows = hugging_face(name, limit + 10 * shots, part=split, seed=config.seed)
        available = of_rows(rows, source, source)
    else:
        available = of_rows(read_rows(Path(source), 10**9), source, Path(source).stem)
    return _sample(available, limit, config.seed, shots, source)


def _sample(questions: Sequence[Question], limit: int, seed: int, shots: int, source: str) -> QuestionSet:
    """Draws the study's questions from the beginning of a random order, and the examples from its end.

    The study keeps the order of the source.
    """
    order = np.random.default_rng(seed).permutation(len(questions)).tolist()
    if not shots and len(questions) <= limit:
        return QuestionSet(list(questions), [])
    examples = [i for i in reversed(order) if questions[i].answerable][:shots]
    if len(examples) < shots:
        raise InputError(f"prompt.shots: expected at least {shots} questions with answers in {source}, found "
                         f"{len(examples)}")
    remaining = [i for i in order if i not in set(examples)] if shots else order
    unrelated = _unrelated([questions[i] for i in remaining], [questions[i] for i in examples])
    chosen = set(map(id, unrelated[:limit]))
    return QuestionSet([question for question in questions if id(question) in chosen],
                       [questions[i] for i in examples])


def _unrelated(questions: Sequence[Question], examples: Sequence[Question]) -> list[Question]:
    """Returns the questions that share no group with an example, nor have a paraphrase equal to one."""
    if not examples:
        return list(questions)
    every = [*questions, *examples]
    groups = splits.group_ids([question.text for question in every], [question.id for question in every],
                              [question.entity for question in every])
    taken, texts = set(groups[len(questions):].tolist()), {example.text for example in examples}
    return [question for question, group in zip(questions, groups.tolist(), strict=False)
            if group not in taken and not texts & set(question.paraphrases)]


def of_rows(rows: Sequence[Row], source: str, dataset: str) -> list[Question]:
    """Converts rows in the layout of one of the data sets above, or with the columns of COLUMNS.

    Raises:
        InputError: a row, which the message names, has another format.
    """
    return [_question(row, f"{source}, row {i}", dataset, str(i)) for i, row in enumerate(flat(rows), 1)]


def flat(rows: Sequence[Row]) -> list[Row]:
    """Returns a row for each question: SelfAware's file is one list, SimpleQA's has other columns."""
    if len(rows) == 1 and isinstance(rows[0].get("example"), list):
        rows = rows[0]["example"]
    return [{**row, "question": row["problem"]} if "problem" in row and "question" not in row else row
            for row in rows]


def _question(row: Row, where: str, dataset: str, number: str) -> Question:
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: question: expected text, found {describe_cell(row, 'question')}; "
                         f"{columns_of(row)}, expected are {COLUMNS}")
    if "possible_answers" in row:
        answers = [*_list(row["possible_answers"], where), *([row["obj"]] if row.get("obj") else [])]
        return Question(f"popqa-{row.get('id', number)}", "popqa", text, _texts(answers, where),
                        _entity(row.get("s_uri") or row.get("subj")), _number(row.get("s_pop"), where),
                        str(row.get("prop") or ""))
    if isinstance(row.get("answer"), dict):
        answer = row["answer"]
        answers = [answer.get("value"), *_list(answer.get("aliases") or [], where),
                   *_list(answer.get("normalized_aliases") or [], where)]
        return Question(f"triviaqa-{row.get('question_id', number)}", "triviaqa", text,
                        _texts([text for text in answers if text], where))
    given = row.get("answers", row.get("answer"))
    if isinstance(given, dict):  # SQuAD: its texts, with the article as the entity
        given, row = given.get("text"), {**row, "group": row.get("group", row.get("title"))}
    answerable = _is_answerable(row, given, where)
    # An id is unique within the row's data set; a row number only within its file, as files can share one.
    row_dataset = str(row.get("dataset") or dataset)
    identity = row.get("id", row.get("question_id"))
    name = f"{dataset}, row {number}" if identity in (None, "") else f"{row_dataset}-{identity}"
    entity = _entity(row.get("group"))
    return Question(name, row_dataset, text, _texts(_list(given, where), where) if answerable else (),
                    None if entity is None else f"{row_dataset}: {entity}",
                    _number(row.get("popularity"), where),
                    str(row.get("category") or row.get("relation") or ""),
                    _paraphrases(row.get("paraphrases"), where))


def _is_answerable(row: Row, given: Any, where: str) -> bool:
    """Returns whether a question has an answer: as the row says, or else if SQuAD lists none."""
    value = row.get("answerable")
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        value = value.strip().lower() in ("true", "1")
    if value is None or value == "" or value != value:  # missing, also as pandas writes it
        return not (isinstance(row.get("answers"), dict) and not given)
    if value not in (0, 1):
        raise InputError(f"{where}: answerable: expected true or false, found {value!r:.40}")
    if not value and given and given == given:
        raise InputError(f"{where}: answers: expected none where answerable is false, found {given!r:.40}")
    return bool(value)


def _paraphrases(value: Any, where: str) -> tuple[str, ...]:
    texts = () if value is None or value == "" else _list(value, where, "paraphrases")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{where}: paraphrases: expected texts, found {value!r:.40}")
    return tuple(texts)


def _list(value: Any, where: str, column: str = "answers") -> list[Any]:
    if isinstance(value, int | float):
        value = [value]
    if isinstance(value, str):
        value = _parse_list(value, where) if value.strip().startswith("[") else value.split("|")
    if not isinstance(value, list):
        raise InputError(f"{where}: {column}: expected a list of texts, or texts separated by |, found "
                         f"{'nothing' if value is None else repr(value):.40}; the columns are {COLUMNS}")
    return value


def _parse_list(text: str, where: str) -> list[Any]:
    """Parses a list in JSON, or as Python prints it, which is what pandas writes into a CSV file."""
    for parse in (json.loads, _literal):
        try:
            parsed = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            continue
        if isinstance(parsed, list):
            return parsed
    if not text.strip().endswith("]"):  # a text such as "[sic] a title"
        return text.split("|")
    raise InputError(f"{where}: answers: expected a list in JSON or Python syntax, or texts separated by |, "
                     f"found {text!r:.60}")


def _literal(text: str) -> Any:
    """Raises SyntaxError for adjacent texts without a comma, as numpy prints them: Python joins them."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)
             if token.type not in (tokenize.NL, tokenize.NEWLINE)]
    if any(a == b == tokenize.STRING for a, b in itertools.pairwise(kinds)):
        raise SyntaxError("texts without a comma between them")
    return ast.literal_eval(text.strip())


def _texts(values: Sequence[Any], where: str) -> tuple[str, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
            raise InputError(f"{where}: answers: expected texts, found {value!r:.40}")
    # pandas reads integers as 1912.0 if another cell of the column is empty.
    texts = [str(int(value)) if isinstance(value, float) and value.is_integer() else
             re.sub(r"^(\d+)\.0$", r"\1", str(value).strip()) for value in values]
    distinct = tuple(dict.fromkeys(text for text in texts if text))
    if not distinct:
        raise InputError(f"{where}: answers: expected at least one, found none")
    return distinct


def _entity(value: Any) -> str | None:
    if value is None or value == "" or value != value:  # NaN: a missing value in a column of numbers
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _number(value: Any, where: str) -> float:
    if value is None or value == "" or value != value:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number < math.inf:
        raise InputError(f"{where}: popularity: expected a number ≥ 0, found {value!r:.40}")
    return number
