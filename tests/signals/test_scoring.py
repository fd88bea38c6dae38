"""Scores of texts in batches are those of each text alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from tests.tolerance import noise
from tilelli_jax.models import decoder
from tilelli_jax.models.decoder import CHUNK
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import Mesh, MeshConfig, make_mesh
from tilelli_jax.signals.scoring import Scorer, Text, recording, score
from tilelli_jax.store import build

NETWORKS: dict[str, Any] = {
    "gpt_neox": GPTNeoXConfig(vocab_size=61, d_model=16, n_layers=3, n_heads=2, d_hidden=32, max_seq_len=128),
    "routed": RoutedConfig(d_model=16, n_layers=3, max_seq_len=128, n_heads=2, d_head=8, top_k=4,
                           dense_expand=2)}
LENGTHS = (2, 33, 33, 65, 65)  # of texts that are scored alone, which each length compiles anew


def texts(lengths: Sequence[int] = (2, 33, 32, 65, 100)) -> list[Text]:
    rng = np.random.default_rng(0)
    return [Text(rng.integers(0, 61, length).tolist(), [0, length - 1]) for length in lengths]


@functools.cache
def alone(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The logits of each text, and what is recorded of it in layers 0 and 2."""
    model = build(NETWORKS[name], 0)
    read = jax.jit(lambda ids: model.tapped(ids, Tap(record=("resid_post",))))
    found = []
    for text in texts(LENGTHS):
        logits, seen = jax.device_get(read(np.array([text.ids])))
        found.append((logits[0], seen["resid_post"][[0, 2], 0][:, list(text.beside)]))
    return found


def assert_single_texts(name: str, mesh: Mesh | None) -> None:
    model, given = build(NETWORKS[name], 0), texts(LENGTHS)
    found = dict(score(model, given, recording(("resid_post",), (0, 2)), batch_size=4, mesh=mesh))
    assert sorted(found) == list(range(len(given)))
    for i, (logits, seen) in enumerate(alone(name)):
        ids = np.array(given[i].ids[1:])
        nats = -np.take_along_axis(log_softmax(logits[:-1], axis=1), ids[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(found[i].nats, nats, atol=noise(logits))
        np.testing.assert_allclose(found[i].seen["resid_post"], seen, atol=noise(seen, steps=3))


@pytest.mark.parametrize(("name", "chunk"), [
    ("gpt_neox", 7000),
    *(pytest.param(name, CHUNK, marks=pytest.mark.exhaustive) for name in ("gpt_neox", "routed"))])
def test_batches_are_single_texts(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "CHUNK", chunk)  # the small one: logits a few positions at a time
    assert_single_texts(name, None)


@pytest.mark.eight_devices
@pytest.mark.parametrize(("name", "chunk"), [
    ("gpt_neox", 7000), *(pytest.param(*given, marks=pytest.mark.exhaustive) for given in (
        ("gpt_neox", CHUNK), ("routed", CHUNK), ("routed", 7000)))])
def test_eight_devices_share_a_batch(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "CHUNK", chunk)
    assert_single_texts(name, make_mesh(MeshConfig(data=4, tensor=2)))


def test_compilations_go_with_lengths_not_with_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(NETWORKS["gpt_neox"], 0)
    traced: list[tuple[int, ...]] = []
    nats = type(model).nats
    monkeypatch.setattr(type(model), "nats",
                        lambda self, ids, tap: traced.append(ids.shape) or nats(self, ids, tap))
    list(score(model, [*texts(), *texts()], batch_size=2))
    assert traced == [(2, 112), (2, 80), (2, 48), (2, 32), (2, 16)]  # in steps of 16


def test_a_scorer_compiles_once_for_all_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build(NETWORKS["gpt_neox"], 0), texts(LENGTHS)
    traced: list[tuple[int, ...]] = []
    tapped = type(model).tapped
    monkeypatch.setattr(type(model), "tapped",
                        lambda self, ids, tap: traced.append(ids.shape) or tapped(self, ids, tap))
    scorer = Scorer(model, recording(("resid_post",), (2,)), batch_size=2)
    first, second = dict(scorer(given)), dict(scorer(given))
    assert sorted(first) == sorted(second) == list(range(len(given)))
    for i, (_, seen) in enumerate(alone("gpt_neox")):
        np.testing.assert_array_equal(first[i].nats, second[i].nats)
        np.testing.assert_array_equal(first[i].seen["resid_post"], second[i].seen["resid_post"])
        np.testing.assert_allclose(first[i].seen["resid_post"], seen[1:], atol=noise(seen, steps=3))
    assert len(traced) == len(set(traced)) == 3
    (_, (nats, seen)), = scorer(given[1:2])  # fewer texts than a batch has, of a length that has been
    np.testing.assert_allclose(nats, first[1].nats, atol=2e-5)
    assert len(traced) == 3 and seen["resid_post"].shape == (1, 2, 16)


def test_what_cannot_be_scored() -> None:
    model = build(NETWORKS["gpt_neox"], 0)
    with pytest.raises(ValueError, match="as many numbers in each text"):
        list(score(model, [Text([1, 2], [0]), Text([1, 2], [0, 1])]))
    with pytest.raises(ValueError, match="found none in text 1"):
        list(score(model, [Text([1, 2]), Text([])]))
    assert list(score(model, [])) == []


def test_learned_positions_are_not_passed() -> None:
    """Lengths are rounded up only as far as the network has positions."""
    model = build(VanillaConfig(d_model=16, n_layers=1, max_seq_len=40, n_heads=2), 0)
    (_, found), = score(model, [Text(list(range(36)))])
    assert found.nats.shape == (35,) and np.isfinite(found.nats).all()
