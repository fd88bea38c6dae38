"""Fits the estimators of a study, and maps their scores to probabilities.

Scores rise with the probability of a correct answer. Estimators are fitted to the train split, the validate
split selects hyperparameters, and the calibrate split fits the map from scores to probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.estimators.sidecar import Sidecar

from ..calibration import CALIBRATORS, Calibrator
from ..checks import Floats
from ..estimators.config import FitConfig
from ..estimators.interface import LinearProbe, Method, Rows, Training
from ..estimators.panel import CONTROLS, SIDECAR, chosen
from ..estimators.sidecar import SidecarEstimator
from ..estimators.table import QuestionTable
from .scores import Methods, Scores


class FittedMethods(NamedTuple):
    """Scores and info of every method; the sidecar of each seed with its calibrator, and linear probes.

    `omitted`: why estimators are left out; not of controls, which do not apply to all questions.
    """

    methods: Methods
    info: dict[str, dict[str, Any]]
    sidecars: list[Sidecar]
    calibrators: list[Calibrator]
    probes: dict[str, tuple[LinearProbe, Calibrator]]
    omitted: dict[str, str]


def fit(table: QuestionTable, estimators: Sequence[str], options: FitConfig, dataset: str | None = None, *,
        notify: Callable[[str], None] = lambda line: None) -> FittedMethods:
    """Fits estimators to the questions of one data set, or of all.

    An estimator is omitted if the table lacks what it needs, if it has nothing to learn from, or if its
    scores on the calibrate split cover only one label.

    Args:
        estimators: names and presets; see `estimators.panel`.
    """
    train, validate, calibrate = (table.rows(split, dataset) for split in ("train", "validate", "calibrate"))
    training = Training(table, train, validate, options)
    sidecars: list[Sidecar] = []
    methods: dict[str, Method] = {}
    omitted: dict[str, str] = {}
    for name, estimator in chosen(estimators).items():
        if not estimator.is_measured(table):
            continue
        if name not in CONTROLS:
            notify(name)
        if isinstance(estimator, SidecarEstimator):
            methods[name], sidecars = estimator.fit_with_sidecars(training)
        elif (method := estimator.fit(training)) is not None:
            methods[name] = method
        elif name not in CONTROLS:
            omitted[name] = "it has nothing to learn from"
    fitted: Methods = {}
    calibrators: dict[str, list[Calibrator]] = {}
    for name, method in methods.items():
        if _covers_both_labels(method, table, calibrate):
            calibrators[name] = [_calibrator(run, table.known, calibrate, options) for run in method.scores]
            fitted[name] = Scores(method.scores, np.stack([
                np.where(np.isnan(run), np.nan, calibrator(np.nan_to_num(run)))
                for run, calibrator in zip(method.scores, calibrators[name], strict=True)]))
        elif name not in CONTROLS:
            omitted[name] = "it scores calibration questions of one kind only, known or unknown, or none"
    return FittedMethods(fitted, {name: methods[name].info for name in fitted}, sidecars,
                         calibrators[SIDECAR], {name: (method.probe, calibrators[name][0])
                                                for name, method in methods.items()
                                                if name in fitted and method.probe is not None}, omitted)


# ---------------------------------------------------------------------------------------------


def _scored_rows(scores: Floats, rows: Rows) -> Rows:
    return rows[~np.isnan(scores[rows])]


def _calibrator(scores: Floats, known: NDArray, rows: Rows, options: FitConfig) -> Calibrator:
    scored = _scored_rows(scores, rows)
    return CALIBRATORS[options.calibrate](scores[scored], known[scored])


def _covers_both_labels(method: Method, table: QuestionTable, rows: Rows) -> bool:
    """Returns whether the method scores both known and unknown questions among these rows."""
    return len(np.unique(table.known[_scored_rows(method.scores[0], rows)])) == 2
