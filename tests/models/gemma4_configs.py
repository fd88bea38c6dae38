"""Small configurations of Gemma 4, one for each kind of layer."""

from __future__ import annotations

import dataclasses

from tilelli_jax.models.gemma4 import Gemma4Config

TINY = Gemma4Config(
    vocab_size=61, d_model=24, layers=("sliding", "full", "sliding", "full"), max_seq_len=64, n_heads=4,
    n_kv_heads=2, d_head=6, n_kv_heads_full=2, d_head_full=12, window=5, n_shared_layers=2, d_hidden=20,
    d_per_layer=4, vocab_per_layer=61)
VARIANTS: dict[str, Gemma4Config] = {
    "E4B": TINY,
    "E2B: one key head, double width": dataclasses.replace(
        TINY, n_kv_heads=1, n_kv_heads_full=1, double_wide=True,
        layers=("sliding", "sliding", "full", "sliding", "full"), n_shared_layers=2),
    "31B: shared projection, no per-layer embeddings": dataclasses.replace(
        TINY, layers=("sliding", "full"), d_per_layer=0, n_shared_layers=0, key_is_value=True, n_kv_heads=4,
        n_kv_heads_full=2, window=3),
    "26B-A4B: experts": dataclasses.replace(
        TINY, layers=("sliding", "full"), d_per_layer=0, n_shared_layers=0, key_is_value=True,
        n_kv_heads_full=1, n_experts=6, experts_per_token=2, d_expert=8),
    "all options of a layer": dataclasses.replace(
        TINY, n_experts=5, experts_per_token=3, d_expert=4, softcap=0.0, vocab_per_layer=70,
        rotary_fraction_full=0.5, rotary_theta=500.0, rotary_theta_full=2000.0, norm_eps=1e-5),
    "untied, full layers only": dataclasses.replace(
        TINY, layers=("full",) * 2, n_shared_layers=1, tie_embeddings=False, d_head=8, end_ids=(1, 9)),
}
