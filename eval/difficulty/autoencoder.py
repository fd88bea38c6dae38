"""The autoencoder of a study: trained on the items to learn from, or given; measured on others either way."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.difficulty.config import SAEStageConfig, StudyConfig
from eval.difficulty.items import Items
from eval.difficulty.subject import Subject
from eval.stages import fingerprint
from eval.tables import as_json
from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax import train as train_command
from tilelli_jax.data.activations import open_activations, write_activations
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.files import write_atomically
from tilelli_jax.signals.patching import EVERYTHING
from tilelli_jax.training.sae import describe

JUDGED = "judged.json"


class TrainingStopped(Exception):
    """A run has ended before its end, and has said why; `status` is that of its command."""

    def __init__(self, status: int) -> None:
        super().__init__(f"training ended with status {status}")
        self.status = status


def train(config: str, run: Path, overrides: Sequence[str]) -> Path:
    """One sitting of `python -m tilelli_jax.train`, in this process: the model directory it ends with.

    Raises:
        TrainingStopped: it has not come to its end.
    """
    status = train_command.main(["--config", config, f"run_dir={run}", *overrides])
    if status or not (run / "summary.json").is_file():
        raise TrainingStopped(status)
    return run / "model"


@dataclasses.dataclass(frozen=True)
class Judged:
    """An autoencoder and what became of held-out items in it.

    Attributes:
        model: its directory.
        steps: updates that it has seen; None where its directory does not say.
        explained, dead, l0, rows: of the variance; of the latents; active in a row; how many rows.
        natural, reconstructed, zeroed: mean loss of the network as it is, with the reconstruction, and with
            zeros in its place.
    """

    model: Path
    fingerprint: str
    config: dict[str, Any]
    steps: int | None
    explained: float
    dead: float
    l0: float
    rows: int
    natural: float
    reconstructed: float
    zeroed: float

    @property
    def recovered(self) -> float:
        """How far the reconstruction goes from zeros to the network as it is."""
        gap = self.zeroed - self.natural
        return (self.zeroed - self.reconstructed) / gap if gap else math.nan

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

    def check(self, options: SAEStageConfig) -> None:
        """Raises InputError where there are faults, unless the study goes on all the same."""
        if (faults := self.faults(options)) and not options.force:
            raise InputError(f"{self.model}: refused: {'; '.join(faults)}; sae.force=true goes on, and the "
                             "report says so")


def make(path: Path, config: StudyConfig, subject: Subject, network: Callable[[], Any], table: Items,
         layer: int, network_path: Path) -> None:
    """Trains or takes an autoencoder for one layer, and writes judged.json.

    Raises:
        InputError: there is none, it is none, or it is one of another network, place or layer.
        TrainingStopped: see `train`.
    """
    options = config.sae
    about = {"of_model": (network_path.resolve().parent.name if network_path.name == "model" else
                          network_path.name),
             "place": config.extract.place, "layer": layer}
    held_out = table.test[:options.held_out].tolist()
    _collected(path / "held-out", about, lambda: subject.rows(network(), held_out, layer))
    width = open_activations(path / "held-out").d_model
    if options.path:
        model = Path(options.path.format(layer=layer))
        steps = _steps(model.parent / "summary.json")
    else:
        _collected(path / "rows", about, lambda: subject.rows(network(), table.train.tolist(), layer))
        run = path / "run"
        model = train(options.train, run, [
            f"activations.source={path / 'rows'}", f"model.d_model={width}", f"model.layer={layer}",
            f"model.of_model={about['of_model']}", f"model.place={config.extract.place}"])
        steps = _steps(run / "summary.json")
    sae = _load(model, about, width)
    found = describe(sae, open_activations(path / "held-out"))
    losses = subject.patched(network(), sae, held_out, [EVERYTHING], layer, "all").mean(axis=0)
    write_atomically(path / JUDGED, as_json({
        "model": str(model), "fingerprint": fingerprint(model.glob("*.*")),
        "config": config_lib.to_dict(sae.config), "steps": steps, "explained": found["explained_variance"],
        "dead": found["dead_fraction"], "l0": found["l0"], "rows": found["rows"],
        **dict(zip(("natural", "reconstructed", "zeroed"), losses.tolist(), strict=True))}))


def read(path: Path) -> Judged:
    """What `make` wrote."""
    tree = json.loads((path / JUDGED).read_text(encoding="utf-8"))
    return Judged(**tree | {"model": Path(tree["model"])})


def _load(path: Path, about: dict[str, Any], width: int) -> Any:
    if not path.is_dir():
        raise InputError(f"sae.path: {path}: no such directory; nothing is probed with random weights in its "
                         "place")
    config = store.load_config(path)
    if not isinstance(config, SAEConfig):
        raise InputError(f"sae.path: {path}: expected an autoencoder, found family {config.family}")
    if config.d_model != width:
        raise InputError(f"sae.path: {path}: expected one of width {width}, found {config.d_model}")
    said = {"place": config.place, "layer": config.layer if config.layer >= 0 else ""}
    for name, value in said.items():
        if value not in ("", about[name]):
            raise InputError(f"sae.path: {path}: expected one of {name} {about[name]}, found {value}")
    return store.load(path)


def _collected(path: Path, about: dict[str, Any], rows: Callable[[], Iterator[np.ndarray]]) -> None:
    """Rows on disk; the directory appears when it is whole."""
    if not path.exists():
        write_activations(path, rows(), about)


def _steps(summary: Path) -> int | None:
    try:
        return int(json.loads(summary.read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
