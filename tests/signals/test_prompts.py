"""Prompt signals do not depend on batches, vocabulary chunks or devices, for every causal network."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from tests.reference_impl.random_weights import random_network
from tests.references import STORED, needs
from tests.tolerance import noise
from tilelli_jax.loading.store import build
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM, Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.batching import Batch
from tilelli_jax.signals.crystallisation import LayerActivations, crystallisation
from tilelli_jax.signals.prompts import PromptIds, PromptOutputs, PromptReader, lens_hooks

GEMMA = STORED / "gemma4_tiny" / "e4b"
CONFIGS: dict[str, Any] = {
    "gpt_neox": GPTNeoXConfig(vocab_size=97, d_model=16, n_layers=3, n_heads=2, d_hidden=32),
    "vanilla": VanillaConfig(d_model=16, n_layers=3, max_seq_len=64, n_heads=2),
    "routed": RoutedConfig(d_model=16, n_layers=2, max_seq_len=64, n_heads=2, d_head=8, top_k=4,
                           quantizer="ternary")}
# Relative to the largest number. In the stored Gemma, rounding errors double every second layer: measured
# 2e-5 after its twelve layers, and 1e-6 for the others.
NOISE = {"gpt_neox": noise(1, steps=3), "vanilla": noise(1, steps=3), "routed": noise(1, steps=3),
         "gemma4": noise(10, steps=3)}  # its norms amplify small writes
NETWORKS = ["routed", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("gpt_neox", "vanilla")),
            pytest.param("gemma4", marks=[needs(GEMMA), pytest.mark.exhaustive])]


def network(name: str) -> Any:
    return FlaxGemma4ForCausalLM.from_pretrained(GEMMA) if name == "gemma4" else build(CONFIGS[name], 0)


def some_prompts(model: Any) -> list[PromptIds]:
    rng = np.random.default_rng(0)
    lengths = [12, 12, 40, 40, 12, 12, 12]  # few different lengths, because `alone` compiles each
    spans = [(2, 9), (0, 5), (10, 31), (4, 4), (0, 12), (5, 12), (1, 1)]
    return [PromptIds(rng.integers(0, min(90, model.config.vocab_size), n).tolist(), *span)
            for n, span in zip(lengths, spans, strict=True)]


def assert_same(results: dict[int, PromptOutputs], expected: dict[int, PromptOutputs], name: str) -> None:
    assert sorted(results) == sorted(expected)
    for i, read in results.items():
        pairs = {field: (getattr(read.crystallisation, field), getattr(expected[i].crystallisation, field))
                 for field in read.crystallisation._fields} | {"final": (read.final, expected[i].final)}
        for field, (a, b) in pairs.items():
            np.testing.assert_allclose(a, b, rtol=0, atol=NOISE[name] * max(1, np.abs(b).max()),
                                       err_msg=f"{i} {field}")


@functools.cache
def alone(name: str) -> dict[int, PromptOutputs]:
    """Signals of each prompt from a separate pass without padding, recording all positions."""
    model = network(name)
    hooks = lens_hooks(model)

    @jax.jit
    def read(ids: jax.Array, question: jax.Array) -> tuple[Any, jax.Array]:
        _, recorded = model.tapped(ids, Tap(record=tuple(hook for hook in hooks if hook)))
        activations = LayerActivations(*(recorded[hook] if hook else None for hook in hooks))
        return crystallisation(model.unembedding(), activations, question), activations.stream[:, 0, -1]
    results = {}
    for i, prompt in enumerate(some_prompts(model)):
        at = np.arange(len(prompt.ids))[None]
        question = (prompt.start <= at) & (at < prompt.stop)
        signals, stream = jax.device_get(read(np.array([prompt.ids]), question))
        results[i] = PromptOutputs(type(signals)(*(part[0] for part in signals)), stream)
    return results


@pytest.mark.parametrize("name", NETWORKS)
def test_results_do_not_depend_on_batches_and_chunks(name: str) -> None:
    model = network(name)
    batch_size = 4 if name == "gpt_neox" else 7  # in two batches, or in one
    reader = PromptReader(model, batch_size=batch_size, chunk=32)
    assert_same(dict(reader(some_prompts(model))), alone(name), name)


@pytest.mark.exhaustive
@pytest.mark.eight_devices
@pytest.mark.parametrize("name", ["gpt_neox", "routed", "vanilla", NETWORKS[-1]])
def test_results_do_not_depend_on_the_number_of_devices(name: str) -> None:
    model, mesh = network(name), make_mesh(MeshConfig(data=4, tensor=2))
    results = dict(PromptReader(model, batch_size=8, chunk=33, mesh=mesh)(some_prompts(model)))
    assert_same(results, alone(name), name)


SMALL_GEMMA = Gemma4Config(vocab_size=61, d_model=12, layers=("sliding", "full"), max_seq_len=64, n_heads=2,
                           n_kv_heads=1, d_head=4, n_kv_heads_full=1, d_head_full=8, window=5,
                           n_shared_layers=0, d_hidden=20, d_per_layer=4, vocab_per_layer=61)


@pytest.mark.parametrize("name", [*CONFIGS, "gemma4"])
def test_unembedding_matches_the_networks_logits(name: str) -> None:
    model = random_network(SMALL_GEMMA if name == "gemma4" else CONFIGS[name], 0)[0]
    ids = np.array([some_prompts(model)[0].ids]) % model.config.vocab_size

    @jax.jit
    def read(ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, recorded = model.tapped(ids, Tap(record=("resid_post",)))
        unembedding = model.unembedding()
        normed = unembedding.norm(recorded["resid_post"][-1, 0])
        all_logits = unembedding.logits(normed, 0, unembedding.vocab_size)
        return logits[0], all_logits, unembedding.logits(normed, 3, 20)
    logits, all_logits, piece = read(ids)
    np.testing.assert_allclose(all_logits, logits, atol=noise(logits))
    np.testing.assert_allclose(piece, logits[:, 3:23], atol=noise(logits))


def test_batches_shrink_to_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("vanilla")
    prompts = some_prompts(model)
    sizes: list[int] = []

    def batch(self: PromptReader, batch: Batch,
              prompts: Sequence[PromptIds]) -> list[PromptIds]:  # no signals
        sizes.append(batch.rows)
        return [prompts[i] for i in batch.indices]
    monkeypatch.setattr(PromptReader, "_batch", batch)
    reader = PromptReader(model, batch_size=7, max_bytes=2 * PromptReader(model).bytes_of(25))
    assert dict(reader(prompts)) == dict(enumerate(prompts))
    assert sizes == [2, 2, 4], "the last questions are short: four of them need less than two long ones"
    sizes.clear()
    list(PromptReader(model, batch_size=7, max_bytes=3 * PromptReader(model).bytes_of(25))(prompts))
    assert sizes[0] == 2, "not padded to four, which would exceed the memory limit"
    sizes.clear()
    list(PromptReader(model, batch_size=7, max_bytes=1)(prompts))
    assert sizes == [1] * 7


@pytest.mark.parametrize(("prompt", "message"), [
    (PromptIds([], 0, 0), "prompt 0: expected 1 to 64 ids, found 0"),
    (PromptIds([1, 2], 1, 3), r"the question inside its 2 ids, found \[1, 3\)"),
    (PromptIds([1] * 65, 0, 1), "prompt 0: expected 1 to 64 ids, found 65")])
def test_invalid_prompts_raise(prompt: PromptIds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(PromptReader(network("vanilla"))([prompt]))
