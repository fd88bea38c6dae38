"""Directories of Gemma 4 in the Hugging Face format: the multimodal network's, and invalid configurations."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.models.gemma4_configs import TINY
from tests.reference_impl.comparison import assert_same_weights
from tests.reference_impl.random_weights import random_network
from tilelli_jax.errors import InputError
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "saved"
    random_network(TINY, 0)[0].save_pretrained(path)
    return path


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def test_the_text_decoder_of_the_multimodal_network(saved: Path, tmp_path: Path) -> None:
    """Reads the text decoder under its prefix, ignoring image parts and unused keys of the last layers."""
    expected = FlaxGemma4ForCausalLM.from_pretrained(saved)
    arrays = {name.replace("model.", "model.language_model.", 1): array
              for name, array in safetensors.numpy.load_file(saved / "model.safetensors").items()}
    arrays["model.vision_tower.patch.weight"] = np.ones((2, 3), np.float32)
    arrays["model.language_model.layers.3.self_attn.k_proj.weight"] = np.ones((24, 24), np.float32)
    arrays["model.language_model.layers.2.self_attn.k_norm.weight"] = np.ones(6, np.float32)
    arrays["lm_head.weight"] = arrays["model.language_model.embed_tokens.weight"].copy()
    other = tmp_path / "other"
    other.mkdir()
    safetensors.numpy.save_file(arrays, other / "model.safetensors")
    tree = json.loads((saved / "config.json").read_text())
    full = tree.pop("per_layer_config")["1"]
    outer = {"model_type": "gemma4", "eos_token_id": [1, 50],
             "text_config": {**tree, "global_head_dim": full["head_dim"], "num_global_key_value_heads": None}}
    (other / "config.json").write_text(json.dumps(outer))
    result = FlaxGemma4ForCausalLM.from_pretrained(other)
    assert result.config == dataclasses.replace(expected.config, end_ids=(1, 50))
    assert_same_weights(result, expected)


def rewritten(path: Path, **changes: Any) -> None:
    tree = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**tree, **changes}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "gemma3"}, "model_type: expected gemma4_text or gemma4, found 'gemma3'"),
    ({"hidden_activation": "relu"}, "hidden_activation: expected gelu_pytorch_tanh, found relu"),
    ({"attention_bias": True}, "attention_bias: expected False, found True"),
    ({"use_bidirectional_attention": "all"}, "expected a causal network, found all"),
    ({"layer_types": ["linear_attention"]}, "layer_types: expected sliding_attention or full_attention"),
    ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layers: expected at least one layer"),
    ({"num_kv_shared_layers": 3}, "n_shared_layers: expected a layer of kind full before the last 3"),
    ({"num_hidden_layers": 9}, "num_hidden_layers: expected 4, the length of layer_types"),
    ({"layer_types": "full_attention"}, "layer_types: expected a list, found text"),
    ({"rope_parameters": [1]}, "rope_parameters: expected an object, found a list"),
    ({"rope_parameters": {"sliding_attention": 3}},
     "rope_parameters.sliding_attention: expected an object, found a number"),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 0},
                          "full_attention": {"rope_type": "proportional"}}},
     "rope_parameters.sliding_attention.rope_theta: expected a number > 0, found 0"),
    ({"per_layer_config": {"1": [1]}}, "per_layer_config.1: expected an object, found a list"),
    ({"text_config": [1]}, "text_config: expected an object, found a list"),
    ({"final_logit_softcapping": 0}, "final_logit_softcapping: expected a number > 0, found 0"),
    ({"vocab_size_per_layer_input": 0}, "vocab_per_layer: expected an integer ≥ 1, found 0"),
    ({"per_layer_config": None, "global_head_dim": 0}, "d_head_full: expected an integer ≥ 1, found 0"),
    ({"per_layer_config": None, "attention_k_eq_v": True, "num_global_key_value_heads": 0},
     "n_kv_heads_full: expected an integer ≥ 1, found 0"),
    ({"quantization_config": {}}, "quantization_config: expected weights that are not quantised, found"),
    ({"eos_token_id": [1, 10**9]}, "eos_token_id: expected ids of the vocabulary, 0 to "),
    ({"num_attention_heads": 3}, "n_heads: expected a multiple of 2 key heads, found 3"),
    ({"per_layer_config": {"1": {"head_dim": 12}, "03": {"head_dim": 6}}},
     r"per_layer_config: expected the same heads in all full layers, found [(6, 2), (12, 2)]"),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}, "full_attention": {}}},
     "rope_parameters.sliding_attention.rope_type: expected default, found yarn"),
    ({"enable_moe_block": True, "num_experts": 2, "top_k_experts": 3, "moe_intermediate_size": 4},
     "experts_per_token: expected 1 to 2"),
])
def test_invalid_configurations_raise(saved: Path, changes: dict[str, Any], message: str) -> None:
    rewritten(saved, **changes)
    with pytest.raises(InputError) as raised:
        FlaxGemma4ForCausalLM.from_pretrained(saved)
    assert message in str(raised.value) and str(raised.value).startswith(f"{saved}/config.json: ")
