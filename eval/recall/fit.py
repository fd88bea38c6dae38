"""The sidecar and the methods that it is compared with, all fitted to the train split.

    sidecar                a GRU over the layers on signals A and B (one run for each seed)
    layer probe            logistic regression on the residual stream at the last position, best layer
    prompt features        logistic regression on the ten features of the whole prompt
    entropies              logistic regression on three entropies per layer (TriLens)
    negative entropy       of the next token; nothing is fitted
    familiarity            minus the Mahalanobis distance to known questions
    robustness             minus the divergence under noise
    words, length, …       controls that do not use the network (controls.py)
Scores rise with the probability of a correct answer. Methods are fitted to the train split, the validate
split selects hyperparameters, and the calibrate split fits the map from scores to probabilities.
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
from tilelli_jax.estimators.fit_sidecar import Examples, fit_sidecar, sidecar_logits
from tilelli_jax.estimators.sidecar import Sidecar
from tilelli_jax.signals.crystallisation import BY_LAYER, PROMPT_FEATURES

from ..calibration import CALIBRATORS, Calibrator
from ..checks import Floats
from ..familiarity import Familiarity
from ..metrics import auroc
from . import controls
from .config import FitConfig
from .scores import Methods, Scores
from .table import QuestionTable

SIDECAR = "sidecar"
Rows = NDArray[np.intp]


class Method(NamedTuple):
    """`scores` f64 `[runs, questions]`, NaN for a question without a score; `info`: what was selected."""

    scores: Floats
    info: dict[str, Any]


class FittedMethods(NamedTuple):
    """Scores and info of every method; the sidecar of each seed with its calibrator."""

    methods: Methods
    info: dict[str, dict[str, Any]]
    sidecars: list[Sidecar]
    calibrators: list[Calibrator]


def fit(table: QuestionTable, options: FitConfig, dataset: str | None = None, *,
        notify: Callable[[str], None] = lambda line: None) -> FittedMethods:
    """Fits every method to the questions of one data set, or of all.

    A method is omitted if its scores on the calibrate split cover only one label.
    """
    train, validate, calibrate = (table.rows(split, dataset) for split in ("train", "validate", "calibrate"))
    sidecars: list[Sidecar] = []
    methods: dict[str, Method] = {}
    runs = []
    for seed in options.seeds:
        notify(f"{SIDECAR}, seed {seed}")
        try:
            run = fit_sidecar(_examples(table, train), _examples(table, validate), auroc, options.sidecar,
                              names=BY_LAYER, prompt_feature_names=PROMPT_FEATURES, seed=seed)
        except ValueError as error:
            raise InputError(f"fit.sidecar: {error}") from None
        sidecars.append(run.sidecar)
        runs.append({"seed": seed, "epoch": run.best_epoch,
                     "validation_auroc": run.scores[run.best_epoch - 1]})
    methods[SIDECAR] = Method(np.stack([sidecar_logits(sidecar, table.by_layer, table.prompt_features)
                                        for sidecar in sidecars]), {"runs": runs})
    if table.final is not None:
        notify("layer probe")
        methods["layer probe"] = _layer_probe(table.final, table.known, train, validate, options)
    for name, features in (("prompt features", table.prompt_features), ("entropies", table.entropies)):
        notify(name)
        log_odds, info = _best_probe(features.reshape(len(features), -1), table.known, train, validate,
                                     options)
        methods[name] = Method(log_odds[None], info)
    final_entropy = table.prompt_features[None, :, PROMPT_FEATURES.index("a_final_entropy")]
    methods["negative entropy"] = Method(-final_entropy.astype(float), {})
    if table.final is not None:
        methods["familiarity"] = _familiarity(table.final, table.known, train, options)
    if table.robustness is not None:
        methods["robustness"] = Method(-table.robustness[None].astype(float), {})
    notify("controls")
    for name, scores in controls.controls(table.text.tolist(), table.known, table.dataset, train,
                                          table.popularity).items():
        methods[name] = Method(np.asarray(scores, float)[None], {"control": True})
    fitted: Methods = {}
    calibrators: dict[str, list[Calibrator]] = {}
    for name, method in methods.items():
        if _covers_both_labels(method, table, calibrate):
            calibrators[name] = [_calibrator(run, table.known, calibrate, options) for run in method.scores]
            fitted[name] = Scores(method.scores, np.stack([
                np.where(np.isnan(run), np.nan, calibrator(np.nan_to_num(run)))
                for run, calibrator in zip(method.scores, calibrators[name], strict=True)]))
    return FittedMethods(fitted, {name: methods[name].info for name in fitted}, sidecars,
                         calibrators[SIDECAR])


# ---------------------------------------------------------------------------------------------


def _examples(table: QuestionTable, rows: Rows) -> Examples:
    return Examples(table.by_layer[rows], table.prompt_features[rows], table.known[rows])


def _scored_rows(scores: Floats, rows: Rows) -> Rows:
    return rows[~np.isnan(scores[rows])]


def _calibrator(scores: Floats, known: NDArray, rows: Rows, options: FitConfig) -> Calibrator:
    scored = _scored_rows(scores, rows)
    return CALIBRATORS[options.calibrate](scores[scored], known[scored])


def _covers_both_labels(method: Method, table: QuestionTable, rows: Rows) -> bool:
    """Returns whether the method scores both known and unknown questions among these rows."""
    return len(np.unique(table.known[_scored_rows(method.scores[0], rows)])) == 2


def _logistic(c_value: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=c_value, max_iter=2000))


def _best_probe(features: np.ndarray, known: np.ndarray, train: Rows, validate: Rows,
                options: FitConfig) -> tuple[Floats, dict[str, Any]]:
    """Selects C by AUROC on the validate split, the smallest of equals. Returns log odds and info."""
    best: tuple[float, float, Pipeline] | None = None
    for c_value in sorted(options.c_values):
        probe = _logistic(c_value).fit(features[train].astype(float), known[train])
        area = auroc(known[validate], probe.decision_function(features[validate].astype(float)))
        if best is None or area > best[0]:
            best = area, c_value, probe
    assert best is not None
    return best[2].decision_function(features.astype(float)), {"C": best[1], "validation_auroc": best[0]}


def _layer_probe(final: np.ndarray, known: np.ndarray, train: Rows, validate: Rows,
                 options: FitConfig) -> Method:
    """Selects the layer by AUROC on the validate split, the first of equals."""
    probes = Parallel(n_jobs=options.jobs)(
        delayed(_best_probe)(final[:, layer], known, train, validate, options)
        for layer in range(final.shape[1]))
    areas = [info["validation_auroc"] for _, info in probes]
    best = int(np.argmax(areas))
    log_odds, info = probes[best]
    return Method(log_odds[None], {"layer": best, **info, "by_layer": areas})


def _familiarity(final: np.ndarray, known: np.ndarray, train: Rows, options: FitConfig) -> Method:
    layer = int(options.familiarity_depth * final.shape[1])
    activations = final[:, layer].astype(float)
    model = Familiarity.fit(activations[train], known[train])
    return Method(-model.distance(activations)[None], {"layer": layer, "shrinkage": model.shrinkage})
