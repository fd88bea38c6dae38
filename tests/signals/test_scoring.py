"""Scores of texts in batches match those of each text alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from tests.tolerance import noise
from tilelli_jax.loading.store import build
from tilelli_jax.models import causal_lm
from tilelli_jax.models.causal_lm import CHUNK
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import Mesh, MeshConfig, make_mesh
from tilelli_jax.signals.scoring import Scorer, Text, recording, score

NETWORKS: dict[str, Any] = {
    "gpt_neox": GPTNeoXConfig(vocab_size=61, d_model=16, n_layers=3, n_heads=2, d_hidden=32, max_seq_len=128),
    "routed": RoutedConfig(d_model=16, n_layers=3, max_seq_len=128, n_heads=2, d_head=8, top_k=4,
                           dense_expand=2)}
LENGTHS = (2, 33, 33, 65, 65)  # few different lengths, because scoring a text alone compiles each length


def texts(lengths: Sequence[int] = (2, 33, 32, 65, 100)) -> list[Text]:
    rng = np.random.default_rng(0)
    return [Text(rng.integers(0, 61, length).tolist(), [0, length - 1]) for length in lengths]


@functools.cache
def alone(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The logits of each text, and its recorded activations in layers 0 and 2."""
    model = build(NETWORKS[name], 0)
    read = jax.jit(lambda ids: model.tapped(ids, Tap(record=("resid_post",))))
    results = []
    for text in texts(LENGTHS):
        logits, recorded = jax.device_get(read(np.array([text.ids])))
        results.append((logits[0], recorded["resid_post"][[0, 2], 0][:, list(text.metadata)]))
    return results


def assert_matches_single_texts(name: str, mesh: Mesh | None) -> None:
    model, inputs = build(NETWORKS[name], 0), texts(LENGTHS)
    results = dict(score(model, inputs, recording(("resid_post",), (0, 2)), batch_size=4, mesh=mesh))
    assert sorted(results) == list(range(len(inputs)))
    for i, (logits, recorded) in enumerate(alone(name)):
        ids = np.array(inputs[i].ids[1:])
        nll = -np.take_along_axis(log_softmax(logits[:-1], axis=1), ids[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(results[i].nll, nll, atol=noise(logits))
        np.testing.assert_allclose(results[i].activations["resid_post"], recorded,
                                   atol=noise(recorded, steps=3))


@pytest.mark.parametrize(("name", "chunk"), [
    ("gpt_neox", 7000),
    *(pytest.param(name, CHUNK, marks=pytest.mark.exhaustive) for name in ("gpt_neox", "routed"))])
def test_batches_match_single_texts(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "CHUNK", chunk)  # if small: a few positions at a time
    assert_matches_single_texts(name, None)


@pytest.mark.eight_devices
@pytest.mark.parametrize(("name", "chunk"), [
    ("gpt_neox", 7000), *(pytest.param(*inputs, marks=pytest.mark.exhaustive) for inputs in (
        ("gpt_neox", CHUNK), ("routed", CHUNK), ("routed", 7000)))])
def test_eight_devices_share_a_batch(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "CHUNK", chunk)
    assert_matches_single_texts(name, make_mesh(MeshConfig(data=4, tensor=2)))


def test_each_padded_length_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(NETWORKS["gpt_neox"], 0)
    traced: list[tuple[int, ...]] = []
    nll = type(model).nll
    monkeypatch.setattr(type(model), "nll",
                        lambda self, ids, tap: traced.append(ids.shape) or nll(self, ids, tap))
    list(score(model, [*texts(), *texts()], batch_size=2))
    assert traced == [(2, 128), (2, 96), (2, 48), (2, 32), (2, 16)]


def test_a_scorer_compiles_once_for_all_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(NETWORKS["gpt_neox"], 0), texts(LENGTHS)
    traced: list[tuple[int, ...]] = []
    tapped = type(model).tapped
    monkeypatch.setattr(type(model), "tapped",
                        lambda self, ids, tap: traced.append(ids.shape) or tapped(self, ids, tap))
    scorer = Scorer(model, recording(("resid_post",), (2,)), batch_size=2)
    first, second = dict(scorer(inputs)), dict(scorer(inputs))
    assert sorted(first) == sorted(second) == list(range(len(inputs)))
    for i, (_, recorded) in enumerate(alone("gpt_neox")):
        np.testing.assert_array_equal(first[i].nll, second[i].nll)
        np.testing.assert_array_equal(first[i].activations["resid_post"], second[i].activations["resid_post"])
        np.testing.assert_allclose(first[i].activations["resid_post"], recorded[1:],
                                   atol=noise(recorded, steps=3))
    assert len(traced) == len(set(traced)) == 3
    (_, (nll, recorded)), = scorer(inputs[1:2])  # fewer texts than the batch size, of a known length
    np.testing.assert_allclose(nll, first[1].nll, atol=2e-5)
    assert len(traced) == 3 and recorded["resid_post"].shape == (1, 2, 16)


def test_invalid_texts_raise() -> None:
    model = build(NETWORKS["gpt_neox"], 0)
    with pytest.raises(ValueError, match="metadata: expected the same number of values in each text"):
        list(score(model, [Text([1, 2], [0]), Text([1, 2], [0, 1])]))
    with pytest.raises(ValueError, match="found none in text 1"):
        list(score(model, [Text([1, 2]), Text([])]))
    assert list(score(model, [])) == []


def test_padding_respects_learned_positions() -> None:
    """Lengths are rounded up to at most the network's context length."""
    model = build(VanillaConfig(d_model=16, n_layers=1, max_seq_len=40, n_heads=2), 0)
    (_, results), = score(model, [Text(list(range(36)))])
    assert results.nll.shape == (35,) and np.isfinite(results.nll).all()
