"""Recalibration: maps from a score (log odds) to a calibrated probability, fitted out of fold.

Each calibrator is fitted on the scores of training rows, each scored by a probe that was fitted without
that row. It is applied to the test scores of the probe that was fitted on all training rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from . import checks
from .checks import Floats
from .folds import Folds, check_folds
from .metrics import auroc, brier, expected_calibration_error, log_loss
from .probes import Block, check_features

LOG_TEMPERATURE_BOUNDS = (-7.0, 7.0)  # bounds of the search for log T


# --- Calibrators: called with log odds of any shape, return probabilities of that shape -------


@dataclasses.dataclass(frozen=True)
class Platt:
    """P = σ(slope · score + intercept).

    Raises ValueError for a negative slope, which would reverse the order of the items.
    """

    kind: ClassVar[str] = "platt"
    slope: float
    intercept: float

    def __post_init__(self) -> None:
        _check_finite(slope=self.slope, intercept=self.intercept)
        if self.slope < 0:
            raise ValueError(f"slope: expected at least 0, found {self.slope}")

    def __call__(self, scores: ArrayLike) -> Floats:
        odds = _log_odds(scores)
        # With slope 0 the score has no effect, even where it is infinite (0 · ∞ would be NaN).
        return expit(self.slope * odds + self.intercept if self.slope
                     else np.full(odds.shape, self.intercept))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON tree that `calibrator_from_dict` reads."""
        return {"kind": self.kind, "slope": self.slope, "intercept": self.intercept}


@dataclasses.dataclass(frozen=True)
class Temperature:
    """P = σ(score / temperature). Raises ValueError unless the temperature is above 0."""

    kind: ClassVar[str] = "temperature"
    temperature: float

    def __post_init__(self) -> None:
        _check_finite(temperature=self.temperature)
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected above 0, found {self.temperature}")

    def __call__(self, scores: ArrayLike) -> Floats:
        return expit(_log_odds(scores) / self.temperature)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON tree that `calibrator_from_dict` reads."""
        return {"kind": self.kind, "temperature": self.temperature}


@dataclasses.dataclass(frozen=True)
class Isotonic:
    """P by linear interpolation between knots, constant beyond the first and the last knot.

    Raises ValueError if there is no knot, the scores of the knots do not increase strictly, or their
    probabilities decrease or leave [0, 1].

    Attributes:
        x: scores of the knots, strictly increasing.
        y: probabilities of the knots.
    """

    kind: ClassVar[str] = "isotonic"
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y):
            raise ValueError(f"x, y: expected equal lengths of at least one, found {len(self.x)} and "
                             f"{len(self.y)}")
        for name in ("x", "y"):
            _check_finite(**{f"{name}[{i}]": value for i, value in enumerate(getattr(self, name))})
        if (np.diff(self.x) <= 0).any():
            raise ValueError("x: expected strictly increasing scores, found others")
        if (np.diff(self.y) < 0).any() or self.y[0] < 0 or self.y[-1] > 1:
            raise ValueError("y: expected non-decreasing probabilities in [0, 1], found others")

    def __call__(self, scores: ArrayLike) -> Floats:
        return np.asarray(np.interp(_log_odds(scores), self.x, self.y))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON tree that `calibrator_from_dict` reads."""
        return {"kind": self.kind, "x": list(self.x), "y": list(self.y)}


Calibrator: TypeAlias = Platt | Temperature | Isotonic


