"""Reading prompts: in any batches, any pieces of the vocabulary, on any devices, for every causal network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.references import STORED, needs
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.crystallisation import Inner, crystallisation
from tilelli_jax.signals.prompts import Prompt, Read, Reader, places_of
from tilelli_jax.store import build

GEMMA = STORED / "gemma4_tiny" / "e4b"
CONFIGS: dict[str, Any] = {
    "gpt_neox": GPTNeoXConfig(vocab_size=97, d_model=16, n_layers=4, n_heads=2, d_hidden=32),
    "vanilla": VanillaConfig(d_model=16, n_layers=3, max_seq_len=64, n_heads=2),
    "routed": RoutedConfig(d_model=16, n_layers=3, max_seq_len=64, n_heads=2, d_head=8, top_k=4,
                           quantizer="ternary")}
NETWORKS = [*CONFIGS, pytest.param("gemma4", marks=needs(GEMMA))]


def network(name: str) -> Any:
    return FlaxGemma4ForCausalLM.from_pretrained(GEMMA) if name == "gemma4" else build(CONFIGS[name], 0)


def some_prompts(model: Any) -> list[Prompt]:
    rng = np.random.default_rng(0)
    lengths = [12, 5, 40, 40, 12, 12, 5]  # few different ones: each is compiled for in the test below
    spans = [(2, 9), (0, 5), (10, 31), (4, 4), (0, 12), (5, 12), (1, 1)]
    return [Prompt(rng.integers(0, min(90, model.config.vocab_size), n).tolist(), *span)
            for n, span in zip(lengths, spans, strict=True)]


def assert_same(found: dict[int, Read], expected: dict[int, Read], atol: float = 5e-5) -> None:
    assert sorted(found) == sorted(expected)
    for i, read in found.items():
        for name, a, b in zip(read.crystallisation._fields, read.crystallisation, expected[i].crystallisation,
                              strict=True):
            np.testing.assert_allclose(a, b, atol=atol, err_msg=f"{i} {name}")
        size = max(1, np.abs(read.final).max())
        np.testing.assert_allclose(read.final, expected[i].final, atol=atol * size)


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_and_pieces_change_nothing(name: str) -> None:
    """Against each prompt alone, without the reader: its own pass, all inner values, its own positions."""
    model = network(name)
    prompts = some_prompts(model)
    places = places_of(model)
    alone: dict[int, Read] = {}
    for i, prompt in enumerate(prompts):
        _, seen = model.tapped(np.array([prompt.ids]), Tap(record=tuple(place for place in places if place)))
        at = np.array([*range(prompt.start, prompt.stop), len(prompt.ids) - 1])
        inner = Inner(*(seen[place][:, :, at] if place else None for place in places))
        question = np.arange(len(at))[None] < len(at) - 1
        found = crystallisation(model.unembedding(), inner, question)
        alone[i] = Read(type(found)(*(np.asarray(part)[0] for part in found)),
                        np.asarray(inner.stream[:, 0, -1]))
    assert_same(dict(Reader(model, batch_size=4, chunk=32)(prompts)), alone)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    assert_same(dict(Reader(model, batch_size=8, chunk=33, mesh=mesh)(prompts)), alone)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_unembedding_is_that_of_the_network(name: str) -> None:
    model = network(name)
    ids = np.array([some_prompts(model)[0].ids])
    logits, seen = model.tapped(ids, Tap(record=("resid_post",)))
    unembedding = model.unembedding()
    normed = unembedding.norm(seen["resid_post"][-1, 0])
    np.testing.assert_allclose(unembedding.logits(normed, 0, unembedding.vocab_size), logits[0], atol=2e-5)
    np.testing.assert_allclose(unembedding.logits(normed, 3, 20), logits[0, :, 3:23], atol=2e-5)


def test_memory_is_bounded_by_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("vanilla")
    prompts = some_prompts(model)
    expected = dict(Reader(model, batch_size=7)(prompts))
    sizes: list[int] = []
    batch = Reader._batch

    def watched(self: Reader, prompts: Sequence[Prompt]) -> list[Read]:
        sizes.append(len(prompts))
        return batch(self, prompts)
    monkeypatch.setattr(Reader, "_batch", watched)
    reader = Reader(model, batch_size=7, most_bytes=2 * Reader(model).bytes_of(25))
    assert_same(dict(reader(prompts)), expected)
    assert sizes[0] == 2 and max(sizes) <= 4 and sum(sizes) == 7, sizes
    sizes.clear()
    list(Reader(model, batch_size=7, most_bytes=3 * Reader(model).bytes_of(25))(prompts))
    assert sizes[0] == 2, "not padded to four, which would be more than there is room for"
    sizes.clear()
    list(Reader(model, batch_size=7, most_bytes=1)(prompts))
    assert sizes == [1] * 7


@pytest.mark.parametrize(("prompt", "message"), [
    (Prompt([], 0, 0), "prompt 0: expected 1 to 64 ids, found 0"),
    (Prompt([1, 2], 1, 3), r"the question inside its 2 ids, found \[1, 3\)"),
    (Prompt([1] * 65, 0, 1), "prompt 0: expected 1 to 64 ids, found 65")])
def test_what_is_no_prompt(prompt: Prompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(Reader(network("vanilla"))([prompt]))
