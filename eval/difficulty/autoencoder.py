"""The autoencoder of a study: trained on the items to learn from, or given; measured on others either way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tilelli_jax import store
from tilelli_jax.data.activations import Activations, open_activations, write_activations
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.files import write_atomically
from tilelli_jax.json_text import as_expected, read_json
from tilelli_jax.signals.patching import EVERYTHING, Spliced
from tilelli_jax.training.run import RunDirectory
from tilelli_jax.training.sae import describe

from ..inputs.networks import trained
from ..tables import as_json, write_columns
from .config import SAEStageConfig, StudyConfig
from .extract import Extraction
from .features import encoded
from .subject import Subject

JUDGED, ACTIVE = "judged.json", "active.parquet"


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of held-out items in an autoencoder.

    Attributes:
        of_model: whose values it says it has learned; may be empty.
        steps: updates that it has seen; None where its directory does not say.
        explained, dead, l0, rows: at all positions: of the variance; of the latents, never active; active in
            a row; how many rows.
        probed: of the variance where it is probed, at the positions that were extracted.
        untrained: of the variance at all positions that one of its shape with random weights explains.
        losses: of the network, a mean over the items.
    """

    of_model: str
    steps: int | None
    explained: float
    dead: float
    l0: float
    rows: int
    probed: float
    untrained: float
    losses: Spliced

    def faults(self, options: SAEStageConfig, network: str) -> list[str]:
        """Why no conclusion should rest on it."""
        found = []
        if self.of_model not in ("", network):
            found.append(f"it says it is of {self.of_model}, and the network is {network}")
        if self.steps is not None and self.steps < options.min_steps:
            found.append(f"it has seen {self.steps} updates (least {options.min_steps})")
        if self.dead > options.max_dead:
            found.append(f"{self.dead:.0%} of its latents were never active in {self.rows} held-out rows "
                         f"(most {options.max_dead:.0%})")
        least = max(options.min_explained, self.untrained + options.min_gain_over_random)
        if self.explained < least:
            found.append(f"it explains {self.explained:.0%} of their variance (least {least:.0%}; random "
                         f"weights explain {self.untrained:.0%})")
        return found


def learn(path: Path, config: StudyConfig, subject: Subject, network: Any, items: Sequence[int], layer: int,
          of_model: str) -> None:
    """Collects the items' rows in `path/rows`, and trains an autoencoder on them in `path/run`.

    Raises:
        TrainingStopped: see `networks.trained`.
    """
    place = config.extract.place
    rows = _collected(path / "rows", {"of_model": of_model, "place": place, "layer": layer},
                      lambda: subject.rows(network, items, layer))
    width = open_activations(rows).d_model
    trained(config.sae.train, path / "run", [
        f"activations.source={rows}", f"model.d_model={width}", f"model.layer={layer}",
        f"model.of_model={of_model}", f"model.place={place}"])


def judge(path: Path, model: Path, config: StudyConfig, subject: Subject, network: Any, extracted: Extraction,
          items: Sequence[int], layer: int) -> None:
    """Measures the autoencoder in the directory `model` on items; writes judged.json and active.parquet.

    The latter has, for each latent, in how many rows it is active: at `all` positions, at the `boundary`.

    Raises:
        InputError: it is none, or one of another width, place or layer.
    """
    place = config.extract.place
    about = {"place": place, "layer": layer}
    wanted = set(items)
    held_out = open_activations(_collected(path / "held-out", about,
                                           lambda: subject.rows(network, items, layer)))
    probed = open_activations(_collected(path / "probed", about, lambda: (
        values for i, values in zip(extracted.items.tolist(), extracted.activations(layer), strict=True)
        if i in wanted)))
    sae = _load(model, place, layer, held_out.d_model)
    found = describe(sae, held_out)
    losses = subject.patched(network, sae, items, [EVERYTHING], layer, "all").mean(axis=0)
    write_columns(path / ACTIVE, {"all": _active(sae, held_out.blocks()), "boundary": _active(
        sae, subject.rows(network, items, layer, "boundary"))})
    write_atomically(path / JUDGED, as_json({
        "of_model": sae.config.of_model, "steps": _steps(model), "explained": found["explained_variance"],
        "dead": found["dead_fraction"], "l0": found["l0"], "rows": found["rows"],
        "probed": describe(sae, probed)["explained_variance"],
        "untrained": describe(_untrained(sae, held_out), held_out)["explained_variance"], "losses": losses}))


def _active(sae: TopKSAE, rows: Iterable[np.ndarray]) -> np.ndarray:
    """In how many of the rows each latent is active: int `[n_latents]`."""
    return sum((np.bincount(latents[values > 0], minlength=sae.config.n_latents)
                for values, latents in encoded(sae, rows)), np.zeros(sae.config.n_latents, np.int64))


def _untrained(sae: TopKSAE, rows: Activations) -> TopKSAE:
    """One of the same shape with random weights, around the mean of the rows."""
    made = store.build(dataclasses.replace(sae.config, activation="topk", max_active=0), 0)
    made.bias[...] = jnp.asarray(np.mean([block.mean(axis=0, dtype=np.float64) for block in rows.blocks()],
                                         axis=0), jnp.float32)
    return made


def read(path: Path) -> Judged:
    """What `judge` wrote."""
    with as_expected(path / JUDGED):
        tree = read_json(path / JUDGED)
        return Judged(**tree | {"losses": Spliced(*tree["losses"])})


def read_config(path: Path, place: str, layer: int) -> SAEConfig:
    """Raises InputError where there is no autoencoder, or one of another place or layer."""
    config = store.load_config(path)
    if not isinstance(config, SAEConfig):
        raise InputError(f"sae.path: {path}: expected an autoencoder, found family {config.family}")
    if config.place not in ("", place):
        raise InputError(f"sae.path: {path}: expected one of place {place}, found {config.place}")
    if config.layer not in (-1, layer):
        raise InputError(f"sae.path: {path}: expected one of layer {layer}, found {config.layer}")
    return config


def _load(path: Path, place: str, layer: int, width: int) -> TopKSAE:
    if (found := read_config(path, place, layer).d_model) != width:
        raise InputError(f"sae.path: {path}: expected one of width {width}, found {found}")
    return store.load(path)


def _collected(path: Path, about: dict[str, Any], rows: Callable[[], Iterator[np.ndarray]]) -> Path:
    """Rows on disk; the directory appears when it is whole."""
    if not path.exists():
        write_activations(path, rows(), about)
    return path


def _steps(model: Path) -> int | None:
    """Of the run that the model directory is in, if it is in one."""
    try:
        return int(RunDirectory(model.parent).read_summary()["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
