"""Networks, one file each, and how one is built from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from tilelli_jax.models.decoder import ComputeConfig, Decoder
from tilelli_jax.models.routed import RoutedConfig, RoutedLM
from tilelli_jax.models.vanilla import VanillaConfig, VanillaLM
from tilelli_jax.nn.linear import Weight

ModelConfig = RoutedConfig | VanillaConfig
FAMILIES: dict[str, tuple[type, Callable[..., Decoder]]] = {
    "routed": (RoutedConfig, RoutedLM),
    "vanilla": (VanillaConfig, VanillaLM),
}


def build(config: ModelConfig, seed: int | jax.Array = 0, compute: ComputeConfig | None = None) -> Decoder:
    """A network with random weights. `seed` is a number or a PRNG key."""
    return FAMILIES[config.family][1](config, rngs=nnx.Rngs(seed), compute=compute)


def weights(model: nnx.Module) -> dict[str, Weight]:
    """Every weight of the model that a quantiser may take, by dotted name."""
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)
            if isinstance(module, Weight)}


def freeze(model: Decoder) -> Decoder:
    """A copy whose weights are quantised once and for all: what decoding should run.

    Its numbers are those of `model`; quantising anew at every byte would cost more than the rest.
    Its configuration says `quantizer: none`, as its weights are now what they seem.
    """
    frozen = nnx.clone(model)
    for weight in weights(frozen).values():
        weight.freeze()
    frozen.config = dataclasses.replace(model.config, quantizer="none")
    frozen.unroll()
    return frozen
