"""The autoencoder of a study: trained on the train items or an existing one, and evaluated on test items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tilelli_jax.data.activations import Activations, open_activations, write_activations
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.io.files import write_atomically
from tilelli_jax.io.json_text import as_expected, read_json
from tilelli_jax.loading import store
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.signals.patching import EVERYTHING, PatchedLoss
from tilelli_jax.training.run import RunDirectory
from tilelli_jax.training.tasks.sae import reconstruction_quality

from ..inputs.networks import train_network
from ..tables import json_with_nulls, write_columns
from .config import DifficultyConfig, SAEStageConfig
from .extract import Extraction
from .features import encoded
from .study_data import StudyData

EVALUATION, ACTIVE = "evaluation.json", "active.parquet"


@dataclasses.dataclass(frozen=True)
class SAEEvaluation:
    """How well an autoencoder reconstructs the activations of held-out items.

    Attributes:
        source_model: name of the network whose activations trained the autoencoder; may be empty.
        steps: number of training updates; None if its directory does not contain a run summary.
        explained: fraction of variance explained, at all positions.
        dead: fraction of latents that are never active, at all positions.
        l0: mean number of active latents per row.
        rows: number of rows (positions of all held-out items).
        explained_probed: fraction of variance explained at the extracted positions, which the probes use.
        explained_random: fraction of variance that an autoencoder of the same shape with random weights
            explains, at all positions.
        losses: mean losses of the network over the items.
    """

    source_model: str
    steps: int | None
    explained: float
    dead: float
    l0: float
    rows: int
    explained_probed: float
    explained_random: float
    losses: PatchedLoss

    def faults(self, options: SAEStageConfig, network: str) -> list[str]:
        """Returns the reasons to reject the autoencoder; empty if there are none."""
        faults = []
        if self.source_model not in ("", network):
            faults.append(f"it was trained on activations of {self.source_model}, not of {network}")
        if self.steps is not None and self.steps < options.min_steps:
            faults.append(f"it was trained for {self.steps} updates (minimum {options.min_steps})")
        if self.dead > options.max_dead:
            faults.append(f"{self.dead:.0%} of its latents are never active in {self.rows} held-out rows "
                          f"(maximum {options.max_dead:.0%})")
        minimum = max(options.min_explained, self.explained_random + options.min_gain_over_random)
        if self.explained < minimum:
            faults.append(f"it explains {self.explained:.0%} of their variance (minimum {minimum:.0%}; "
                          f"random weights explain {self.explained_random:.0%})")
        return faults


def train_sae(path: Path, config: DifficultyConfig, data: StudyData, network: Any, items: Sequence[int],
              layer: int, source_model: str) -> None:
    """Writes the items' activations to `path/rows`, and trains an autoencoder on them in `path/run`.

    Raises:
        TrainingStopped: see `networks.train_network`.
    """
    hook = config.extract.hook
    metadata: dict[str, Any] = {"source_model": source_model, "hook": hook, "layer": layer}
    if isinstance(network, LanguageModel):
        metadata["prepend_bos"] = False  # `LanguageModel.encode` adds none
    rows = _stored_rows(path / "rows", metadata, lambda: data.activation_rows(network, items, layer))
    width = open_activations(rows).d_model
    train_network(config.sae.train, path / "run", [
        *config.sae.set, f"activations.source={rows}", f"model.d_model={width}", f"model.layer={layer}",
        f"model.source_model={source_model}", f"model.hook={hook}"])


def evaluate(path: Path, model: Path, config: DifficultyConfig, data: StudyData, network: Any,
             extraction: Extraction, items: Sequence[int], layer: int) -> None:
    """Evaluates the autoencoder in the directory `model` on items; writes evaluation.json and active.parquet.

    active.parquet contains, for each latent, the number of rows in which it is active: column `all` counts
    all positions, column `boundary` only the last positions of the prompts.

    Raises:
        InputError: the directory contains no autoencoder, or one of another width, hook or layer.
    """
    hook = config.extract.hook
    metadata = {"hook": hook, "layer": layer}
    chosen = set(items)
    held_out = open_activations(_stored_rows(path / "held-out", metadata,
                                             lambda: data.activation_rows(network, items, layer)))
    probed = open_activations(_stored_rows(path / "probed", metadata, lambda: (
        values for i, values in zip(extraction.items.tolist(), extraction.activations(layer), strict=True)
        if i in chosen)))
    sae = _load(model, hook, layer, held_out.d_model)
    quality = reconstruction_quality(sae, held_out)
    losses = data.patched_losses(network, sae, items, [EVERYTHING], layer, "all").mean(axis=0)
    write_columns(path / ACTIVE, {"all": _active_counts(sae, held_out.blocks()), "boundary": _active_counts(
        sae, data.activation_rows(network, items, layer, "boundary"))})
    write_atomically(path / EVALUATION, json_with_nulls({
        "source_model": sae.config.source_model, "steps": _steps(model),
        "explained": quality["explained_variance"],
        "dead": quality["dead_fraction"], "l0": quality["l0"], "rows": quality["rows"],
        "explained_probed": reconstruction_quality(sae, probed)["explained_variance"],
        "explained_random": reconstruction_quality(
            _random_sae(sae, held_out, quality["l0"]), held_out)["explained_variance"],
        "losses": losses}))


def _active_counts(sae: TopKSAE, rows: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the number of rows in which each latent is active: int `[n_latents]`."""
    return sum((np.bincount(latents[values > 0], minlength=sae.config.n_latents)
                for values, latents in encoded(sae, rows)), np.zeros(sae.config.n_latents, np.int64))


