"""What was measured of the questions of a study, as arrays `[questions, …]`: the input of every estimator."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from .likelihood import TokenStatistics

SPLITS = ("train", "validate", "calibrate", "test")
UNANSWERABLE = "unanswerable"  # the split of questions without an answer, in a study of correctness


@dataclasses.dataclass(frozen=True)
class Samples:
    """Sampled answers of the questions that were sampled, n of each.

    Attributes:
        rows: the sampled questions, in increasing order, `[sampled]`.
        texts: the answers, `[sampled][n]`.
        log_probs: their log-probabilities in nats, f64 `[sampled, n]`; `lengths`: their numbers of tokens.
        streams: `[sampled, n, d_model]`, the residual stream of a middle layer at each answer's last token.
        classes: int `[sampled, n]`, the class of equal meaning of each answer; see `samples.classes`.
    """

    rows: NDArray[np.intp]
    texts: list[list[str]]
    log_probs: NDArray[np.float64]
    lengths: NDArray[np.int64]
    streams: np.ndarray
    classes: NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class QuestionTable:
    """Arrays over n questions. What was not measured is None.

    Attributes:
        by_layer, prompt_features: signals A (crystallisation) and B (MLP-write specificity): f32
            `[n, layers, 12]` for each layer, and f32 `[n, 10]` for the whole prompt.
        entropies: f32 `[n, layers, 3]`, nats: of the attention write, the MLP write, the stream (TriLens).
        known: int `[n]`, 1 for a correct answer; `refused` bool `[n]`, True for a refusal.
        split: `[n]`, one of SPLITS, or UNANSWERABLE; `group` int `[n]`, the number of the question's group.
        text, answer, dataset: `[n]`: the question, the network's answer, and the data set.
        popularity: f64 `[n]`, NaN if unknown.
        category: `[n]`, the kind of question, for example a relation; "" if it has none.
        answers: `[n]`, the correct answers of each question.
        final: `[n, layers, d_model]`, the residual stream at the prompt's last position.
        robustness: f32 `[n]`, divergence under noise in nats.
        greedy: `[n]`, statistics of the tokens of the network's answer.
        answer_final: `[n, layers, d_model]`, the residual stream at the last token of the answer; zeros for
            an answer without tokens.
        p_true, verbalised: f64 `[n]`, the network's judgement of its answer, 0 to 1; NaN where it has none.
        agreement: f64 `[n]`, fraction of paraphrases whose answer has the same meaning; NaN without any.
        samples: sampled answers.
    """

    by_layer: np.ndarray
    prompt_features: np.ndarray
    entropies: np.ndarray
    known: NDArray[np.int64]
    refused: NDArray[np.bool_]
    split: np.ndarray
    group: np.ndarray
    text: np.ndarray
    answer: np.ndarray
    dataset: np.ndarray
    popularity: NDArray[np.float64]
    category: np.ndarray
    answers: list[list[str]]
    final: np.ndarray | None = None
    robustness: np.ndarray | None = None
    greedy: list[TokenStatistics] | None = None
    answer_final: np.ndarray | None = None
    p_true: NDArray[np.float64] | None = None
    verbalised: NDArray[np.float64] | None = None
    agreement: NDArray[np.float64] | None = None
    samples: Samples | None = None

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
