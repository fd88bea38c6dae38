"""Random weights that leave nothing at its neutral value, and networks of the library with them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from tilelli_jax.models import FAMILIES
from tilelli_jax.models.arrays import outline
from tilelli_jax.store import from_arrays


def random_network(config: Any, seed: int) -> tuple[Any, dict[str, np.ndarray]]:
    """The network with random weights, and these by name; both are the caller's own.

    Only the shapes of its own initial weights are worked out, and once for each configuration: that takes
    longer than most of what is done with the network.
    """
    graph, state, arrays = _made(config, seed)
    own = jax.tree.map(lambda array: jax.device_put(array, may_alias=False), state)
    return nnx.merge(graph, own), {name: a.copy() for name, a in arrays.items()}


@functools.lru_cache(maxsize=32)
def _made(config: Any, seed: int) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """The network as its structure and arrays of numpy, which are no device's."""
    found = outline(FAMILIES[config.family][1], config)
    arrays = random_weights({name: leaf.shape for name, leaf in found.items()}, seed)
    graph, state = nnx.split(from_arrays(config, arrays))
    return graph, jax.tree.map(np.array, state), arrays


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Arrays f32 of these names: a test on scales of 1 and biases of 0 would see neither."""
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
                raise ValueError(f"{name}: what is it?")
        arrays[name] = np.asarray(value, np.float32)
    return arrays
