"""Calibrators against what they should find."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from eval import calibration, folds
from eval.metrics import auroc, expected_calibration_error
from eval.probes import ProbeOptions, fit_probe


def drawn(n: int = 40_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log odds, and labels drawn with them."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-0.5, 1.5, n)
    return odds, (rng.random(n) < expit(odds)).astype(int)


@pytest.mark.parametrize("name", calibration.CALIBRATORS)
def test_a_score_that_is_too_sure(name: str) -> None:
    """Three times the true log odds: every calibrator finds the way back."""
    odds, labels = drawn()
    assert expected_calibration_error(labels, expit(3 * odds)) > 0.1
    found = calibration.CALIBRATORS[name](3 * odds, labels)
    fresh, known = drawn(seed=1)
    assert expected_calibration_error(known, found(3 * fresh)) < 0.015
    np.testing.assert_allclose(found(np.array([-3.0, 0, 3])), expit(np.array([-1.0, 0, 1])), atol=0.03)


def test_platt_shifts_and_temperature_does_not() -> None:
    odds, labels = drawn()
    np.testing.assert_allclose(calibration.platt(odds + 2, labels)(odds + 2), expit(odds), atol=0.02)
    assert (calibration.temperature(odds + 2, labels)(np.zeros(1)) == 0.5).all()


def test_platt_never_turns_the_order_around() -> None:
    """Training rows that disagree with the score leave it without a say, not with the opposite one."""
    odds, labels = drawn(500)
    found = calibration.platt(-odds, labels)(np.array([-1.0, 0.0, 5.0]))
    np.testing.assert_allclose(found, labels.mean())


@pytest.mark.parametrize("name", calibration.CALIBRATORS)
def test_order_is_kept(name: str) -> None:
    odds, labels = drawn(300)
    fresh = np.sort(np.random.default_rng(2).normal(0, 5, 200))
    assert (np.diff(calibration.CALIBRATORS[name](odds, labels)(fresh)) >= 0).all()


def test_extreme_scores_are_calibrated_too() -> None:
    odds, labels = drawn(2000)
    for name, learn in calibration.CALIBRATORS.items():
        found = learn(1e6 * odds, labels)(1e6 * odds)
        assert np.isfinite(found).all() and ((found >= 0) & (found <= 1)).all(), name


def test_out_of_fold_scores_have_not_seen_their_rows() -> None:
    """A probe of noise knows the rows that it was fitted to; held-out rows it does not."""
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((200, 150)), rng.integers(0, 2, 200)
    splits = folds.stratified(labels)
    probe = fit_probe(features, labels, splits, ProbeOptions(strengths=(10.0,)))
    assert auroc(labels, probe.pipeline.decision_function(features)) > 0.99
    scores, known = calibration.out_of_fold(probe.pipeline, features, labels, splits)
    assert abs(auroc(known, scores) - 0.5) < 0.12
    test, truth = rng.standard_normal((2000, 150)), rng.integers(0, 2, 2000)
    found = calibration.recalibrate(probe.pipeline, features, labels, test, truth, splits)
    assert list(found) == ["raw", "platt", "temperature", "isotonic"]
    assert found["raw"].ece > 0.25 and all(found[name].ece < 0.12 for name in calibration.CALIBRATORS)
    assert found["raw"].auroc == pytest.approx(found["temperature"].auroc)
