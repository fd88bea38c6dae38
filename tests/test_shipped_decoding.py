"""Cached decoding of the shipped networks at their own widths, compiled as users have it compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tilelli_jax
from tests.restated.compiling import decoding_compiled
from tests.restated.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.decoder import ComputeConfig, Decoder
from tilelli_jax.store import from_arrays
from tilelli_jax.training.experiment import ExperimentConfig

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = ("tilelli-lite-fp32", "tilelli-lite-ternary", "tilelli-fp32", "tilelli-ternary", "vanilla-fp32",
           "atome-944k")
# In place of the quick and bad code that all other tests are compiled to (see conftest.py).
AS_SHIPPED: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):  # later ones have no other way
    AS_SHIPPED["xla_cpu_use_fusion_emitters"] = True
PROMPTS = [b"Once upon a time, there was a ", b"q"]


@pytest.fixture(scope="module", autouse=True)
def compiled_as_shipped() -> Iterator[None]:
    with decoding_compiled(AS_SHIPPED):
        yield


def shipped(name: str, n_layers: int) -> ModelConfig:
    config = config_lib.load(ExperimentConfig, CONFIGS / f"{name}.yaml").model
    return dataclasses.replace(config, n_layers=n_layers)


def whole(model: Decoder) -> Callable[[np.ndarray], jax.Array]:
    """The network's forward pass, compiled."""
    return jax.jit(lambda ids: model(ids), compiler_options=AS_SHIPPED)


def uncached(forward: Callable[[np.ndarray], jax.Array], prompt: bytes, n: int, window: int) -> bytes:
    """Greedily, by the forward pass over all that is seen, filled up to the window."""
    text = prompt
    for _ in range(n):
        seen = text[-window:]
        ids = np.frombuffer(seen.ljust(window, b"\0"), np.uint8).astype(np.int32)[None]
        text += bytes([int(np.argmax(forward(ids)[0, len(seen) - 1, :256]))])
    return text[len(prompt):]


@pytest.mark.parametrize("name", SHIPPED)
def test_cached_decoding_gives_the_bytes_of_the_forward_pass(name: str) -> None:
    """Two layers of each: what is particular to it is all in them."""
    model = random_network(shipped(name, n_layers=2), seed=1)[0]
    found, forward = tilelli_jax.generate(model, PROMPTS, max_new=40, temperature=0), whole(model)
    for prompt, made in zip(PROMPTS, found, strict=True):
        assert made.data == uncached(forward, prompt, 40, window=len(PROMPTS[0]) + 40)
    assert tilelli_jax.generate(model, PROMPTS[1], max_new=40, temperature=0)[0].data == found[1].data
    assert len(set(found[0].data)) > 4, "too dull to tell anything"


@pytest.mark.parametrize(("name", "n_layers"), [("atome-944k", 8), ("tilelli-lite-fp32", 1)])
def test_across_the_trained_length(name: str, n_layers: int) -> None:
    """atome in full carries on past 256; Lite's window slides."""
    model = random_network(shipped(name, n_layers), seed=1)[0]
    prompt, n = bytes(np.random.default_rng(0).integers(97, 123, 250).astype(np.uint8)), 12
    with pytest.warns(UserWarning, match="decoding to 262"):
        made, = tilelli_jax.generate(model, prompt, max_new=n, temperature=0)
    slides = model.config.positions == "learned"
    assert made.slid == slides
    assert made.data == uncached(whole(model), prompt, n, window=256 if slides else len(prompt) + n)


# Of the logits' standard deviation. Rounded to 8 bits, sums differ with their order: by up to 0.031 in
# what follows (three seeds). A wrong cache would make the logits differ by as much as they do anyway.
BFLOAT16 = 0.1


@pytest.mark.parametrize("name", ["tilelli-lite-fp32", "tilelli-ternary", "vanilla-fp32"])
def test_cached_logits_in_bfloat16_are_those_of_the_forward_pass(name: str) -> None:
    config = shipped(name, n_layers=1)
    arrays = random_network(config, seed=1)[1]
    model = from_arrays(config, arrays, ComputeConfig(dtype="bfloat16"))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 24)))
    expected = np.asarray(jax.jit(lambda ids: model(ids))(ids))
    logits, caches = jax.jit(lambda ids, lengths: model.prefill(ids, lengths, 32))(
        ids, jnp.array([10, 10], jnp.int32))
    step = jax.jit(lambda ids, caches, at: model.step(ids, caches, at))
    worst = np.abs(np.asarray(logits) - expected[:, 9]).max()
    for at in range(10, 24):
        logits, caches = step(ids[:, at], caches, jnp.array([at, at], jnp.int32))
        worst = max(worst, np.abs(np.asarray(logits) - expected[:, at]).max())
    assert logits.dtype == jnp.float32
    assert 0 < worst < BFLOAT16 * expected.std(), worst / expected.std()
