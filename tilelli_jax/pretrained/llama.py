"""Llama, SmolLM2, Mistral, Qwen2 and Qwen3 in Hugging Face directories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.pretrained.hugging_face import (
    Family,
    Tree,
    is_tied,
    layer_types,
    one_or_several,
    several_ids,
    their_layer_types,
    value_or,
)
from tilelli_jax.pretrained.mapping import Names, Theirs, transposed
from tilelli_jax.pretrained.rotary import rope_of, rope_section, rotary_of

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM"}
_OURS, _THEIRS = "blocks.{i}.", "model.layers.{i}."


def decoder_names(norms: Mapping[str, str]) -> Names:
    """The name map of decoders that are called as Llama's.

    Args:
        norms: our names → theirs, of the norms inside a block.
    """
    names = {"embed.kernel": Theirs("model.embed_tokens.weight"),
             "final_norm.scale": Theirs("model.norm.weight"),
             "unembed.kernel": transposed("lm_head.weight")}
    for ours, theirs in norms.items():
        names[f"{_OURS}{ours}.scale"] = Theirs(f"{_THEIRS}{theirs}.weight")
    for ours, theirs in {
            "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
            "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
            "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}.items():
        names[f"{_OURS}{ours}.kernel"] = transposed(f"{_THEIRS}{theirs}.weight")
        names[f"{_OURS}{ours}.bias"] = Theirs(f"{_THEIRS}{theirs}.bias")
    return names


NAMES = decoder_names({"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
                       "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"})


def decoder_ignored(config: Any) -> Mapping[str, str]:
    """Tensors that are not needed: `Family.ignored`."""
    return {r"rotary_emb\.inv_freq$": "computed from the configuration",
            **({r"^lm_head\.weight$": "the same table as embed_tokens"} if config.tie_embeddings else {})}


def _config_of(tree: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    model_type, n_layers = tree["model_type"], tree["num_hidden_layers"]
    for setting, expected in (("hidden_act", "silu"), ("partial_rotary_factor", 1)):
        if (found := value_or(tree, setting, expected)) != expected:
            raise InputError(f"{setting}: expected {expected}, found {found!r:.40}")
    layers, window = _layers(tree)
    rope, key = rope_section(tree)
    max_len = tree["max_position_embeddings"]
    theta, scaling = rotary_of(rope, key, theta=value_or(tree, "rope_theta", 10000.0), max_len=max_len,
                               original_len=tree.get("original_max_position_embeddings"))
    n_heads = tree["num_attention_heads"]
    kv_heads = {"llama": n_heads, "mistral": 8}.get(model_type, 32)  # transformers' defaults
    return {
        "model_type": model_type, "vocab_size": tree["vocab_size"], "d_model": tree["hidden_size"],
        "layers": layers if layers is not None else ["full"] * n_layers, "window": window,
        "max_seq_len": max_len,
        "tie_embeddings": is_tied(tensors, "model.embed_tokens.weight", "lm_head.weight",
                                  tree.get("tie_word_embeddings", False)),
        "n_heads": n_heads, "n_kv_heads": value_or(tree, "num_key_value_heads", kv_heads),
        "d_head": value_or(tree, "head_dim",
                           128 if model_type == "qwen3" else tree["hidden_size"] // n_heads),
        "d_hidden": tree["intermediate_size"], "rotary_theta": theta, "rotary_scaling": scaling,
        "attention_bias": model_type in ("llama", "qwen3") and value_or(tree, "attention_bias", False),
        "mlp_bias": model_type == "llama" and value_or(tree, "mlp_bias", False),
        "norm_eps": float(tree.get("rms_norm_eps", 1e-6)), "bos_id": tree.get("bos_token_id"),
        "end_ids": several_ids(tree.get("eos_token_id"))}


def _layers(tree: Tree) -> tuple[list[str] | None, int | None]:
    """The kind of each layer (None: all full), and the window of the sliding ones."""
    model_type, n_layers, window = tree["model_type"], tree["num_hidden_layers"], tree.get("sliding_window")
    if model_type == "llama":
        return layer_types(tree, ("full",)), None
    if model_type == "mistral":
        kind = "full" if window is None else "sliding"
        return layer_types(tree, (kind,)) or [kind] * n_layers, window
    layers = layer_types(tree, ("sliding", "full"))
    if not tree.get("use_sliding_window", False) or window is None:
        if layers and "sliding" in layers:
            raise InputError("use_sliding_window: expected true for layer_types with sliding_attention, "
                             "found false")
        return None, None
    n_full = value_or(tree, "max_window_layers", 28)
    return layers or ["full" if i < n_full else "sliding" for i in range(n_layers)], window


def _tree_of(config: Any) -> Tree:
    tree = {
        "architectures": [CLASSES[config.model_type]], "model_type": config.model_type, "hidden_act": "silu",
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.d_head,
        "intermediate_size": config.d_hidden, "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_of(config.rotary_theta, config.rotary_scaling),
        "bos_token_id": config.bos_id, "eos_token_id": one_or_several(config.end_ids)}
    if config.model_type in ("llama", "qwen3"):
        tree["attention_bias"] = config.attention_bias
    if config.model_type == "llama":
        tree["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        tree["sliding_window"] = config.window
    if config.model_type in ("qwen2", "qwen3"):
        tree |= {"use_sliding_window": config.window is not None, "sliding_window": config.window,
                 "layer_types": their_layer_types(config.layers)}
    return tree


LLAMA = Family(family="llama", model_types=tuple(CLASSES), config_of=_config_of, tree_of=_tree_of,
               names=lambda _: NAMES, renamed={}, ignored=decoder_ignored)
