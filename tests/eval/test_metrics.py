"""Metrics against scikit-learn, closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as their_log_loss
from tilelli_jax.eval import metrics, selective

from tests.references import STORED, needs

CASES = STORED / "recall_cases" / "metric_cases.npz"

# Few levels: equal scores are the rule.
ITEMS = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40).filter(
    lambda items: len({label for label, _ in items}) == 2)


def taken_apart(items: list[tuple[bool, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([int(label) for label, _ in items]), np.array([score / 5 for _, score in items])


@given(ITEMS)
def test_areas_are_scikit_learns(items: list[tuple[bool, int]]) -> None:
    labels, scores = taken_apart(items)
    assert math.isclose(metrics.auroc(labels, scores), roc_auc_score(labels, scores), abs_tol=1e-12)
    assert math.isclose(metrics.auprc(labels, scores), average_precision_score(labels, scores), abs_tol=1e-12)
    assert math.isclose(metrics.brier(labels, scores), brier_score_loss(labels, scores), abs_tol=1e-12)
    assert math.isclose(metrics.log_loss(labels, np.clip(scores, 0.1, 0.9)),
                        their_log_loss(labels, np.clip(scores, 0.1, 0.9)), abs_tol=1e-12)


@given(ITEMS)
def test_auroc_counts_pairs(items: list[tuple[bool, int]]) -> None:
    labels, scores = taken_apart(items)
    won = [1.0 if high > low else 0.5 if high == low else 0.0
           for high in scores[labels == 1] for low in scores[labels == 0]]
    assert math.isclose(metrics.auroc(labels, scores), np.mean(won), abs_tol=1e-12)
    assert math.isclose(metrics.auroc(labels, -scores), 1 - np.mean(won), abs_tol=1e-12)
    assert metrics.auroc(labels, np.exp(3 * scores)) == metrics.auroc(labels, scores)


@given(ITEMS, st.integers(0, 2**32 - 1))
def test_weights_are_repeated_items(items: list[tuple[bool, int]], seed: int) -> None:
    labels, scores = taken_apart(items)
    counts = np.random.default_rng(seed).integers(0, 4, (7, len(items)))
    found = metrics.auroc_weighted(labels, scores, counts)
    for row, area in zip(counts, found, strict=True):
        again = np.repeat(labels, row)
        if len(np.unique(again)) < 2:
            assert math.isnan(area)
        else:
            assert math.isclose(area, roc_auc_score(again, np.repeat(scores, row)), abs_tol=1e-12)


@given(ITEMS, st.integers(0, 2**32 - 1), st.floats(-320, 307), st.floats(-320, 307))
def test_weights_of_any_size(items: list[tuple[bool, int]], seed: int, up: float, down: float) -> None:
    """What all 1s and all 0s weigh changes no area, so that nothing overflows or vanishes."""
    labels, scores = taken_apart(items)
    weights = np.random.default_rng(seed).integers(1, 4, len(items))
    sizes = np.where(labels == 1, 10.0**up, 10.0**down)
    (expected,) = metrics.auroc_weighted(labels, scores, [sizes > 0])
    np.testing.assert_allclose(metrics.auroc_weighted(labels, scores, [sizes]), [expected], rtol=1e-12)
    scaled = np.stack([weights, weights * 2.0**600, weights * 2.0**-600])
    found = metrics.auroc_weighted(labels, scores, scaled)
    assert found[0] == found[1] == found[2] and not np.isnan(found).any()


@given(ITEMS, st.integers(0, 2**32 - 1))
def test_relabelled(items: list[tuple[bool, int]], seed: int) -> None:
    labels, scores = taken_apart(items)
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.permutation(labels) for _ in range(5)])
    np.testing.assert_allclose(metrics.auroc_relabelled(drawn, scores),
                               [roc_auc_score(row, scores) for row in drawn], atol=1e-12)


def test_one_class_has_no_area() -> None:
    assert math.isnan(metrics.auroc([1, 1, 1], [0.1, 0.2, 0.3]))
    assert math.isnan(metrics.auprc([0, 0], [0.1, 0.2]))


def test_a_perfect_and_a_constant_score() -> None:
    labels = np.array([0, 0, 1, 1, 0])
    assert metrics.auroc(labels, labels) == 1.0 and metrics.auroc(labels, np.zeros(5)) == 0.5
    assert metrics.auprc(labels, np.zeros(5)) == labels.mean()
    assert metrics.brier(labels, labels) == metrics.expected_calibration_error(labels, labels) == 0.0
    assert metrics.log_loss([1], [0.0]) == pytest.approx(-math.log(1e-15))


def test_bins_and_their_edges() -> None:
    """0.1 is an edge and belongs to the bin above it; 1 belongs to the last."""
    probabilities = [0.05, 0.1, 0.19, 1.0, 0.95]
    found = metrics.reliability([0, 1, 0, 1, 0], probabilities)
    np.testing.assert_allclose(found.confidence, [0.05, 0.145, 0.975])
    np.testing.assert_allclose(found.accuracy, [0, 0.5, 0.5])
    assert found.counts.tolist() == [1, 2, 2]
    expected = (0.05 * 1 + abs(0.145 - 0.5) * 2 + abs(0.975 - 0.5) * 2) / 5
    assert metrics.expected_calibration_error([0, 1, 0, 1, 0], probabilities) == pytest.approx(expected)


def test_an_edge_belongs_to_the_bin_above() -> None:
    """Those that are not exact in binary, too: stated confidences lie just there."""
    for bins in (2, 5, 10, 15, 20):
        stated = [k / bins for k in range(bins)]
        found = metrics.reliability([1] * bins, stated, bins)
        assert found.counts.tolist() == [1] * bins and found.confidence.tolist() == stated
    stated = [float(f"0.{k}") for k in range(10)]
    assert metrics.reliability([0] * 11, [*stated, 1.0]).counts.tolist() == [1] * 9 + [2]
    found = metrics.expected_calibration_error([1] * 10 + [0] * 10, [0.5] * 10 + [0.6] * 10)
    assert found == pytest.approx(0.55, abs=1e-12)


def test_what_is_calibrated_and_what_is_not() -> None:
    """Labels drawn with the probabilities, and with others: 0.1 too sure at either end."""
    rng = np.random.default_rng(0)
    chances = rng.random(200_000)
    labels = rng.random(chances.size) < chances
    assert metrics.expected_calibration_error(labels, chances) < 0.005
    sure = np.clip(chances + 0.1 * np.sign(chances - 0.5), 0, 1)
    expected = np.abs(sure - chances).mean()
    assert metrics.expected_calibration_error(labels, sure) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("labels", "scores", "message"), [
    ([0, 2], [0.1, 0.2], "labels: expected 0 or 1"),
    ([], [], "labels: expected .* at least one"),
    ([0, 1], [0.1], r"scores: expected shape \(2,\)"),
    ([0, 1], [0.1, float("nan")], r"scores: expected numbers, found 1 of 2 \(the first is item 1\) NaN")])
def test_what_is_no_score(labels: list, scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.auroc(labels, scores)


def test_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"probabilities: expected values in \[0, 1\]"):
        metrics.brier([0, 1], [0.5, 1.5])


@needs(CASES)
def test_recalls_numbers() -> None:
    """Areas, calibration error, reliability and risk of its evaluation, on four sets."""
    with np.load(CASES, allow_pickle=False) as cases:
        for k in "0123":
            labels, chances = cases[f"{k}/y"], cases[f"{k}/p"]
            # Its edges 0.3, 0.6 and 0.7 lie a last bit too high, and what lies just there in the bin below.
            below = np.isin(chances, (0.3, 0.6, 0.7))
            chances = np.where(below, chances - 1e-13, chances)
            told = metrics.reliability(labels, chances)
            ours = {"auroc": metrics.auroc(labels, chances), "auprc": metrics.auprc(labels, chances),
                    "ece": metrics.expected_calibration_error(labels, chances),
                    "rel_x": told.confidence, "rel_y": told.accuracy}
            for name, found in ours.items():
                np.testing.assert_allclose(found, cases[f"{k}/{name}"], rtol=0, atol=1e-12)
            sure = np.abs(chances - 0.5)
            if len(np.unique(sure)) == len(sure):  # equals: theirs as they stand, ours in any order
                risks = selective.Order((chances >= 0.5) != labels, -sure).risks()
                np.testing.assert_allclose(risks, cases[f"{k}/risk"], rtol=0, atol=1e-12)
