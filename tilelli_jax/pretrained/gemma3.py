"""Gemma 3's text decoder in Hugging Face directories, alone or as part of the multimodal network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io.json_text import object_under
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.pretrained.hugging_face import (
    NON_TEXT_PARTS,
    TEXT_DECODER,
    Family,
    Tree,
    is_tied,
    layer_types,
    one_or_several,
    positive,
    several_ids,
    text_config,
    their_layer_types,
    value_or,
)
from tilelli_jax.pretrained.llama import decoder_ignored, decoder_names
from tilelli_jax.pretrained.rotary import rope_of, rope_type, rotary_of

NAMES = decoder_names({
    "norm1": "input_layernorm", "attention_norm": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm", "mlp_norm": "post_feedforward_layernorm",
    "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"})


def _config_of(tree: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    tree = text_config(tree)
    for key, expected in (("hidden_activation", "gelu_pytorch_tanh"), ("final_logit_softcapping", None),
                          ("attn_logit_softcapping", None), ("use_bidirectional_attention", False),
                          ("partial_rotary_factor", 1)):
        if value_or(tree, key, expected) != expected:
            raise InputError(f"{key}: expected {expected}, found {tree[key]!r:.40}")
    max_len = value_or(tree, "max_position_embeddings", 131072)
    theta, theta_full, scaling = _rotary(tree, max_len)
    return {
        "vocab_size": value_or(tree, "vocab_size", 262208), "d_model": tree["hidden_size"],
        "layers": _layers(tree), "max_seq_len": max_len,
        "tie_embeddings": is_tied(tensors, "model.embed_tokens.weight", "lm_head.weight",
                                  tree.get("tie_word_embeddings", True)),
        # Files of the multimodal network leave out what equals transformers' defaults.
        "n_heads": value_or(tree, "num_attention_heads", 8),
        "n_kv_heads": value_or(tree, "num_key_value_heads", 4), "d_head": value_or(tree, "head_dim", 256),
        "d_hidden": tree["intermediate_size"], "window": value_or(tree, "sliding_window", 4096),
        "query_scale": value_or(tree, "query_pre_attn_scalar", 256),
        "rotary_theta": theta, "rotary_theta_full": theta_full, "rotary_scaling": scaling,
        "attention_bias": value_or(tree, "attention_bias", False),
        "norm_eps": float(value_or(tree, "rms_norm_eps", 1e-6)), "bos_id": tree.get("bos_token_id", 2),
        "end_ids": several_ids(tree.get("eos_token_id", 1))}


def _layers(tree: Tree) -> list[str]:
    layers = layer_types(tree, ("sliding", "full"))
    period = value_or(tree, "sliding_window_pattern", value_or(tree, "_sliding_window_pattern", 6))
    return layers or ["full" if (i + 1) % period == 0 else "sliding"
                      for i in range(tree["num_hidden_layers"])]


def _rotary(tree: Tree, max_len: Any) -> tuple[float, float, Tree | None]:
    """The bases of sliding and full layers, and the scaling of full ones."""
    local, glob = value_or(tree, "rope_local_base_freq", 10000.0), value_or(tree, "rope_theta", 1000000.0)
    if object_under(tree, "rope_scaling"):  # before transformers 5
        theta, scaling = rotary_of(object_under(tree, "rope_scaling"), "rope_scaling", theta=glob,
                                   max_len=max_len)
        return positive(local, "rope_local_base_freq"), theta, scaling
    rope = object_under(tree, "rope_parameters")
    if others := sorted(rope.keys() - {"sliding_attention", "full_attention"}):
        raise InputError("rope_parameters: expected the sections sliding_attention and full_attention, found "
                         f"{others[0]}")
    sliding, full = (object_under(rope, key, "rope_parameters.")
                     for key in ("sliding_attention", "full_attention"))
    if (kind := rope_type(sliding)) != "default":
        raise InputError(f"rope_parameters.sliding_attention.rope_type: expected default, found {kind!r:.40}")
    theta, _ = rotary_of(sliding, "rope_parameters.sliding_attention", theta=local, max_len=max_len)
    return theta, *rotary_of(full, "rope_parameters.full_attention", theta=glob, max_len=max_len)


def _tree_of(config: Any) -> Tree:
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": config.attention_bias,
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "layer_types": their_layer_types(config.layers),
        "max_position_embeddings": config.max_seq_len, "tie_word_embeddings": config.tie_embeddings,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head, "intermediate_size": config.d_hidden, "sliding_window": config.window,
        "query_pre_attn_scalar": int(config.query_scale), "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"sliding_attention": rope_of(config.rotary_theta, None),
                            "full_attention": rope_of(config.rotary_theta_full, config.rotary_scaling)},
        "final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False,
        "bos_token_id": config.bos_id, "eos_token_id": one_or_several(config.end_ids), "pad_token_id": 0}


GEMMA3 = Family(
    family="gemma3", model_types=("gemma3_text", "gemma3"), config_of=_config_of, tree_of=_tree_of,
    names=lambda _: NAMES, renamed=TEXT_DECODER,
    ignored=lambda config: {**NON_TEXT_PARTS, **decoder_ignored(config)})
