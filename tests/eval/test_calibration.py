"""Calibrators recover known distortions of true log odds, and are stored and read without loss."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from tests.references import STORED, needs
from tilelli_jax.eval import calibration, folds
from tilelli_jax.eval.metrics import auroc, expected_calibration_error, log_loss
from tilelli_jax.eval.probes import ProbeOptions, fit_probe

CASES = STORED / "recall_cases" / "metric_cases.npz"


def sample(n: int = 40_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns log odds, and labels drawn with these odds."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-0.5, 1.5, n)
    return odds, (rng.random(n) < expit(odds)).astype(int)


@pytest.mark.parametrize("name", calibration.CALIBRATORS)
def test_overconfident_scores_are_corrected(name: str) -> None:
    """The scores are three times the true log odds; every calibrator recovers the true probabilities."""
    odds, labels = sample()
    assert expected_calibration_error(labels, expit(3 * odds)) > 0.1
    calibrator = calibration.CALIBRATORS[name](3 * odds, labels)
    new_odds, new_labels = sample(seed=1)
    assert expected_calibration_error(new_labels, calibrator(3 * new_odds)) < 0.015
    np.testing.assert_allclose(calibrator(np.array([-3.0, 0, 3])), expit(np.array([-1.0, 0, 1])), atol=0.03)


def test_platt_shifts_and_temperature_does_not() -> None:
    odds, labels = sample()
    np.testing.assert_allclose(calibration.platt(odds + 2, labels)(odds + 2), expit(odds), atol=0.02)
    assert (calibration.temperature(odds + 2, labels)(np.zeros(1)) == 0.5).all()


def test_platt_never_reverses_the_order() -> None:
    """If the training rows contradict the score, the fit ignores the score instead of reversing it."""
    odds, labels = sample(500)
    probabilities = calibration.platt(-odds, labels)(np.array([-1.0, 0.0, 5.0]))
    np.testing.assert_allclose(probabilities, labels.mean())
    at_infinity = calibration.platt(-odds, labels)(np.array([-np.inf, np.inf]))
    np.testing.assert_allclose(at_infinity, labels.mean())


def test_platt_of_equal_scores_has_no_slope() -> None:
    """The standard deviation of [0.1, 0.1, 0.1] is a rounding error and must not be a divisor."""
    for scores in ([0.1] * 3, [0.1, 0.1, 0.3 - 0.2]):
        np.testing.assert_allclose(calibration.platt(scores, [0, 1, 0])([-5, 0.1, 5]), 1 / 3)


@pytest.mark.parametrize("name", calibration.CALIBRATORS)
def test_calibration_preserves_the_order(name: str) -> None:
    odds, labels = sample(300)
    new_odds = np.sort(np.random.default_rng(2).normal(0, 5, 200))
    assert (np.diff(calibration.CALIBRATORS[name](odds, labels)(new_odds)) >= 0).all()


def test_extreme_scores_give_probabilities() -> None:
    odds, labels = sample(2000)
    for name, fit in calibration.CALIBRATORS.items():
        probabilities = fit(1e6 * odds, labels)(1e6 * odds)
        assert np.isfinite(probabilities).all() and ((probabilities >= 0) & (probabilities <= 1)).all(), name


def test_out_of_fold_scores_come_from_probes_without_their_rows() -> None:
    """A probe fitted on noise memorises its own rows and is at chance on held-out rows."""
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((200, 150)), rng.integers(0, 2, 200)
    splits = folds.stratified(labels)
    probe = fit_probe(features, labels, splits, ProbeOptions(c_values=(10.0,)))
    assert auroc(labels, probe.pipeline.decision_function(features)) > 0.99
    scores, held_out = calibration.out_of_fold(probe.pipeline, features, labels, splits)
    assert abs(auroc(held_out, scores) - 0.5) < 0.12
    test, truth = rng.standard_normal((2000, 150)), rng.integers(0, 2, 2000)
    results = calibration.recalibrate(probe.pipeline, features, labels, test, truth, splits)
    assert list(results) == ["raw", "platt", "temperature", "isotonic"]
    assert results["raw"].ece > 0.25 and all(results[name].ece < 0.12 for name in calibration.CALIBRATORS)
    assert results["raw"].auroc == pytest.approx(results["temperature"].auroc)


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_equals_scikit_learns(seed: int) -> None:
    """At the knots, between them, beyond them, and with tied scores."""
    rng = np.random.default_rng(seed)
    odds = np.round(rng.normal(0, 2, 300), 1 + seed % 2)
    labels = (rng.random(300) < expit(odds)).astype(int)
    theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(odds, labels)
    ours = calibration.isotonic(odds, labels)
    new = np.r_[odds, rng.normal(0, 4, 1000), -100, 100]
    np.testing.assert_array_equal(ours(new), theirs.predict(new))
    assert ours(new.reshape(2, -1)).shape == (2, len(new) // 2)
    np.testing.assert_array_equal(calibration.isotonic([1.0, 1.0], [0, 1])([0, 1, 2]), [0.5, 0.5, 0.5])


@needs(CASES)
def test_temperatures_fit_at_least_as_well_as_recalls() -> None:
    """Recall's optimiser stops after 60 steps, within 0.001 of the temperature with the lowest loss."""
    with np.load(CASES, allow_pickle=False) as cases:
        for k in "0123":
            odds, labels = cases[f"{k}/z"], cases[f"{k}/y"]
            ours = calibration.temperature(odds, labels)
            assert ours.temperature == pytest.approx(float(cases[f"{k}/T"]), abs=1e-3)
            theirs = calibration.Temperature(float(cases[f"{k}/T"]))
            assert log_loss(labels, ours(odds)) <= log_loss(labels, theirs(odds)) + 1e-12


