"""The autoencoder of a study: trained on the items to learn from, or given; measured on others either way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.difficulty.config import SAEStageConfig, StudyConfig
from eval.difficulty.networks import trained
from eval.difficulty.subject import Subject
from eval.tables import as_json
from tilelli_jax import store
from tilelli_jax.data.activations import open_activations, write_activations
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.files import write_atomically
from tilelli_jax.signals.patching import EVERYTHING, Spliced
from tilelli_jax.training.run import RunDirectory
from tilelli_jax.training.sae import describe

JUDGED, HELD_OUT = "judged.json", "held-out"


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of held-out items in an autoencoder.

    Attributes:
        steps: updates that it has seen; None where its directory does not say.
        explained, dead, l0, rows: of the variance; of the latents; active in a row; how many rows.
        losses: of the network, a mean over the items.
    """

    steps: int | None
    explained: float
    dead: float
    l0: float
    rows: int
    losses: Spliced

    def faults(self, options: SAEStageConfig) -> list[str]:
        """Why no conclusion should rest on it."""
        found = []
        if self.steps is not None and self.steps < options.least_steps:
            found.append(f"it has seen {self.steps} updates (least {options.least_steps})")
        if self.dead > options.most_dead:
            found.append(f"{self.dead:.0%} of its latents were never active in {self.rows} held-out rows "
                         f"(most {options.most_dead:.0%})")
        if self.explained < options.least_explained:
            found.append(f"it explains {self.explained:.0%} of their variance (least "
                         f"{options.least_explained:.0%}; random weights explain no more)")
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


def judge(path: Path, model: Path, config: StudyConfig, subject: Subject, network: Any, items: Sequence[int],
          layer: int) -> None:
    """Measures the autoencoder in the directory `model` on items, and writes judged.json.

    Raises:
        InputError: it is none, or one of another width, place or layer.
    """
    place = config.extract.place
    rows = _collected(path / HELD_OUT, {"place": place, "layer": layer},
                      lambda: subject.rows(network, items, layer))
    held_out = open_activations(rows)
    sae = _load(model, place, layer, held_out.d_model)
    found = describe(sae, held_out)
    losses = subject.patched(network, sae, items, [EVERYTHING], layer, "all").mean(axis=0)
    write_atomically(path / JUDGED, as_json({
        "steps": _steps(model), "explained": found["explained_variance"], "dead": found["dead_fraction"],
        "l0": found["l0"], "rows": found["rows"], "losses": losses}))


def read(path: Path) -> Judged:
    """What `judge` wrote."""
    tree = json.loads((path / JUDGED).read_text(encoding="utf-8"))
    return Judged(**tree | {"losses": Spliced(*tree["losses"])})


def _load(path: Path, place: str, layer: int, width: int) -> Any:
    config = store.load_config(path)
    if not isinstance(config, SAEConfig):
        raise InputError(f"sae.path: {path}: expected an autoencoder, found family {config.family}")
    if config.d_model != width:
        raise InputError(f"sae.path: {path}: expected one of width {width}, found {config.d_model}")
    if config.place not in ("", place):
        raise InputError(f"sae.path: {path}: expected one of place {place}, found {config.place}")
    if config.layer not in (-1, layer):
        raise InputError(f"sae.path: {path}: expected one of layer {layer}, found {config.layer}")
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
    except (OSError, ValueError, KeyError, TypeError):
        return None
