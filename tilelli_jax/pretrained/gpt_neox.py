"""GPT-NeoX and Pythia in Hugging Face directories."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.pretrained.hugging_face import (
    ACTIVATIONS,
    THEIR_ACTIVATIONS,
    Family,
    Tree,
    is_tied,
    one_or_several,
    positive,
    several_ids,
    value_or,
)
from tilelli_jax.pretrained.mapping import Theirs, transposed
from tilelli_jax.pretrained.rotary import rope_of, rope_section, rope_type

log = logging.getLogger(__name__)
_OURS, _THEIRS = "blocks.{i}.", "gpt_neox.layers.{i}."
NAMES = {
    "embed.kernel": Theirs("gpt_neox.embed_in.weight"),
    "final_norm.scale": Theirs("gpt_neox.final_layer_norm.weight"),
    "final_norm.bias": Theirs("gpt_neox.final_layer_norm.bias"),
    "unembed.kernel": transposed("embed_out.weight"),
    _OURS + "norm1.scale": Theirs(_THEIRS + "input_layernorm.weight"),
    _OURS + "norm1.bias": Theirs(_THEIRS + "input_layernorm.bias"),
    _OURS + "norm2.scale": Theirs(_THEIRS + "post_attention_layernorm.weight"),
    _OURS + "norm2.bias": Theirs(_THEIRS + "post_attention_layernorm.bias"),
    _OURS + "attention.qkv.kernel": transposed(_THEIRS + "attention.query_key_value.weight"),
    _OURS + "attention.qkv.bias": Theirs(_THEIRS + "attention.query_key_value.bias"),
    _OURS + "attention.out.kernel": transposed(_THEIRS + "attention.dense.weight"),
    _OURS + "attention.out.bias": Theirs(_THEIRS + "attention.dense.bias"),
    _OURS + "mlp.up.kernel": transposed(_THEIRS + "mlp.dense_h_to_4h.weight"),
    _OURS + "mlp.up.bias": Theirs(_THEIRS + "mlp.dense_h_to_4h.bias"),
    _OURS + "mlp.down.kernel": transposed(_THEIRS + "mlp.dense_4h_to_h.weight"),
    _OURS + "mlp.down.bias": Theirs(_THEIRS + "mlp.dense_4h_to_h.bias")}
IGNORED = {r"attention\.(masked_)?bias$": "the causal mask, stored by old versions",
           r"rotary_emb\.inv_freq$": "computed from the configuration"}
TIED = {r"^embed_out\.weight$": "the same table as embed_in"}


def _config_of(tree: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    """Our settings from config.json, as written by transformers before or from version 5 on."""
    rope, key = rope_section(tree)
    if (kind := rope_type(rope)) not in ("default", "linear"):
        raise InputError(f"{key}.rope_type: expected default or linear, found {kind!r:.40}")
    factor = 1.0 if kind == "default" else positive(rope.get("factor"), f"{key}.factor")
    if (activation := value_or(tree, "hidden_act", "gelu")) not in ("gelu", "gelu_new", "gelu_fast"):
        raise InputError(f"hidden_act: expected gelu, gelu_new or gelu_fast, found {activation!r:.40}")
    return {
        "vocab_size": tree["vocab_size"], "d_model": tree["hidden_size"],
        "n_layers": tree["num_hidden_layers"], "max_seq_len": tree["max_position_embeddings"],
        "tie_embeddings": is_tied(tensors, NAMES["embed.kernel"].name, NAMES["unembed.kernel"].name,
                                  tree.get("tie_word_embeddings", False)),
        "n_heads": tree["num_attention_heads"], "d_hidden": tree["intermediate_size"],
        "rotary_fraction": _rotation(tree, "partial_rotary_factor", "rotary_pct", 0.25),
        "rotary_theta": _rotation(tree, "rope_theta", "rotary_emb_base", 10000),
        "rotary_scaling": None if factor == 1 else {"kind": "linear", "factor": factor},
        "activation": ACTIVATIONS[activation],
        "parallel_residual": tree.get("use_parallel_residual", True),
        "attention_bias": tree.get("attention_bias", True),
        "norm_eps": float(tree.get("layer_norm_eps", 1e-5)), "bos_id": tree.get("bos_token_id"),
        "end_ids": several_ids(tree.get("eos_token_id"))}


def _rotation(tree: Tree, key: str, older: str, default: float) -> float:
    """A rotary setting: the value of `key`, or of the key of older versions, as transformers reads them."""
    rope, section = rope_section(tree)
    if key not in rope:
        return positive(tree.get(older, default), older)
    if tree.get(older, rope[key]) != rope[key]:
        log.warning("config.json: %s.%s is %s, but %s is %s; using %s.%s, as transformers does", section, key,
                    rope[key], older, tree[older], section, key)
    return positive(rope[key], f"{section}.{key}")


def _tree_of(config: Any) -> Tree:
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox",
        "hidden_act": THEIR_ACTIVATIONS[config.activation],
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings, "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_hidden, "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias, "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.rotary_fraction, "rotary_emb_base": config.rotary_theta,
        "rope_parameters": {**rope_of(config.rotary_theta, config.rotary_scaling),
                            "partial_rotary_factor": config.rotary_fraction},
        "bos_token_id": config.bos_id, "eos_token_id": one_or_several(config.end_ids)}


GPT_NEOX = Family(
    family="gpt_neox", model_types=("gpt_neox",), config_of=_config_of, tree_of=_tree_of,
    names=lambda _: NAMES,
    renamed={r"^lm_head\.": "embed_out."},
    ignored=lambda config: {**IGNORED, **(TIED if config.tie_embeddings else {})})
