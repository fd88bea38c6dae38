"""Reads the files of an fm-difficulty-probe run: metadata, activations, autoencoder, losses.

    squad.yaml                   ReleaseConfig; its paths are relative to a root
    …_metadata.parquet           one row per item
    …_activations.safetensors    `encoder_embeddings [items, positions, d]`, float16, in the order of the rows
    …_metadata.parquet           of the expensive model: `window_id` and error, at least for the test items
    causal_ablation_*.parquet    in out_dir: losses per item: unpatched, reconstructed, and with a latent
                                 ablated

All files are read and checked before the first fit.
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

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.io.tensors import Tensor, read_file
from tilelli_jax.loading import store

from ...checks import Floats
from ...tables import column_names, read_parquet
from .. import cheap
from ..labels import hard_by_quantile
from ..series import read_series
from . import protocol
from .config import ReleaseConfig
from .pooling import pooled

ACTIVATIONS = "encoder_embeddings"
TYPES = (np.float16, np.float32)


@dataclasses.dataclass(frozen=True)
class Release:
    """The inputs of the tables. Items are in the order of the metadata.

    Attributes:
        source: the configuration file, for error messages.
        windows: int64 `[items]`, the `window_id` of each item.
        train, test: bool `[items]`; an item may be in neither split.
        hard: int64 `[items]`, 0 or 1.
        error: f64 `[items]`: `hard`, or the CRPS.
        blocks: `cheap` f64 `[items, 8]`; with activations `raw` `[items, d or 3 d]`, in the dtype on disk;
            with an autoencoder `sae` f32 `[items, n or 3 n]`. The rungs P4 and P5 scale their only block in
            its own dtype, as in fm-difficulty-probe; with float16 this changes the third digit.
        cascade: errors of the cheap and of the expensive model, f64 `[test items]` each.
        losses: positions → the columns of a table of losses, f64 `[items of the table]` each.
        network: name of the network in the summaries of causal effects.
    """

    config: ReleaseConfig
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


def read_release(config: ReleaseConfig, root: Path, source: str) -> Release:
    """Reads and checks all files that a configuration names.

    Args:
        root: directory that the paths of the configuration are relative to.
        source: the configuration file, for error messages.

    Raises:
        InputError: a file or a column is missing, files are inconsistent, or a value is not a finite number.
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
        _check_rows(np.isin(hard, (0, 1)), path, "difficulty: expected 0 or 1")
        _check_rows(columns["seq_len"] > 0, path, "seq_len: expected at least 1")
    for name, rows in (("train", train), ("test", test)):
        if not rows.any():
            raise InputError(f"{path}: the {name} split is empty")
        if len(np.unique(hard[rows])) < 2:
            raise InputError(f"{path}: the {name} split has one class only: all its {rows.sum()} items are "
                             + ("hard" if hard[rows][0] else "easy"))

    # The small files come first, so that errors in them appear before the encoding.
    losses, cascade_errors = files.losses(), files.cascade(columns["window_id"][test])
    activations, sae = files.activations(len(hard)), None
    if activations is not None:
        sae = files.autoencoder(activations.shape[2])
    if is_series:
        blocks = {"cheap": files.series_features(path, columns["start_ts"])}
    else:
        lists = {name: column.tolist() for name, column in columns.items()}
        blocks = {"cheap": protocol.prompt_features(lists)[1]}
    if activations is not None:
        lengths = np.full(len(hard), activations.shape[1])
        if not is_series:
            lengths = np.minimum(lengths, columns["seq_len"])
        blocks |= pooled(activations, lengths, sae, files.path(*files.of_layer("activations")))
    network = config.causal_model  # the published code shortens a directory to its name
    if network and (root / network).exists():
        network = Path(network).name
    return Release(config, source, columns["window_id"], train, test, hard, error, blocks, cascade_errors,
                   losses,
               network)


# --- Tables ------------------------------------------------------------------------------------

_LLM = {"window_id": int, "split": str, "prompt": str, "activity_label": str, "seq_len": int,
        "difficulty": int}
_TSFM = {"window_id": int, "split": str, "start_ts": int, "crps_raw": float, "crps_norm": float}


def _llm_columns(path: Path) -> dict[str, type]:
    nll = "prompt_perplexity" if "prompt_perplexity" in column_names(path) else "perplexity"
    return {**_LLM, nll: float}


def read_columns(path: Path, kinds: Mapping[str, type]) -> dict[str, NDArray[Any]]:
    """Reads columns of a parquet file: `[rows]` of text (objects), integers (int64) or numbers (f64).

    Args:
        kinds: column → str, int or float.

    Raises:
        InputError: the file cannot be read, has no rows or no such column, or a cell is empty or of another
            type (the message counts rows from 0).
    """
    table = read_parquet(path, list(kinds))
    if not len(table):
        raise InputError(f"{path}: expected rows, found none")
    return {name: _column(path, name, table[name].to_pylist(), kind) for name, kind in kinds.items()}


def _column(path: Path, name: str, cells: list[Any], kind: type) -> NDArray[Any]:
    if kind is str:
        _check_rows(np.array([isinstance(cell, str) for cell in cells]), path, f"{name}: expected text")
        return np.array(cells, dtype=object)
    numbers = np.array([float(cell) if isinstance(cell, int | float) else np.nan for cell in cells])
    if kind is float:
        _check_rows(np.isfinite(numbers), path, f"{name}: expected a finite number")
        return numbers
    is_integer = (np.abs(numbers) < 2**63) & (numbers == np.floor(numbers))
    _check_rows(is_integer, path, f"{name}: expected an integer")
    return np.array([int(cell) for cell in cells], np.int64)


