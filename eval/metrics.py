"""Metrics of scores and probabilities: discrimination between two classes, and calibration.

Throughout, `labels` are 0 or 1, `scores` increase with the chance of a 1, and `probabilities` lie in [0, 1];
all are `[items]`. Ties count half, also between infinite scores. Other input raises ValueError (`checks`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .checks import Floats


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Returns the area under the ROC curve: the chance that a 1 scores above a 0 (Mann–Whitney, ties half).

    NaN if only one class is present.
    """
    positive, scores = check_scored(labels, scores)
    return float(_rank_auroc(positive.astype(float)[None], midranks(scores))[0])


def auroc_weighted(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> Floats:
    """Returns the AUROC under each row of whole-number weights, such as the counts of a bootstrap replicate.

    Args:
        weights: `[replicates, items]`, how often each item counts.

    Returns:
        `[replicates]`, f64; NaN where a replicate contains one class only. All sums are of whole and half
        numbers below 2⁵³, or of those times a power of two: only the final division rounds.
    """
    positive, scores = check_scored(labels, scores)
    won, pairs = _won(positive, scores, np.atleast_2d(checks.weights(weights, len(scores))))
    return np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def auroc_within(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike, strata: ArrayLike) -> Floats:
    """Returns the AUROC of pairs of the same stratum, under each row of weights as in `auroc_weighted`.

    It is the chance that a 1 scores above a 0 of its own stratum (ties half), so that a score that differs
    between strata only has 0.5. Each stratum counts by its number of pairs (van Elteren 1960).

    Args:
        strata: `[items]`, the stratum of each.

    Returns:
        `[replicates]`, f64; NaN where no stratum contains both classes.
    """
    positive, scores = check_scored(labels, scores)
    rows = np.atleast_2d(checks.weights(weights, len(scores)))
    names, stratum = np.unique(np.asarray(strata), return_inverse=True)
    won, pairs = np.zeros(len(rows)), np.zeros(len(rows))
    for i in range(len(names)):
        inside = stratum == i
        if 0 < positive[inside].sum() < inside.sum():
            of_stratum = _won(positive[inside], scores[inside], rows[:, inside])
            won, pairs = won + of_stratum[0], pairs + of_stratum[1]
    return np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _won(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """How many pairs of a 1 and a 0 the 1 wins (ties half), and the number of pairs, `[replicates]` each."""
    order = np.argsort(scores, kind="stable")
    starts = checks.starts_of_ties(scores[order])
    above, below = (np.add.reduceat(_scaled(weights[:, order] * in_class[order]), starts, axis=1)
                    for in_class in (positive, ~positive))
    return ((above * (np.cumsum(below, axis=1) - 0.5 * below)).sum(axis=1),
            above.sum(axis=1) * below.sum(axis=1))


def _scaled(weights: Floats) -> Floats:
    """Scales rows whose products could overflow or underflow by powers of two, which do not round."""
    largest = weights.max(axis=1, initial=0)
    if not ((largest > 0) & ((largest < 2.0**-64) | (largest > 2.0**64))).any():
        return weights
    return np.ldexp(weights, -np.frexp(largest)[1][:, None])


def _rank_auroc(positive: Floats, ranks: Floats) -> Floats:
    n = positive.sum(axis=1)
    pairs = n * (positive.shape[1] - n)
    won = positive @ ranks - n * (n + 1) / 2
    return np.divide(won, pairs, out=np.full(len(n), np.nan), where=pairs > 0)


def midranks(scores: ArrayLike) -> Floats:
    """Returns ranks from 1, `[items]`; equal scores share the mean of their ranks."""
    _, rank_group, counts = np.unique(checks.scores(scores), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[rank_group]


def auprc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Returns the average precision: Σ (gain in recall) × precision over descending thresholds.

    Equal scores pass the threshold together. NaN without a 1.
    """
    positive, scores = check_scored(labels, scores)
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ends = np.r_[checks.starts_of_ties(scores[order])[1:], len(scores)] - 1
    true_positives = np.cumsum(positive[order])[ends]
    return float(np.sum(np.diff(true_positives, prepend=0) * true_positives / (ends + 1)) / positive.sum())


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Returns the mean squared difference between probability and label."""
    positive, predicted = _check_predicted(labels, probabilities)
    return float(np.mean((predicted - positive) ** 2))


def log_loss(labels: ArrayLike, probabilities: ArrayLike, floor: float = 1e-15) -> float:
    """Returns the mean negative log-likelihood of the labels, in nats.

    Args:
        floor: a label's probability below it counts as `floor`.
    """
    positive, predicted = _check_predicted(labels, probabilities)
    floor = checks.fraction(floor, "floor")
    return float(-np.mean(np.log(np.maximum(np.where(positive, predicted, 1 - predicted), floor))))


class Reliability(NamedTuple):
    """Mean predicted probability, observed frequency and number of items per non-empty bin, each `[bins]`."""

    confidence: Floats
    accuracy: Floats
    counts: NDArray[np.int64]


def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> Reliability:
    """Returns the reliability diagram with bins of equal width.

    An edge belongs to the bin above it, and 1 to the last bin.
    """
    positive, predicted = _check_predicted(labels, probabilities)
    bins = checks.count(bins, "bins")
    edges = np.arange(bins + 1) / bins  # correctly rounded, like a literal 0.3; linspace's edges are not
    bin_of = np.clip(np.digitize(predicted, edges) - 1, 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    non_empty = counts > 0
    def means(values: NDArray) -> Floats:
        return np.bincount(bin_of, values, bins)[non_empty] / counts[non_empty]
    return Reliability(means(predicted), means(positive), counts[non_empty])


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> float:
    """Returns the ECE: Σ (fraction of items in the bin) × |confidence − accuracy| (Naeini et al. 2015).

    The bins have equal width.
    """
    diagram = reliability(labels, probabilities, bins)
    gaps = np.abs(diagram.confidence - diagram.accuracy)
    return float(np.sum(diagram.counts * gaps) / diagram.counts.sum())


def expected_ece_if_calibrated(probabilities: ArrayLike, bins: int = 10, draws: int = 200,
                               seed: int = 0) -> float:
    """Returns the mean expected calibration error of labels drawn with these probabilities.

    This is the error that sampling noise alone causes when the probabilities are perfectly calibrated.
    """
    predicted = checks.probabilities(probabilities)
    if not len(predicted):
        raise ValueError("probabilities: expected [items] with at least one, found none")
    rng = np.random.default_rng(checks.seed(seed))
    drawn = rng.random((checks.count(draws, "draws"), len(predicted))) < predicted
    return float(np.mean([expected_calibration_error(labels, predicted, bins) for labels in drawn]))


# ---------------------------------------------------------------------------------------------


def check_scored(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    """Returns labels and scores as arrays `[items]`.

    Raises ValueError for NaN, or for labels other than 0 and 1.
    """
    positive = checks.labels(labels)
    return positive, checks.scores(scores, len(positive))


def _check_predicted(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    positive = checks.labels(labels)
    return positive, checks.probabilities(probabilities, len(positive))
