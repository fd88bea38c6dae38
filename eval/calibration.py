"""Recalibration: maps from a score to a probability that can be believed, learned out of fold.

Each is fitted to scores of training rows by probes that have not seen them, and applied to the test
scores of the probe that has seen all training rows. Scores are log odds.
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
from .folds import Folds
from .folds import checked as checked_folds
from .metrics import auroc, brier, expected_calibration_error, log_loss
from .probes import Block, checked_features

LOG_T = (-7.0, 7.0)  # where a temperature is looked for, as a logarithm


# --- What is learned: called with log odds of any shape, gives probabilities of that shape ----


@dataclasses.dataclass(frozen=True)
class Platt:
    """P = σ(slope · score + level). Raises ValueError for a slope below 0: it would turn the order."""

    kind: ClassVar[str] = "platt"
    slope: float
    level: float

    def __post_init__(self) -> None:
        _finite(slope=self.slope, level=self.level)
        if self.slope < 0:
            raise ValueError(f"slope: expected at least 0, found {self.slope}")

    def __call__(self, scores: ArrayLike) -> Floats:
        found = _log_odds(scores)
        # Without a slope the score has no say, not even an infinite one.
        return expit(self.slope * found + self.level if self.slope else np.full(found.shape, self.level))

    def to_dict(self) -> dict[str, Any]:
        """A tree for JSON; `calibrator_from_dict` reads it."""
        return {"kind": self.kind, "slope": self.slope, "level": self.level}


@dataclasses.dataclass(frozen=True)
class Temperature:
    """P = σ(score / temperature). Raises ValueError for a temperature that is not above zero."""

    kind: ClassVar[str] = "temperature"
    temperature: float

    def __post_init__(self) -> None:
        _finite(temperature=self.temperature)
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected above 0, found {self.temperature}")

    def __call__(self, scores: ArrayLike) -> Floats:
        return expit(_log_odds(scores) / self.temperature)

    def to_dict(self) -> dict[str, Any]:
        """A tree for JSON; `calibrator_from_dict` reads it."""
        return {"kind": self.kind, "temperature": self.temperature}


@dataclasses.dataclass(frozen=True)
class Isotonic:
    """P by straight lines between knots, constant beyond them.

    Raises ValueError where there is no knot, the scores of the knots do not rise, or their probabilities
    fall or leave [0, 1].

    Attributes:
        x: scores of the knots, rising.
        y: their probabilities.
    """

    kind: ClassVar[str] = "isotonic"
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y):
            raise ValueError(f"x, y: expected as many of both, at least one, found {len(self.x)} and "
                             f"{len(self.y)}")
        for name in ("x", "y"):
            _finite(**{f"{name}[{i}]": value for i, value in enumerate(getattr(self, name))})
        if (np.diff(self.x) <= 0).any():
            raise ValueError("x: expected scores that rise")
        if (np.diff(self.y) < 0).any() or self.y[0] < 0 or self.y[-1] > 1:
            raise ValueError("y: expected probabilities in [0, 1] that do not fall")

    def __call__(self, scores: ArrayLike) -> Floats:
        return np.asarray(np.interp(_log_odds(scores), self.x, self.y))

    def to_dict(self) -> dict[str, Any]:
        """A tree for JSON; `calibrator_from_dict` reads it."""
        return {"kind": self.kind, "x": list(self.x), "y": list(self.y)}


Calibrator: TypeAlias = Platt | Temperature | Isotonic


def calibrator_from_dict(tree: Any) -> Calibrator:
    """What `to_dict` of a calibrator wrote. Raises ValueError naming the key and what was expected."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"calibrator: expected a mapping, found {type(tree).__name__}")
    found = {key: value for key, value in tree.items() if key != "kind"}
    wanted = {"platt": {"slope", "level"}, "temperature": {"temperature"}, "isotonic": {"x", "y"}}
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in wanted:
        raise ValueError(f"kind: expected one of {', '.join(wanted)}, found {kind!r}")
    if found.keys() != wanted[kind]:
        raise ValueError(f"{kind}: expected {', '.join(sorted(wanted[kind]))}, found "
                         f"{', '.join(sorted(map(str, found))) or 'nothing'}")
    if kind == "platt":
        return Platt(_number(found, "slope"), _number(found, "level"))
    if kind == "temperature":
        return Temperature(_number(found, "temperature"))
    return Isotonic(_numbers(found, "x"), _numbers(found, "y"))


def _number(tree: Mapping[str, Any], key: str) -> float:
    value = tree[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}: expected a number, found {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key}: expected a number that a float can hold") from None


