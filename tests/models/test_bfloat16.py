"""Pretrained families in bfloat16: the errors have the same size as those of transformers.

The errors themselves differ, because sums are rounded in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.extras import needs_transformers
from tilelli_jax.models import (
    FlaxGemma3ForCausalLM,
    FlaxGemma4ForCausalLM,
    FlaxGPTNeoXForCausalLM,
    FlaxLlamaForCausalLM,
    FlaxT5ForConditionalGeneration,
)
from tilelli_jax.models.causal_lm import ComputeConfig

pytestmark = needs_transformers

VOCABULARY = 61


def neox() -> Any:
    import transformers
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, initializer_range=0.2,
        attn_implementation="eager"))


def gemma4() -> Any:
    import transformers
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size=32,
        hidden_size_per_layer_input=8, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, global_head_dim=16,
        intermediate_size=64, sliding_window=8, num_kv_shared_layers=0, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"] * 2, attn_implementation="eager"))


def decoder(name: str, config: str = "", **options: Any) -> Callable[[], Any]:
    """A network of a class of transformers with Llama's settings, and others."""
    def make() -> Any:
        import transformers
        config_class = getattr(transformers, config or f"{name}Config")
        return getattr(transformers, f"{name}ForCausalLM")(config_class(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=64, max_position_embeddings=64,
            initializer_range=0.2, attn_implementation="eager", **options))
    return make


def t5() -> Any:
    import transformers
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
        feed_forward_proj="relu", initializer_factor=1.0, decoder_start_token_id=0))


NETWORKS: dict[str, Any] = {  # theirs, ours, and the number of inputs
    "gpt_neox": (neox, FlaxGPTNeoXForCausalLM, 1), "gemma4": (gemma4, FlaxGemma4ForCausalLM, 1),
    "llama": (decoder("Llama"), FlaxLlamaForCausalLM, 1),
    "mistral": (decoder("Mistral", sliding_window=5), FlaxLlamaForCausalLM, 1),
    "qwen2": (decoder("Qwen2"), FlaxLlamaForCausalLM, 1),
    "qwen3": (decoder("Qwen3"), FlaxLlamaForCausalLM, 1),
    "gemma3": (decoder("Gemma3", "Gemma3TextConfig", sliding_window=5, query_pre_attn_scalar=8),
               FlaxGemma3ForCausalLM, 1),
    "t5": (t5, FlaxT5ForConditionalGeneration, 2)}


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=[pytest.mark.exhaustive] * (name != "gpt_neox")) for name in NETWORKS])
def test_errors_are_similar_to_those_of_transformers(family: str, tmp_path: Path) -> None:
    import torch
    make, ours, n_inputs = NETWORKS[family]
    torch.manual_seed(0)
    original = make().eval()
    original.save_pretrained(tmp_path)
    rng = np.random.default_rng(1)
    inputs = [rng.integers(2, VOCABULARY, (16, 24)) for _ in range(n_inputs)]

    def theirs(model: Any) -> np.ndarray:
        names = ("input_ids", "decoder_input_ids")
        with torch.no_grad():
            tensors = {name: torch.from_numpy(ids) for name, ids in zip(names, inputs, strict=False)}
            return model(**tensors).logits.float().numpy()

    exact, rough = theirs(original), theirs(original.bfloat16())
    model = ours.from_pretrained(tmp_path, ComputeConfig(dtype="bfloat16"), param_dtype="bfloat16")
    result = np.asarray(jax.jit(model)(*inputs), np.float32)
    ratio = np.abs(result - exact).mean() / np.abs(rough - exact).mean()
    assert 0.3 < ratio < 1.2, ratio  # measured: 1.01, 0.88, 0.93
