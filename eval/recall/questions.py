"""Questions with their correct answers: PopQA, TriviaQA, the built-in world of facts, and files."""

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
from .config import QuestionsConfig

HUB = {"popqa": ("hf:akariasai/PopQA", "test"),
       "triviaqa": ("hf:mandarjoshi/trivia_qa#rc.nocontext", "validation")}
BUILT_IN = "facts"
COLUMNS = ("question, answers (a list, or texts separated by |), and optionally id, dataset, group, "
           "popularity")


class Question(NamedTuple):
    """One question.

    `answers` are the correct ones; `entity` is what it is about, or None; `popularity` is NaN if unknown.
    """

    id: str
    dataset: str
    text: str
    answers: tuple[str, ...]
    entity: str | None = None
    popularity: float = math.nan


def read(config: QuestionsConfig) -> list[Question]:
    """Samples equally many questions from each source and shuffles them, both with the configured seed.

    Raises:
        InputError: a source cannot be read.
    """
    n, stems = len(config.sources), [Path(source).stem for source in config.sources]
    for source, stem in zip(config.sources, stems, strict=True):
        if stems.count(stem) > 1:
            raise InputError(f"questions.sources: expected files with different names, which name their data "
                             f"sets, found {source} and another '{stem}'")
    per_source = config.items // n
    questions: list[Question] = []
    for i, source in enumerate(config.sources):
        limit = per_source if i < n - 1 else config.items - per_source * (n - 1)
        questions += _of_source(source, limit, config)
    return [questions[i] for i in np.random.default_rng(config.seed).permutation(len(questions))]


def _of_source(source: str, limit: int, config: QuestionsConfig) -> list[Question]:
    if source == BUILT_IN:
        world = facts.facts(config.facts_seed, config.facts_people)
        questions = [Question(f"facts-{i}", BUILT_IN, fact.question, (fact.answer,), fact.entity,
                              float(fact.times)) for i, fact in enumerate(world)]
        return _sample(questions, limit, config.seed)
    if source in HUB:
        name, split = HUB[source]
        return of_rows(hugging_face(name, limit, part=split, seed=config.seed), source, source)
    path = Path(source)
    return _sample(of_rows(read_rows(path, 10**9), source, path.stem), limit, config.seed)


def _sample(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    if len(questions) <= limit:
        return list(questions)
    return [questions[i] for i in np.sort(np.random.default_rng(seed).permutation(len(questions))[:limit])]


def of_rows(rows: Sequence[Row], source: str, dataset: str) -> list[Question]:
    """Converts rows in PopQA's or TriviaQA's format, or with the columns of COLUMNS.

    Raises:
        InputError: a row, which the message names, has another format.
    """
    return [_question(row, f"{source}, row {i}", dataset, str(i)) for i, row in enumerate(rows, 1)]


def _question(row: Row, where: str, dataset: str, number: str) -> Question:
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: question: expected text, found {describe_cell(row, 'question')}; "
                         f"{columns_of(row)}, expected are {COLUMNS}")
    if "possible_answers" in row:
        answers = [*_list(row["possible_answers"], where), *([row["obj"]] if row.get("obj") else [])]
        return Question(f"popqa-{row.get('id', number)}", "popqa", text, _texts(answers, where),
                        _entity(row.get("s_uri") or row.get("subj")), _number(row.get("s_pop"), where))
    if isinstance(row.get("answer"), dict):
        answer = row["answer"]
        answers = [answer.get("value"), *_list(answer.get("aliases") or [], where),
                   *_list(answer.get("normalized_aliases") or [], where)]
        return Question(f"triviaqa-{row.get('question_id', number)}", "triviaqa", text,
                        _texts([text for text in answers if text], where))
    # An id is unique within the row's data set; a row number only within its file, as files can share one.
    row_dataset = str(row.get("dataset") or dataset)
    name = f"{dataset}, row {number}" if row.get("id") in (None, "") else f"{row_dataset}-{row['id']}"
    entity = _entity(row.get("group"))
    return Question(name, row_dataset, text, _texts(_list(row.get("answers"), where), where),
                    None if entity is None else f"{row_dataset}: {entity}",
                    _number(row.get("popularity"), where))


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, int | float):
        value = [value]
    if isinstance(value, str):
        value = _parse_list(value, where) if value.strip().startswith("[") else value.split("|")
    if not isinstance(value, list):
        raise InputError(f"{where}: answers: expected a list of texts, or texts separated by |, found "
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
        raise InputError(f"{where}: popularity: expected a number from 0, found {value!r:.40}")
    return number
