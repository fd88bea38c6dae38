"""config.json of Llama's family and Gemma 3 as published before transformers 5; settings that are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.extras import needs_transformers
from tests.models.test_llama import GEMMA3, LLAMA, MISTRAL, NOISE, QWEN2, QWEN3, ids_for, network, theirs_of
from tests.reference_impl.comparison import distance
from tilelli_jax.errors import InputError
from tilelli_jax.loading.language import load

WITHOUT = {"rope_parameters": None}  # None removes a key
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# The network, the changes of the config.json that we write, and what our configuration must then have.
PUBLISHED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "llama 2": (LLAMA, WITHOUT | {"rope_theta": 10000.0, "rope_scaling": None, "head_dim": None}, {
        "d_head": 6}),
    "llama 2, all heads": (dataclasses.replace(LLAMA, n_kv_heads=4), WITHOUT | {
        "num_key_value_heads": None}, {"n_kv_heads": 4, "rotary_theta": 10000.0}),
    "llama 3.1": (LLAMA, WITHOUT | {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {
        "original_max_position_embeddings": 16}}, {"rotary_theta": 500.0}),
    "llama3 without a length": (LLAMA, WITHOUT | {"rope_scaling": LLAMA3}, {}),
    "llama3, the length outside": (LLAMA, WITHOUT | {
        "original_max_position_embeddings": 16, "rope_scaling": LLAMA3 | {
            "original_max_position_embeddings": 32}}, {}),
    "linear, type": (LLAMA, WITHOUT | {"rope_scaling": {"type": "linear", "factor": 4.0}}, {}),
    "yarn, type": (dataclasses.replace(QWEN2, d_head=8), WITHOUT | {"rope_scaling": YARN}, {}),
    "yarn, the length outside": (dataclasses.replace(QWEN2, d_head=8), WITHOUT | {
        "rope_scaling": YARN, "original_max_position_embeddings": 8}, {}),
    "yarn, mscale": (dataclasses.replace(LLAMA, d_head=8), WITHOUT | {
        "rope_scaling": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}}, {}),
    "yarn without a length": (dataclasses.replace(LLAMA, d_head=8), WITHOUT | {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0}}, {}),
    "mistral": (dataclasses.replace(MISTRAL, n_heads=8, n_kv_heads=8), WITHOUT | {
        "rope_theta": 1e6, "num_key_value_heads": None}, {"layers": ("sliding",) * 2, "window": 5}),
    "mistral, no window": (MISTRAL, {"sliding_window": None}, {"layers": ("full",) * 2, "window": None}),
    "qwen2": (QWEN2, WITHOUT | {"rope_theta": 1e6, "layer_types": None, "sliding_window": 5,
                                "max_window_layers": 1, "use_sliding_window": False}, {"window": None}),
    "qwen2, a window from layer 1 on": (dataclasses.replace(QWEN2, layers=("full",) * 3), WITHOUT | {
        "layer_types": None, "sliding_window": 5, "max_window_layers": 1, "use_sliding_window": True}, {
            "layers": ("full", "sliding", "sliding"), "window": 5}),
    "qwen3, width of a head": (dataclasses.replace(QWEN3, d_head=128), {"head_dim": None}, {"d_head": 128}),
    "gemma 3": (GEMMA3, WITHOUT | {"layer_types": None, "sliding_window_pattern": 3, "rope_theta": 1e6,
                                   "rope_local_base_freq": 5000.0, "rope_scaling": None}, {
        "layers": ("sliding", "sliding", "full"), "rotary_theta": 5000.0}),
    "gemma 3, linear": (GEMMA3, WITHOUT | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0,
                                           "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, {}),
}
FIRST = ("llama 3.1", "yarn, the length outside", "gemma 3")


def rewrite(path: Path, changes: dict[str, Any]) -> None:
    """Changes keys of config.json; None removes one."""
    tree = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


@needs_transformers
@pytest.mark.parametrize("name", [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.exhaustive) for name in PUBLISHED])
def test_published_styles(name: str, tmp_path: Path) -> None:
    import torch
    config, changes, expected = PUBLISHED[name]
    network(config).save_pretrained(tmp_path)
    rewrite(tmp_path, changes)
    ids = ids_for(config)
    with torch.no_grad():
        logits = theirs_of(tmp_path)(torch.from_numpy(ids)).logits
    model = load(tmp_path)
    assert distance(jax.jit(model)(ids), logits) < NOISE
    assert {key: getattr(model.config, key) for key in expected} == expected


@needs_transformers
@pytest.mark.exhaustive
def test_the_text_decoder_of_the_multimodal_gemma(tmp_path: Path) -> None:
    import torch
    import transformers
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config={"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 20, "sliding_window": 5,
                     "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                     "query_pre_attn_scalar": 7, "max_position_embeddings": 64, "initializer_range": 0.3,
                     "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
        vision_config={"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=60, boi_token_index=58, eoi_token_index=59)).eval()
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(3, 58, (2, 19))
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids)).logits
    model = load(tmp_path)
    assert model.config.family == "gemma3" and model.config.layers == ("sliding", "sliding", "full")
    assert distance(jax.jit(model)(ids), expected) < NOISE


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "activation": (LLAMA, {"hidden_act": "gelu"}, "hidden_act: expected silu, found 'gelu'"),
    "partly rotated": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, found 0.5"),
    "partly rotated, inside": (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                           "partial_rotary_factor": 0.5}},
                               "rope_parameters.partial_rotary_factor: expected 1, found 0.5"),
    "scaling": (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2.0}},
                "rope_scaling.rope_type: expected default, linear, llama3, yarn, found 'longrope'"),
    "no factor": (LLAMA, {"rope_scaling": {"type": "linear"}}, "expected the key rope_scaling.factor"),
    "sliding layers of a Llama": (LLAMA, {"layer_types": ["sliding_attention", "full_attention"]},
                                  "layer_types"),
    "full layers of a Mistral": (MISTRAL, {"layer_types": ["sliding_attention", "full_attention"]},
                                 "layer_types"),
    "an unused window": (QWEN2, {"layer_types": ["sliding_attention", "full_attention"],
                                 "use_sliding_window": False}, "use_sliding_window: expected true"),
    "Gemma's activation": (GEMMA3, {"hidden_activation": "gelu"},
                           "hidden_activation: expected gelu_pytorch_tanh, found 'gelu'"),
    "soft caps": (GEMMA3, {"final_logit_softcapping": 30.0},
                  "final_logit_softcapping: expected None, found 30.0"),
    "bidirectional": (GEMMA3, {"use_bidirectional_attention": True},
                      "use_bidirectional_attention: expected False, found True"),
    "one section for all layers": (GEMMA3, {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
                                   "rope_parameters: expected the sections sliding_attention and "
                                   "full_attention, found factor"),
    "sliding layers, scaled": (GEMMA3, {"rope_parameters": {
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        "rope_parameters.sliding_attention.rope_type: expected default, found 'linear'"),
    "experts": (LLAMA, {"model_type": "mixtral"}, "model_type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name: str, tmp_path: Path) -> None:
    config, changes, message = REFUSED[name]
    network(config).save_pretrained(tmp_path)
    rewrite(tmp_path, changes)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
