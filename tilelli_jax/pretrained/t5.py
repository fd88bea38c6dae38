"""T5 and Chronos-T5 in Hugging Face directories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io.json_text import object_under
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.pretrained.hugging_face import (
    ACTIVATIONS,
    THEIR_ACTIVATIONS,
    Family,
    Tree,
    is_tied,
    several_ids,
    value_or,
)
from tilelli_jax.pretrained.mapping import Names, Theirs, transposed

TOKENIZER = "MeanScaleUniformBins"
TABLE, UNEMBED = "shared.weight", "lm_head.weight"


def _names(up: str) -> Names:
    """The name map; `up` is the name of the map into the hidden layer: wi, or wi_1 beside a gate."""
    names = {"embed.kernel": Theirs(TABLE), "unembed.kernel": transposed(UNEMBED)}
    for part, mlp in (("encoder", 1), ("decoder", 2)):
        bias = f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names |= {f"{part}.norm.scale": Theirs(f"{part}.final_layer_norm.weight"),
                  f"{part}.bias.table": Theirs(bias)}
        attentions = [("norm1", "attention", 0, "SelfAttention")]
        if part == "decoder":
            attentions.append(("norm_cross", "cross", 1, "EncDecAttention"))
        ours, theirs = part + ".blocks.{i}.", part + ".block.{i}.layer."
        for norm, attention, layer, module in attentions:
            names[f"{ours}{norm}.scale"] = Theirs(f"{theirs}{layer}.layer_norm.weight")
            names |= {f"{ours}{attention}.{mine}.kernel":
                      transposed(f"{theirs}{layer}.{module}.{letter}.weight")
                      for mine, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))}
        names |= {f"{ours}norm2.scale": Theirs(f"{theirs}{mlp}.layer_norm.weight"),
                  f"{ours}mlp.gate.kernel": transposed(f"{theirs}{mlp}.DenseReluDense.wi_0.weight"),
                  f"{ours}mlp.up.kernel": transposed(f"{theirs}{mlp}.DenseReluDense.{up}.weight"),
                  f"{ours}mlp.down.kernel": transposed(f"{theirs}{mlp}.DenseReluDense.wo.weight")}
    return names


IGNORED = {r"^(encoder|decoder)\.embed_tokens\.weight$": "the same table as shared.weight",
           r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias": "never used"}
TIED = {r"^lm_head\.weight$": "the same table as shared.weight"}
TIE, SCALE = "tie_word_embeddings", "scale_decoder_outputs"
_ALIASES = {"hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
            "head_dim": "d_kv"}


def _config_of(tree: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    activation, gated = _feed_forward(tree)
    for alias, key in _ALIASES.items():
        if tree.get(alias, tree[key]) != tree[key]:
            raise InputError(f"{alias}: expected the {tree[key]} of {key}, found {tree[alias]}")
    for part in ("encoder", "decoder"):
        if not is_tied(tensors, TABLE, f"{part}.embed_tokens.weight"):
            raise InputError(f"{part}.embed_tokens.weight: expected the same numbers as {TABLE}")
    chronos = tree.get("chronos_config")
    return {
        "vocab_size": tree["vocab_size"], "d_model": tree["d_model"], "n_layers": tree["num_layers"],
        "n_decoder_layers": value_or(tree, "num_decoder_layers", tree["num_layers"]),
        "n_heads": tree["num_heads"], "d_head": tree["d_kv"], "d_hidden": tree["d_ff"],
        "activation": activation, "gated": gated,
        "n_buckets": tree["relative_attention_num_buckets"],
        "max_distance": tree.get("relative_attention_max_distance", 128),
        "norm_eps": float(tree.get("layer_norm_epsilon", 1e-6)),
        # Independent of tie_word_embeddings: from version 5 on, transformers ties whenever the tables agree.
        "tie_embeddings": is_tied(tensors, TABLE, UNEMBED), "scale_decoder_outputs": _scaled(tree),
        "start_id": value_or(tree, "decoder_start_token_id", 0), "end_id": _end(tree.get("eos_token_id", 1)),
        "chronos": None if chronos is None else _chronos_of(chronos)}


def _feed_forward(tree: Tree) -> tuple[str, bool]:
    """The activation, and whether it is gated. transformers derives dense_act_fn and is_gated_act from
    feed_forward_proj, but uses their values if present."""
    stated = value_or(tree, "feed_forward_proj", "relu")
    gate, _, name = str(stated).rpartition("-")
    if gate not in ("", "gated"):
        raise InputError("feed_forward_proj: expected an activation, or gated- and one, "
                         f"found {stated!r:.40}")
    default = "gelu_new" if stated == "gated-gelu" else name
    activation = value_or(tree, "dense_act_fn", default)
    if activation not in ACTIVATIONS:
        key = "dense_act_fn" if tree.get("dense_act_fn") is not None else "feed_forward_proj"
        raise InputError(f"{key}: expected one of {', '.join(ACTIVATIONS)}, found {activation!r:.40}")
    gated = value_or(tree, "is_gated_act", gate == "gated")
    if not isinstance(gated, bool):
        raise InputError(f"is_gated_act: expected true or false, found {gated!r:.40}")
    return ACTIVATIONS[activation], gated


def _scaled(tree: Tree) -> bool:
    """Whether decoder outputs are scaled; older files state it by tie_word_embeddings, as in transformers."""
    for key in (TIE, SCALE):
        if not isinstance(tree.get(key), bool | None):
            raise InputError(f"{key}: expected true or false, found {tree[key]!r}")
    return bool(tree[SCALE]) if SCALE in tree else tree.get(TIE) is not False


def _end(ids: Any) -> int:
    end_ids = several_ids(ids)
    if len(end_ids) != 1:
        raise InputError(f"eos_token_id: expected one id, found {ids!r}")
    return end_ids[0]


_CHRONOS: dict[str, type] = {
    "context_length": int, "prediction_length": int, "n_tokens": int, "n_special_tokens": int,
    "num_samples": int, "low_limit": float, "high_limit": float, "temperature": float, "top_k": int,
    "top_p": float}


def _chronos_of(tree: Any) -> Tree:
    if not isinstance(tree, dict) or tree.get("tokenizer_class") != TOKENIZER:  # Chronos-Bolt has none
        raise InputError(f"chronos_config: expected an object with tokenizer_class {TOKENIZER}")
    for key, expected in (("use_eos_token", True), ("pad_token_id", 0), ("eos_token_id", 1)):
        if tree.get(key, expected) != expected:
            raise InputError(f"chronos_config.{key}: expected {expected}, found {tree[key]!r}")
    values = {**tree, **object_under(tree, "tokenizer_kwargs", "chronos_config.")}
    return {name: convert(values[name]) for name, convert in _CHRONOS.items() if name in values}


def _tree_of(config: Any) -> Tree:
    chronos = config.chronos and {"chronos_config": {
        "tokenizer_class": TOKENIZER, "model_type": "seq2seq", "pad_token_id": 0,
        "eos_token_id": config.end_id, "use_eos_token": True,
        "tokenizer_kwargs": {name: getattr(config.chronos, name) for name in _CHRONOS if "limit" in name},
        **{name: getattr(config.chronos, name) for name in _CHRONOS if "limit" not in name}}}
    return {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
        "feed_forward_proj": _their_feed_forward(config), "is_gated_act": config.gated,
        "dense_act_fn": THEIR_ACTIVATIONS[config.activation],
        "vocab_size": config.vocab_size, "d_model": config.d_model, "num_layers": config.n_layers,
        "num_decoder_layers": config.n_decoder_layers, "num_heads": config.n_heads, "d_kv": config.d_head,
        "d_ff": config.d_hidden, "relative_attention_num_buckets": config.n_buckets,
        "relative_attention_max_distance": config.max_distance, "layer_norm_epsilon": config.norm_eps,
        TIE: config.tie_embeddings, SCALE: config.scale_decoder_outputs,
        "decoder_start_token_id": config.start_id, "eos_token_id": config.end_id, "pad_token_id": 0,
        **(chronos or {})}


def _their_feed_forward(config: Any) -> str:
    name = THEIR_ACTIVATIONS[config.activation]
    if not config.gated:
        return name
    return "gated-gelu" if name == "gelu_new" else f"gated-{name}"


T5 = Family(
    family="t5", model_types=("t5",), config_of=_config_of, tree_of=_tree_of,
    names=lambda config: _names("wi_1" if config.gated else "wi"), renamed={},
    ignored=lambda config: {**IGNORED, **(TIED if config.tie_embeddings else {})})
