"""The device mesh and the one table of sharding rules.

Axes: `data` copies the parameters and splits the batch; `fsdp` splits the batch and stores each
parameter in parts, gathered where it is used (ZeRO-3); `tensor` splits heads and hidden widths (the
vanilla network's fused columns of queries, keys and values lie across its cuts, and are exchanged).
XLA's partitioner inserts the collectives (automatic axes); nothing here changes what is computed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError

BATCH = ("data", "fsdp")

# The last dimensions of every array whose path ends so; leading ones (stacked layers) are whole.
# The optimiser's moments have the paths and the shapes of their parameters: the same rules hold.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Tokens over `tensor`, in the table as in the unembedding. With d_model over `tensor` and tokens
    # over `fsdp`, XLA (of JAX 0.10 and 0.12, on CPUs) gives some devices the logits of others' rows.
    (r"embed\.kernel", ("tensor", "fsdp")),
    (r"(unembed|up|qkv)\.kernel", ("fsdp", "tensor")),
    (r"experts\.gate_up\.kernel", ("tensor", "fsdp", None)),
    (r"experts\.down\.kernel", ("tensor", None, "fsdp")),
    (r"(down|out)\.kernel", ("tensor", "fsdp")),
    (r"sparse(_\d+)?\.(query|key)\.kernel", ("tensor", "fsdp", None)),
    (r"sparse(_\d+)?\.value\.kernel", ("tensor", None, "fsdp")),
    (r"positions\.table", (None, "fsdp")),
    (r"(query|key|value|gate)\.kernel", ("fsdp", "tensor")),
    (r"embed_per_layer\.kernel", ("tensor", "fsdp")),
    (r"project_per_layer\.kernel", ("fsdp", "tensor")),
    (r"encoder\.kernel", ("fsdp", "tensor")),  # of an autoencoder: latents over `tensor`
    (r"decoder\.kernel", ("tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """How many devices along each axis; -1 takes the rest."""

    data: int = setting(-1, "devices that share the batch, each with all parameters")
    fsdp: int = setting(1, "devices that share the batch and the storage of the parameters")
    tensor: int = setting(1, "devices that share heads and hidden widths")

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(f"data, fsdp, tensor: expected whole numbers ≥ 1, of which at most one "
                             f"-1, found {sizes}")

    def shape(self, n_devices: int) -> tuple[int, int, int]:
        """The three sizes for so many devices.

        Raises:
            InputError: their product cannot be the number of devices.
        """
        sizes = list(dataclasses.astuple(self))
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and n_devices % known == 0:
            sizes[sizes.index(-1)] = n_devices // known
        if math.prod(sizes) != n_devices or -1 in sizes:
            asked = " × ".join(map(str, dataclasses.astuple(self)))
            raise InputError(f"mesh: data × fsdp × tensor = {asked} does not make {n_devices} "
                             f"device{'s' * (n_devices > 1)}")
        return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (of all processes), axes ("data", "fsdp", "tensor")."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(config.shape(len(devices)), ("data", "fsdp", "tensor"),
                         axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The rule for an array: `path` is dotted; an axis that does not divide is dropped.

    What no rule names is small (routers, convolutions, norms, state pathways): a copy everywhere.
    """
    for pattern, rule in RULES:
        if re.search(rf"(^|\.){pattern}$", path) and len(rule) <= len(shape):
            axes = (None,) * (len(shape) - len(rule)) + rule
            return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None
                                   for axis, size in zip(axes, shape, strict=True)))
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array (or abstract array) of a pytree, by its path."""
    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(one, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as `blocks.sparse.query.kernel`, without the wrapper of a Flax variable."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name.endswith("value"):
        path = path[:-1]
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                    for key in path)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_spec(ndim: int, axis: int = 0) -> PartitionSpec:
    """The batch axis split over data and fsdp, all others whole."""
    return PartitionSpec(*(BATCH if i == axis else None for i in range(ndim)))


def split_batch(x: jax.Array) -> jax.Array:
    """Holds an activation `[batch, …]` to the batch's sharding; without a mesh, does nothing.

    Said once a block, it keeps the partitioner from splitting activations by the layout of the
    weights they meet, which under fsdp would trade small gathers for large ones.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH) <= set(mesh.axis_names):
        return x
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, batch_spec(x.ndim))


def local_rows(mesh: Mesh, n_rows: int) -> np.ndarray:
    """Which rows of a batch of n_rows this process's devices hold, in order."""
    sharding = NamedSharding(mesh, batch_spec(1))
    held = [np.arange(n_rows)[index] for index in
            sharding.addressable_devices_indices_map((n_rows,)).values()]
    return np.unique(np.concatenate(held))


def place_rows(array: np.ndarray, mesh: Mesh, n_rows: int, axis: int = 0) -> jax.Array:
    """A global array out of the rows that each process read.

    Args:
        array: this process's `local_rows`, along `axis`.
        n_rows: the size of that axis over all processes.
    """
    rows = local_rows(mesh, n_rows)
    shape = (*array.shape[:axis], n_rows, *array.shape[axis + 1:])
    sharding = NamedSharding(mesh, batch_spec(array.ndim, axis))

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[axis].indices(n_rows)
        first = int(np.searchsorted(rows, start))
        return np.take(array, np.arange(first, first + stop - start), axis=axis)

    return jax.make_array_from_callback(shape, sharding, part)


def whole_batch(rows: int, mesh: Mesh | None) -> int:
    """So many rows, or the next number of them that all devices can share."""
    devices = 1 if mesh is None else batch_devices(mesh)
    return -(-rows // devices) * devices


def batch_devices(mesh: Mesh) -> int:
    """Over how many devices a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)
