"""Scores of texts in batches are those of each text alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.restated.compiling import quick_jit
from tilelli_jax.models import decoder
from tilelli_jax.models.decoder import CHUNK
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.scoring import Scorer, Text, recording, score
from tilelli_jax.store import build

NETWORKS: dict[str, Any] = {
    "gpt_neox": GPTNeoXConfig(vocab_size=61, d_model=16, n_layers=3, n_heads=2, d_hidden=32, max_seq_len=128),
    "routed": RoutedConfig(d_model=16, n_layers=3, max_seq_len=128, n_heads=2, d_head=8, top_k=4,
                           dense_expand=2)}


def texts(n: int = 5) -> list[Text]:
    rng = np.random.default_rng(0)
    lengths = [2, 33, 32, 65, 100][:n]
    return [Text(rng.integers(0, 61, length).tolist(), [0, length - 1]) for length in lengths]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("devices", "chunk"), [(None, CHUNK), (8, CHUNK), (8, 7000)])
def test_batches_are_single_texts(name: str, devices: int | None, chunk: int,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "CHUNK", chunk)  # the small one: logits a few positions at a time
    model, given = build(NETWORKS[name], 0), texts()
    mesh = None if devices is None else make_mesh(MeshConfig(data=4, tensor=2))
    found = dict(score(model, given, recording(("resid_post",), (0, 2)), batch_size=4, mesh=mesh))
    assert sorted(found) == list(range(len(given)))
    for i, text in enumerate(given):
        ids = jnp.asarray([text.ids])
        logits, seen = quick_jit(lambda ids: model.tapped(ids, Tap(record=("resid_post",))))(ids)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits[0, :-1]), ids[0, 1:, None], axis=1)[:, 0]
        np.testing.assert_allclose(found[i].nats, nats, atol=2e-5)
        expected = np.asarray(seen["resid_post"])[[0, 2], 0][:, list(text.beside)]
        np.testing.assert_allclose(found[i].seen["resid_post"], expected, atol=2e-5)


def test_compilations_go_with_lengths_not_with_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(NETWORKS["gpt_neox"], 0)
    traced: list[tuple[int, ...]] = []
    nats = type(model).nats
    monkeypatch.setattr(type(model), "nats",
                        lambda self, ids, tap: traced.append(ids.shape) or nats(self, ids, tap))
    list(score(model, [*texts(), *texts()], batch_size=2))
    assert traced == [(2, 112), (2, 80), (2, 48), (2, 32), (2, 16)]  # in steps of 16


def test_a_scorer_compiles_once_for_all_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build(NETWORKS["gpt_neox"], 0), texts()
    expected = dict(score(model, given, recording(("resid_post",), (1,)), batch_size=2))
    traced: list[tuple[int, ...]] = []
    tapped = type(model).tapped
    monkeypatch.setattr(type(model), "tapped",
                        lambda self, ids, tap: traced.append(ids.shape) or tapped(self, ids, tap))
    scorer = Scorer(model, recording(("resid_post",), (1,)), batch_size=2)
    for _ in range(2):
        found = dict(scorer(given))
        assert sorted(found) == list(range(len(given)))
        for i, (nats, seen) in found.items():
            np.testing.assert_array_equal(nats, expected[i].nats)
            np.testing.assert_array_equal(seen["resid_post"], expected[i].seen["resid_post"])
    assert len(traced) == len(set(traced)) == 3
    (_, (nats, seen)), = scorer(given[1:2])  # fewer texts than a batch has, of a length that has been
    np.testing.assert_allclose(nats, expected[1].nats, atol=2e-5)
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
