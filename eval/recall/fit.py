"""The sidecar and its rivals: what each says of every question, learned from one part of them.

    sidecar                a GRU over the layers on signals A and B (several runs, one for each seed)
    layer probe            logistic on the stream at the last position, at the best layer
    globals                logistic on the ten features of the whole prompt
    entropies              logistic on three entropies a layer (TriLens)
    negative entropy       of the next symbol: nothing is learned
    familiarity            minus the Mahalanobis distance to known questions
    robustness             minus the divergence under noise
    words, length, …       controls that need no network (controls.py)
Scores rise with the chance of knowing. What is learned sees train; choices look at validate; what turns
scores into probabilities is fitted on calibrate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from eval.calibration import Calibrator, isotonic, platt, temperature
from eval.familiarity import Familiarity
from eval.metrics import Floats, auroc
from eval.recall import controls
from eval.recall.config import FitConfig
from eval.recall.table import Table
from tilelli_jax.estimators.sidecar import Sidecar
from tilelli_jax.signals.crystallisation import BY_LAYER, OVERALL
from tilelli_jax.training.sidecar import Examples, learn, logits_of

SIDECAR = "sidecar"
LEARN: Mapping[str, Callable[[ArrayLike, ArrayLike], Calibrator]] = {
    "platt": platt, "isotonic": isotonic, "temperature": temperature}
Rows = NDArray[np.intp]


class Scored(NamedTuple):
    """One method: scores f64 `[runs, questions]`, NaN where it says nothing; and what is to be told of it."""

    scores: Floats
    about: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """All methods by name, the sidecars, and the calibrator of each run of each method."""

    methods: Mapping[str, Scored]
    sidecars: list[Sidecar]
    calibrators: Mapping[str, list[Calibrator]]

    def probabilities(self, name: str) -> Floats:
        """P(knows), `[runs, questions]`; NaN where the method says nothing."""
        scores = self.methods[name].scores
        return np.stack([np.where(np.isnan(run), np.nan, learned(np.nan_to_num(run)))
                         for run, learned in zip(scores, self.calibrators[name], strict=True)])


def fit(table: Table, options: FitConfig, dataset: str | None = None, *,
        tell: Callable[[str], None] = lambda line: None) -> Fitted:
    """Every method, learned from the questions of one data set, or of all."""
    train, validate, calibrate = (table.rows(part, dataset) for part in ("train", "validate", "calibrate"))
    sidecars, methods = [], {}
    runs = []
    for seed in options.seeds:
        tell(f"{SIDECAR}, seed {seed}")
        learned = learn(_examples(table, train), _examples(table, validate), auroc, options.sidecar,
                        names=BY_LAYER, names_whole=OVERALL, seed=seed)
        sidecars.append(learned.sidecar)
        runs.append({"seed": seed, "epoch": learned.best, "validation": learned.scores[learned.best - 1]})
    methods[SIDECAR] = Scored(np.stack([logits_of(sidecar, table.by_layer, table.overall)
                                        for sidecar in sidecars]), {"runs": runs})
    if table.final is not None:
        tell("layer probe")
        methods["layer probe"] = _layer_probe(table.final, table.known, train, validate, options)
    for name, features in (("globals", table.overall), ("entropies", table.entropies)):
        tell(name)
        probe, about = _chosen(features.reshape(len(features), -1), table.known, train, validate, options)
        methods[name] = Scored(probe[None], about)
    methods["negative entropy"] = Scored(-table.overall[None, :, 0].astype(float), {})
    if table.final is not None:
        methods["familiarity"] = _familiarity(table.final, table.known, train, options)
    if table.robustness is not None:
        methods["robustness"] = Scored(-table.robustness[None].astype(float), {})
    tell("controls")
    for name, scores in controls.controls(table.text.tolist(), table.known, table.dataset, train,
                                          table.popularity).items():
        methods[name] = Scored(np.asarray(scores, float)[None], {"control": True})
    calibrators = {name: [_calibrated(run, table.known, calibrate, options) for run in scored.scores]
                   for name, scored in methods.items() if _says(scored, table, calibrate)}
    return Fitted({name: methods[name] for name in calibrators}, sidecars, calibrators)


# ---------------------------------------------------------------------------------------------


def _examples(table: Table, rows: Rows) -> Examples:
    return Examples(table.by_layer[rows], table.overall[rows], table.known[rows])


def _calibrated(scores: Floats, known: NDArray, rows: Rows, options: FitConfig) -> Calibrator:
    heard = rows[~np.isnan(scores[rows])]
    return LEARN[options.calibrate](scores[heard], known[heard])


def _says(scored: Scored, table: Table, rows: Rows) -> bool:
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
                 options: FitConfig) -> Scored:
    """The layer whose probe is the best on validate; of equals, the first."""
    found = Parallel(n_jobs=options.jobs)(delayed(_chosen)(final[:, layer], known, train, validate, options)
                                for layer in range(final.shape[1]))
    areas = [about["validation"] for _, about in found]
    best = int(np.argmax(areas))
    return Scored(found[best][0][None], {"layer": best, **found[best][1], "by_layer": areas})


def _familiarity(final: np.ndarray, known: np.ndarray, train: Rows, options: FitConfig) -> Scored:
    layer = int(options.familiarity * final.shape[1])
    values = final[:, layer].astype(float)
    found = Familiarity.fit(values[train], known[train])
    return Scored(-found.distance(values)[None], {"layer": layer, "shrinkage": found.shrinkage})
