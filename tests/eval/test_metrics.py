"""Metrics compared with scikit-learn, closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as their_log_loss

from tests.references import STORED, needs
from tilelli_jax.eval import metrics, selective

CASES = STORED / "recall_cases" / "metric_cases.npz"

# Few score levels, so that most cases have ties.
ITEMS = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40).filter(
    lambda items: len({label for label, _ in items}) == 2)


def to_arrays(items: list[tuple[bool, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([int(label) for label, _ in items]), np.array([score / 5 for _, score in items])


@given(ITEMS)
def test_metrics_equal_scikit_learns(items: list[tuple[bool, int]]) -> None:
    labels, scores = to_arrays(items)
    assert math.isclose(metrics.auroc(labels, scores), roc_auc_score(labels, scores), abs_tol=1e-12)
    assert math.isclose(metrics.auprc(labels, scores), average_precision_score(labels, scores), abs_tol=1e-12)
    assert math.isclose(metrics.brier(labels, scores), brier_score_loss(labels, scores), abs_tol=1e-12)
    assert math.isclose(metrics.log_loss(labels, np.clip(scores, 0.1, 0.9)),
                        their_log_loss(labels, np.clip(scores, 0.1, 0.9)), abs_tol=1e-12)


@given(ITEMS)
def test_auroc_counts_pairs(items: list[tuple[bool, int]]) -> None:
    labels, scores = to_arrays(items)
    won = [1.0 if high > low else 0.5 if high == low else 0.0
           for high in scores[labels == 1] for low in scores[labels == 0]]
    assert math.isclose(metrics.auroc(labels, scores), np.mean(won), abs_tol=1e-12)
    assert math.isclose(metrics.auroc(labels, -scores), 1 - np.mean(won), abs_tol=1e-12)
    assert metrics.auroc(labels, np.exp(3 * scores)) == metrics.auroc(labels, scores)


@given(ITEMS, st.integers(0, 2**32 - 1))
def test_weights_equal_repeated_items(items: list[tuple[bool, int]], seed: int) -> None:
    labels, scores = to_arrays(items)
    counts = np.random.default_rng(seed).integers(0, 4, (7, len(items)))
    areas = metrics.auroc_weighted(labels, scores, counts)
    for row, area in zip(counts, areas, strict=True):
        repeated = np.repeat(labels, row)
        if len(np.unique(repeated)) < 2:
            assert math.isnan(area)
        else:
            assert math.isclose(area, roc_auc_score(repeated, np.repeat(scores, row)), abs_tol=1e-12)


@given(ITEMS, st.integers(0, 2**32 - 1))
def test_pairs_within_strata(items: list[tuple[bool, int]], seed: int) -> None:
    """By counting the pairs of the same stratum."""
    labels, scores = to_arrays(items)
    rng = np.random.default_rng(seed)
    strata, counts = rng.choice(["a", "b", "c"], len(items)), rng.integers(0, 3, (4, len(items)))
    areas = metrics.auroc_within(labels, scores, counts, strata)
    for row, area in zip(counts, areas, strict=True):
        repeated = np.repeat(np.arange(len(items)), row)
        won = [1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
               for i in repeated for j in repeated
               if labels[i] == 1 and labels[j] == 0 and strata[i] == strata[j]]
        assert math.isclose(area, np.mean(won), abs_tol=1e-12) if won else math.isnan(area)
    np.testing.assert_array_equal(metrics.auroc_within(labels, scores, counts, np.zeros(len(items))),
                                  metrics.auroc_weighted(labels, scores, counts))


@given(ITEMS, st.integers(0, 2**32 - 1), st.floats(-320, 307), st.floats(-320, 307))
def test_weights_of_any_size(items: list[tuple[bool, int]], seed: int, exponent_1: float,
                             exponent_0: float) -> None:
    """The weight of a whole class does not change the AUROC: nothing overflows or underflows."""
    labels, scores = to_arrays(items)
    weights = np.random.default_rng(seed).integers(1, 4, len(items))
    sizes = np.where(labels == 1, 10.0**exponent_1, 10.0**exponent_0)
    (expected,) = metrics.auroc_weighted(labels, scores, [sizes > 0])
    np.testing.assert_allclose(metrics.auroc_weighted(labels, scores, [sizes]), [expected], rtol=1e-12)
    scaled = np.stack([weights, weights * 2.0**600, weights * 2.0**-600])
    areas = metrics.auroc_weighted(labels, scores, scaled)
    assert areas[0] == areas[1] == areas[2] and not np.isnan(areas).any()


def test_one_class_has_no_auroc() -> None:
    assert math.isnan(metrics.auroc([1, 1, 1], [0.1, 0.2, 0.3]))
    assert math.isnan(metrics.auprc([0, 0], [0.1, 0.2]))


def test_perfect_and_constant_scores() -> None:
    labels = np.array([0, 0, 1, 1, 0])
    assert metrics.auroc(labels, labels) == 1.0 and metrics.auroc(labels, np.zeros(5)) == 0.5
    assert metrics.auprc(labels, np.zeros(5)) == labels.mean()
    assert metrics.brier(labels, labels) == metrics.expected_calibration_error(labels, labels) == 0.0
    assert metrics.log_loss([1], [0.0]) == pytest.approx(-math.log(1e-15))


def test_reliability_by_hand() -> None:
    """0.1 is an edge and belongs to the bin above it; 1 belongs to the last."""
    probabilities = [0.05, 0.1, 0.19, 1.0, 0.95]
    diagram = metrics.reliability([0, 1, 0, 1, 0], probabilities)
    np.testing.assert_allclose(diagram.confidence, [0.05, 0.145, 0.975])
    np.testing.assert_allclose(diagram.accuracy, [0, 0.5, 0.5])
    assert diagram.counts.tolist() == [1, 2, 2]
    expected = (0.05 * 1 + abs(0.145 - 0.5) * 2 + abs(0.975 - 0.5) * 2) / 5
    assert metrics.expected_calibration_error([0, 1, 0, 1, 0], probabilities) == pytest.approx(expected)


def test_an_edge_belongs_to_the_bin_above() -> None:
    """This includes edges that are not exact in binary, because models often state such confidences."""
    for bins in (2, 5, 10, 15, 20):
        stated = [k / bins for k in range(bins)]
        diagram = metrics.reliability([1] * bins, stated, bins)
        assert diagram.counts.tolist() == [1] * bins and diagram.confidence.tolist() == stated
    stated = [float(f"0.{k}") for k in range(10)]
    assert metrics.reliability([0] * 11, [*stated, 1.0]).counts.tolist() == [1] * 9 + [2]
    ece = metrics.expected_calibration_error([1] * 10 + [0] * 10, [0.5] * 10 + [0.6] * 10)
    assert ece == pytest.approx(0.55, abs=1e-12)


def test_the_calibration_error_of_calibrated_and_overconfident_probabilities() -> None:
    """The overconfident probabilities are shifted by 0.1 away from 0.5."""
    rng = np.random.default_rng(0)
    probabilities = rng.random(200_000)
    labels = rng.random(probabilities.size) < probabilities
    assert metrics.expected_calibration_error(labels, probabilities) < 0.005
    overconfident = np.clip(probabilities + 0.1 * np.sign(probabilities - 0.5), 0, 1)
    expected = np.abs(overconfident - probabilities).mean()
    assert metrics.expected_calibration_error(labels, overconfident) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("labels", "scores", "message"), [
    ([0, 2], [0.1, 0.2], "labels: expected 0 or 1"),
    ([], [], "labels: expected .* at least one"),
    ([0, 1], [0.1], r"scores: expected shape \(2,\)"),
    ([0, 1], [0.1, float("nan")],
     r"scores: expected numbers, found NaN for 1 of 2 items \(the first: item 1\)")])
def test_invalid_scores_are_rejected(labels: list, scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.auroc(labels, scores)


def test_invalid_probabilities_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"probabilities: expected values in \[0, 1\]"):
        metrics.brier([0, 1], [0.5, 1.5])


@needs(CASES)
def test_metrics_equal_recalls() -> None:
    """AUROC, AUPRC, ECE, reliability and risk of Recall's evaluation, on four sets."""
    with np.load(CASES, allow_pickle=False) as cases:
        for k in "0123":
            labels, probabilities = cases[f"{k}/y"], cases[f"{k}/p"]
            # Recall's edges 0.3, 0.6 and 0.7 are one ulp too high: its bins below contain these values.
            on_edge = np.isin(probabilities, (0.3, 0.6, 0.7))
            probabilities = np.where(on_edge, probabilities - 1e-13, probabilities)
            diagram = metrics.reliability(labels, probabilities)
            ours = {"auroc": metrics.auroc(labels, probabilities),
                    "auprc": metrics.auprc(labels, probabilities),
                    "ece": metrics.expected_calibration_error(labels, probabilities),
                    "rel_x": diagram.confidence, "rel_y": diagram.accuracy}
            for name, value in ours.items():
                np.testing.assert_allclose(value, cases[f"{k}/{name}"], rtol=0, atol=1e-12)
            confidence = np.abs(probabilities - 0.5)
            if len(np.unique(confidence)) == len(confidence):  # Recall breaks ties by position
                risks = selective.Ranking((probabilities >= 0.5) != labels, -confidence).risks()
                np.testing.assert_allclose(risks, cases[f"{k}/risk"], rtol=0, atol=1e-12)
