"""The sidecar and its rivals: what each says of every question, learned from one part of them.

    sidecar                a GRU over the layers on signals A and B (several runs, one for each seed)
    layer probe            logistic on the stream at the last position, at the best layer
    globals                logistic on the ten features of the whole prompt
    entropies              logistic on three entropies a layer (TriLens)
    negative entropy       of the next token: nothing is learned
    familiarity            minus the Mahalanobis distance to known questions
    robustness             minus the divergence under noise
    words, length, …       controls that need no network (controls.py)
Scores rise with the chance of knowing. What is learned sees train; choices look at validate; what turns
scores into probabilities is fitted on calibrate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sidecar import Sidecar
from tilelli_jax.signals.crystallisation import BY_LAYER, OVERALL
from tilelli_jax.training.sidecar import Examples, learn, logits_of

from ..calibration import CALIBRATORS, Calibrator
from ..checks import Floats
from ..familiarity import Familiarity
from ..metrics import auroc
from . import controls
from .config import FitConfig
from .scores import Methods, Scores
from .table import Table

SIDECAR = "sidecar"
Rows = NDArray[np.intp]


class Method(NamedTuple):
    """Scores f64 `[runs, questions]`, NaN where it says nothing; and what is to be told of how they came."""

    scores: Floats
    about: dict[str, Any]


class FittedMethods(NamedTuple):
    """What every method says, what is to be told of it, the sidecars, and the calibrator of each of them."""

    methods: Methods
    about: dict[str, dict[str, Any]]
    sidecars: list[Sidecar]
    calibrators: list[Calibrator]


def fit(table: Table, options: FitConfig, dataset: str | None = None, *,
        notify: Callable[[str], None] = lambda line: None) -> FittedMethods:
    """Every method, learned from the questions of one data set, or of all.

    A method that says nothing of the questions to calibrate on, or of one kind of them only, is left out.
    """
    train, validate, calibrate = (table.rows(part, dataset) for part in ("train", "validate", "calibrate"))
    sidecars: list[Sidecar] = []
    methods: dict[str, Method] = {}
    runs = []
    for seed in options.seeds:
        notify(f"{SIDECAR}, seed {seed}")
        try:
            learned = learn(_examples(table, train), _examples(table, validate), auroc, options.sidecar,
                            names=BY_LAYER, names_whole=OVERALL, seed=seed)
        except ValueError as error:
            raise InputError(f"fit.sidecar: {error}") from None
        sidecars.append(learned.sidecar)
        runs.append({"seed": seed, "epoch": learned.best, "validation": learned.scores[learned.best - 1]})
    methods[SIDECAR] = Method(np.stack([logits_of(sidecar, table.by_layer, table.overall)
                                        for sidecar in sidecars]), {"runs": runs})
    if table.final is not None:
        notify("layer probe")
        methods["layer probe"] = _layer_probe(table.final, table.known, train, validate, options)
    for name, features in (("globals", table.overall), ("entropies", table.entropies)):
        notify(name)
        probe, about = _chosen(features.reshape(len(features), -1), table.known, train, validate, options)
        methods[name] = Method(probe[None], about)
    methods["negative entropy"] = Method(-table.overall[None, :, 0].astype(float), {})
    if table.final is not None:
        methods["familiarity"] = _familiarity(table.final, table.known, train, options)
    if table.robustness is not None:
        methods["robustness"] = Method(-table.robustness[None].astype(float), {})
    notify("controls")
    for name, scores in controls.controls(table.text.tolist(), table.known, table.dataset, train,
                                          table.popularity).items():
        methods[name] = Method(np.asarray(scores, float)[None], {"control": True})
    found: Methods = {}
    calibrators: dict[str, list[Calibrator]] = {}
    for name, method in methods.items():
        if _says(method, table, calibrate):
            calibrators[name] = [_calibrated(run, table.known, calibrate, options) for run in method.scores]
            found[name] = Scores(method.scores, np.stack([
                np.where(np.isnan(run), np.nan, calibrator(np.nan_to_num(run)))
                for run, calibrator in zip(method.scores, calibrators[name], strict=True)]))
    return FittedMethods(found, {name: methods[name].about for name in found}, sidecars, calibrators[SIDECAR])


# ---------------------------------------------------------------------------------------------


def _examples(table: Table, rows: Rows) -> Examples:
    return Examples(table.by_layer[rows], table.overall[rows], table.known[rows])


def _calibrated(scores: Floats, known: NDArray, rows: Rows, options: FitConfig) -> Calibrator:
    heard = rows[~np.isnan(scores[rows])]
    return CALIBRATORS[options.calibrate](scores[heard], known[heard])


def _says(scored: Method, table: Table, rows: Rows) -> bool:
    """Whether it says something of known and of unknown questions there."""
    heard = rows[~np.isnan(scored.scores[0, rows])]
    return len(np.unique(table.known[heard])) == 2


def _logistic(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))


def _chosen(features: np.ndarray, known: np.ndarray, train: Rows, validate: Rows,
            options: FitConfig) -> tuple[Floats, dict[str, Any]]:
    """Log odds `[questions]` of the probe whose C is the best on validate; of equals, the smallest."""
    best: tuple[float, float, Pipeline] | None = None
    for strength in sorted(options.strengths):
        probe = _logistic(strength).fit(features[train].astype(float), known[train])
        area = auroc(known[validate], probe.decision_function(features[validate].astype(float)))
        if best is None or area > best[0]:
            best = area, strength, probe
    assert best is not None
    return best[2].decision_function(features.astype(float)), {"C": best[1], "validation": best[0]}


def _layer_probe(final: np.ndarray, known: np.ndarray, train: Rows, validate: Rows,
                 options: FitConfig) -> Method:
    """The layer whose probe is the best on validate; of equals, the first."""
    found = Parallel(n_jobs=options.jobs)(delayed(_chosen)(final[:, layer], known, train, validate, options)
                                for layer in range(final.shape[1]))
    areas = [about["validation"] for _, about in found]
    best = int(np.argmax(areas))
    return Method(found[best][0][None], {"layer": best, **found[best][1], "by_layer": areas})


def _familiarity(final: np.ndarray, known: np.ndarray, train: Rows, options: FitConfig) -> Method:
    layer = int(options.familiarity * final.shape[1])
    values = final[:, layer].astype(float)
    found = Familiarity.fit(values[train], known[train])
    return Method(-found.distance(values)[None], {"layer": layer, "shrinkage": found.shrinkage})
