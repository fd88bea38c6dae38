"""Scores of every method for every question, stored as one parquet table.

A scope is the data set that a method was trained on; None means all of them.
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
    """One method's scores (log odds, or any increasing function of them) and P(knows).

    Both are f64 `[runs, questions]`, NaN for a question that the method does not score.
    """

    scores: Floats
    probabilities: Floats


Methods = dict[str, Scores]


def complete_methods(methods: Methods, rows: np.ndarray) -> list[str]:
    """Returns the methods that score all of these questions."""
    return [name for name, scores in methods.items() if not np.isnan(scores.scores[:, rows]).any()]


def write(path: Path, scopes: Mapping[Scope, Methods]) -> None:
    """Writes FILE into a stage's directory."""
    columns: dict[str, list] = {"scope": [], "method": [], "run": [], "question": [], "score": [], "p": []}
    for scope, methods in scopes.items():
        for name, (scores, probabilities) in methods.items():
            n = scores.shape[1]
            for run in range(len(scores)):
                values = [scope] * n, [name] * n, [run] * n, range(n), scores[run], probabilities[run]
                for column, part in zip(columns.values(), values, strict=True):
                    column.extend(part)
    write_columns(path / FILE, columns)


def read(path: Path) -> dict[Scope, Methods]:
    """Returns what `write` stored."""
    columns = read_columns(path / FILE)
    runs: dict[tuple[Scope, str], list[slice]] = {}
    starts = np.flatnonzero(columns["question"] == 0).tolist()
    for start, stop in zip(starts, [*starts[1:], len(columns["question"])], strict=True):
        runs.setdefault((columns["scope"][start], columns["method"][start]), []).append(slice(start, stop))
    scopes: dict[Scope, Methods] = {}
    for (scope, name), slices in runs.items():
        scopes.setdefault(scope, {})[name] = Scores(*(
            np.stack([columns[column][rows].astype(float) for rows in slices]) for column in ("score", "p")))
    return scopes
