"""Hugging Face directories: config.json and safetensors, read and written by a table of names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from tilelli_jax.errors import InputError
from tilelli_jax.files import as_json, write_together
from tilelli_jax.models import store
from tilelli_jax.models.decoder import ComputeConfig

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of networks is named there.

    Attributes:
        model_type: what its config.json says under that key.
        config_of: their configuration → ours; may raise InputError and KeyError.
        tree_of: ours → theirs.
        build: the network's class.
        names: our names → theirs; `{i}` stands for a layer's number.
        turned: endings of our names whose arrays are `[out, in]` there and `[in, out]` here.
        aliases: other names of theirs → those in `names`.
        ignored: patterns of tensors that are not needed, with the reason.
    """

    model_type: str
    config_of: Callable[[dict[str, Any]], Any]
    tree_of: Callable[[Any], dict[str, Any]]
    build: Callable[..., Any]
    names: Mapping[str, str]
    turned: tuple[str, ...]
    aliases: Mapping[str, str]
    ignored: Mapping[str, str]

    def turns(self, name: str) -> bool:
        return name.endswith(self.turned)

    def ours(self, name: str) -> str | None:
        """Our name of one of their tensors; None where it is ignored; itself where it is not known."""
        name = self.aliases.get(name, name)
        number = re.search(r"\.(\d+)\.", name)
        plain = name if number is None else name.replace(number[0], ".{i}.", 1)
        for ours, theirs in self.names.items():
            if theirs in (name, plain):  # a name with a number in it may stand for itself
                return ours.replace("{i}", number[1] if number else "")
        return None if any(re.search(pattern, name) for pattern in self.ignored) else name

    def theirs(self, name: str) -> str:
        """Their name of one of our tensors."""
        number = re.search(r"\.(\d+)\.", name)
        plain = name if number is None else name.replace(number[0], ".{i}.", 1)
        return self.names[plain].replace("{i}", number[1] if number else "")


def load(family: Family, path: str | Path, compute: ComputeConfig | None = None) -> Any:
    """The network in a directory, with float32 weights whatever they are stored in.

    Raises:
        InputError: no such directory, another family, or tensors that do not fit the configuration.
    """
    path = Path(path)
    tree = _tree(path / CONFIG)
    if tree.get("model_type") != family.model_type:
        raise InputError(f"{path / CONFIG}: model_type: expected {family.model_type}, "
                         f"found {tree.get('model_type')!r}")
    try:
        config = family.config_of(tree)
    except KeyError as error:
        raise InputError(f"{path / CONFIG}: expected the key {error}") from None
    except InputError as error:
        raise InputError(f"{path / CONFIG}: {error}") from None
    arrays = {}
    for theirs, array in _tensors(path):
        ours = family.ours(theirs)
        if ours is not None:
            arrays[ours] = array.T if family.turns(ours) else array
    if config.tie_embeddings:
        arrays.pop("unembed.kernel", None)
    return store.from_arrays(config, arrays, compute, source=str(path), build=family.build)


def save(family: Family, model: Any, path: str | Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """Writes config.json and model.safetensors as transformers reads them.

    Raises:
        InputError: the directory cannot be written.
    """
    path = Path(path)
    kind = np.dtype(jnp.dtype(dtype))
    arrays = {}
    for name, array in store.to_arrays(model).items():
        turned = array.T if family.turns(name) else array
        arrays[family.theirs(name)] = np.ascontiguousarray(turned.astype(kind))
    tree = family.tree_of(model.config) | {"dtype": dtype, "torch_dtype": dtype}
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_together({path / TENSORS: safetensors.numpy.save(arrays, metadata={"format": "pt"}),
                        path / CONFIG: as_json(tree)})
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no Hugging Face directory: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected an object")
    return tree


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a directory, one at a time, from its file or files."""
    if (path / INDEX).is_file():
        index = _tree(path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise InputError(f"{path / INDEX}: expected file names under 'weight_map'")
        files = sorted(set(index.values()))
    else:
        files = [TENSORS]
    if missing := [name for name in files if not (path / name).is_file()]:
        raise InputError(f"{path}: {missing[0]} is missing")
    for name in files:
        try:
            with safetensors.safe_open(path / name, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    yield key, file.get_tensor(key)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path / name}: cannot be read: {error}") from None