def _numbers(tree: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = tree[key]
    if not isinstance(values, list | tuple):
        raise ValueError(f"{key}: expected a list of numbers, found {type(values).__name__}")
    return tuple(_number({f"{key}[{i}]": value}, f"{key}[{i}]") for i, value in enumerate(values))


def _finite(**values: float) -> None:
    for name, value in values.items():
        checks.number(value, name)


def _log_odds(scores: ArrayLike) -> Floats:
    found = checks.numbers(scores, "scores")
    if np.isnan(found).any():
        raise ValueError(f"scores: expected numbers, found {int(np.isnan(found).sum())} NaN")
    return found


# --- Learning them ---------------------------------------------------------------------------


def platt(scores: ArrayLike, labels: ArrayLike) -> Platt:
    """P = σ(a · score + b), a ≥ 0, by maximum likelihood (Platt 1999), of finite scores and both classes.

    A slope below zero would turn the order of the items around because the training folds happened to
    disagree with the score. What is left then is a = 0: the share of 1s for everyone.
    """
    known = checks.labels(labels, both=True)
    scores = checks.finite(scores, len(known), "scores")[:, None]
    if not checks.varies(scores, checks.READ):
        return Platt(0.0, float(logit(known.mean())))
    middle, spread = float(scores.mean()), float(scores.std()) or 1.0
    fitted = LogisticRegression(C=np.inf).fit((scores - middle) / spread, known)
    slope, level = float(fitted.coef_[0, 0]) / spread, float(fitted.intercept_[0])
    if slope <= 0:
        return Platt(0.0, float(logit(known.mean())))
    return Platt(slope, level - slope * middle)


def temperature(scores: ArrayLike, labels: ArrayLike) -> Temperature:
    """P = σ(score / T), T > 0 by maximum likelihood (Guo et al. 2017), of finite scores and both classes."""
    known = checks.labels(labels, both=True)
    scores, sign = checks.finite(scores, len(known), "scores"), np.where(known, 1.0, -1.0)
    found = minimize_scalar(lambda t: np.logaddexp(0, -sign * scores * np.exp(-t)).mean(), bounds=LOG_T,
                            method="bounded", options={"xatol": 1e-6})
    return Temperature(float(np.exp(found.x)))


def isotonic(scores: ArrayLike, labels: ArrayLike) -> Isotonic:
    """The rising steps nearest to the labels (Zadrozny & Elkan 2002); constant beyond what was seen."""
    known = checks.labels(labels)
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
        checks.finite(scores, len(known), "scores"), known.astype(float))
    return Isotonic(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))


CALIBRATORS: Mapping[str, Callable[[ArrayLike, ArrayLike], Calibrator]] = {
    "platt": platt, "temperature": temperature, "isotonic": isotonic}


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Test probabilities `[items]` under one calibrator, and how good they are; log loss in nats."""

    probabilities: Floats
    ece: float
    brier: float
    log_loss: float
    auroc: float


def judged(labels: ArrayLike, probabilities: Floats) -> Calibrated:
    """How good probabilities are."""
    return Calibrated(probabilities, expected_calibration_error(labels, probabilities),
                      brier(labels, probabilities), log_loss(labels, probabilities),
                      auroc(labels, probabilities))


def out_of_fold(pipeline: Pipeline, features: Block, labels: ArrayLike,
                folds: Folds) -> tuple[Floats, Floats]:
    """Log odds of held-out rows by the same pipeline fitted anew without them, and their labels.

    Rows that no fold holds out are left out, those held out twice come twice.
    """
    labels = checks.labels(labels).astype(int)
    features = checked_features(features, rows=len(labels))
    folds = checked_folds(folds, len(labels))
    if not folds:
        raise ValueError("folds: expected one at least, found none")
    for number, (fit, _) in enumerate(folds):
        if len(np.unique(labels[fit])) < 2:
            raise ValueError(f"folds: expected both classes to fit, found one in fold {number}")
    held = [(clone(pipeline).fit(features[fit], labels[fit]).decision_function(features[out]), labels[out])
            for fit, out in folds]
    return np.concatenate([scores for scores, _ in held]), np.concatenate([known for _, known in held])


def recalibrate(pipeline: Pipeline, train: Block, train_labels: ArrayLike, test: Block,
                test_labels: ArrayLike, folds: Folds) -> dict[str, Calibrated]:
    """The probabilities of a fitted pipeline as they are ("raw") and under each calibrator."""
    scores, known = out_of_fold(pipeline, train, train_labels, folds)
    found = pipeline.decision_function(checked_features(test, columns=pipeline.n_features_in_))
    return {"raw": judged(test_labels, expit(found)),
            **{name: judged(test_labels, learn(scores, known)(found)) for name, learn in CALIBRATORS.items()}}
