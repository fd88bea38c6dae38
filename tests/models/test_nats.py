"""NLL of next tokens, from all logits at once or in chunks of positions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax.models import causal_lm
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.hooks import OFF, Tap

SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 8, "n_layers": 2, "max_seq_len": 12, "n_heads": 2}
NETWORKS: dict[str, Any] = {
    "routed": RoutedConfig(**SIZES, d_head=4, top_k=3, dense_expand=2, abstain_head=True),
    "vanilla": VanillaConfig(**SIZES, dense_expand=2, tie_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**SIZES, d_hidden=24),
    "gemma4": Gemma4Config(
        vocab_size=19, d_model=16, layers=("sliding", "full"), n_heads=2, n_kv_heads=1, d_head=8,
        n_kv_heads_full=1, d_head_full=8, window=3, n_shared_layers=0, d_hidden=24, d_per_layer=4,
        vocab_per_layer=19, softcap=0.5)}
ROWS, TIME = 3, 12
IDS = np.random.default_rng(0).integers(0, 19, (ROWS, TIME))
TAPS = {"off": OFF, "records": Tap(record=("embed", "resid_post", "hidden")),
        "edits": Tap(record=("hidden",), edit={"hidden": lambda value, layer: value[..., ::-1]}),
        "records logits": Tap(record=("logits",)),
        "edits logits": Tap(edit={"logits": lambda value, layer: value[..., ::-1]})}


def tolerance(numbers: np.ndarray) -> float:
    """Tolerance for numbers of this size after two layers and a softmax."""
    return noise(numbers, 1.0, steps=4)


def nll_of_logits(logits: np.ndarray) -> np.ndarray:
    """NLL of the next tokens from the logits, in float64."""
    logits = np.asarray(logits[:, :-1], np.float64)
    right = np.take_along_axis(logits, IDS[:, 1:, None], axis=2)[..., 0]
    return np.log(np.exp(logits).sum(axis=2)) - right


@functools.cache
def all_logits(name: str) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """For each tap: all logits and the recorded activations."""
    model, _ = random_network(NETWORKS[name], 0)
    return jax.tree.map(np.asarray, jax.jit(
        lambda ids: {tap: model.tapped(ids, TAPS[tap]) for tap in TAPS})(jnp.asarray(IDS)))


QUICK = (("routed", 4), ("vanilla", 1), ("gpt_neox", TIME), ("gemma4", 5))


@pytest.mark.parametrize(("name", "chunk_time"), [  # of 11 positions with a next token
    pytest.param(name, chunk_time, marks=() if (name, chunk_time) in QUICK else pytest.mark.exhaustive)
    for name in NETWORKS for chunk_time in (1, 4, 5, TIME)])
def test_chunked_nll_matches_all_logits(name: str, chunk_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random_network(NETWORKS[name], 0)
    taps = TAPS if chunk_time == 4 else {"off": OFF}
    monkeypatch.setattr(causal_lm, "CHUNK", chunk_time * ROWS * 19)
    results = jax.jit(lambda ids: {tap: model.nll(ids, taps[tap]) for tap in taps})(jnp.asarray(IDS))
    for tap, (nll, recorded) in results.items():
        logits, expected = all_logits(name)[tap]
        assert nll.shape == (ROWS, TIME - 1) and nll.dtype == jnp.float32
        np.testing.assert_allclose(nll, nll_of_logits(logits), rtol=0, atol=tolerance(logits))
        assert set(recorded) == set(taps[tap].record)
        for hook, value in recorded.items():
            np.testing.assert_allclose(value, expected[hook], rtol=0, atol=tolerance(expected[hook]))


@pytest.mark.parametrize(("name", "chunk_time"), [
    ("gpt_neox", 5), *[pytest.param(name, TIME, marks=pytest.mark.exhaustive) for name in NETWORKS]])
def test_scores_of_targets(name: str, chunk_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random_network(NETWORKS[name], 0)
    monkeypatch.setattr(causal_lm, "CHUNK", chunk_time * ROWS * 19)
    logits, _ = all_logits(name)["off"]
    targets = np.where(np.arange(TIME) % 3 == 0, logits.argmax(axis=2), IDS[:, ::-1])
    nll, greedy = jax.jit(model.score)(jnp.asarray(IDS), jnp.asarray(targets))
    right = np.take_along_axis(np.asarray(logits, np.float64), targets[..., None], axis=2)[..., 0]
    expected = np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=2)) - right
    np.testing.assert_allclose(nll, expected, rtol=0, atol=tolerance(logits))
    assert greedy.tolist() == (targets == logits.argmax(axis=2)).tolist() and not greedy.all()


@pytest.mark.parametrize("time", [1, 2])
def test_nll_of_the_shortest_texts(time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "CHUNK", 1)
    model, _ = random_network(NETWORKS["gpt_neox"], 0)
    nll, _ = jax.jit(model.nll)(jnp.asarray(IDS[:, :time]))
    logits, _ = all_logits("gpt_neox")["off"]
    np.testing.assert_allclose(nll, nll_of_logits(logits)[:, :time - 1], rtol=0, atol=tolerance(logits))


def test_all_logits_are_never_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random_network(NETWORKS["gpt_neox"], 0)
    text = jax.jit(lambda ids: model.nll(ids)[0])

    def shapes() -> str:
        jax.clear_caches()
        return text.lower(IDS).as_text()
    assert f"tensor<{ROWS * TIME}x19xf32>" in shapes()
    monkeypatch.setattr(causal_lm, "CHUNK", 4 * ROWS * 19)
    results = shapes()
    assert f"tensor<{ROWS * 4}x19xf32>" in results
    assert all(f"tensor<{size}x19xf32>" not in results
               for size in (f"{ROWS * TIME}", f"{ROWS}x{TIME}", f"{ROWS}x{TIME - 1}"))
