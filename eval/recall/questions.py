"""Questions with their right answers: PopQA, TriviaQA, the built-in world of facts, and files."""

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

from tilelli_jax.data import facts
from tilelli_jax.errors import InputError

from ..inputs.rows import Row, columns_of, hugging_face, read_rows
from .config import LEAST, QuestionsConfig

HUB = {"popqa": ("hf:akariasai/PopQA", "test"),
       "triviaqa": ("hf:mandarjoshi/trivia_qa#rc.nocontext", "validation")}
BUILT_IN = "facts"
COLUMNS = ("question, answers (a list, or texts between |), and if there are any id, dataset, group, "
           "popularity")


class Question(NamedTuple):
    """`answers` are the right ones; `entity` whom or what it is about, or None; `popularity` NaN for none."""

    id: str
    dataset: str
    text: str
    answers: tuple[str, ...]
    entity: str | None = None
    popularity: float = math.nan


def read(config: QuestionsConfig) -> list[Question]:
    """As many of each source, drawn and put in order by the seed.

    Raises:
        InputError: a source cannot be read, or there are too few.
    """
    n, stems = len(config.sources), [Path(source).stem for source in config.sources]
    for source, stem in zip(config.sources, stems, strict=True):
        if stems.count(stem) > 1:
            raise InputError(f"questions.sources: {source}: expected files of different names, which are "
                             "those of their data sets")
    share = config.items // n
    found: list[Question] = []
    for i, source in enumerate(config.sources):
        found += _of_source(source, share if i < n - 1 else config.items - share * (n - 1), config)
    if len(found) < LEAST:
        raise InputError(f"questions.sources: {', '.join(config.sources)}: expected {LEAST} questions at "
                         f"least, found {len(found)}")
    return [found[i] for i in np.random.default_rng(config.seed).permutation(len(found))]


def _of_source(source: str, most: int, config: QuestionsConfig) -> list[Question]:
    if source == BUILT_IN:
        world = facts.facts(config.facts_seed, config.facts_people)
        every = [Question(f"facts-{i}", BUILT_IN, fact.question, (fact.answer,), fact.entity,
                          float(fact.times)) for i, fact in enumerate(world)]
        return _some(every, most, config.seed)
    if source in HUB:
        name, part = HUB[source]
        return of_rows(hugging_face(name, most, part=part, seed=config.seed), source, source)
    path = Path(source)
    return _some(of_rows(read_rows(path, 10**9), source, path.stem), most, config.seed)


def _some(every: Sequence[Question], most: int, seed: int) -> list[Question]:
    if len(every) <= most:
        return list(every)
    return [every[i] for i in np.sort(np.random.default_rng(seed).permutation(len(every))[:most])]


def of_rows(rows: Sequence[Row], source: str, dataset: str) -> list[Question]:
    """Rows as PopQA or TriviaQA has them, or with the columns of COLUMNS.

    Raises:
        InputError: a row has not; it is named.
    """
    return [_question(row, f"{source}, row {i}", dataset, str(i)) for i, row in enumerate(rows, 1)]


def _question(row: Row, where: str, dataset: str, number: str) -> Question:
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: question: expected text, found {row.get('question', 'nothing')!r:.40}; "
                         f"{columns_of(row)}, expected are {COLUMNS}")
    if "possible_answers" in row:
        return Question(f"popqa-{row.get('id', number)}", "popqa", text, _texts(
            [*_list(row["possible_answers"], where), *([row["obj"]] if row.get("obj") else [])], where),
            _entity(row.get("s_uri") or row.get("subj")), _number(row.get("s_pop"), where))
    if isinstance(row.get("answer"), dict):
        answer = row["answer"]
        said = [answer.get("value"), *_list(answer.get("aliases") or [], where),
                *_list(answer.get("normalized_aliases") or [], where)]
        return Question(f"triviaqa-{row.get('question_id', number)}", "triviaqa", text,
                        _texts([one for one in said if one], where))
    # A row's number says which of its file it is, not which of its data set: two files may share one.
    own = str(row.get("dataset") or dataset)
    name = f"{dataset}, row {number}" if row.get("id") in (None, "") else f"{own}-{row['id']}"
    entity = _entity(row.get("group"))
    return Question(name, own, text, _texts(_list(row.get("answers"), where), where),
                    None if entity is None else f"{own}: {entity}", _number(row.get("popularity"), where))


def _list(given: Any, where: str) -> list[Any]:
    if isinstance(given, int | float):
        given = [given]
    if isinstance(given, str):
        given = _written_list(given, where) if given.strip().startswith("[") else given.split("|")
    if not isinstance(given, list):
        raise InputError(f"{where}: answers: expected a list of texts, or texts between |, found "
                         f"{'nothing' if given is None else repr(given):.40}; the columns are {COLUMNS}")
    return given


def _written_list(text: str, where: str) -> list[Any]:
    """A list as JSON has it, or as Python prints it, which is what pandas writes into a CSV file."""
    for read in (json.loads, _literal):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            continue
        if isinstance(found, list):
            return found
    if not text.strip().endswith("]"):  # "[sic] a title"
        return text.split("|")
    raise InputError(f"{where}: answers: expected a list as JSON or Python writes it, or texts between |, "
                     f"found {text!r:.60}")


def _literal(text: str) -> Any:
    """Raises SyntaxError for texts side by side, as numpy prints them: Python would take them for one."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)
             if token.type not in (tokenize.NL, tokenize.NEWLINE)]
    if any(a == b == tokenize.STRING for a, b in itertools.pairwise(kinds)):
        raise SyntaxError("texts without a comma between them")
    return ast.literal_eval(text.strip())


def _texts(given: Sequence[Any], where: str) -> tuple[str, ...]:
    for one in given:
        if isinstance(one, bool) or not isinstance(one, str | int | float) or one != one:
            raise InputError(f"{where}: answers: expected texts, found {one!r:.40}")
    # A number beside a missing one is read as 1912.0.
    plain = [str(int(one)) if isinstance(one, float) and one.is_integer() else
             re.sub(r"^(\d+)\.0$", r"\1", str(one).strip()) for one in given]
    found = tuple(dict.fromkeys(one for one in plain if one))
    if not found:
        raise InputError(f"{where}: answers: expected one at least, found none")
    return found


def _entity(given: Any) -> str | None:
    if given is None or given == "" or given != given:  # NaN: a missing one among numbers
        return None
    return str(int(given)) if isinstance(given, float) and given.is_integer() else str(given)


def _number(given: Any, where: str) -> float:
    if given is None or given == "" or given != given:
        return math.nan
    try:
        found = float(given)
    except (TypeError, ValueError, OverflowError):
        found = -1.0
    if not 0 <= found < math.inf:
        raise InputError(f"{where}: popularity: expected a number from 0, found {given!r:.40}")
    return found