# --- Storage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", calibration.CALIBRATORS)
def test_a_calibrator_survives_json(name: str) -> None:
    odds, labels = sample(500)
    for scores in (odds, -odds):
        calibrator = calibration.CALIBRATORS[name](scores, labels)
        restored = calibration.calibrator_from_dict(json.loads(json.dumps(calibrator.to_dict())))
        assert restored == calibrator and hash(restored) == hash(calibrator)
        np.testing.assert_array_equal(restored(odds), calibrator(odds))


@pytest.mark.parametrize(("tree", "message"), [
    (None, "mapping"), ({}, "kind: expected one of platt"), ({"kind": "beta"}, "'beta'"),
    ({"kind": ["platt"]}, "kind"), ({"kind": "platt", "slope": 1.0}, "platt: expected intercept, slope"),
    ({"kind": "platt", "slope": 1.0, "intercept": 0.0, "T": 1.0}, "T"),
    ({"kind": "platt", "slope": "1", "intercept": 0.0}, "slope: expected a number"),
    ({"kind": "platt", "slope": True, "intercept": 0.0}, "slope"),
    ({"kind": "platt", "slope": -1.0, "intercept": 0.0}, "slope: expected at least 0"),
    ({"kind": "platt", "slope": 1, "intercept": float("nan")}, "intercept: expected a finite"),
    ({"kind": "platt", "slope": 10**400, "intercept": 0}, "slope"),
    ({"kind": "temperature", "temperature": 0}, "above 0"),
    ({"kind": "isotonic", "x": 1.0, "y": [0.5]}, "x: expected a list"),
    ({"kind": "isotonic", "x": [], "y": []}, "at least one"),
    ({"kind": "isotonic", "x": [0, 1], "y": [0.5]}, "equal lengths"),
    ({"kind": "isotonic", "x": [0, None], "y": [0, 1]}, r"x\[1\]: expected a number"),
    ({"kind": "isotonic", "x": [0, float("inf")], "y": [0, 1]}, "finite"),
    ({"kind": "isotonic", "x": [0, 0], "y": [0, 1]}, "x: expected strictly increasing"),
    ({"kind": "isotonic", "x": [0, 1], "y": [1, 0]}, "non-decreasing"),
    ({"kind": "isotonic", "x": [0, 1], "y": [0, 1.5]}, r"in \[0, 1\]")])
def test_a_damaged_calibrator_is_rejected(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration.calibrator_from_dict(tree)
