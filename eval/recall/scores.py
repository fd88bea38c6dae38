"""What every method says of every question, on disk: one parquet table of scopes, methods and runs.

A scope is the data set that was learned from, or None for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checks import Floats
from ..tables import read_columns, write_columns

FILE = "scores.parquet"
Scope = str | None


class Scores(NamedTuple):
    """Of one method, f64 `[runs, questions]` each: log odds or what rises with them, and P(knows).

    NaN where it says nothing of a question.
    """

    scores: Floats
    probabilities: Floats


Methods = dict[str, Scores]


def heard(methods: Methods, rows: np.ndarray) -> list[str]:
    """The methods that say something of all these questions."""
    return [name for name, found in methods.items() if not np.isnan(found.scores[:, rows]).any()]


def write(path: Path, found: Mapping[Scope, Methods]) -> None:
    """Into a stage's directory."""
    columns: dict[str, list] = {"scope": [], "method": [], "run": [], "question": [], "score": [], "p": []}
    for scope, methods in found.items():
        for name, (scores, chances) in methods.items():
            n = scores.shape[1]
            for run in range(len(scores)):
                parts = [scope] * n, [name] * n, [run] * n, range(n), scores[run], chances[run]
                for column, values in zip(columns.values(), parts, strict=True):
                    column.extend(values)
    write_columns(path / FILE, columns)


def read(path: Path) -> dict[Scope, Methods]:
    """What `write` wrote."""
    columns = read_columns(path / FILE)
    runs: dict[tuple[Scope, str], list[slice]] = {}
    starts = np.flatnonzero(columns["question"] == 0).tolist()
    for start, stop in zip(starts, [*starts[1:], len(columns["question"])], strict=True):
        runs.setdefault((columns["scope"][start], columns["method"][start]), []).append(slice(start, stop))
    found: dict[Scope, Methods] = {}
    for (scope, name), parts in runs.items():
        found.setdefault(scope, {})[name] = Scores(*(
            np.stack([columns[column][part].astype(float) for part in parts]) for column in ("score", "p")))
    return found
