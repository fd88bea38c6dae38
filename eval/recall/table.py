"""All questions of a study with what was read and said, as arrays `[questions, …]`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.errors import InputError

from ..inputs.shards import Shards
from ..tables import read_columns

QUESTIONS = "questions.parquet"
PARTS = ("train", "validate", "calibrate", "test")


@dataclasses.dataclass(frozen=True)
class Table:
    """n questions.

    Attributes:
        by_layer: f32 `[n, layers, 12]`, and `overall` f32 `[n, 10]`: signals A and B.
        entropies: f32 `[n, layers, 3]`: of attention's write, the feed-forward write, the stream (TriLens).
        final: `[n, layers, d_model]`, the stream at the last position, or None where it was not kept.
        robustness: f32 `[n]`, nats, or None.
        known: int `[n]`: 1 where the answer was right; `refused` bool `[n]`: where none was given.
        part: `[n]`, of PARTS; `group` int `[n]`, what belongs together.
        text, answer, dataset: `[n]`: the question, what the network answered, and the data set.
        popularity: f64 `[n]`, NaN for none.
    """

    by_layer: np.ndarray
    overall: np.ndarray
    entropies: np.ndarray
    final: np.ndarray | None
    robustness: np.ndarray | None
    known: NDArray[np.int64]
    refused: NDArray[np.bool_]
    part: np.ndarray
    group: np.ndarray
    text: np.ndarray
    answer: np.ndarray
    dataset: np.ndarray
    popularity: NDArray[np.float64]

    @property
    def datasets(self) -> list[str]:
        return sorted(set(self.dataset.tolist()))

    @property
    def calibrated_on(self) -> str:
        """The part that probabilities and thresholds come from."""
        return "calibrate" if (self.part == "calibrate").any() else "validate"

    def rows(self, part: str, dataset: str | None = None) -> NDArray[np.intp]:
        """Of a part, in one data set or all. Where there is no calibrate, validate stands in."""
        mask = self.part == (self.calibrated_on if part == "calibrate" else part)
        return np.flatnonzero(mask if dataset is None else mask & (self.dataset == dataset))


def read(signals: Path, questions: Path) -> Table:
    """Of the directories of two stages."""
    shards, columns = Shards(signals), read_columns(questions / QUESTIONS)
    return Table(
        shards.joined("by_layer"), shards.joined("overall"), shards.joined("entropies"),
        shards.joined("final") if "final" in shards.names else None,
        shards.joined("robustness") if "robustness" in shards.names else None,
        columns["known"].astype(np.int64), columns["refused"].astype(bool), columns["part"].astype(str),
        columns["group"], columns["question"].astype(str), columns["answer"].astype(str),
        columns["dataset"].astype(str), columns["popularity"].astype(float))


def check_parts(table: Table, dataset: str | None = None) -> None:
    """Raises InputError where a part has not both kinds of questions: nothing can be learned or told."""
    for part in PARTS:
        found = np.bincount(table.known[table.rows(part, dataset)], minlength=2)
        if found.min() < 2:
            where = f" of {dataset}" if dataset else ""
            raise InputError(f"split.{part}: expected two known and two unknown questions{where} at least, "
                             f"found {found[1]} and {found[0]}: ask more questions, or others")
