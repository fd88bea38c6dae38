"""Heads and probes on a network that stays as it is: what its activations tell of what it does not know.

    pooled      logistic regression on the mean of the last stream over the prompt
    low_rank    the same on the last position, through its leading principal directions alone
    raw_probe   the study of difficulty's probe on the stream at the last position, of the layer that
                cross-validation chooses
    sae_probe   the same on the codes of a TopK autoencoder of that layer

The heads are fitted to what v8b and v9 learn from, and differ from these in method alone; the probes, which
are signals of v4, to prompts that v4 has not learned.
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

from tilelli_jax import store
from tilelli_jax.data.activations import write_activations
from tilelli_jax.estimators.sae import Codes
from tilelli_jax.signals.prompts import Prompt
from tilelli_jax.signals.scoring import Scorer, Text, recording
from tilelli_jax.signals.uncertainty import Uncertainty, UncertaintyReader
from tilelli_jax.training.run import RunDirectory

from ..checks import Floats
from ..folds import number_of_folds, stratified
from ..inputs.networks import trained
from ..probes import Fitted, ProbeOptions, fit_probe
from .config import FittedConfig, RecipeConfig
from .measure import turn

SCORES = ("pooled", "low_rank", "raw_probe", "sae_probe")
PLACE = "resid_post"
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0)


class Found(NamedTuple):
    """What heads and probes say of each list of prompts, score → `[prompts]`, and how they came about (JSON).

    `about["heads"]` has for each head the parameters fitted, and the seconds taken, reading included.
    """

    scores: list[dict[str, Floats]]
    about: dict[str, Any]


def fit(path: Path, model: Any, taught: Mapping[str, bool], held_out: Mapping[str, bool],
        asked: Sequence[Sequence[str]], options: FittedConfig, sae: RecipeConfig, seed: int,
        batch_size: int) -> Found:
    """Fits all of them to prompts, and asks them of others.

    Args:
        path: a directory for the autoencoder's rows and run.
        taught: prompt → whether it can be answered, for the heads.
        held_out: likewise, for the probes; v4 has learned from none of them.
        asked: lists of prompts.

    Raises:
        TrainingStopped: see `networks.trained`.
    """
    reader = UncertaintyReader(model, batch_size=batch_size)
    others = [[turn(prompt) for prompt in prompts] for prompts in asked]
    there = [reader.read(some, "features") for some in others]

    begun = time.monotonic()
    unknown, turns = _labels(taught), [turn(prompt) for prompt in taught]
    lesson = reader.read(turns, "heads")
    read_in = time.monotonic() - begun
    pooled, pooled_in = _timed(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
                               lesson.pooled, unknown)
    rank = min(options.rank, lesson.hidden.shape[1])
    low_rank, low_rank_in = _timed(
        make_pipeline(StandardScaler(), PCA(rank, random_state=seed), LogisticRegression(max_iter=2000)),
        lesson.hidden, unknown)

    unknown, turns = _labels(held_out), [turn(prompt) for prompt in held_out]
    here = reader.read(turns, "probes")
    folds = stratified(unknown, number_of_folds(unknown), seed=seed)
    how = ProbeOptions(strengths=STRENGTHS, seed=seed, jobs=options.jobs)
    probes = [fit_probe(here.read.final[:, layer], unknown, folds, how)
              for layer in range(model.config.n_layers)]
    areas = [max(probe.cross_validated.values()) for probe in probes]
    layer = int(np.argmax(areas))

    coder = _autoencoder(path, model, turns, layer, options, sae, seed, batch_size)
    encoder = UncertaintyReader(model, sae=coder, batch_size=batch_size, lens=False)
    codes = [_dense(encoder.read(some, "codes"), coder.config.n_latents) for some in (turns, *others)]
    of_codes = fit_probe(codes[0], unknown, folds, how)
    scores = [{"pooled": pooled.predict_proba(found.pooled)[:, 1],
               "low_rank": low_rank.predict_proba(found.hidden)[:, 1],
               "raw_probe": probes[layer].probabilities(found.read.final[:, layer]),
               "sae_probe": of_codes.probabilities(code)}
              for found, code in zip(there, codes[1:], strict=True)]
    return Found(scores, {
        "prompts": {"heads": len(taught), "probes": len(held_out)},
        "layer": layer, "layers": areas, "rank": rank,
        "variance_of_rank": float(low_rank[1].explained_variance_ratio_.sum()),
        "heads": {"pooled": {"trained_parameters": lesson.pooled.shape[1] + 1,
                             "seconds": read_in + pooled_in},
                  # The directions are fitted as well.
                  "low_rank": {"trained_parameters": low_rank[1].components_.size + rank + 1,
                               "seconds": read_in + low_rank_in}},
        "raw_probe": _about(probes[layer]), "sae_probe": _about(of_codes),
        "autoencoder": RunDirectory(path / "run").read_summary()})


def _labels(prompts: Mapping[str, bool]) -> np.ndarray:
    """1 where a prompt cannot be answered."""
    return np.array([not known for known in prompts.values()], int)


def _timed(pipeline: Pipeline, features: np.ndarray, labels: np.ndarray) -> tuple[Pipeline, float]:
    """It fitted, and how many seconds that took."""
    begun = time.monotonic()
    return pipeline.fit(features, labels), time.monotonic() - begun


def _autoencoder(path: Path, model: Any, turns: Sequence[Prompt], layer: int, options: FittedConfig,
                 sae: RecipeConfig, seed: int, batch_size: int) -> Any:
    """One of the stream at every position of the prompts."""
    d_model, rows = model.config.d_model, path / "rows"
    if not rows.exists():
        write_activations(rows, _streams(model, turns, layer, batch_size), {"place": PLACE, "layer": layer})
    return store.load(trained(sae.train, path / "run", [
        *sae.set, f"activations.source={rows}", f"model.d_model={d_model}", f"model.layer={layer}",
        f"model.n_latents={options.latents * d_model}", f"model.place={PLACE}", f"seed={seed}"]))


def _streams(model: Any, turns: Sequence[Prompt], layer: int, batch_size: int) -> Iterator[np.ndarray]:
    """The stream after a layer at every position, one prompt after the other: `[time, d_model]`."""
    longest = max(len(prompt.ids) for prompt in turns)
    scorer = Scorer(model, recording((PLACE,), (layer,)), nll=False, batch_size=batch_size)
    # Positions past a prompt's end stand for its last: they are cut off again.
    texts = [Text(prompt.ids, np.minimum(np.arange(longest), len(prompt.ids) - 1).tolist())
             for prompt in turns]
    for i, found in scorer(texts, what="rows"):
        yield found.seen[PLACE][0][:len(turns[i].ids)]


def _dense(found: Uncertainty, n_latents: int) -> scipy.sparse.csr_array:
    """The codes as sparse rows, `[prompts, n_latents]`."""
    assert found.codes is not None
    codes: Codes = found.codes
    # Indices of 32 bits: scikit-learn takes no others.
    rows = np.repeat(np.arange(len(codes.values), dtype=np.int32), codes.values.shape[1])
    return scipy.sparse.csr_array((np.ravel(codes.values), (rows, np.ravel(codes.latents))),
                                  shape=(len(codes.values), n_latents))


def _about(probe: Fitted) -> dict[str, Any]:
    return {"strength": probe.strength, "cross_validated": max(probe.cross_validated.values())}
