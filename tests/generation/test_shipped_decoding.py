"""Cached decoding of the shipped networks at their full widths, compiled with XLA's default options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tilelli_jax
from tests.reference_impl.random_weights import random_network
from tests.reference_impl.uncached import forward_of, logits_before
from tests.tolerance import noise
from tilelli_jax import config as config_lib
from tilelli_jax.generation import decoding
from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.training.config import ExperimentConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = ("tilelli-lite-fp32", "tilelli-lite-ternary", "tilelli-fp32", "tilelli-ternary", "vanilla-fp32",
           "atome-944k")
# Replaces the low optimisation level of all other tests (tests/compiled.py).
AS_SHIPPED: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):  # later versions always use them
    AS_SHIPPED["xla_cpu_use_fusion_emitters"] = True
PROMPTS = [b"Once upon a time, there was a ", b"q"]


@pytest.fixture(scope="module", autouse=True)
def compiled_as_shipped() -> Iterator[None]:
    """Compiles the jitted functions of `decoding` with the default options of users."""
    parts: dict[str, dict[str, Any]] = {
        "prefill": {"static_argnames": ("graph", "size")},
        "_decode": {"static_argnames": ("graph", "width", "tokens"), "donate_argnames": ("caches",)},
        "_slide": {"static_argnames": ("graph", "width", "tokens")}}
    with pytest.MonkeyPatch.context() as patch:
        for name, settings in parts.items():
            plain = getattr(decoding, name).__wrapped__
            patch.setattr(decoding, name, jax.jit(plain, compiler_options=AS_SHIPPED, **settings))
        yield


def shipped(name: str, n_layers: int) -> ModelConfig:
    config = config_lib.load(ExperimentConfig, CONFIGS / f"{name}.yaml").model
    return dataclasses.replace(config, n_layers=n_layers)


# Tolerance between logits with and without caches, relative to the largest: rounding in up to eight layers.
NOISE = noise(1, steps=8)


def assert_greedy(model: Decoder, prompts: list[bytes], outputs: list[bytes], window: int) -> None:
    """Asserts that each new byte is the most likely one of a forward pass, padded to the window."""
    forward = forward_of(model, compiler_options=AS_SHIPPED)
    logits = logits_before(forward, prompts, outputs, window, rows=8)[..., :256]
    chosen = np.take_along_axis(logits, np.array([list(data) for data in outputs])[..., None], axis=2)[..., 0]
    assert (chosen >= logits.max(2) - 2 * NOISE * np.abs(logits).max()).all()


exhaustive = pytest.mark.exhaustive


@exhaustive
@pytest.mark.parametrize(("name", "n_layers", "batches"), [
    (name, 2, [PROMPTS, PROMPTS[1:]]) for name in SHIPPED])
def test_cached_greedy_decoding_matches_the_forward_pass(
        name: str, n_layers: int, batches: list[list[bytes]]) -> None:
    """Two layers contain all kinds of layers of each network."""
    model = random_network(shipped(name, n_layers), seed=1)[0]
    for prompts in batches:
        results = tilelli_jax.generate(model, prompts, max_new=40, temperature=0)
        assert_greedy(model, prompts, [outputs.data for outputs in results], window=len(PROMPTS[0]) + 40)
        assert len(set(results[0].data)) > 4, "the bytes are too uniform for a meaningful test"


@pytest.mark.parametrize(("name", "n_layers"), [
    pytest.param("atome-944k", 8, marks=exhaustive), pytest.param("tilelli-lite-fp32", 1, marks=exhaustive)])
def test_decoding_beyond_the_trained_length(name: str, n_layers: int) -> None:
    """The full atome network continues beyond 256 bytes; Lite's window slides."""
    model = random_network(shipped(name, n_layers), seed=1)[0]
    prompt, n = bytes(np.random.default_rng(0).integers(97, 123, 250).astype(np.uint8)), 12
    with pytest.warns(UserWarning, match="decoding to 262"):
        outputs, = tilelli_jax.generate(model, prompt, max_new=n, temperature=0)
    slides = model.config.positions == "learned"
    assert outputs.context_truncated == slides
    assert_greedy(model, [prompt], [outputs.data], window=256 if slides else len(prompt) + n)


# Of the logits' standard deviation. Rounded to 8 bits, sums differ with their order: by up to 0.031 in
# what follows (three seeds). A wrong cache would make the logits differ by as much as they do anyway.
BFLOAT16 = 0.1


@pytest.mark.parametrize("name", [
    "tilelli-lite-fp32", pytest.param("tilelli-ternary", marks=exhaustive),
    pytest.param("vanilla-fp32", marks=exhaustive)])
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
