"""The sidecar: a GRU over the layers on the features of the prompt, one run for each seed."""

from __future__ import annotations

import dataclasses

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.fit_sidecar import Examples, fit_sidecar, sidecar_logits
from tilelli_jax.estimators.sidecar import Sidecar
from tilelli_jax.signals.crystallisation import BY_LAYER, PROMPT_FEATURES

from ..metrics import auroc
from .interface import Estimator, Group, Method, Rows, Training


@dataclasses.dataclass(frozen=True)
class SidecarEstimator(Estimator):
    """Recall's sidecar on crystallisation and MLP-write specificity."""

    group: Group = "prompt"

    def fit(self, training: Training) -> Method:
        return self.fit_with_sidecars(training)[0]

    def fit_with_sidecars(self, training: Training) -> tuple[Method, list[Sidecar]]:
        """Returns the scores, and the sidecar of each seed."""
        table, options = training.table, training.options

        def examples(rows: Rows) -> Examples:
            return Examples(table.by_layer[rows], table.prompt_features[rows], table.known[rows])
        sidecars, runs = [], []
        for seed in options.seeds:
            try:
                run = fit_sidecar(examples(training.train), examples(training.validate), auroc,
                                  options.sidecar, names=BY_LAYER, prompt_feature_names=PROMPT_FEATURES,
                                  seed=seed)
            except ValueError as error:
                raise InputError(f"fit.sidecar: {error}") from None
            sidecars.append(run.sidecar)
            runs.append({"seed": seed, "epoch": run.best_epoch,
                         "validation_auroc": run.scores[run.best_epoch - 1]})
        scores = np.stack([sidecar_logits(sidecar, table.by_layer, table.prompt_features)
                           for sidecar in sidecars])
        return Method(scores, {"runs": runs}), sidecars
