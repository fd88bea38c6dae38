"""Calibrators against what they should find."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from tilelli_jax.eval import calibration, folds
from tilelli_jax.eval.metrics import auroc, expected_calibration_error, log_loss
from tilelli_jax.eval.probes import ProbeOptions, fit_probe

from tests.references import STORED, needs

CASES = STORED / "recall_cases" / "metric_cases.npz"


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
    worn_out = calibration.platt(-odds, labels)(np.array([-np.inf, np.inf]))
    np.testing.assert_allclose(worn_out, labels.mean())


def test_platt_of_equal_scores_has_no_slope() -> None:
    """The spread of [0.1, 0.1, 0.1] is rounding, by which nothing may be divided."""
    for scores in ([0.1] * 3, [0.1, 0.1, 0.3 - 0.2]):
        np.testing.assert_allclose(calibration.platt(scores, [0, 1, 0])([-5, 0.1, 5]), 1 / 3)


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


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_is_scikit_learns(seed: int) -> None:
    """At its knots, between them, beyond them, and where scores are equal."""
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
def test_temperatures_are_recalls_or_better() -> None:
    """Theirs stops 60 steps after it has begun, within 0.001 of where the loss is least."""
    with np.load(CASES, allow_pickle=False) as cases:
        for k in "0123":
            odds, labels = cases[f"{k}/z"], cases[f"{k}/y"]
            found = calibration.temperature(odds, labels)
            assert found.temperature == pytest.approx(float(cases[f"{k}/T"]), abs=1e-3)
            theirs = calibration.Temperature(float(cases[f"{k}/T"]))
            assert log_loss(labels, found(odds)) <= log_loss(labels, theirs(odds)) + 1e-12


# --- Stored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", calibration.CALIBRATORS)
def test_stored_and_read(name: str) -> None:
    odds, labels = drawn(500)
    for scores in (odds, -odds):
        found = calibration.CALIBRATORS[name](scores, labels)
        again = calibration.calibrator_from_dict(json.loads(json.dumps(found.to_dict())))
        assert again == found and hash(again) == hash(found)
        np.testing.assert_array_equal(again(odds), found(odds))


@pytest.mark.parametrize(("tree", "said"), [
    (None, "mapping"), ({}, "kind: expected one of platt"), ({"kind": "beta"}, "'beta'"),
    ({"kind": ["platt"]}, "kind"), ({"kind": "platt", "slope": 1.0}, "platt: expected level, slope"),
    ({"kind": "platt", "slope": 1.0, "level": 0.0, "T": 1.0}, "T"),
    ({"kind": "platt", "slope": "1", "level": 0.0}, "slope: expected a number"),
    ({"kind": "platt", "slope": True, "level": 0.0}, "slope"),
    ({"kind": "platt", "slope": -1.0, "level": 0.0}, "slope: expected at least 0"),
    ({"kind": "platt", "slope": 1, "level": float("nan")}, "level: expected a finite"),
    ({"kind": "platt", "slope": 10**400, "level": 0}, "slope"),
    ({"kind": "temperature", "temperature": 0}, "above 0"),
    ({"kind": "isotonic", "x": 1.0, "y": [0.5]}, "x: expected a list"),
    ({"kind": "isotonic", "x": [], "y": []}, "at least one"),
    ({"kind": "isotonic", "x": [0, 1], "y": [0.5]}, "as many"),
    ({"kind": "isotonic", "x": [0, None], "y": [0, 1]}, r"x\[1\]: expected a number"),
    ({"kind": "isotonic", "x": [0, float("inf")], "y": [0, 1]}, "finite"),
    ({"kind": "isotonic", "x": [0, 0], "y": [0, 1]}, "x: expected scores that rise"),
    ({"kind": "isotonic", "x": [0, 1], "y": [1, 0]}, "do not fall"),
    ({"kind": "isotonic", "x": [0, 1], "y": [0, 1.5]}, r"in \[0, 1\]")])
def test_what_is_wrong_with_a_stored_one_is_named(tree: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        calibration.calibrator_from_dict(tree)
