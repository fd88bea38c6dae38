"""The files of a run of fm-difficulty-probe: metadata, activations, autoencoder, losses.

    squad.yaml                   KitConfig; its paths are relative to a root
    …_metadata.parquet           a row for each item
    …_activations.safetensors    `encoder_embeddings [items, positions, d]`, float16, in the rows' order
    …_metadata.parquet           of the expensive model: `window_id` and its error, of the test items at least
    causal_ablation_*.parquet    in out_dir: losses of each item, as it is, reconstructed, a latent left out

All is read and checked before anything is fitted.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.tensors import Tensor, read_file

from ...checks import Floats
from ...tables import column_names, read_parquet
from .. import cheap
from ..labels import hard_by_quantile
from ..series import read_series
from . import protocol
from .config import KitConfig
from .pooling import pooled

ACTIVATIONS = "encoder_embeddings"
TYPES = (np.float16, np.float32)


@dataclasses.dataclass(frozen=True)
class Kit:
    """What the tables are made of. Items are in the order of the metadata.

    Attributes:
        windows: int64 `[items]`, their `window_id`.
        train, test: bool `[items]`; an item may be neither.
        hard: int64 `[items]`, 0 or 1.
        error: f64 `[items]`: `hard`, or the CRPS.
        blocks: `cheap` f64 `[items, 8]`; where there are such files `raw` `[items, d or 3 d]`, in the type on
            disk, and `sae` f32 `[items, n or 3 n]`. Where they stand alone they are scaled in their own
            type, as the published rungs P4 and P5 are: with float16 that is seen in the third digit.
        cascade: errors of the cheap and of the expensive model, f64 `[test items]` each.
        losses: which positions → the columns of a causal table, f64 `[its items]` each.
        network: what the causal summaries call it.
    """

    config: KitConfig
    source: str
    windows: NDArray[np.int64]
    train: NDArray[np.bool_]
    test: NDArray[np.bool_]
    hard: NDArray[np.int64]
    error: Floats
    blocks: dict[str, np.ndarray]
    cascade: tuple[Floats, Floats] | None
    losses: dict[str, dict[str, Floats]]
    network: str


def read_kit(config: KitConfig, root: Path, source: str) -> Kit:
    """Reads and checks all files that a configuration names.

    Args:
        root: what its paths are relative to.
        source: its own file, for errors.

    Raises:
        InputError: a file or a column is missing, or they do not fit together, or say what is no number.
    """
    files = _Files(config, root, source)
    path = files.path("metadata", config.metadata)
    is_series = config.modality == "tsfm"
    columns = read_columns(path, _TSFM if is_series else _llm_columns(path))
    train, test = (columns["split"] == name for name in ("train", "test"))
    error = columns["crps_raw" if is_series else "difficulty"].astype(float)
    if is_series:
        reference = np.ones(len(error), bool) if config.label_threshold_split == "all" else train
        if not reference.any():
            raise InputError(f"{path}: the train split is empty")
        hard = hard_by_quantile(columns["crps_norm"], reference, config.hard_quantile)
    else:
        hard = columns["difficulty"]
        _all(np.isin(hard, (0, 1)), path, "difficulty: expected 0 or 1")
        _all(columns["seq_len"] > 0, path, "seq_len: expected at least 1")
    for name, rows in (("train", train), ("test", test)):
        if not rows.any():
            raise InputError(f"{path}: the {name} split is empty")
        if len(np.unique(hard[rows])) < 2:
            raise InputError(f"{path}: the {name} split has one class only: all its {rows.sum()} items are "
                             + ("hard" if hard[rows][0] else "easy"))

    # The small files first: nothing is encoded only to be thrown away.
    losses, dear = files.losses(), files.cascade(columns["window_id"][test])
    activations, sae = files.activations(len(hard)), None
    if activations is not None:
        sae = files.autoencoder(activations.shape[2])
    if is_series:
        blocks = {"cheap": files.series_features(path, columns["start_ts"])}
    else:
        said = {name: column.tolist() for name, column in columns.items()}
        blocks = {"cheap": protocol.prompt_features(said)[1]}
    if activations is not None:
        lengths = np.full(len(hard), activations.shape[1])
        if not is_series:
            lengths = np.minimum(lengths, columns["seq_len"])
        blocks |= pooled(activations, lengths, sae, files.path(*files.of_layer("activations")))
    network = config.causal_model  # theirs call a directory by its name, and others as they are
    if network and (root / network).exists():
        network = Path(network).name
    return Kit(config, source, columns["window_id"], train, test, hard, error, blocks, dear, losses, network)


# --- Tables ------------------------------------------------------------------------------------

_LLM = {"window_id": int, "split": str, "prompt": str, "activity_label": str, "seq_len": int,
        "difficulty": int}
_TSFM = {"window_id": int, "split": str, "start_ts": int, "crps_raw": float, "crps_norm": float}


def _llm_columns(path: Path) -> dict[str, type]:
    there = column_names(path)
    nll = "prompt_perplexity" if "prompt_perplexity" in there else "perplexity"
    return {**_LLM, nll: float}


def read_columns(path: Path, kinds: Mapping[str, type]) -> dict[str, NDArray[Any]]:
    """Columns of a parquet file: `[rows]` of text (objects), whole numbers (int64) or numbers (f64).

    Raises:
        InputError: it cannot be read, has no such column or no rows, or a cell is empty or no such thing;
            rows are counted from 0.
    """
    table = read_parquet(path, list(kinds))
    if not len(table):
        raise InputError(f"{path}: expected rows, found none")
    return {name: _column(path, name, table[name].to_pylist(), kind) for name, kind in kinds.items()}


def _column(path: Path, name: str, cells: list[Any], kind: type) -> NDArray[Any]:
    if kind is str:
        _all(np.array([isinstance(cell, str) for cell in cells]), path, f"{name}: expected text")
        return np.array(cells, dtype=object)
    numbers = np.array([float(cell) if isinstance(cell, int | float) else np.nan for cell in cells])
    if kind is float:
        _all(np.isfinite(numbers), path, f"{name}: expected a finite number")
        return numbers
    _all((np.abs(numbers) < 2**63) & (numbers == np.floor(numbers)), path, f"{name}: expected a whole number")
    return np.array([int(cell) for cell in cells], np.int64)


def _all(fits: NDArray[np.bool_], path: Path, expected: str) -> None:
    if not fits.all():
        raise InputError(f"{path}: row {int(np.argmin(fits))}: {expected}")


# --- What a configuration names ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Files:
    config: KitConfig
    root: Path
    source: str

    def path(self, key: str, value: str | None) -> Path:
        """The file under a key; raises InputError where there is none."""
        if not value:
            raise InputError(f"{self.source}: {key}: expected a file, found nothing")
        if "://" in value:
            raise InputError(f"{self.source}: {key}: expected a local file, found {value}; fetch it, and add "
                             f"{key}=FILE")
        if not (path := self.root / value).exists():
            raise InputError(f"{self.source}: {key}: {path}: no such file; paths are relative to --root, "
                             f"here {self.root}")
        return path

    def of_layer(self, key: str) -> tuple[str, str | None]:
        """A key with its layer, and what stands there."""
        layer = self.config.layer
        return f"{key}.{layer}", getattr(getattr(self.config, key), layer)

    def activations(self, rows: int) -> Tensor | None:
        key, value = self.of_layer("activations")
        if not value:
            return None
        path = self.path(key, value)
        found = read_file(path)
        if ACTIVATIONS not in found:
            raise InputError(f"{path}: expected the tensor '{ACTIVATIONS}', found "
                             + (", ".join(found) or "none"))
        tensor = found[ACTIVATIONS]
        if len(tensor.shape) != 3 or not all(tensor.shape) or tensor.dtype not in TYPES:
            raise InputError(f"{path}: {ACTIVATIONS}: expected float16 or float32 [items, positions, d], "
                             f"found {tensor.dtype} {list(tensor.shape)}")
        if tensor.shape[0] != rows:
            raise InputError(f"{path}: expected {rows} items, as the metadata has rows, found "
                             f"{tensor.shape[0]}")
        return tensor

    def autoencoder(self, width: int) -> TopKSAE | None:
        key, value = self.of_layer("sae_ckpt")
        if not value:
            return None
        path = self.root / value
        if path.is_file():
            out = Path(value).with_suffix("")
            told = shlex.join(["tilelli", "convert", str(path), str(self.root / out), "--set",
                               f"k={self.config.k}"])
            raise InputError(f"{path}: a file of PyTorch, which is not read here: `{told}` makes a model "
                             f"directory of it; then add {key}={shlex.quote(str(out))}")
        if not path.is_dir():
            raise InputError(f"{self.source}: {key}: {path}: no such directory; nothing is probed with "
                             "random weights in its place")
        about = store.load_config(path)
        if not isinstance(about, SAEConfig):
            raise InputError(f"{path}: expected an autoencoder, found family {about.family}")
        if about.d_model != width:
            raise InputError(f"{path}: expected an autoencoder of width {width}, as the activations have, "
                             f"found {about.d_model}")
        if about.k != self.config.k or about.activation != "topk":
            raise InputError(f"{path}: expected k {self.config.k}, as {self.source} says, found "
                             f"{about.activation} with k {about.k}")
        return store.load(path)

    def series_features(self, metadata: Path, starts: NDArray[np.int64]) -> Floats:
        context = self.config.context_length
        values = read_series(self.path("series_csv", self.config.series_csv), self.config.target_col)
        _all(np.asarray((starts >= 0) & (starts + context <= len(values))), metadata,
             f"start_ts: expected the row of the series that a window of {context} values begins at, within "
             f"its {len(values)}")
        found = cheap.series_statistics([values[start:start + context] for start in starts.tolist()])
        _all(np.asarray(np.isfinite(found).all(axis=1)), metadata,
             "expected a window with statistics, found one whose values are all the same")
        return found

    def cascade(self, windows: NDArray[np.int64]) -> tuple[Floats, Floats] | None:
        section = self.config.cascade
        if section is None:
            return None
        column, kind = ("crps_raw", float) if self.config.modality == "tsfm" else ("difficulty", int)
        found = []
        for key, value in (("cheap_metadata", section.cheap_metadata or self.config.metadata),
                           ("expensive_metadata", section.expensive_metadata)):
            path = self.path(f"cascade.{key}", value)
            table = read_columns(path, {"window_id": int, column: kind})
            errors: dict[int, float] = {}
            for window, error in zip(table["window_id"].tolist(), table[column].tolist(), strict=True):
                if errors.setdefault(window, error) != error:
                    raise InputError(f"{path}: window_id {window}: two rows with different {column}")
            if missing := [window for window in windows.tolist() if window not in errors]:
                raise InputError(f"{path}: expected a row for every test item, found none of window_id "
                                 f"{missing[0]}")
            found.append(np.array([errors[window] for window in windows.tolist()], float))
        return found[0], found[1]

    def losses(self) -> dict[str, dict[str, Floats]]:
        prefix = "causal_ablation_"
        if not self.config.out_dir:
            return {}
        found = {}
        for path in sorted((self.root / self.config.out_dir).glob(f"{prefix}*.parquet")):
            names = [name for name in column_names(path) if name != "window_id"]
            found[path.stem.removeprefix(prefix)] = read_columns(path, dict.fromkeys(names, float))
            patterns = (".*_natural", ".*_recon", *[".*_ablate_[0-9]{1,9}"] * len(names[2:]))
            if len(names) < 2 or not all(map(re.fullmatch, patterns, names)):
                raise InputError(f"{path}: expected columns …_natural, …_recon and …_ablate_LATENT, found "
                                 + (", ".join(names) or "none"))
        return found