def _random_sae(sae: TopKSAE, rows: Activations, l0: float) -> TopKSAE:
    """Returns a TopK SAE of the same shape with random weights and the mean of the rows as its bias.

    Its k is that of the autoencoder, or, where that has none, the mean number of its active latents.
    """
    k = sae.config.k or max(1, round(l0))
    random_sae = store.build(dataclasses.replace(sae.config, activation="topk", k=k, max_active=0,
                                                 input_norm="none"), 0)
    total = sum(block.sum(axis=0, dtype=np.float64) for block in rows.blocks())
    random_sae.bias[...] = jnp.asarray(total / len(rows), jnp.float32)
    return random_sae


def read_evaluation(path: Path) -> SAEEvaluation:
    """Reads the result of `evaluate`."""
    with as_expected(path / EVALUATION):
        tree = read_json(path / EVALUATION)
        return SAEEvaluation(**tree | {"losses": PatchedLoss(*tree["losses"])})


def read_config(path: Path, hook: str, layer: int) -> SAEConfig:
    """Reads an autoencoder's configuration. Raises InputError if it is of another family, hook or layer."""
    config = store.load_config(path)
    if not isinstance(config, SAEConfig):
        raise InputError(f"sae.path: {path}: expected an autoencoder, found family {config.family}")
    if config.hook not in ("", hook):
        raise InputError(f"sae.path: {path}: expected an autoencoder of hook {hook}, found {config.hook}")
    if config.layer not in (-1, layer):
        raise InputError(f"sae.path: {path}: expected an autoencoder of layer {layer}, found {config.layer}")
    return config


def _load(path: Path, hook: str, layer: int, width: int) -> TopKSAE:
    if (d_model := read_config(path, hook, layer).d_model) != width:
        raise InputError(f"sae.path: {path}: expected an autoencoder of width {width}, found {d_model}")
    return store.load(path)


def _stored_rows(path: Path, metadata: dict[str, Any], rows: Callable[[], Iterator[np.ndarray]]) -> Path:
    """Writes the rows to `path` unless it exists; the directory appears only when it is complete."""
    if not path.exists():
        write_activations(path, rows(), metadata)
    return path


def _steps(model: Path) -> int | None:
    """Returns the number of updates of the run that contains the model directory; None if there is none."""
    try:
        return int(RunDirectory(model.parent).read_summary()["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
