"""Compares the uncertainty signals of a batch with those of each prompt alone, in float64."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.reference_impl.random_weights import random_network
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.loading import store
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.crystallisation import PROMPT_FEATURES
from tilelli_jax.signals.names import BLOCK, LENS, SIGNALS, describe, direction, signal_names
from tilelli_jax.signals.prompts import PromptIds, PromptReader
from tilelli_jax.signals.uncertainty import Uncertainty, UncertaintyReader, signal_columns

SHAPE = {"d_model": 16, "n_layers": 3, "max_seq_len": 96, "n_heads": 2}
ROUTED = RoutedConfig(**SHAPE, d_head=8, top_k=4, dense_expand=2, abstain_head=True)
TEXTS = ("USER: who?\nTILELLI:", "USER: " + "long " * 9 + "\nTILELLI:", "x")


def network(config: Any, seed: int = 0) -> Any:
    return random_network(config, seed)[0]


def prompts() -> list[PromptIds]:
    return [PromptIds(list(text.encode()), min(6, len(text) - 1), len(text) - 1) for text in TEXTS]


def expected_signals(model: Any, before: Any, text: str) -> dict[str, Any]:
    """Signals of one prompt without padding, computed in float64 from the logits and the routing."""
    ids = jnp.asarray([list(text.encode())])

    @nnx.jit
    def read(model: Any, before: Any) -> Any:
        reference = before.tapped(ids, Tap(record=("router",)))[1]["router"]
        return *model.tapped(ids, Tap(record=("router", "abstain", "hidden"))), reference[:, 0]
    logits, recorded, reference = read(model, before)
    logits = np.asarray(logits[0], np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    largest = (p / p.sum(-1, keepdims=True)).max(-1)
    r = np.asarray(recorded["router"][:, 0], np.float64)
    entropies = -(r * np.log(r)).sum(-1) / np.log(r.shape[-1])
    reference = np.asarray(reference, np.float64)
    hidden = np.asarray(recorded["hidden"][0], np.float64)
    return {"max_softmax_last": largest[-1], "max_softmax_mean": largest.mean(),
            "router_entropy": entropies.mean(), "router_entropy_var": entropies.var(),
            "router_entropy_block": entropies.mean(1),
            "drift": (reference * np.log(reference / r)).sum(-1).mean(), "hidden": hidden[-1],
            "pooled": hidden.mean(0), "abstain_logit": float(recorded["abstain"][0, -1])}


def autoencoder() -> TopKSAE:
    return store.build(SAEConfig(d_model=16, n_latents=32, k=4, hook="resid_post", layer=1))


@pytest.fixture(scope="module")
def signals() -> Uncertainty:
    """All signals, in one batch."""
    reader = UncertaintyReader(network(ROUTED, 1), before=network(ROUTED, 2), sae=autoencoder(), batch_size=3)
    return reader.read(prompts())


def test_signals_match_each_prompt_alone(signals: Uncertainty) -> None:
    model, before = network(ROUTED, 1), network(ROUTED, 2)
    for i, text in enumerate(TEXTS):
        for name, expected in expected_signals(model, before, text).items():
            np.testing.assert_allclose(getattr(signals, name)[i], expected, rtol=1e-4, atol=2e-5,
                                       err_msg=name)
    chex.assert_shape(signals.router_entropy_block, (3, 3))
    chex.assert_shape([signals.hidden, signals.pooled], (3, 16))
    chex.assert_shape(signals.lens.final, (3, 3, 16))
    np.testing.assert_allclose(signals.router_conf, 1 - signals.router_entropy)
    np.testing.assert_allclose(signals.abstain_p, 1 / (1 + np.exp(-signals.abstain_logit.astype(float))))
    assert signals.drift.min() > 0 and np.ptp(signals.abstain_p) > 0.01
    # The lens outputs match those of PromptReader.
    plain = dict(PromptReader(model, batch_size=4)(prompts()))
    for i in range(len(TEXTS)):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=2e-5),
                     signals.lens, plain[i])


def test_names_match_and_signals_do_not_depend_on_the_question() -> None:
    model = network(ROUTED, 1)
    both = [*prompts(), *(prompt._replace(start=0, stop=0) for prompt in prompts())]
    signals = signal_columns(UncertaintyReader(model).read(both))
    assert signal_names(model) == tuple(signals) and all(map(direction, signals))
    lean = signal_columns(UncertaintyReader(model, lens=False).read(both))
    assert lean.keys() == signals.keys() - LENS.keys()
    for name, values in signals.items():
        assert values.dtype == np.float64 and values.shape == (6,)
        np.testing.assert_allclose(values[3:], values[:3], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(lean.get(name, values), values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_every_signal_is_defined() -> None:
    """The registry has each scalar that `Uncertainty` computes; the others are features of Recall."""
    computed = {*Uncertainty._fields, "router_conf", "abstain_p"} - {
        "router_entropy_block", "abstain_logit", "lens", "hidden", "pooled", "codes"}
    assert SIGNALS.keys() == computed | LENS.keys() and set(LENS.values()) <= set(PROMPT_FEATURES)
    names = ("max_softmax_last", "router_entropy", f"{BLOCK}2", "drift", "loss")
    assert [direction(name) for name in names] == [-1, 1, 1, 0, 0]
    assert describe("lens_entropy") == (
        "lens_entropy: entropy of the logit lens at the last position, mean over the middle layers (nats); "
        "higher if not known")
    assert describe("router_conf") == "router_conf: 1 − router_entropy; lower if not known"


def test_codes_belong_to_the_last_position(signals: Uncertainty) -> None:
    model, sae = network(ROUTED, 1), autoencoder()
    expected = sae.encode(jnp.asarray(signals.lens.final[:, 1]))
    assert signals.codes is not None
    np.testing.assert_allclose(signals.codes.values, expected.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(signals.codes.latents, expected.latents)
    with pytest.raises(ValueError, match=r"^layer: expected 0 to 2, found 3"):
        UncertaintyReader(model, sae=store.build(
            SAEConfig(d_model=16, n_latents=8, k=2, hook="mix", layer=3)))


def test_missing_signals_are_none() -> None:
    vanilla = network(VanillaConfig(**SHAPE))
    signals = UncertaintyReader(vanilla).read(prompts())
    for name in ("router_entropy", "router_conf", "router_entropy_var", "router_entropy_block", "drift",
                 "abstain_logit", "abstain_p", "codes"):
        assert getattr(signals, name) is None, name
    assert np.isfinite(signals.max_softmax_mean).all() and (signals.max_softmax_mean > 1 / 256).all()
    expected = ("max_softmax_last", "max_softmax_mean", *LENS)
    assert signal_names(vanilla) == tuple(signal_columns(signals)) == expected
    with pytest.raises(InputError, match=r"^before: expected a network with the same blocks and pathways, "
                                         r"None, found \(3, 3\)"):
        UncertaintyReader(vanilla, before=network(ROUTED))
    with pytest.raises(ValueError, match="at least one"):
        UncertaintyReader(vanilla).read([])


@pytest.mark.exhaustive
def test_codes_and_drift_without_each_other(signals: Uncertainty) -> None:
    model = network(ROUTED, 1)
    codes = UncertaintyReader(model, sae=autoencoder(), lens=False).read(prompts()).codes
    assert codes is not None and signals.codes is not None
    np.testing.assert_allclose(codes.values, signals.codes.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(codes.latents, signals.codes.latents)
    drift = UncertaintyReader(model, before=network(ROUTED, 2), lens=False).read(prompts()).drift
    np.testing.assert_allclose(drift, signals.drift, rtol=1e-4, atol=2e-5)
    none = UncertaintyReader(model, before=model, lens=False).read(prompts()).drift
    np.testing.assert_allclose(none, 0, atol=1e-6)  # no drift from itself


@pytest.mark.eight_devices
@pytest.mark.parametrize("lens", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_eight_devices_match_one(lens: bool) -> None:
    model = network(ROUTED, 1)
    one = UncertaintyReader(model, lens=lens).read(prompts())
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        many = UncertaintyReader(model, mesh=mesh, lens=lens).read(prompts())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one, many)