def calibrator_from_dict(tree: Any) -> Calibrator:
    """Reads the tree that a calibrator's `to_dict` returned. Raises ValueError that names the wrong key."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"calibrator: expected a mapping, found {type(tree).__name__}")
    parameters = {key: value for key, value in tree.items() if key != "kind"}
    expected = {"platt": {"slope", "intercept"}, "temperature": {"temperature"}, "isotonic": {"x", "y"}}
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in expected:
        raise ValueError(f"kind: expected one of {', '.join(expected)}, found {kind!r}")
    if parameters.keys() != expected[kind]:
        raise ValueError(f"{kind}: expected {', '.join(sorted(expected[kind]))}, found "
                         f"{', '.join(sorted(map(str, parameters))) or 'nothing'}")
    if kind == "platt":
        return Platt(_number(parameters, "slope"), _number(parameters, "intercept"))
    if kind == "temperature":
        return Temperature(_number(parameters, "temperature"))
    return Isotonic(_numbers(parameters, "x"), _numbers(parameters, "y"))


def _number(tree: Mapping[str, Any], key: str) -> float:
    value = tree[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}: expected a number, found {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key}: expected a number in the range of a float, found a larger one") from None


def _numbers(tree: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = tree[key]
    if not isinstance(values, list | tuple):
        raise ValueError(f"{key}: expected a list of numbers, found {type(values).__name__}")
    return tuple(_number({f"{key}[{i}]": value}, f"{key}[{i}]") for i, value in enumerate(values))


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        checks.number(value, name)


def _log_odds(scores: ArrayLike) -> Floats:
    odds = checks.numbers(scores, "scores")
    if np.isnan(odds).any():
        raise ValueError(f"scores: expected numbers, found {int(np.isnan(odds).sum())} NaN")
    return odds


# --- Fitting ---------------------------------------------------------------------------------


def platt(scores: ArrayLike, labels: ArrayLike) -> Platt:
    """Fits P = σ(a · score + b), a ≥ 0, by maximum likelihood (Platt 1999).

    The scores must be finite and both classes present. A negative slope would reverse the order of the
    items merely because the training folds disagree with the score. The fit then falls back to a = 0: the
    base rate for every item.
    """
    positive = checks.labels(labels, both=True)
    scores = checks.finite(scores, len(positive), "scores")[:, None]
    if not checks.varies(scores, checks.INPUT_TOLERANCE):
        return Platt(0.0, float(logit(positive.mean())))
    mean, std = float(scores.mean()), float(scores.std()) or 1.0
    model = LogisticRegression(C=np.inf).fit((scores - mean) / std, positive)
    slope, intercept = float(model.coef_[0, 0]) / std, float(model.intercept_[0])
    if slope <= 0:
        return Platt(0.0, float(logit(positive.mean())))
    return Platt(slope, intercept - slope * mean)


def temperature(scores: ArrayLike, labels: ArrayLike) -> Temperature:
    """Fits P = σ(score / T), T > 0, by maximum likelihood (Guo et al. 2017).

    The scores must be finite and both classes present.
    """
    positive = checks.labels(labels, both=True)
    scores, sign = checks.finite(scores, len(positive), "scores"), np.where(positive, 1.0, -1.0)
    optimum = minimize_scalar(lambda t: np.logaddexp(0, -sign * scores * np.exp(-t)).mean(),
                              bounds=LOG_TEMPERATURE_BOUNDS, method="bounded", options={"xatol": 1e-6})
    return Temperature(float(np.exp(optimum.x)))


def isotonic(scores: ArrayLike, labels: ArrayLike) -> Isotonic:
    """Fits isotonic regression (Zadrozny & Elkan 2002), constant beyond the range of the scores."""
    positive = checks.labels(labels)
    model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
        checks.finite(scores, len(positive), "scores"), positive.astype(float))
    return Isotonic(tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))


CALIBRATORS: Mapping[str, Callable[[ArrayLike, ArrayLike], Calibrator]] = {
    "platt": platt, "temperature": temperature, "isotonic": isotonic}


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """Test probabilities `[items]` of one calibrator and their metrics; the log loss is in nats."""

    probabilities: Floats
    ece: float
    brier: float
    log_loss: float
    auroc: float


def evaluate(labels: ArrayLike, probabilities: Floats) -> CalibrationResult:
    """Measures calibration and discrimination of probabilities `[items]`."""
    return CalibrationResult(probabilities, expected_calibration_error(labels, probabilities),
                             brier(labels, probabilities), log_loss(labels, probabilities),
                             auroc(labels, probabilities))


def out_of_fold(pipeline: Pipeline, features: Block, labels: ArrayLike,
                folds: Folds) -> tuple[Floats, Floats]:
    """Returns log odds of the held-out rows, by clones of the pipeline fitted without them, and their labels.

    Rows that no fold holds out are missing; rows that two folds hold out occur twice.
    """
    labels = checks.labels(labels).astype(int)
    features = check_features(features, rows=len(labels))
    folds = check_folds(folds, len(labels))
    if not folds:
        raise ValueError("folds: expected at least one, found none")
    for number, (fit, _) in enumerate(folds):
        if len(np.unique(labels[fit])) < 2:
            raise ValueError("folds: expected both classes among the rows to fit, found one in fold "
                             f"{number}")
    parts = [(clone(pipeline).fit(features[fit], labels[fit]).decision_function(features[held_out]),
              labels[held_out]) for fit, held_out in folds]
    return np.concatenate([scores for scores, _ in parts]), np.concatenate([truth for _, truth in parts])


def recalibrate(pipeline: Pipeline, train: Block, train_labels: ArrayLike, test: Block,
                test_labels: ArrayLike, folds: Folds) -> dict[str, CalibrationResult]:
    """Evaluates a fitted pipeline's test probabilities: uncalibrated ("raw") and under each calibrator."""
    scores, labels = out_of_fold(pipeline, train, train_labels, folds)
    odds = pipeline.decision_function(check_features(test, columns=pipeline.n_features_in_))
    return {"raw": evaluate(test_labels, expit(odds)),
            **{name: evaluate(test_labels, fit(scores, labels)(odds)) for name, fit in CALIBRATORS.items()}}
