"""Networks, one module each, and functions for any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import CausalLM
from tilelli_jax.models.gemma3 import FlaxGemma3ForCausalLM, Gemma3Config
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM, Gemma4Config
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.llama import FlaxLlamaForCausalLM, LlamaConfig
from tilelli_jax.models.routed import RoutedConfig, RoutedLM
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration, T5Config
from tilelli_jax.models.vanilla import VanillaConfig, VanillaLM
from tilelli_jax.nn.linear import Weight

ModelConfig = RoutedConfig | VanillaConfig  # networks that can be trained from scratch
FAMILIES: dict[str, tuple[type, Callable[..., Any]]] = {
    "routed": (RoutedConfig, RoutedLM),
    "vanilla": (VanillaConfig, VanillaLM),
    "gpt_neox": (GPTNeoXConfig, FlaxGPTNeoXForCausalLM),
    "llama": (LlamaConfig, FlaxLlamaForCausalLM),
    "gemma3": (Gemma3Config, FlaxGemma3ForCausalLM),
    "gemma4": (Gemma4Config, FlaxGemma4ForCausalLM),
    "t5": (T5Config, FlaxT5ForConditionalGeneration),
}


def weights(model: nnx.Module) -> dict[str, Weight]:
    """Every weight of the model that can be quantised, by dotted name."""
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)
            if isinstance(module, Weight)}


def pack(model: CausalLM) -> CausalLM:
    """Returns a copy whose quantised weights are stored as codes and scales, without full-precision kernels.

    It computes the same numbers as `model`, and cannot be trained.

    Raises:
        InputError: no weight is quantised.
    """
    packed = nnx.clone(model)
    for weight in weights(packed).values():
        weight.pack()
    if not is_packed(packed):
        raise InputError("packed: expected quantised weights, found none: the network has quantizer "
                         f"{getattr(model.config, 'quantizer', 'none')}")
    return packed


def is_packed(model: nnx.Module) -> bool:
    """Whether any weight is packed."""
    return any(weight.is_packed for weight in weights(model).values())


def freeze(model: CausalLM) -> CausalLM:
    """Returns a copy with permanently quantised weights, for decoding.

    It computes the same numbers as `model`; quantising the weights again for every byte would cost more
    than the rest of decoding. Its configuration has `quantizer: none`, because its kernels already hold
    the quantised values.
    """
    frozen = nnx.clone(model)
    for weight in weights(frozen).values():
        weight.freeze()
    frozen.config = dataclasses.replace(model.config, quantizer="none")
    frozen.unroll()
    return frozen
