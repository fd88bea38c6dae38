"""Heads and probes on a frozen network: predict from its activations whether it knows the answer.

    mean_pool_head  logistic regression on the residual stream after the final norm, mean over the prompt
    pca_head        logistic regression on the leading principal directions of that stream at the last
                    position
    raw_probe       the difficulty study's probe on the residual stream at the last position, of the layer
                    that cross-validation selects
    sae_probe       the same probe on the codes of a TopK autoencoder of that layer

The heads are fitted to the training data of v8b and v9, so that only the method differs from these. The
probes are signals of v4 and are fitted to prompts on which v4 was not trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from tilelli_jax.data.activations import write_activations
from tilelli_jax.estimators.sae import Codes
from tilelli_jax.loading import store
from tilelli_jax.signals.prompts import PromptIds
from tilelli_jax.signals.scoring import Scorer, Text, recording
from tilelli_jax.signals.uncertainty import Uncertainty, UncertaintyReader
from tilelli_jax.training.run import RunDirectory

from ..checks import Floats
from ..folds import number_of_folds, stratified
from ..inputs.networks import NetworkConfig, train_network
from ..probes import Fitted, ProbeOptions, fit_probe
from .config import FittedConfig
from .measure import turn

SCORES = ("mean_pool_head", "pca_head", "raw_probe", "sae_probe")
HOOK = "resid_post"
C_VALUES = (1e-3, 1e-2, 0.1, 1.0)


class FittedScores(NamedTuple):
    """The scores of heads and probes for each list of prompts, score → `[prompts]`, and how they were fitted.

    `result` is JSON. `result["heads"]` has for each head the number of fitted parameters, and the time in
    seconds, including the passes of the network.
    """

    scores: list[dict[str, Floats]]
    result: dict[str, Any]


def fit(path: Path, model: Any, head_prompts: Mapping[str, bool], probe_prompts: Mapping[str, bool],
        evaluated: Sequence[Sequence[str]], options: FittedConfig, sae: NetworkConfig, seed: int,
        batch_size: int) -> FittedScores:
    """Fits all heads and probes, and scores other prompts with them.

    Args:
        path: a directory for the autoencoder's activations and run.
        head_prompts: prompt → whether it can be answered; the heads are fitted to these.
        probe_prompts: likewise for the probes; v4 was not trained on them.
        evaluated: lists of prompts to score.

    Raises:
        TrainingStopped: see `networks.train_network`.
    """
    reader = UncertaintyReader(model, batch_size=batch_size)
    evaluated_turns = [[turn(prompt) for prompt in prompts] for prompts in evaluated]
    evaluated_features = [reader.read(turns, "features") for turns in evaluated_turns]

    begun = time.monotonic()
    unknown, turns = _labels(head_prompts), [turn(prompt) for prompt in head_prompts]
    head_features = reader.read(turns, "heads")
    read_seconds = time.monotonic() - begun
    pooled, pooled_seconds = _timed(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
                                    head_features.pooled, unknown)
    rank = min(options.rank, head_features.hidden.shape[1])
    pca_head, low_rank_seconds = _timed(
        make_pipeline(StandardScaler(), PCA(rank, random_state=seed), LogisticRegression(max_iter=2000)),
        head_features.hidden, unknown)

    unknown, turns = _labels(probe_prompts), [turn(prompt) for prompt in probe_prompts]
    probe_features = reader.read(turns, "probes")
    folds = stratified(unknown, number_of_folds(unknown), seed=seed)
    probe_options = ProbeOptions(c_values=C_VALUES, seed=seed, jobs=options.jobs)
    probes = [fit_probe(probe_features.lens.final[:, layer], unknown, folds, probe_options)
              for layer in range(model.config.n_layers)]
    aurocs = [max(probe.cross_validated.values()) for probe in probes]
    layer = int(np.argmax(aurocs))

    autoencoder = _autoencoder(path, model, turns, layer, options, sae, seed, batch_size)
    encoder = UncertaintyReader(model, sae=autoencoder, batch_size=batch_size, lens=False)
    codes = [_sparse_codes(encoder.read(some, "codes"), autoencoder.config.n_latents)
             for some in (turns, *evaluated_turns)]
    sae_probe = fit_probe(codes[0], unknown, folds, probe_options)
    scores = [{"mean_pool_head": pooled.predict_proba(features.pooled)[:, 1],
               "pca_head": pca_head.predict_proba(features.hidden)[:, 1],
               "raw_probe": probes[layer].probabilities(features.lens.final[:, layer]),
               "sae_probe": sae_probe.probabilities(list_codes)}
              for features, list_codes in zip(evaluated_features, codes[1:], strict=True)]
    return FittedScores(scores, {
        "prompts": {"heads": len(head_prompts), "probes": len(probe_prompts)},
        "layer": layer, "layers": aurocs, "rank": rank,
        "variance_of_rank": float(pca_head[1].explained_variance_ratio_.sum()),
        "heads": {"mean_pool_head": {"trained_parameters": head_features.pooled.shape[1] + 1,
                             "seconds": read_seconds + pooled_seconds},
                  # The principal directions are fitted as well.
                  "pca_head": {"trained_parameters": pca_head[1].components_.size + rank + 1,
                               "seconds": read_seconds + low_rank_seconds}},
        "raw_probe": _probe_result(probes[layer]), "sae_probe": _probe_result(sae_probe),
        "autoencoder": RunDirectory(path / "run").read_summary()})


def _labels(prompts: Mapping[str, bool]) -> np.ndarray:
    """Returns 1 where a prompt cannot be answered."""
    return np.array([not answerable for answerable in prompts.values()], int)


def _timed(pipeline: Pipeline, features: np.ndarray, labels: np.ndarray) -> tuple[Pipeline, float]:
    """Returns the fitted pipeline and the time that the fit took, in seconds."""
    begun = time.monotonic()
    return pipeline.fit(features, labels), time.monotonic() - begun


def _autoencoder(path: Path, model: Any, turns: Sequence[PromptIds], layer: int, options: FittedConfig,
                 sae: NetworkConfig, seed: int, batch_size: int) -> Any:
    """Trains an autoencoder of the residual stream at every position of the prompts."""
    d_model, rows = model.config.d_model, path / "rows"
    if not rows.exists():
        write_activations(rows, _streams(model, turns, layer, batch_size), {"hook": HOOK, "layer": layer})
    return store.load(train_network(sae.train, path / "run", [
        *sae.set, f"activations.source={rows}", f"model.d_model={d_model}", f"model.layer={layer}",
        f"model.n_latents={options.latents * d_model}", f"model.hook={HOOK}", f"seed={seed}"]))


def _streams(model: Any, turns: Sequence[PromptIds], layer: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the residual stream after a layer, prompt by prompt: `[time, d_model]`."""
    longest = max(len(prompt.ids) for prompt in turns)
    scorer = Scorer(model, recording((HOOK,), (layer,)), nll=False, batch_size=batch_size)
    # Shorter prompts repeat their last position as padding, which the yield cuts off.
    texts = [Text(prompt.ids, np.minimum(np.arange(longest), len(prompt.ids) - 1).tolist())
             for prompt in turns]
    for i, scored in scorer(texts, label="rows"):
        yield scored.activations[HOOK][0][:len(turns[i].ids)]


def _sparse_codes(uncertainty: Uncertainty, n_latents: int) -> scipy.sparse.csr_array:
    """Returns the codes as sparse rows, `[prompts, n_latents]`."""
    assert uncertainty.codes is not None
    codes: Codes = uncertainty.codes
    # scikit-learn requires 32-bit indices.
    rows = np.repeat(np.arange(len(codes.values), dtype=np.int32), codes.values.shape[1])
    return scipy.sparse.csr_array((np.ravel(codes.values), (rows, np.ravel(codes.latents))),
                                  shape=(len(codes.values), n_latents))


def _probe_result(probe: Fitted) -> dict[str, Any]:
    return {"c_value": probe.c_value, "cross_validated": max(probe.cross_validated.values())}
