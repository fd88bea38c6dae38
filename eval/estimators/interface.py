"""The interface of estimators: what one needs, learns from and costs, and the scores that it gives.

A new estimator is one class, and one line in `panel.ESTIMATORS`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import Floats
from .config import FitConfig
from .table import QuestionTable

# What an estimator needs beside the prompt's pass, which every study runs: fields of `QuestionTable`.
Need = Literal["final", "robustness", "greedy", "answer_final", "p_true", "verbalised", "agreement",
               "samples"]
Group = Literal["prompt", "answer", "judgement", "samples", "control"]
GROUPS: dict[Group, str] = {
    "prompt": "the prompt, before anything is written", "answer": "greedy answers",
    "judgement": "the greedy answer and one more prompt", "samples": "sampled answers",
    "control": "no activations"}
Rows = NDArray[np.intp]


class LinearProbe(NamedTuple):
    """score = activations of a layer at the prompt's last position · `weight [d_model]` + `bias`."""

    layer: int
    weight: Floats
    bias: float


class Method(NamedTuple):
    """The result of fitting.

    Attributes:
        scores: f64 `[runs, questions]`, NaN for a question without a score.
        info: what was selected.
        probe: the estimator itself, if it is linear in the residual stream of one layer.
    """

    scores: Floats
    info: dict[str, Any]
    probe: LinearProbe | None = None


@dataclasses.dataclass(frozen=True)
class Training:
    """What an estimator may learn from: rows of `table` to fit to and to select by, and the options."""

    table: QuestionTable
    train: Rows
    validate: Rows
    options: FitConfig


class Estimator(abc.ABC):
    """Scores questions: the higher, the more likely the network's answer is correct.

    Attributes:
        group: what it needs at most; see GROUPS.
        needs: the measurements that the score of a question reads.
        learns_with: measurements of the training questions that it needs besides.
        learns_from: labels: the correctness of answers; samples: their agreement; nothing.
        source: the paper.
    """

    group: Group
    needs: tuple[Need, ...] = ()
    learns_with: tuple[Need, ...] = ()
    learns_from: Literal["nothing", "labels", "samples"] = "labels"
    source: str = ""

    @abc.abstractmethod
    def fit(self, training: Training) -> Method | None:
        """Returns the scores of all questions of the table; None if it has nothing to learn from."""

    def is_measured(self, table: QuestionTable) -> bool:
        """Returns whether the table has what the estimator needs."""
        return all(getattr(table, need) is not None for need in (*self.needs, *self.learns_with))


class Score(Estimator):
    """An estimator that learns nothing: `scores(table)` gives f64 `[questions]`."""

    learns_from = "nothing"

    @abc.abstractmethod
    def scores(self, table: QuestionTable) -> Floats:
        """Returns the score of every question, NaN where there is none."""

    def fit(self, training: Training) -> Method:
        return Method(np.asarray(self.scores(training.table), float)[None], {})
