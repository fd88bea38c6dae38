"""Gemma 4's text decoder in Hugging Face directories, alone or as part of the multimodal network."""

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
from tilelli_jax.pretrained.mapping import Names, Theirs, transposed

_OURS, _THEIRS = "blocks.{i}.", "model.layers.{i}."


def _names(_: Any) -> Names:
    names = {
        "embed.kernel": Theirs("model.embed_tokens.weight"),
        "embed_per_layer.kernel": Theirs("model.embed_tokens_per_layer.weight"),
        "project_per_layer.kernel": transposed("model.per_layer_model_projection.weight"),
        "per_layer_norm.scale": Theirs("model.per_layer_projection_norm.weight"),
        "final_norm.scale": Theirs("model.norm.weight"),
        "unembed.kernel": transposed("lm_head.weight"),
        _OURS + "scalar": Theirs(_THEIRS + "layer_scalar"),
        _OURS + "router.scale": Theirs(_THEIRS + "router.scale"),
        _OURS + "router.expert_scale": Theirs(_THEIRS + "router.per_expert_scale"),
        _OURS + "experts.gate_up.kernel": transposed(_THEIRS + "experts.gate_up_proj"),
        _OURS + "experts.down.kernel": transposed(_THEIRS + "experts.down_proj")}
    for ours, theirs in {
            "norm1": "input_layernorm", "attention_norm": "post_attention_layernorm",
            "norm2": "pre_feedforward_layernorm", "mlp_norm": "post_feedforward_layernorm",
            "dense_norm": "post_feedforward_layernorm_1", "experts_in_norm": "pre_feedforward_layernorm_2",
            "experts_norm": "post_feedforward_layernorm_2", "per_layer.norm": "post_per_layer_input_norm",
            "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}.items():
        names[f"{_OURS}{ours}.scale"] = Theirs(f"{_THEIRS}{theirs}.weight")
    for ours, theirs in {
            "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
            "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
            "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
            "per_layer.gate": "per_layer_input_gate", "per_layer.out": "per_layer_projection",
            "router.proj": "router.proj"}.items():
        names[f"{_OURS}{ours}.kernel"] = transposed(f"{_THEIRS}{theirs}.weight")
    return names


def _ignored(config: Any) -> dict[str, str]:
    ignored = dict(NON_TEXT_PARTS)
    if config.tie_embeddings:
        ignored[r"^lm_head\.weight$"] = "the same table as embed_tokens"
    if shared := [str(i) for i in range(config.n_own, config.n_layers)]:
        ignored[rf"^model\.layers\.({'|'.join(shared)})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\."] = (
            "this layer uses the keys of another layer")
    return ignored


def _config_of(tree: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    tree = text_config(tree)
    for key, expected in (("hidden_activation", "gelu_pytorch_tanh"), ("attention_bias", False)):
        if tree.get(key, expected) != expected:
            raise InputError(f"{key}: expected {expected}, found {tree[key]}")
    if tree.get("use_bidirectional_attention") == "all":  # "vision" affects images only
        raise InputError("use_bidirectional_attention: expected a causal network, found all")
    if (layers := layer_types(tree, ("sliding", "full"))) is None:
        raise KeyError("layer_types")
    rope = object_under(tree, "rope_parameters")
    for each, expected in (("sliding_attention", "default"), ("full_attention", "proportional")):
        if (found := object_under(rope, each, "rope_parameters.").get("rope_type")) != expected:
            raise InputError(f"rope_parameters.{each}.rope_type: expected {expected}, found {found}")
    experts, softcap = tree.get("enable_moe_block"), tree.get("final_logit_softcapping")
    return {
        "vocab_size": tree["vocab_size"], "d_model": tree["hidden_size"], "layers": layers,
        "max_seq_len": tree["max_position_embeddings"],
        "tie_embeddings": is_tied(tensors, "model.embed_tokens.weight", "lm_head.weight",
                                  tree.get("tie_word_embeddings", True)),
        "n_heads": tree["num_attention_heads"],
        **_heads(tree, layers), "window": tree["sliding_window"],
        "n_shared_layers": value_or(tree, "num_kv_shared_layers", 0),
        "key_is_value": tree.get("attention_k_eq_v", False),
        **{ours: positive(rope[each]["rope_theta"], f"rope_parameters.{each}.rope_theta") for ours, each in (
            ("rotary_theta", "sliding_attention"), ("rotary_theta_full", "full_attention"))},
        "rotary_fraction_full": float(rope["full_attention"].get("partial_rotary_factor", 1.0)),
        "d_hidden": tree["intermediate_size"], "double_wide": tree.get("use_double_wide_mlp", False),
        "d_per_layer": value_or(tree, "hidden_size_per_layer_input", 0),
        "vocab_per_layer": value_or(tree, "vocab_size_per_layer_input", tree["vocab_size"]),
        "n_experts": tree["num_experts"] if experts else 0,
        "experts_per_token": tree["top_k_experts"] if experts else 0,
        "d_expert": tree["moe_intermediate_size"] if experts else 0,
        "softcap": 0.0 if softcap is None else positive(softcap, "final_logit_softcapping"),
        "norm_eps": float(tree.get("rms_norm_eps", 1e-6)), "bos_id": tree.get("bos_token_id"),
        "end_ids": several_ids(tree.get("eos_token_id"))}


def _heads(tree: Tree, layers: list[str]) -> Tree:
    """Widths and numbers of heads for both kinds of layers; newer files state them for each layer."""
    of_kind = {"sliding": (tree["head_dim"], tree["num_key_value_heads"])}
    special = object_under(tree, "per_layer_config")
    by_layer = {int(layer): object_under(special, layer, "per_layer_config.") for layer in special}
    if by_layer:
        heads_by_layer = [(by_layer.get(i, {}).get("head_dim", tree["head_dim"]),
                           by_layer.get(i, {}).get("num_key_value_heads", tree["num_key_value_heads"]))
                          for i in range(len(layers))]
        for kind in ("sliding", "full"):
            heads = sorted({head for layer, head in zip(layers, heads_by_layer, strict=True)
                            if layer == kind})
            if len(heads) > 1:
                raise InputError(f"per_layer_config: expected the same heads in all {kind} layers, "
                                 f"found {heads}")
            of_kind[kind] = heads[0] if heads else of_kind["sliding"]
    else:
        n_kv = tree["num_key_value_heads"]
        if tree.get("attention_k_eq_v"):
            n_kv = value_or(tree, "num_global_key_value_heads", n_kv)
        of_kind["full"] = (value_or(tree, "global_head_dim", 512), n_kv)
    (d_head, n_kv), (d_head_full, n_kv_full) = of_kind["sliding"], of_kind["full"]
    return {"d_head": d_head, "n_kv_heads": n_kv, "d_head_full": d_head_full, "n_kv_heads_full": n_kv_full}


def _tree_of(config: Any) -> Tree:
    full = {"head_dim": config.d_head_full, "num_key_value_heads": config.n_kv_heads_full}
    return {
        "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "vocab_size": config.vocab_size,
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "layer_types": their_layer_types(config.layers),
        "max_position_embeddings": config.max_seq_len, "tie_word_embeddings": config.tie_embeddings,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "per_layer_config": {str(i): full for i, kind in enumerate(config.layers) if kind == "full"},
        "sliding_window": config.window, "num_kv_shared_layers": config.n_shared_layers,
        "attention_k_eq_v": config.key_is_value,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rotary_theta},
            "full_attention": {"rope_type": "proportional", "rope_theta": config.rotary_theta_full,
                               "partial_rotary_factor": config.rotary_fraction_full}},
        "intermediate_size": config.d_hidden, "use_double_wide_mlp": config.double_wide,
        "hidden_size_per_layer_input": config.d_per_layer,
        "vocab_size_per_layer_input": config.vocab_per_layer,
        "enable_moe_block": config.n_experts > 0, "num_experts": config.n_experts or None,
        "top_k_experts": config.experts_per_token or None, "moe_intermediate_size": config.d_expert or None,
        "final_logit_softcapping": config.softcap or None, "rms_norm_eps": config.norm_eps,
        "bos_token_id": config.bos_id, "eos_token_id": one_or_several(config.end_ids), "pad_token_id": 0}


GEMMA4 = Family(
    family="gemma4", model_types=("gemma4_text", "gemma4"), config_of=_config_of, tree_of=_tree_of,
    names=_names, renamed=TEXT_DECODER, ignored=_ignored)
