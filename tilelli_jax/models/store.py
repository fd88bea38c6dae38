"""Model directories: `config.json` and `model.safetensors`, the format every command reads.

Tensors have their dotted names with the layers one by one: `blocks.3.sparse.query.kernel`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.files import as_json, write_together
from tilelli_jax.models import FAMILIES, ModelConfig
from tilelli_jax.models.decoder import ComputeConfig, Decoder
from tilelli_jax.nn.linear import Derived
from tilelli_jax.sharding import path_name

CONFIG, TENSORS = "config.json", "model.safetensors"
# What tensors may be stored in; all are computed with in float32.
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def save(model: Decoder, path: str | Path) -> None:
    """Writes a model directory; a model that is there is replaced when the new one is whole.

    Raises:
        InputError: the directory cannot be written.
    """
    path = Path(path)
    tensors = safetensors.numpy.save(to_arrays(model), metadata={"format": "tilelli_jax"})
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_together({path / TENSORS: tensors, path / CONFIG: as_json(config_lib.to_dict(model.config))})
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def load(path: str | Path, compute: ComputeConfig | None = None) -> Decoder:
    """Reads a model directory.

    Raises:
        InputError: the directory is none of a model, or its tensors are not those of its config, or
            not finite.
    """
    path = Path(path)
    return from_arrays(load_config(path), _read(path / TENSORS), compute, source=str(path / TENSORS))


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of a model directory."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: expected a model directory ({CONFIG} and {TENSORS}), found "
                         + ("a file" if path.exists() else "nothing"))
    try:
        tree = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = path / "model"
        raise InputError(f"{path}: no model directory: it has no {CONFIG}"
                         + (f"; did you mean '{inside}'?" if (inside / CONFIG).exists() else "")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path / CONFIG}: cannot be read: {error}") from None
    family = tree.get("family") if isinstance(tree, dict) else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{path / CONFIG}: family: expected one of {', '.join(FAMILIES)}, found {family!r}")
    return config_lib.from_dict(FAMILIES[family][0], tree, source=str(path / CONFIG))


def to_arrays(model: Decoder) -> dict[str, np.ndarray]:
    """Every stored array by name, layers one by one, in the type it has (f32)."""
    arrays = {}
    for name, value in named(nnx.state(model, nnx.Not(Derived))).items():
        value = np.asarray(jax.device_get(value))
        head, _, tail = name.partition(".")
        if head == "blocks" and not tail[0].isdigit():  # digits: unrolled, as `freeze` leaves them
            arrays.update({f"blocks.{i}.{tail}": layer for i, layer in enumerate(value)})
        else:
            arrays[name] = value
    return {name: np.array(value, order="C") for name, value in arrays.items()}


def from_arrays(config: Any, arrays: dict[str, np.ndarray], compute: ComputeConfig | None = None,
                source: str = "arrays", build: Callable[..., Any] | None = None) -> Any:
    """The network with these weights; the inverse of `to_arrays`.

    Args:
        build: the network's class, where the configuration's family does not say it.

    Raises:
        InputError: names or shapes are not those of the configuration; all such are listed.
    """
    make = build or FAMILIES[config.family][1]
    abstract = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0), compute=compute))
    graph, state = nnx.split(abstract)
    wanted: dict[str, tuple[int, ...]] = {}
    for name, leaf in named(state).items():
        head, _, tail = name.partition(".")
        if head == "blocks":
            wanted |= {f"blocks.{i}.{tail}": leaf.shape[1:] for i in range(leaf.shape[0])}
        else:
            wanted[name] = leaf.shape
    problems = {"missing": sorted(wanted.keys() - arrays.keys()),
                "not known": sorted(arrays.keys() - wanted.keys()),
                "of another shape": [f"{name} {arrays[name].shape} instead of {shape}"
                                     for name, shape in sorted(wanted.items())
                                     if name in arrays and arrays[name].shape != shape]}
    if any(problems.values()):
        raise InputError(f"{source}: tensors do not fit the configuration; " + "; ".join(
            f"{what}: {', '.join(names)}" for what, names in problems.items() if names))

    def filled(path: Any, leaf: Any) -> jax.Array:
        name = path_name(path)
        head, _, tail = name.partition(".")
        value = (np.stack([arrays[f"blocks.{i}.{tail}"] for i in range(leaf.shape[0])])
                 if head == "blocks" else arrays[name])
        return jnp.asarray(value, leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(filled, state))


def named(state: nnx.State) -> dict[str, Any]:
    """The leaves of a state by dotted name, e.g. `blocks.sparse.query.kernel` (layers stacked)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_name(path): leaf for path, leaf in leaves}


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no model directory: it has no {path.name}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    for name, tensor in tensors:
        if tensor["dtype"] not in DTYPES:
            raise InputError(f"{path}: {name}: expected one of {', '.join(DTYPES)}, found {tensor['dtype']}")
    arrays = {name: np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
              for name, tensor in tensors}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name}: holds numbers that are not finite")
    return arrays
