"""Random weights without neutral values such as scales of 1, and networks with these weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models import FAMILIES
from tilelli_jax.models.arrays import abstract_arrays


def random_network(config: Any, seed: int) -> tuple[Any, dict[str, np.ndarray]]:
    """The network with random weights, and the weights by name; callers may modify both.

    Shapes are computed once for each configuration, because this takes longer than most tests.
    """
    graph, state, arrays = _cached(config, seed)
    copies = jax.tree.map(lambda array: jax.device_put(array, may_alias=False), state)
    return nnx.merge(graph, copies), {name: a.copy() for name, a in arrays.items()}


@functools.lru_cache(maxsize=32)
def _cached(config: Any, seed: int) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """The network's structure, and its state and weights as NumPy arrays."""
    shapes = abstract_arrays(FAMILIES[config.family][1], config)
    arrays = random_weights({name: leaf.shape for name, leaf in shapes.items()}, seed)
    graph, state = nnx.split(from_arrays(config, arrays))
    return graph, jax.tree.map(np.array, state), arrays


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Random f32 arrays by name. Scales of 1 and biases of 0 would hide errors in their use."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in sorted(shapes.items(), reverse=True):  # a kernel before its alpha
        noise = rng.standard_normal(shape)
        prefix, _, last = name.rpartition(".")
        match last:
            case "kernel":
                value = noise / np.sqrt(shape[-1] if prefix in ("embed", "embed_per_layer") else shape[-2])
            case "alpha":
                kernel = arrays[f"{prefix}.kernel".lstrip(".")]
                value = np.abs(kernel).mean((-2, -1)) * np.exp(0.3 * noise)
            case "rotation":
                value = np.linalg.qr(noise)[0]
            case "scale" | "scalar" | "expert_scale" | "b" | "c":
                value = 1 + 0.3 * noise
            case "a_raw":
                value = noise  # decays of both signs
            case "bias" | "table":
                value = 0.3 * noise
            case _:
                raise ValueError(f"{name}: unknown kind of array")
        arrays[name] = np.asarray(value, np.float32)
    return arrays
