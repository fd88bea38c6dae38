"""The vanilla transformer baseline of Tilelli's authors, in a `.pt` file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tilelli_jax.models.vanilla import VanillaConfig, VanillaLM
from tilelli_jax.pretrained.mapping import Theirs, transposed

from ..plan import Plan, SourceFamily, configured, key_of, make_plan
from ..source import Source
from .common import (
    cannot_infer,
    has_library_settings,
    library_settings,
    quantized_parts,
    quantizer_setting,
    shape_of,
    stripped,
    tied_duplicates,
)

_BLOCK = "blocks.{i}."
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.")
NAMES = {
    "embed.kernel": Theirs("tok_embed.weight"), "positions.table": Theirs("pos_embed.weight"),
    "final_norm.scale": Theirs("norm_final.weight"), "final_norm.bias": Theirs("norm_final.bias"),
    "unembed.kernel": transposed("unembed.weight"),
    "abstain.kernel": transposed("abstain.weight"), "abstain.bias": Theirs("abstain.bias"),
    **{f"{_BLOCK}{norm}.{ours}": Theirs(f"{_BLOCK}{norm}.{theirs}") for norm in ("norm1", "norm2")
       for ours, theirs in (("scale", "weight"), ("bias", "bias"))},
    _BLOCK + "attention.qkv.kernel": transposed(_BLOCK + "attn.qkv.weight"),
    _BLOCK + "attention.out.kernel": transposed(_BLOCK + "attn.out.weight"),
    _BLOCK + "dense.up.kernel": transposed(_BLOCK + "ffn.up.weight"),
    _BLOCK + "dense.down.kernel": transposed(_BLOCK + "ffn.down.weight")}


def _recognises(source: Source) -> bool:
    return not source.is_directory and any(name.endswith("attn.qkv.weight") for name in source.tensors)


def _plan(source: Source, overrides: Sequence[str]) -> Plan:
    source = stripped(source)
    tensors = source.tensors
    tied = tied_duplicates(tensors, "tok_embed.weight", "unembed.weight")
    if has_library_settings(source, "vanilla"):
        config = configured(VanillaConfig, library_settings(VanillaConfig, source), overrides,
                            str(source.path))
        return make_plan("vanilla", VanillaLM, config, NAMES, source, {})
    vocab_size, d_model = shape_of(source, tensors, "tok_embed.weight", 2)
    up, _ = shape_of(source, tensors, "blocks.0.ffn.up.weight", 2)
    inferred: dict[str, Any] = {
        "family": "vanilla", "vocab_size": vocab_size, "d_model": d_model, "dense_expand": up // d_model,
        "n_layers": 1 + max(int(match[1]) for match in map(_IN_BLOCK.match, tensors) if match),
        "tie_embeddings": "unembed.weight" not in tensors or bool(tied),
        "abstain_head": "abstain.weight" in tensors, **quantizer_setting(source)}
    if "pos_embed.weight" in tensors:
        inferred["max_seq_len"], _ = shape_of(source, tensors, "pos_embed.weight", 2)
    else:
        inferred |= {"positions": "none", "max_seq_len": source.config.get("max_seq_len", 256)}
    if "n_heads" in source.config:
        inferred["n_heads"] = source.config["n_heads"]
    elif "n_heads" not in map(key_of, overrides):
        raise cannot_infer(source, "n_heads")
    config = configured(VanillaConfig, inferred, overrides, str(source.path))
    assumptions = quantized_parts(config, {*inferred, *map(key_of, overrides)})
    return make_plan("vanilla", VanillaLM, config, NAMES, source, {}, assumptions, tied)


VANILLA = SourceFamily("vanilla", _recognises, _plan)
