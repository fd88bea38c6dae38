"""The device mesh and the table of sharding rules.

Axes: `data` replicates the parameters and splits the batch; `fsdp` splits the batch and shards each
parameter, which is gathered where it is used (ZeRO-3); `tensor` splits heads and hidden widths. (The
vanilla network's fused columns of queries, keys and values do not align with the `tensor` shards, so they
are exchanged.) XLA's partitioner inserts the collectives (automatic axes); sharding does not change the
computed function.
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

# Path suffix → mesh axes of the last dimensions; leading dimensions (stacked layers) are not split.
# The optimiser's moments have the paths and shapes of their parameters, so the same rules apply.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Tokens over `tensor`, in the table and in the unembedding. With d_model over `tensor` and tokens over
    # `fsdp`, XLA (JAX 0.10 and 0.12, on CPUs) computes wrong logits: some devices get those of other rows.
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
    (r"encoder\.kernel", ("fsdp", "tensor")),  # autoencoders: latents over `tensor`
    (r"decoder\.kernel", ("tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Number of devices along each mesh axis."""

    data: int = setting(
        -1, "number of devices that split the batch, each with all parameters; -1: all remaining devices")
    fsdp: int = setting(
        1, "number of devices that split the batch and the parameter storage; -1: all remaining devices")
    tensor: int = setting(
        1, "number of devices that split heads and hidden widths; -1: all remaining devices")

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(f"data, fsdp, tensor: expected integers ≥ 1, of which at most one "
                             f"-1, found {sizes}")

    def shape(self, n_devices: int) -> tuple[int, int, int]:
        """The sizes of the three axes for n_devices devices.

        Raises:
            InputError: the product of the sizes cannot equal the number of devices.
        """
        sizes = list(dataclasses.astuple(self))
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and n_devices % known == 0:
            sizes[sizes.index(-1)] = n_devices // known
        if math.prod(sizes) != n_devices or -1 in sizes:
            product = " × ".join(map(str, dataclasses.astuple(self)))
            raise InputError(f"mesh: data × fsdp × tensor = {product} does not make {n_devices} "
                             f"device{'s' * (n_devices > 1)}")
        return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (of all processes), axes ("data", "fsdp", "tensor")."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(config.shape(len(devices)), ("data", "fsdp", "tensor"),
                         axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of an array with dotted `path`. Axes that do not divide the dimension are dropped.

    Arrays without a rule are small (routers, convolutions, norms, state pathways) and replicated.
    """
    path = re.sub(r"\.packed$", ".kernel", path)  # codes are sharded as the kernel that they replace
    for pattern, rule in RULES:
        if re.search(rf"(^|\.){pattern}$", path) and len(rule) <= len(shape):
            axes = (None,) * (len(shape) - len(rule)) + rule
            return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None
                                   for axis, size in zip(axes, shape, strict=True)))
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array (or abstract array) of a pytree, by its path."""
    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(sharding, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a dotted name, `blocks.sparse.query.kernel`, without the wrapper of Flax variables."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name.endswith("value"):
        path = path[:-1]
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                    for key in path)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_spec(ndim: int, axis: int = 0) -> PartitionSpec:
    """The partition that splits the batch axis over data and fsdp, and no other axis."""
    return PartitionSpec(*(BATCH if i == axis else None for i in range(ndim)))


def split_batch(x: jax.Array) -> jax.Array:
    """Constrains an activation `[batch, …]` to the batch's sharding; without a mesh, does nothing.

    One constraint per block keeps the partitioner from sharding activations like the weights that they
    are multiplied with, which under fsdp would replace small gathers by large ones.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH) <= set(mesh.axis_names):
        return x
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, batch_spec(x.ndim))


def local_rows(mesh: Mesh, n_rows: int) -> np.ndarray:
    """Indices of the rows of a batch of n_rows on this process's devices, in order."""
    sharding = NamedSharding(mesh, batch_spec(1))
    rows = [np.arange(n_rows)[index] for index in
            sharding.addressable_devices_indices_map((n_rows,)).values()]
    return np.unique(np.concatenate(rows))


def place_rows(array: np.ndarray, mesh: Mesh, n_rows: int, axis: int = 0) -> jax.Array:
    """A global array from the rows of each process.

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
    """`rows` rounded up to a multiple of the number of devices that share a batch."""
    devices = 1 if mesh is None else batch_devices(mesh)
    return -(-rows // devices) * devices


def batch_devices(mesh: Mesh) -> int:
    """Number of devices over which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)
