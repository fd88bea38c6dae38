"""Model directories: `config.json`, `model.safetensors` and a model card, the format of every command.

Tensors have dotted names with separate layers: `blocks.3.sparse.query.kernel`. Large models consist of
several files and an index, as in Hugging Face directories.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax import estimators, models
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json
from tilelli_jax.io.json_text import read_json
from tilelli_jax.io.tensors import CONFIG, INDEX, TENSORS, Tensor, in_memory, read_directory, write_directory
from tilelli_jax.loading.model_card import CARD, CardInfo, is_ours, model_card
from tilelli_jax.models.arrays import ParamType, from_tensors, n_parameters, to_arrays
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.packed_tensors import packed_tensors, unpacked_tensors
from tilelli_jax.parallel.sharding import Mesh

FAMILIES = models.FAMILIES | estimators.FAMILIES
WRITER = "tilelli_jax"


def build(config: Any, seed: int | jax.Array = 0, compute: ComputeConfig | None = None) -> Any:
    """Builds a network of any family with random weights. `seed` is a number or a PRNG key."""
    return FAMILIES[config.family][1](config, rngs=nnx.Rngs(seed), compute=compute)


def save(model: Any, path: str | Path, info: CardInfo | None = None, *, packed: bool = False) -> None:
    """Writes a model directory. An existing model is replaced only after the new one is complete.

    An existing model card stays if its user has edited it, or if the network is the same and there is no
    `info`.

    Args:
        info: what the model card says besides the network itself.
        packed: store quantised weights as packed codes (`io.packing`), without the full-precision weights,
            so that the network cannot be trained further. A packed network is always stored so.

    Raises:
        InputError: the directory cannot be written, or there is nothing to pack.
    """
    if packed:
        model = models.pack(model)
    tensors = packed_tensors(to_arrays(model), model.config)
    path, files = Path(path), {CONFIG: as_json(config_lib.to_dict(model.config))}
    try:
        if not _keeps_card(path, files[CONFIG], tensors, info):
            files[CARD] = model_card(model.config, n_parameters(model), info).encode()
        write_directory(path, tensors, files, writer=WRITER)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _keeps_card(path: Path, config: bytes, tensors: Mapping[str, Tensor], info: CardInfo | None) -> bool:
    """Whether the existing model card stays: see `save`."""
    card = path / CARD
    if not card.is_file():
        return False
    if not is_ours(card.read_text(encoding="utf-8", errors="replace")):
        return True
    if info is not None or not (path / CONFIG).is_file() or (path / CONFIG).read_bytes() != config:
        return False
    try:
        stored = read_tensors(path)
        return stored.keys() == tensors.keys() and all(
            np.array_equal(stored[name].read(), tensor.read()) for name, tensor in tensors.items())
    except InputError:
        return False


def load(path: str | Path, compute: ComputeConfig | None = None, *, param_dtype: ParamType = "float32",
         mesh: Mesh | None = None) -> Any:
    """Loads the network of a model directory.

    Args:
        param_dtype: type of the weights in memory; "stored" keeps the type in the file.
        mesh: devices over which each weight is sharded as it is read (see `sharding.RULES`).

    Raises:
        InputError: it is not a model directory, or its tensors do not fit its configuration or are not
            finite.
    """
    path = Path(path)
    config = load_config(path)
    build, source = FAMILIES[config.family][1], str(path / TENSORS)
    tensors = unpacked_tensors(read_tensors(path), build, config, source)
    return from_tensors(build, config, tensors, compute, source=source, param_dtype=param_dtype, mesh=mesh)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a model directory, read lazily.

    Raises:
        InputError: it has no tensors, or they cannot be read.
    """
    if not (path / TENSORS).is_file() and not (path / INDEX).is_file():
        raise InputError(f"{path}: not a model directory: {TENSORS} is missing")
    return read_directory(path)


def from_arrays(config: Any, arrays: Mapping[str, np.ndarray], compute: ComputeConfig | None = None) -> Any:
    """Builds the network with these weights, in float32; the inverse of `to_arrays`.

    Raises:
        InputError: names or shapes do not fit the configuration; all such are listed.
    """
    tensors = {name: in_memory(np.asarray(array)) for name, array in arrays.items()}
    return from_tensors(FAMILIES[config.family][1], config, tensors, compute, source="arrays", finite=False)


def load_config(path: str | Path) -> Any:
    """Reads the configuration of a model directory. Raises InputError if it cannot be read."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: expected a model directory ({CONFIG} and {TENSORS}), found "
                         + ("a file" if path.exists() else "nothing"))
    if not (path / CONFIG).exists():
        inside = path / "model"
        raise InputError(f"{path}: not a model directory: {CONFIG} is missing"
                         + (f"; did you mean '{inside}'?" if (inside / CONFIG).exists() else ""))
    tree = read_json(path / CONFIG)
    family = tree.get("family")
    if family is None and "model_type" in tree:
        raise InputError(f"{path}: a Hugging Face directory, not a model directory: "
                         f"convert it with `tilelli convert {path} OUT`")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{path / CONFIG}: family: expected one of {', '.join(FAMILIES)}, found {family!r}")
    return config_lib.from_dict(FAMILIES[family][0], tree, source=str(path / CONFIG))
