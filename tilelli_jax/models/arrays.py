"""The arrays of a network by dotted name, with separate layers: `blocks.3.sparse.query.kernel`.

In memory some networks stack their layers, with a leading axis of n_layers. On disk layers are always
separate, as in other libraries. A packed weight has `NAME.packed` and `NAME.packed_scale`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor, check_fit, check_floats, is_finite
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.nn.host_embedding import HostEmbedding, HostRows
from tilelli_jax.nn.linear import PACKED, Derived, Packed, Weight
from tilelli_jax.parallel.sharding import Mesh, NamedSharding, path_name, spec

ParamType = Literal["float32", "bfloat16", "stored"]
M = TypeVar("M", bound=nnx.Module)
USUAL_WIDTH = 4096  # largest head width accepted whatever the sizes of the tensors


def named_leaves(state: nnx.State) -> dict[str, Any]:
    """The leaves of a state by dotted name, e.g. `blocks.sparse.query.kernel` (layers stacked)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {path_name(path): leaf for path, leaf in leaves}


def to_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every stored array by name, with separate layers, in its current type."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in named_leaves(nnx.state(model, nnx.Not(Derived))).items():
        value = np.asarray(jax.device_get(value))
        layers = _layers(name, value.shape)
        arrays.update({name: value} if layers is None else dict(zip(layers, value, strict=True)))
    arrays |= {f"{name}.kernel": table.rows.array for name, table in _on_host(model).items() if table.rows}
    return {name: np.array(value, order="C") for name, value in arrays.items()}


def n_parameters(model: nnx.Module) -> int:
    """Number of parameters; a code of a packed weight counts as one."""
    leaves = named_leaves(nnx.state(model, nnx.Any(nnx.Param, Packed)))
    return sum(leaf.size for name, leaf in leaves.items() if not name.endswith(f"{PACKED}_scale"))


def abstract_arrays(build: Callable[..., nnx.Module], config: Any, compute: ComputeConfig | None = None,
                    packed: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and types of all arrays of a network, without allocating them.

    Args:
        packed: of the packed network.
    """
    return _outline(_abstract(build, config, compute, packed))


def check_sizes(config: Any, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Rejects configurations that cannot fit tensors of these shapes.

    Call this before building the network: a network of absurd size would exhaust the memory.

    Raises:
        InputError: there are no tensors, more layers or banks than tensors, or heads wider than every
            tensor.
    """
    if not shapes:
        raise InputError(f"{source}: expected tensors that fit this configuration, found none")
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    limits = {**dict.fromkeys(("n_layers", "n_decoder_layers", "n_banks"), (len(shapes), "the number of")),
              **dict.fromkeys(("d_head", "d_head_full"), (max(widest, USUAL_WIDTH), "the largest size of"))}
    for key, (limit, description) in limits.items():
        if (value := getattr(config, key, 0)) > limit:
            raise InputError(f"{source}: {key}: expected at most {limit}, {description} its tensors, "
                             f"found {value}")


def from_tensors(build: Callable[..., M], config: Any, tensors: Mapping[str, Tensor],
                 compute: ComputeConfig | None = None, *, source: str = "tensors",
                 param_dtype: ParamType = "float32", mesh: Mesh | None = None, finite: bool = True) -> M:
    """Builds the network with these weights; each tensor is read and moved to the devices in turn.

    Args:
        build: the network's class.
        param_dtype: type of the weights in memory; "stored" keeps the type of each tensor.
        mesh: devices over which the weights are sharded; by default all are on the first device.
        finite: whether to reject weights that are not finite.

    Raises:
        InputError: names or shapes do not fit the configuration (all such are listed), a tensor is not
            floating-point, or holds numbers that are not finite.
    """
    if param_dtype not in get_args(ParamType):
        raise InputError(f"param_dtype: expected {' or '.join(get_args(ParamType))}, found {param_dtype!r}")
    check_sizes(config, {name: tensor.shape for name, tensor in tensors.items()}, source)
    abstract = _abstract(build, config, compute, packed_names(tensors))
    graph, state = nnx.split(abstract)
    check_fit({name: leaf.shape for name, leaf in _outline(abstract).items()},
              {name: tensor.shape for name, tensor in tensors.items()}, source)
    check_floats({name: tensor for name, tensor in tensors.items() if not name.endswith(PACKED)}, source)

    def read(name: str) -> np.ndarray:
        array = tensors[name].read()
        if finite and not name.endswith(PACKED) and not is_finite(array):
            raise InputError(f"{source}: {name}: holds numbers that are not finite")
        return array

    def filled(path: Any, leaf: Any) -> jax.Array:
        name = path_name(path)
        layers = _layers(name, leaf.shape)
        value = read(name) if layers is None else np.stack([read(layer) for layer in layers])
        if name.endswith((PACKED, f"{PACKED}_scale")):
            dtype = leaf.dtype
        else:
            dtype = value.dtype if param_dtype == "stored" else jnp.dtype(param_dtype)
        value = value.astype(dtype, order="C", copy=False)
        if mesh is None:
            return jax.device_put(value, may_alias=False)  # jnp.asarray would compile for each new shape
        return jax.device_put(value, NamedSharding(mesh, spec(name, value.shape, mesh)))

    model = nnx.merge(graph, jax.tree_util.tree_map_with_path(filled, state))
    for name, table in _on_host(model).items():
        tensor = tensors[f"{name}.kernel"]
        table.rows = HostRows(tensor.mapped() if tensor.mapped else tensor.read())
    return model


def packed_names(names: Iterable[str]) -> bool:
    """Whether these are the arrays of a packed network."""
    return any(name.endswith(PACKED) for name in names)


def _abstract(build: Callable[..., M], config: Any, compute: ComputeConfig | None, packed: bool = False) -> M:
    """The network with shapes instead of arrays; callers must not modify it.

    Cached: Flax takes seconds for the largest networks, and studies open many networks of one
    configuration.
    """
    try:
        hash(config)
    except TypeError:  # lists instead of tuples: valid, but not cached
        return _eval_shape(build, config, compute, packed)
    return _cached_eval_shape(build, config, compute, packed)


def _eval_shape(build: Callable[..., M], config: Any, compute: ComputeConfig | None, packed: bool) -> M:
    def built() -> M:
        model = build(config, rngs=nnx.Rngs(0), compute=compute)
        for weight in (module for _, module in nnx.iter_modules(model) if isinstance(module, Weight)):
            if packed:
                weight.pack()
        return model
    return nnx.eval_shape(built)


_cached_eval_shape = functools.lru_cache(maxsize=64)(_eval_shape)


def _outline(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {f"{name}.kernel": jax.ShapeDtypeStruct(table.shape, table.dtype)
              for name, table in _on_host(model).items()}
    for name, leaf in named_leaves(nnx.state(model)).items():
        layers = _layers(name, leaf.shape)
        shape = jax.ShapeDtypeStruct(leaf.shape if layers is None else leaf.shape[1:], leaf.dtype)
        shapes |= {name: shape} if layers is None else dict.fromkeys(layers, shape)
    return shapes


def _on_host(model: nnx.Module) -> dict[str, HostEmbedding]:
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)
            if isinstance(module, HostEmbedding)}


def _layers(name: str, shape: tuple[int, ...]) -> list[str] | None:
    """The names of the layers of a stacked array; None if the array is not stacked."""
    head, _, tail = name.partition(".")
    if head != "blocks" or tail[0].isdigit():  # digits: separate layers, as after `freeze`
        return None
    return [f"blocks.{i}.{tail}" for i in range(shape[0])]
