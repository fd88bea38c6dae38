"""How well a score tells two classes apart, and how far a probability can be believed.

Throughout, `labels` are 0 or 1, `scores` rise with the chance of a 1, and `probabilities` lie in
[0, 1]; all are `[items]`. Ties count half, those of infinite scores too. Input of another kind raises
ValueError (`checks`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks
from .checks import Floats


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a 1 is scored above a 0 (Mann–Whitney; ties half).

    NaN where only one class is present: there is nothing to tell apart.
    """
    positive, scores = checked(labels, scores)
    return float(_rank_auroc(positive.astype(float)[None], midranks(scores))[0])


def auroc_weighted(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> Floats:
    """The AUROC under each row of whole-numbered weights, as a resampled set's counts are.

    Args:
        weights: `[replicates, items]`, how often each item counts.

    Returns:
        `[replicates]`, f64; NaN where a replicate holds one class only. Sums of whole numbers and of
        halves below 2⁵³, or those times a power of two: exact but for the last division.
    """
    positive, scores = checked(labels, scores)
    order = np.argsort(scores, kind="stable")
    starts = checks.starts_of_ties(scores[order])
    drawn = np.atleast_2d(checks.weights(weights, len(scores)))[:, order]
    above, below = (np.add.reduceat(_scaled(drawn * of_class[order]), starts, axis=1)
                    for of_class in (positive, ~positive))
    won = (above * (np.cumsum(below, axis=1) - 0.5 * below)).sum(axis=1)
    pairs = above.sum(axis=1) * below.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _scaled(weights: Floats) -> Floats:
    """Rows whose products could leave the range of floats, times powers of two, which round nothing."""
    largest = weights.max(axis=1, initial=0)
    if not ((largest > 0) & ((largest < 2.0**-64) | (largest > 2.0**64))).any():
        return weights
    return np.ldexp(weights, -np.frexp(largest)[1][:, None])


def auroc_relabelled(labels: ArrayLike, scores: ArrayLike) -> Floats:
    """The AUROC of one set of scores under each row of labels, `[relabellings, items]` → `[relabellings]`."""
    ranks = midranks(scores)
    return _rank_auroc(checks.label_rows(labels, len(ranks)).astype(float), ranks)


def _rank_auroc(positive: Floats, ranks: Floats) -> Floats:
    n = positive.sum(axis=1)
    pairs = n * (positive.shape[1] - n)
    won = positive @ ranks - n * (n + 1) / 2
    return np.divide(won, pairs, out=np.full(len(n), np.nan), where=pairs > 0)


def midranks(scores: ArrayLike) -> Floats:
    """Ranks from 1, equal scores sharing the mean of theirs: `[items]` → `[items]`."""
    _, which, counts = np.unique(checks.scores(scores), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def auprc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Average precision: Σ (recall gained) × precision, down the thresholds; equal scores pass together.

    NaN without a 1.
    """
    positive, scores = checked(labels, scores)
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ends = np.r_[checks.starts_of_ties(scores[order])[1:], len(scores)] - 1
    found = np.cumsum(positive[order])[ends]
    return float(np.sum(np.diff(found, prepend=0) * found / (ends + 1)) / positive.sum())


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean squared distance of the probability from what happened."""
    positive, chances = _probable(labels, probabilities)
    return float(np.mean((chances - positive) ** 2))


def log_loss(labels: ArrayLike, probabilities: ArrayLike, floor: float = 1e-15) -> float:
    """Mean −log of the probability given to what happened, in nats; none is taken to be below `floor`."""
    positive, chances = _probable(labels, probabilities)
    floor = checks.share(floor, "floor")
    return float(-np.mean(np.log(np.maximum(np.where(positive, chances, 1 - chances), floor))))


class Reliability(NamedTuple):
    """Mean predicted probability and observed frequency in the occupied bins: each `[bins]`."""

    confidence: Floats
    accuracy: Floats
    counts: NDArray[np.int64]


def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> Reliability:
    """Mean probability and share of 1s in bins of equal width.

    An edge belongs to the bin above it, 1 to the last.
    """
    positive, chances = _probable(labels, probabilities)
    bins = checks.count(bins, "bins")
    edges = np.arange(bins + 1) / bins  # each the float nearest to it, as a stated 0.3 is; linspace's are not
    which = np.clip(np.digitize(chances, edges) - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    held = counts > 0
    def means(values: NDArray) -> Floats:
        return np.bincount(which, values, bins)[held] / counts[held]
    return Reliability(means(chances), means(positive), counts[held])


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> float:
    """Σ (share of items in a bin) × |confidence − accuracy|, bins of equal width (Naeini et al. 2015)."""
    found = reliability(labels, probabilities, bins)
    return float(np.sum(found.counts * np.abs(found.confidence - found.accuracy)) / found.counts.sum())


def calibrated_error(probabilities: ArrayLike, bins: int = 10, draws: int = 200, seed: int = 0) -> float:
    """The mean expected calibration error of these probabilities if they were true: chance's own share."""
    chances = checks.probabilities(probabilities)
    if not len(chances):
        raise ValueError("probabilities: expected [items] with at least one, found none")
    rng = np.random.default_rng(checks.seed(seed))
    drawn = rng.random((checks.count(draws, "draws"), len(chances))) < chances
    return float(np.mean([expected_calibration_error(labels, chances, bins) for labels in drawn]))


# ---------------------------------------------------------------------------------------------


def checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    """Labels and scores as arrays `[items]`. Raises ValueError for labels but 0 and 1, and for NaN."""
    positive = checks.labels(labels)
    return positive, checks.scores(scores, len(positive))


def _probable(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    positive = checks.labels(labels)
    return positive, checks.probabilities(probabilities, len(positive))
