"""Compares Llama, Mistral, Qwen2, Qwen3 and Gemma 3 with transformers on random weights of every option."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.extras import needs_transformers
from tests.reference_impl.comparison import assert_same_weights, distance
from tests.reference_impl.random_weights import random_network
from tilelli_jax.loading.store import from_arrays, load, save
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.gemma3 import Gemma3Config
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.models.rotary_scaling import RotaryScaling
from tilelli_jax.nn.hooks import Tap

NOISE = 2e-5  # relative to the largest number

LLAMA = LlamaConfig(vocab_size=61, d_model=24, layers=("full",) * 2, max_seq_len=64, n_heads=4, n_kv_heads=2,
                    d_head=6, d_hidden=20, rotary_theta=10000.0, end_ids=(2, 7))
MISTRAL = replace(LLAMA, model_type="mistral", layers=("sliding",) * 2, window=5)
QWEN2 = replace(LLAMA, model_type="qwen2")
QWEN3 = replace(LLAMA, model_type="qwen3")
GEMMA3 = Gemma3Config(vocab_size=61, d_model=24, layers=("sliding", "sliding", "full"), max_seq_len=64,
                      n_heads=4, n_kv_heads=2, d_head=6, d_hidden=20, window=5, query_scale=7, end_ids=(1, 6))
LINEAR = RotaryScaling(kind="linear", factor=4.0)
LLAMA3 = RotaryScaling(kind="llama3", factor=8.0, original_max_len=16, low_freq_factor=1.0,
                       high_freq_factor=4.0)
YARN = RotaryScaling(kind="yarn", factor=4.0, original_max_len=16, beta_fast=4.0, attention_factor=1.1386)
CONFIGS: dict[str, Any] = {
    "llama": LLAMA,
    "llama: one key head, untied": replace(LLAMA, n_kv_heads=1, tie_embeddings=False),
    "llama: as many key heads, biases": replace(LLAMA, n_kv_heads=4, attention_bias=True, mlp_bias=True),
    "llama: wide heads, odd sizes": replace(
        LLAMA, d_model=15, n_heads=3, n_kv_heads=1, d_head=10, d_hidden=13, layers=("full",) * 3,
        vocab_size=37),
    "llama: linear": replace(LLAMA, rotary_scaling=LINEAR),
    "llama: llama3": replace(LLAMA, rotary_scaling=LLAMA3, rotary_theta=500.0),
    "llama: yarn": replace(LLAMA, rotary_scaling=YARN, d_head=12),
    "llama: yarn, not truncated": replace(
        LLAMA, rotary_scaling=replace(YARN, truncate=False, beta_slow=0.5), norm_eps=1e-3, d_head=16),
    "mistral": MISTRAL,
    "mistral: full": replace(MISTRAL, layers=("full",) * 2, window=None, tie_embeddings=False),
    "mistral: window 1": replace(MISTRAL, window=1, n_kv_heads=4),
    "mistral: wide window": replace(MISTRAL, window=40, n_kv_heads=1),
    "mistral: odd sizes": replace(MISTRAL, d_model=21, d_hidden=11, d_head=14, window=3),
    "mistral: three layers, yarn": replace(MISTRAL, layers=("sliding",) * 3, rotary_scaling=YARN, d_head=8),
    "mistral: linear": replace(MISTRAL, rotary_scaling=LINEAR, rotary_theta=1e6),
    "mistral: one end, eps": replace(MISTRAL, end_ids=(), bos_id=None, norm_eps=1e-4),
    "qwen2": QWEN2,
    "qwen2: untied": replace(QWEN2, tie_embeddings=False, n_kv_heads=1),
    "qwen2: last layer sliding": replace(QWEN2, layers=("full", "full", "sliding"), window=4),
    "qwen2: all layers sliding": replace(QWEN2, layers=("sliding",) * 2, window=6),
    "qwen2: yarn": replace(QWEN2, rotary_scaling=YARN, rotary_theta=1e6, d_head=8),
    "qwen2: llama3": replace(QWEN2, rotary_scaling=LLAMA3),
    "qwen2: odd sizes": replace(QWEN2, d_model=18, d_hidden=9, n_heads=3, n_kv_heads=3, d_head=6),
    "qwen2: alternating": replace(QWEN2, layers=("sliding", "full") * 2, window=3, d_head=6),
    "qwen3": QWEN3,
    "qwen3: untied": replace(QWEN3, tie_embeddings=False, n_kv_heads=1),
    "qwen3: biases": replace(QWEN3, attention_bias=True, n_kv_heads=4),
    "qwen3: wide heads": replace(QWEN3, d_head=14, n_heads=2, n_kv_heads=1),
    "qwen3: sliding": replace(QWEN3, layers=("full", "sliding", "sliding"), window=7),
    "qwen3: yarn": replace(QWEN3, rotary_scaling=YARN, d_head=8),
    "qwen3: odd sizes": replace(QWEN3, d_model=17, d_hidden=5, vocab_size=29),
    "qwen3: eps, theta": replace(QWEN3, norm_eps=1e-2, rotary_theta=300.0),
    "gemma3": GEMMA3,
    "gemma3: linear in full layers": replace(
        GEMMA3, rotary_scaling=replace(LINEAR, factor=8.0)),
    "gemma3: five to one": replace(GEMMA3, layers=(*("sliding",) * 5, "full"), n_kv_heads=1),
    "gemma3: untied": replace(GEMMA3, tie_embeddings=False, n_kv_heads=4),
    "gemma3: biases": replace(GEMMA3, attention_bias=True),
    "gemma3: odd sizes": replace(GEMMA3, d_model=20, d_hidden=7, d_head=10, vocab_size=43),
    "gemma3: full layers only": replace(GEMMA3, layers=("full",) * 2, rotary_theta_full=500.0),
    "gemma3: sliding layers only": replace(GEMMA3, layers=("sliding",) * 2, rotary_theta=99.0, window=1,
                                                       norm_eps=1e-3, end_ids=(1, 9)),
}
FIRST = ("llama", "mistral", "qwen2: last layer sliding", "qwen3", "gemma3")
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.exhaustive) for name in CONFIGS]
TIME = 19


def network(config: Any) -> Any:
    """The network with random weights. Gemma 3 adds 1 to the scales of its norms."""
    model, arrays = random_network(config, 0)
    if config.family == "gemma3":
        model = from_arrays(config, {name: array - 1 if name.endswith("scale") else array
                                     for name, array in arrays.items()})
    return model


def ids_for(config: Any, rows: int = 3, time: int = TIME) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (rows, time))


def tapping(model: Any) -> Callable[[Any], tuple[Any, Any]]:
    return jax.jit(lambda ids: model.tapped(ids, Tap(record=model.hooks)))


def theirs_of(path: Path) -> Any:
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


@needs_transformers
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_saved_directory_and_agrees(name: str, tmp_path: Path) -> None:
    """Logits, all hidden states, padded batches, and greedy tokens with caches."""
    import torch
    config = CONFIGS[name]
    model = network(config)
    model.save_pretrained(tmp_path)
    theirs = theirs_of(tmp_path)
    ids = ids_for(config)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True)
    logits, recorded = tapping(model)(ids)
    assert distance(logits, expected.logits) < NOISE
    for i, hidden in enumerate(expected.hidden_states[:-1]):
        assert distance(recorded["resid_pre"][i], hidden) < NOISE
    assert distance(recorded["hidden"], expected.hidden_states[-1]) < NOISE

    lengths = np.array([19, 7, 12])
    mask = np.arange(TIME) >= TIME - lengths[:, None]  # padding on the left
    with torch.no_grad():
        padded = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)),
                        position_ids=torch.from_numpy(np.maximum(np.cumsum(mask, 1) - 1, 0))).logits.numpy()
    assert distance(np.asarray(jax.jit(model)(ids, jnp.asarray(mask)))[mask], padded[mask]) < NOISE

    n_new = 16
    with torch.no_grad():  # without their cache, which keeps all keys of a layer with window 1
        continued = theirs.generate(torch.from_numpy(ids[:1, :9]), max_new_tokens=n_new, do_sample=False,
                                    use_cache=False, eos_token_id=None, pad_token_id=0).numpy()[0, 9:]
    assert decoded(model, ids[:1, :9], np.array([9]), n_new)[0].tolist() == continued.tolist()

    # What transformers writes holds the same network, bit for bit.
    theirs.save_pretrained(tmp_path / "theirs")
    again = type(model).from_pretrained(tmp_path / "theirs")
    assert again.config == config
    assert_same_weights(again, model)


def decoded(model: Any, ids: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """n greedy tokens of each row, with caches."""
    logits, caches = prefill(model)(jnp.asarray(ids), jnp.asarray(lengths))
    step = jax.jit(model.step)
    tokens = []
    for i in range(n):
        tokens.append(np.asarray(jnp.argmax(logits, -1)))
        logits, caches = step(jnp.asarray(tokens[-1]), caches, jnp.asarray(lengths + i))
    return np.stack(tokens, 1)


@functools.cache
def prefill(model: Any, size: int = 32) -> Any:
    return jax.jit(lambda ids, lengths: model.prefill(ids, lengths, size))


@pytest.mark.parametrize("name", NAMES)
def test_cached_logits_match_the_forward_pass(name: str) -> None:
    """Rows of different lengths, before and after the window is full."""
    config = CONFIGS[name]
    model = network(config)
    ids = jnp.asarray(ids_for(config))
    expected, lengths = np.asarray(jax.jit(model)(ids)), np.array([3, 9, 1])
    logits, caches = prefill(model)(ids[:, :9], jnp.asarray(lengths))
    windows = {"full": 32, "sliding": getattr(config, "window", None) or 32}
    assert [cache.keys.shape[2] for cache in caches] == [min(32, windows[kind]) for kind in config.layers]
    step, rows = jax.jit(model.step), np.arange(3)
    for n_new in range(10):
        assert distance(logits, expected[rows, lengths + n_new - 1]) < NOISE, n_new
        position = jnp.asarray(lengths + n_new)
        logits, caches = step(ids[rows, position], caches, position)


@pytest.mark.parametrize("name", NAMES)
def test_scanned_and_unrolled_layers_agree(name: str) -> None:
    config = CONFIGS[name]
    scanned = network(config)
    graph, state = nnx.split(scanned)
    unrolled = nnx.merge(graph, state)
    unrolled.unroll()
    ids = jnp.asarray(ids_for(config))
    a, b = tapping(scanned)(ids), tapping(unrolled)(ids)
    assert distance(a[0], b[0]) < NOISE
    for hook in scanned.hooks:
        assert a[1][hook].shape == b[1][hook].shape and distance(a[1][hook], b[1][hook]) < NOISE, hook


@pytest.mark.parametrize("name", FIRST)
def test_bfloat16_is_near_float32(name: str) -> None:
    config = CONFIGS[name]
    exact = network(config)
    rough = type(exact)(config, rngs=nnx.Rngs(0), compute=ComputeConfig(dtype="bfloat16"))
    nnx.update(rough, nnx.state(exact))
    ids = jnp.asarray(ids_for(config))
    exact_logits, rough_logits = (np.asarray(jax.jit(model)(ids)) for model in (exact, rough))
    assert 0 < np.abs(rough_logits - exact_logits).mean() / exact_logits.std() < 0.03


@pytest.mark.parametrize("name", FIRST)
def test_round_trips_are_bit_exact(name: str, tmp_path: Path) -> None:
    """Through our directory in float32, through a Hugging Face directory in bfloat16."""
    config = CONFIGS[name]
    model = network(config)
    save(model, tmp_path / "ours")
    assert load(tmp_path / "ours").config == config
    assert_same_weights(load(tmp_path / "ours"), model)
    model.save_pretrained(tmp_path / "rounded", dtype="bfloat16")
    rounded = type(model).from_pretrained(tmp_path / "rounded", param_dtype="stored")
    rounded.save_pretrained(tmp_path / "again")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("rounded", "again"))
    assert first == second
