"""Recalibration: maps from a score to a probability that can be believed, learned out of fold.

Each is fitted to scores of training rows by probes that have not seen them, and applied to the test
scores of the probe that has seen all training rows. Scores are log odds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.base import clone
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from eval.folds import Folds
from eval.metrics import Floats, auroc, brier, expected_calibration_error, log_loss
from eval.probes import Block

Calibrator = Callable[[Floats], Floats]  # log odds → probabilities
LOG_T = (-7.0, 7.0)  # where a temperature is looked for, as a logarithm


def platt(scores: ArrayLike, labels: ArrayLike) -> Calibrator:
    """P = σ(a · score + b), by maximum likelihood, with a ≥ 0 (Platt 1999).

    A slope below zero would turn the order of the items around because the training folds happened to
    disagree with the score. What is left then is a = 0: the share of 1s for everyone.
    """
    scores, labels = np.asarray(scores, float)[:, None], np.asarray(labels)
    middle, spread = scores.mean(), scores.std() or 1.0
    fitted = LogisticRegression(C=np.inf).fit((scores - middle) / spread, labels)
    slope, level = float(fitted.coef_[0, 0]) / spread, float(fitted.intercept_[0])
    if slope < 0:
        share = float(labels.mean())
        return lambda new: np.full(np.shape(new), share)
    return lambda new: expit(slope * (np.asarray(new, float) - middle) + level)


def temperature(scores: ArrayLike, labels: ArrayLike) -> Calibrator:
    """P = σ(score / T), T > 0 by maximum likelihood (Guo et al. 2017)."""
    scores, sign = np.asarray(scores, float), np.where(np.asarray(labels).astype(bool), 1.0, -1.0)
    found = minimize_scalar(lambda t: np.logaddexp(0, -sign * scores * np.exp(-t)).mean(), bounds=LOG_T,
                            method="bounded", options={"xatol": 1e-6})
    scale = float(np.exp(-found.x))
    return lambda new: expit(np.asarray(new, float) * scale)


def isotonic(scores: ArrayLike, labels: ArrayLike) -> Calibrator:
    """The rising steps nearest to the labels (Zadrozny & Elkan 2002); constant beyond what was seen."""
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(np.asarray(scores, float),
                                                                           np.asarray(labels, float))
    return lambda new: fitted.predict(np.asarray(new, float))


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
    labels = np.asarray(labels)
    held = [(clone(pipeline).fit(features[fit], labels[fit]).decision_function(features[out]), labels[out])
            for fit, out in folds]
    return np.concatenate([scores for scores, _ in held]), np.concatenate([known for _, known in held])


def recalibrate(pipeline: Pipeline, train: Block, train_labels: ArrayLike, test: Block,
                test_labels: ArrayLike, folds: Folds) -> dict[str, Calibrated]:
    """The probabilities of a fitted pipeline as they are ("raw") and under each calibrator."""
    scores, known = out_of_fold(pipeline, train, train_labels, folds)
    found = pipeline.decision_function(test)
    return {"raw": judged(test_labels, expit(found)),
            **{name: judged(test_labels, learn(scores, known)(found)) for name, learn in CALIBRATORS.items()}}