def _check_rows(valid: NDArray[np.bool_], path: Path, expected: str) -> None:
    if not valid.all():
        raise InputError(f"{path}: row {int(np.argmin(valid)) + 1}: {expected}")


# --- Files named by the configuration ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Files:
    config: ReleaseConfig
    root: Path
    source: str

    def path(self, key: str, value: str | None) -> Path:
        """Returns the path of the file under a key. Raises InputError if the file does not exist."""
        if not value:
            raise InputError(f"{self.source}: {key}: expected a file, found nothing")
        if "://" in value:
            raise InputError(f"{self.source}: {key}: expected a local file, found {value}; download it, then "
                             f"add {key}=FILE")
        if not (path := self.root / value).exists():
            raise InputError(f"{self.source}: {key}: {path}: no such file; paths are relative to --root, "
                             f"here {self.root}")
        return path

    def of_layer(self, key: str) -> tuple[str, str | None]:
        """Returns the full key of the configured layer, and its value."""
        layer = self.config.layer
        return f"{key}.{layer}", getattr(getattr(self.config, key), layer)

    def activations(self, rows: int) -> Tensor | None:
        key, value = self.of_layer("activations")
        if not value:
            return None
        path = self.path(key, value)
        tensors = read_file(path)
        if ACTIVATIONS not in tensors:
            raise InputError(f"{path}: expected the tensor '{ACTIVATIONS}', found "
                             + (", ".join(tensors) or "none"))
        tensor = tensors[ACTIVATIONS]
        if len(tensor.shape) != 3 or not all(tensor.shape) or tensor.dtype not in TYPES:
            raise InputError(f"{path}: {ACTIVATIONS}: expected float16 or float32 [items, positions, d], "
                             f"found {tensor.dtype} {list(tensor.shape)}")
        if tensor.shape[0] != rows:
            raise InputError(f"{path}: expected {rows} items, one per row of the metadata, found "
                             f"{tensor.shape[0]}")
        return tensor

    def autoencoder(self, width: int) -> TopKSAE | None:
        key, value = self.of_layer("sae_ckpt")
        if not value:
            return None
        path = self.root / value
        if path.is_file():
            out = Path(value).with_suffix("")
            conversion = shlex.join(["tilelli", "convert", str(path), str(self.root / out), "--set",
                                     f"k={self.config.k}"])
            raise InputError(f"{path}: expected a model directory, found a PyTorch file; convert it with "
                             f"`{conversion}`, then add {key}={shlex.quote(str(out))}")
        if not path.is_dir():
            raise InputError(f"{self.source}: {key}: {path}: no such directory; random weights never "
                             "replace a missing autoencoder")
        config = store.load_config(path)
        if not isinstance(config, SAEConfig):
            raise InputError(f"{path}: expected an autoencoder, found family {config.family}")
        if config.d_model != width:
            raise InputError(f"{path}: expected an autoencoder of width {width}, the width of the "
                             f"activations, found {config.d_model}")
        if config.k != self.config.k or config.activation != "topk":
            raise InputError(f"{path}: expected topk with k {self.config.k}, from {self.source}, found "
                             f"{config.activation} with k {config.k}")
        return store.load(path)

    def series_features(self, metadata: Path, starts: NDArray[np.int64]) -> Floats:
        context = self.config.context_length
        values = read_series(self.path("series_csv", self.config.series_csv), self.config.target_col)
        _check_rows(np.asarray((starts >= 0) & (starts + context <= len(values))), metadata,
                    f"start_ts: expected the row of the series at which a window of {context} values starts, "
                    f"within its {len(values)} values")
        statistics = cheap.series_statistics([values[start:start + context] for start in starts.tolist()])
        _check_rows(np.asarray(np.isfinite(statistics).all(axis=1)), metadata,
                    "expected a window with finite statistics, found one with constant values")
        return statistics

    def cascade(self, windows: NDArray[np.int64]) -> tuple[Floats, Floats] | None:
        section = self.config.cascade
        if section is None:
            return None
        column, kind = ("crps_raw", float) if self.config.modality == "tsfm" else ("difficulty", int)
        errors_of_models = []
        for key, value in (("cheap_metadata", section.cheap_metadata or self.config.metadata),
                           ("expensive_metadata", section.expensive_metadata)):
            path = self.path(f"cascade.{key}", value)
            table = read_columns(path, {"window_id": int, column: kind})
            errors: dict[int, float] = {}
            for window, error in zip(table["window_id"].tolist(), table[column].tolist(), strict=True):
                if errors.setdefault(window, error) != error:
                    raise InputError(f"{path}: window_id {window}: expected one {column}, found two "
                                     "different ones")
            if missing := [window for window in windows.tolist() if window not in errors]:
                raise InputError(f"{path}: expected a row for every test item, found none of window_id "
                                 f"{missing[0]}")
            errors_of_models.append(np.array([errors[window] for window in windows.tolist()], float))
        return errors_of_models[0], errors_of_models[1]

    def losses(self) -> dict[str, dict[str, Floats]]:
        prefix = "causal_ablation_"
        if not self.config.out_dir:
            return {}
        tables = {}
        for path in sorted((self.root / self.config.out_dir).glob(f"{prefix}*.parquet")):
            names = [name for name in column_names(path) if name != "window_id"]
            tables[path.stem.removeprefix(prefix)] = read_columns(path, dict.fromkeys(names, float))
            patterns = (".*_natural", ".*_recon", *[".*_ablate_[0-9]{1,9}"] * len(names[2:]))
            if len(names) < 2 or not all(map(re.fullmatch, patterns, names)):
                raise InputError(f"{path}: expected columns …_natural, …_recon and …_ablate_LATENT, found "
                                 + (", ".join(names) or "none"))
        return tables
