"""Signals of a prompt in one pass, against the same numbers made one prompt at a time in float64."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tilelli_jax.eval.abstention.decision import direction

from tests.restated.random_weights import random_network
from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.nn.tap import Tap
from tilelli_jax.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.names import LENS
from tilelli_jax.signals.prompts import Prompt, PromptReader
from tilelli_jax.signals.uncertainty import Uncertainty, UncertaintyReader, by_name, names

SHAPE = {"d_model": 16, "n_layers": 3, "max_seq_len": 96, "n_heads": 2}
ROUTED = RoutedConfig(**SHAPE, d_head=8, top_k=4, dense_expand=2, abstain_head=True)
TEXTS = ("USER: who?\nTILELLI:", "USER: " + "long " * 9 + "\nTILELLI:", "x")


def made(config: Any, seed: int = 0) -> Any:
    return random_network(config, seed)[0]


def prompts() -> list[Prompt]:
    return [Prompt(list(text.encode()), min(6, len(text) - 1), len(text) - 1) for text in TEXTS]


def by_hand(model: Any, before: Any, text: str) -> dict[str, Any]:
    """One prompt without padding, in float64 from the logits and the routing on."""
    ids = jnp.asarray([list(text.encode())])

    @nnx.jit
    def read(model: Any, before: Any) -> Any:
        start = before.tapped(ids, Tap(record=("router",)))[1]["router"]
        return *model.tapped(ids, Tap(record=("router", "abstain", "hidden"))), start[:, 0]
    logits, seen, start = read(model, before)
    logits = np.asarray(logits[0], np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    largest = (p / p.sum(-1, keepdims=True)).max(-1)
    r = np.asarray(seen["router"][:, 0], np.float64)
    each = -(r * np.log(r)).sum(-1) / np.log(r.shape[-1])
    start = np.asarray(start, np.float64)
    hidden = np.asarray(seen["hidden"][0], np.float64)
    return {"max_softmax_last": largest[-1], "max_softmax_mean": largest.mean(),
            "router_entropy": each.mean(), "router_entropy_var": each.var(),
            "router_entropy_block": each.mean(1),
            "drift": (start * np.log(start / r)).sum(-1).mean(), "hidden": hidden[-1],
            "pooled": hidden.mean(0), "abstain_logit": float(seen["abstain"][0, -1])}


def autoencoder() -> TopKSAE:
    return store.build(SAEConfig(d_model=16, n_latents=32, k=4, place="resid_post", layer=1))


@pytest.fixture(scope="module")
def found() -> Uncertainty:
    """All there is to read, in one batch."""
    reader = UncertaintyReader(made(ROUTED, 1), before=made(ROUTED, 2), sae=autoencoder(), batch_size=3)
    return reader.read(prompts())


def test_signals_are_those_of_each_prompt_alone(found: Uncertainty) -> None:
    model, before = made(ROUTED, 1), made(ROUTED, 2)
    for i, text in enumerate(TEXTS):
        for name, expected in by_hand(model, before, text).items():
            np.testing.assert_allclose(getattr(found, name)[i], expected, rtol=1e-4, atol=2e-5, err_msg=name)
    chex.assert_shape(found.router_entropy_block, (3, 3))
    chex.assert_shape([found.hidden, found.pooled], (3, 16))
    chex.assert_shape(found.read.final, (3, 3, 16))
    np.testing.assert_allclose(found.router_conf, 1 - found.router_entropy)
    np.testing.assert_allclose(found.abstain_p, 1 / (1 + np.exp(-found.abstain_logit.astype(float))))
    assert found.drift.min() > 0 and np.ptp(found.abstain_p) > 0.01
    # The lens is the other reader's.
    plain = dict(PromptReader(model, batch_size=4)(prompts()))
    for i in range(len(TEXTS)):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=2e-5),
                     found.read, plain[i])


def test_signals_have_names_and_need_no_question() -> None:
    model = made(ROUTED, 1)
    both = [*prompts(), *(prompt._replace(start=0, stop=0) for prompt in prompts())]
    found = by_name(UncertaintyReader(model).read(both))
    assert names(model) == tuple(found) and all(map(direction, found))
    lean = by_name(UncertaintyReader(model, lens=False).read(both))
    assert lean.keys() == found.keys() - LENS.keys()
    for name, values in found.items():
        assert values.dtype == np.float64 and values.shape == (6,)
        np.testing.assert_allclose(values[3:], values[:3], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(lean.get(name, values), values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_codes_are_those_of_the_last_position(found: Uncertainty) -> None:
    model, sae = made(ROUTED, 1), autoencoder()
    expected = sae.encode(jnp.asarray(found.read.final[:, 1]))
    assert found.codes is not None
    np.testing.assert_allclose(found.codes.values, expected.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.codes.latents, expected.latents)
    with pytest.raises(ValueError, match=r"^layer: expected 0 to 2, found 3"):
        UncertaintyReader(model, sae=store.build(
            SAEConfig(d_model=16, n_latents=8, k=2, place="mix", layer=3)))


def test_what_a_network_lacks_is_none() -> None:
    vanilla = made(VanillaConfig(**SHAPE))
    found = UncertaintyReader(vanilla).read(prompts())
    for name in ("router_entropy", "router_conf", "router_entropy_var", "router_entropy_block", "drift",
                 "abstain_logit", "abstain_p", "codes"):
        assert getattr(found, name) is None, name
    assert np.isfinite(found.max_softmax_mean).all() and (found.max_softmax_mean > 1 / 256).all()
    assert names(vanilla) == tuple(by_name(found)) == ("max_softmax_last", "max_softmax_mean", *LENS)
    with pytest.raises(InputError, match=r"^before: expected a network routed alike, None, found \(3, 3\)"):
        UncertaintyReader(vanilla, before=made(ROUTED))
    with pytest.raises(ValueError, match="at least one"):
        UncertaintyReader(vanilla).read([])


@pytest.mark.exhaustive
def test_the_one_without_the_other(found: Uncertainty) -> None:
    model = made(ROUTED, 1)
    codes = UncertaintyReader(model, sae=autoencoder(), lens=False).read(prompts()).codes
    assert codes is not None and found.codes is not None
    np.testing.assert_allclose(codes.values, found.codes.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(codes.latents, found.codes.latents)
    drift = UncertaintyReader(model, before=made(ROUTED, 2), lens=False).read(prompts()).drift
    np.testing.assert_allclose(drift, found.drift, rtol=1e-4, atol=2e-5)
    none = UncertaintyReader(model, before=model, lens=False).read(prompts()).drift
    np.testing.assert_allclose(none, 0, atol=1e-6)  # nothing drifts from itself


@pytest.mark.eight_devices
@pytest.mark.parametrize("lens", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_eight_devices_read_the_same(lens: bool) -> None:
    model = made(ROUTED, 1)
    one = UncertaintyReader(model, lens=lens).read(prompts())
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        many = UncertaintyReader(model, mesh=mesh, lens=lens).read(prompts())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one, many)
