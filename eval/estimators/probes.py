"""The estimators that learn from activations and features of the prompt or of the answer."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ..checks import Floats
from ..familiarity import Familiarity
from ..metrics import auroc
from . import samples
from .config import FitConfig
from .interface import Estimator, Group, LinearProbe, Method, Need, Rows, Training


@dataclasses.dataclass(frozen=True)
class FeatureProbe(Estimator):
    """Logistic regression on features of the prompt, `attribute` of the table, flattened."""

    attribute: str
    source: str = ""
    group: Group = "prompt"

    def fit(self, training: Training) -> Method:
        features = getattr(training.table, self.attribute)
        log_odds, info, _ = _best_probe(features.reshape(len(features), -1), training.table.known,
                                        training.train, training.validate, training.options)
        return Method(log_odds[None], info)


@dataclasses.dataclass(frozen=True)
class LayerProbe(Estimator):
    """Logistic regression on the residual stream of the layer that the validate split selects.

    `activations`: "final" for the prompt's last position, "answer_final" for the answer's last token.
    """

    activations: Need = "final"
    group: Group = "prompt"
    source: str = "Alain & Bengio 2016, arXiv:1610.01644; P(IK): Kadavath et al. 2022, arXiv:2207.05221"

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (self.activations,) if self.activations == "final" else ("greedy", self.activations)

    def fit(self, training: Training) -> Method:
        values: Any = getattr(training.table, self.activations)
        method = _layer_probe(values, training.table.known, training.train, training.validate,
                              training.options)
        return method if self.activations == "final" else method._replace(probe=None)


@dataclasses.dataclass(frozen=True)
class AbstainHead(Estimator):
    """A linear head on the normalised stream of the last layer: an abstain head of a frozen network.

    The stream is divided by its root mean square, like a final norm without weights, and the head is a
    logistic regression. Where the final norm has weights, they scale the head's.
    """

    group: Group = "prompt"
    needs: tuple[Need, ...] = ("final",)
    source: str = "Tilelli v9"

    def fit(self, training: Training) -> Method:
        assert training.table.final is not None
        last = training.table.final[:, -1].astype(float)
        normed = last / np.sqrt((last**2).mean(axis=1, keepdims=True) + 1e-6)
        log_odds, info, _ = _best_probe(normed, training.table.known, training.train, training.validate,
                                        training.options)
        return Method(log_odds[None], info)


@dataclasses.dataclass(frozen=True)
class SemanticEntropyProbe(Estimator):
    """Logistic regression on the residual stream that predicts whether the semantic entropy is low.

    Correctness is not used. The threshold of the entropy minimises the variance within the two classes.
    """

    group: Group = "prompt"
    needs: tuple[Need, ...] = ("final",)
    learns_with = ("samples",)
    learns_from = "samples"
    source: str = "Kossen et al. 2024, arXiv:2406.15927"

    def fit(self, training: Training) -> Method | None:
        table = training.table
        assert table.samples is not None and table.final is not None
        certainty = np.full(len(table.known), np.nan)
        certainty[table.samples.rows] = [
            samples.semantic_entropy(log_probs, classes) for log_probs, classes in zip(
                table.samples.log_probs, table.samples.classes, strict=True)]
        train, validate = (rows[~np.isnan(certainty[rows])] for rows in (training.train, training.validate))
        if len(train) < 2 or not np.ptp(certainty[train]):
            return None
        threshold = two_class_threshold(certainty[train])
        is_certain = (np.nan_to_num(certainty) > threshold).astype(np.int64)
        if len(np.unique(is_certain[validate])) < 2:
            return None
        method = _layer_probe(table.final, is_certain, train, validate, training.options)
        return method._replace(info=method.info | {"threshold": -threshold})


@dataclasses.dataclass(frozen=True)
class MassMean(Estimator):
    """(μ₁ − μ₀)ᵀ Σ⁻¹ h, or without Σ⁻¹; μ of known and unknown questions, Σ within the two, shrunk.

    The validate split selects the layer.
    """

    whitened: bool = True
    group: Group = "prompt"
    needs: tuple[Need, ...] = ("final",)
    source: str = "Marks & Tegmark 2023, arXiv:2310.06824"

    def fit(self, training: Training) -> Method:
        table, train = training.table, training.train
        assert table.final is not None
        final, known = table.final, table.known[train] == 1

        def scores_of(layer: int) -> Floats:
            values = final[:, layer].astype(float)
            means = [values[train][known == label].mean(0) for label in (True, False)]
            direction = means[0] - means[1]
            if self.whitened:
                centred = values[train] - np.where(known[:, None], *means)
                direction = LedoitWolf(assume_centered=True).fit(centred).get_precision() @ direction
            return values @ direction
        return _best_layer([scores_of(layer) for layer in range(final.shape[1])], table.known,
                           training.validate)


@dataclasses.dataclass(frozen=True)
class Saplma(Estimator):
    """A network of widths 256, 128 and 64 on the residual stream, trained until validation stops improving.

    The validate split selects the epoch and, among `saplma_depths`, the layer.
    """

    group: Group = "prompt"
    needs: tuple[Need, ...] = ("final",)
    source: str = "Azaria & Mitchell 2023, arXiv:2304.13734"
    epochs: int = 30
    patience: int = 5

    def fit(self, training: Training) -> Method:
        table, options = training.table, training.options
        assert table.final is not None
        layers = sorted({int(depth * table.final.shape[1]) for depth in options.saplma_depths})
        runs = Parallel(n_jobs=options.jobs)(
            delayed(self._run)(table.final[:, layer].astype(np.float32), table.known, training.train,
                               training.validate, seed) for seed in options.seeds for layer in layers)
        scores, infos = [], []
        for i, seed in enumerate(options.seeds):
            of_seed = runs[i * len(layers):(i + 1) * len(layers)]
            best = int(np.argmax([area for _, area, _ in of_seed]))
            scores.append(of_seed[best][0])
            infos.append({"seed": seed, "layer": layers[best], "validation_auroc": of_seed[best][1],
                          "epoch": of_seed[best][2]})
        return Method(np.stack(scores), {"runs": infos})

    def _run(self, values: np.ndarray, known: NDArray, train: Rows, validate: Rows, seed: int
             ) -> tuple[Floats, float, int]:
        """Scores of all questions, validation AUROC and number of epochs of the best epoch."""
        scaled = StandardScaler().fit(values[train]).transform(values)
        model = MLPClassifier((256, 128, 64), random_state=seed)
        best: tuple[Floats, float, int] | None = None
        for epoch in range(1, self.epochs + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.partial_fit(scaled[train], known[train], classes=[0, 1])
            probabilities = np.clip(model.predict_proba(scaled)[:, 1].astype(float), 1e-12, 1 - 1e-12)
            scores = np.log(probabilities / (1 - probabilities))
            area = auroc(known[validate], scores[validate])
            if best is None or area > best[1]:
                best = scores, area, epoch
            elif epoch - best[2] >= self.patience:
                break
        assert best is not None
        return best


@dataclasses.dataclass(frozen=True)
class Mahalanobis(Estimator):
    """Minus the Mahalanobis distance to known training questions, at `familiarity_depth`.

    `relative`: minus (the squared distance to known questions − that to all training questions).
    """

    relative: bool = False
    group: Group = "prompt"
    needs: tuple[Need, ...] = ("final",)
    source: str = "Lee et al. 2018, arXiv:1807.03888; relative: Ren et al. 2022, arXiv:2209.15558"

    def fit(self, training: Training) -> Method:
        table, train = training.table, training.train
        assert table.final is not None
        layer = int(training.options.familiarity_depth * table.final.shape[1])
        values = table.final[:, layer].astype(float)
        known = Familiarity.fit(values[train], table.known[train])
        info = {"layer": layer, "shrinkage": known.shrinkage}
        if not self.relative:
            return Method(-known.distance(values)[None], info)
        everything = Familiarity.fit(values[train], np.ones(len(train), np.int64))
        return Method((everything.distance(values)**2 - known.distance(values)**2)[None], info)


def two_class_threshold(values: Floats) -> float:
    """Returns the threshold that minimises the sum of squared deviations within the two classes of values.

    It lies in the middle between two neighbouring values; the values above it are one class.
    """
    ordered = np.sort(values)
    n, sums, squares = np.arange(1, len(ordered)), np.cumsum(ordered)[:-1], np.cumsum(ordered**2)[:-1]
    total, total_squares = ordered.sum(), (ordered**2).sum()
    within = (squares - sums**2 / n) + (total_squares - squares - (total - sums)**2 / (len(ordered) - n))
    within[np.diff(ordered) == 0] = np.inf
    best = int(np.argmin(within))
    return float((ordered[best] + ordered[best + 1]) / 2)


# ---------------------------------------------------------------------------------------------


def _logistic(c_value: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=c_value, max_iter=2000))


def _best_probe(features: np.ndarray, labels: np.ndarray, train: Rows, validate: Rows,
                options: FitConfig) -> tuple[Floats, dict[str, Any], Pipeline]:
    """Selects C by AUROC on the validate split, the smallest of equals. Returns log odds, info and probe."""
    best: tuple[float, float, Pipeline] | None = None
    for c_value in sorted(options.c_values):
        probe = _logistic(c_value).fit(features[train].astype(float), labels[train])
        area = auroc(labels[validate], probe.decision_function(features[validate].astype(float)))
        if best is None or area > best[0]:
            best = area, c_value, probe
    assert best is not None
    info = {"C": best[1], "validation_auroc": best[0]}
    return best[2].decision_function(features.astype(float)), info, best[2]


def _layer_probe(values: np.ndarray, labels: np.ndarray, train: Rows, validate: Rows,
                 options: FitConfig) -> Method:
    """Selects the layer by AUROC on the validate split, the first of equals."""
    probes = Parallel(n_jobs=options.jobs)(
        delayed(_best_probe)(values[:, layer], labels, train, validate, options)
        for layer in range(values.shape[1]))
    areas = [info["validation_auroc"] for _, info, _ in probes]
    best = int(np.argmax(areas))
    log_odds, info, (scaler, model) = probes[best]
    weight = model.coef_[0] / scaler.scale_
    probe = LinearProbe(best, weight, float(model.intercept_[0] - scaler.mean_ @ weight))
    return Method(log_odds[None], {"layer": best, **info, "by_layer": areas}, probe)


def _best_layer(by_layer: list[Floats], known: np.ndarray, validate: Rows) -> Method:
    areas = [auroc(known[validate], scores[validate]) for scores in by_layer]
    best = int(np.argmax(areas))
    return Method(by_layer[best][None], {"layer": best, "validation_auroc": areas[best], "by_layer": areas})
