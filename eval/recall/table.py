"""All questions of a study with their signals, answers and labels, as arrays `[questions, …]`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.errors import InputError

from ..inputs.shards import Shards
from ..tables import read_columns

QUESTIONS = "questions.parquet"
SPLITS = ("train", "validate", "calibrate", "test")


@dataclasses.dataclass(frozen=True)
class QuestionTable:
    """Arrays over n questions.

    Attributes:
        by_layer, prompt_features: signals A (crystallisation) and B (MLP-write specificity): f32
            `[n, layers, 12]` for each layer, and f32 `[n, 10]` for the whole prompt.
        entropies: f32 `[n, layers, 3]`, nats: of the attention write, the MLP write, the stream (TriLens).
        final: `[n, layers, d_model]`, the residual stream at the last position; None if it was not kept.
        robustness: f32 `[n]`, divergence under noise in nats; None if it was not measured.
        known: int `[n]`, 1 for a correct answer; `refused` bool `[n]`, True for a refusal.
        split: `[n]`, one of SPLITS; `group` int `[n]`, the number of the question's group.
        text, answer, dataset: `[n]`: the question, the network's answer, and the data set.
        popularity: f64 `[n]`, NaN if unknown.
    """

    by_layer: np.ndarray
    prompt_features: np.ndarray
    entropies: np.ndarray
    final: np.ndarray | None
    robustness: np.ndarray | None
    known: NDArray[np.int64]
    refused: NDArray[np.bool_]
    split: np.ndarray
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
        """The split that probabilities and thresholds are fitted to."""
        return "calibrate" if (self.split == "calibrate").any() else "validate"

    def rows(self, split: str, dataset: str | None = None) -> NDArray[np.intp]:
        """Returns the row numbers of a split, in one data set or all.

        "calibrate" returns the validate split if there are no calibration questions.
        """
        mask = self.split == (self.calibrated_on if split == "calibrate" else split)
        return np.flatnonzero(mask if dataset is None else mask & (self.dataset == dataset))


def read(signals: Path, questions: Path) -> QuestionTable:
    """Reads the table from the directories of the stages `signals` and `questions`."""
    shards, columns = Shards(signals), read_columns(questions / QUESTIONS)
    return QuestionTable(
        shards.joined("by_layer"), shards.joined("prompt_features"), shards.joined("entropies"),
        shards.joined("final") if "final" in shards.names else None,
        shards.joined("robustness") if "robustness" in shards.names else None,
        columns["known"].astype(np.int64), columns["refused"].astype(bool), columns["split"].astype(str),
        columns["group"], columns["question"].astype(str), columns["answer"].astype(str),
        columns["dataset"].astype(str), columns["popularity"].astype(float))


def check_dataset(table: QuestionTable, dataset: str) -> None:
    """Raises InputError if a split has fewer than two known or two unknown questions of a data set."""
    for split in SPLITS:
        unknown, known = np.bincount(table.known[table.rows(split, dataset)], minlength=2)
        if min(known, unknown) < 2:
            raise InputError(f"split.{split}: expected at least two known and two unknown questions of "
                             f"{dataset}, found {known} and {unknown}: use more or other questions")
