"""Perturbation robustness matches a separate computation; noise depends on the prompt, not the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference_impl.random_weights import random_network
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.robustness import Robustness

CONFIG = GPTNeoXConfig(vocab_size=40, d_model=16, n_layers=4, n_heads=2, d_hidden=32)


def test_matches_a_separate_computation() -> None:
    """Adds noise from the same keys with a separate tap, and compares full distributions."""
    model = random_network(CONFIG, 0)[0]
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]]
    robustness = Robustness(model, sigma=0.5, k=3, seed=4, batch_size=2)
    result = robustness(prompts)

    @jax.jit
    def divergence(ids: jax.Array, noise: jax.Array) -> jax.Array:
        def noisy(value: jax.Array, at: int | None) -> jax.Array:
            rms = jnp.sqrt((value**2).mean(-1, keepdims=True))
            return value + 0.5 * rms * noise[None] if at == 1 else value  # the middle band begins at 1
        before = jax.nn.log_softmax(model(ids)[0, -1])
        after = jax.nn.log_softmax(model.tapped(ids, Tap(edit={"resid_pre": noisy}))[0][0, -1])
        return (jnp.exp(before) * (before - after)).sum()
    for number, prompt in enumerate(prompts):
        key = jax.random.fold_in(jax.random.key(4), number)
        divergences = []
        for i in range(3):
            noise = np.asarray(jax.random.normal(jax.random.fold_in(key, i), (7, 16)))[:len(prompt)]
            divergences.append(float(divergence(np.array([prompt]), noise)))
        assert result[number] == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-6)
    assert (result > 1e-3).all()
    np.testing.assert_allclose(robustness(prompts[1:], stream_ids=[1]), result[1:], rtol=1e-3)
    tap = Tap(record=("resid_post",))
    streams = [model.tapped(np.array([prompt]), tap)[1]["resid_post"] for prompt in prompts]
    final = np.array([stream[-1, 0, -1] for stream in streams])
    np.testing.assert_allclose(robustness(prompts, final=final), result, rtol=1e-3)
    assert (robustness(prompts, final=final[::-1]) > 1.1 * result).all(), "it is the pass without noise"


@pytest.mark.exhaustive
def test_divergence_grows_with_the_noise() -> None:
    model = random_network(CONFIG, 0)[0]
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    none, some, much = (Robustness(model, sigma=sigma, batch_size=4)(prompts) for sigma in (0.0, 0.1, 1.0))
    np.testing.assert_allclose(none, 0, atol=1e-6)
    assert some.mean() < much.mean()
    alone = Robustness(model, sigma=0.1, batch_size=1)(prompts[2:3], stream_ids=[2])
    np.testing.assert_allclose(alone, some[2:3], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("arguments", "message"), [({"sigma": -1.0}, "sigma ≥ 0"), ({"k": 0}, "k ≥ 1"),
                                                    ({"layer": 4}, "layer: expected 0 to 3, found 4")])
def test_invalid_arguments_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Robustness(random_network(CONFIG, 0)[0], **arguments)


@pytest.mark.exhaustive
@pytest.mark.eight_devices
def test_eight_devices_match_one() -> None:
    model = random_network(CONFIG, 0)[0]
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [7, 8, 9]]
    shared = Robustness(model, sigma=0.3, batch_size=3, mesh=make_mesh(MeshConfig()))
    assert len(jax.devices()) == 8
    alone = Robustness(model, sigma=0.3, batch_size=1)
    np.testing.assert_allclose(shared(prompts), alone(prompts), rtol=1e-3, atol=1e-6)
