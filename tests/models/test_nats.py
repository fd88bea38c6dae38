"""The surprise at next tokens, of all logits at once or of a few positions at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.restated.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax.models import decoder
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.tap import OFF, Tap

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
    """Of what is as large as that after two layers and a softmax."""
    return noise(numbers, 1.0, steps=4)


def restated(logits: np.ndarray) -> np.ndarray:
    """−log of the softmax at the next tokens, in float64."""
    logits = np.asarray(logits[:, :-1], np.float64)
    right = np.take_along_axis(logits, IDS[:, 1:, None], axis=2)[..., 0]
    return np.log(np.exp(logits).sum(axis=2)) - right


@functools.cache
def whole(name: str) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """By tap: all logits, and what is recorded."""
    model, _ = random_network(NETWORKS[name], 0)
    return jax.tree.map(np.asarray, jax.jit(
        lambda ids: {tap: model.tapped(ids, TAPS[tap]) for tap in TAPS})(jnp.asarray(IDS)))


QUICK = (("routed", 4), ("vanilla", 1), ("gpt_neox", TIME), ("gemma4", 5))


@pytest.mark.parametrize(("name", "at_once"), [  # of the 11 that have a next one
    pytest.param(name, at_once, marks=() if (name, at_once) in QUICK else pytest.mark.exhaustive)
    for name in NETWORKS for at_once in (1, 4, 5, TIME)])
def test_nats_are_those_of_all_logits(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random_network(NETWORKS[name], 0)
    taps = TAPS if at_once == 4 else {"off": OFF}
    monkeypatch.setattr(decoder, "CHUNK", at_once * ROWS * 19)
    found = jax.jit(lambda ids: {tap: model.nats(ids, taps[tap]) for tap in taps})(jnp.asarray(IDS))
    for tap, (nats, seen) in found.items():
        logits, expected = whole(name)[tap]
        assert nats.shape == (ROWS, TIME - 1) and nats.dtype == jnp.float32
        np.testing.assert_allclose(nats, restated(logits), rtol=0, atol=tolerance(logits))
        assert set(seen) == set(taps[tap].record)
        for place, value in seen.items():
            np.testing.assert_allclose(value, expected[place], rtol=0, atol=tolerance(expected[place]))


@pytest.mark.parametrize("time", [1, 2])
def test_of_the_shortest_texts(time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "CHUNK", 1)
    model, _ = random_network(NETWORKS["gpt_neox"], 0)
    nats, _ = jax.jit(model.nats)(jnp.asarray(IDS[:, :time]))
    logits, _ = whole("gpt_neox")["off"]
    np.testing.assert_allclose(nats, restated(logits)[:, :time - 1], rtol=0, atol=tolerance(logits))


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random_network(NETWORKS["gpt_neox"], 0)
    text = jax.jit(lambda ids: model.nats(ids)[0])

    def shapes() -> str:
        jax.clear_caches()
        return text.lower(IDS).as_text()
    assert f"tensor<{ROWS * TIME}x19xf32>" in shapes()
    monkeypatch.setattr(decoder, "CHUNK", 4 * ROWS * 19)
    found = shapes()
    assert f"tensor<{ROWS * 4}x19xf32>" in found
    assert all(f"tensor<{size}x19xf32>" not in found
               for size in (f"{ROWS * TIME}", f"{ROWS}x{TIME}", f"{ROWS}x{TIME - 1}"))
