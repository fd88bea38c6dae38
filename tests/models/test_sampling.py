"""Drawing a token against its definition, from logits and through a network."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import scipy.stats

import tilelli_jax
from tests.reference_impl.memorised_text import reciter
from tests.reference_impl.random_weights import random_network
from tests.reference_impl.uncached import forward_of, logits_before
from tilelli_jax.models import sampling
from tilelli_jax.models.routed import RoutedConfig

LITE = RoutedConfig(d_model=16, n_layers=1, max_seq_len=8, n_heads=2, d_head=4, top_k=3, dense_expand=2)


def expected_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Reference in float64: accepts tokens in descending order, ties together, until the limit is reached."""
    logits = np.asarray(logits, np.float64)
    p = np.exp((logits - logits.max()) / temperature)
    for limit, mass in ((top_k or len(p), np.inf), (np.inf, top_p)):
        accepted = np.zeros(len(p), bool)
        for level in np.unique(logits)[::-1]:
            if accepted.sum() < limit and p[accepted].sum() < mass:
                accepted |= logits == level
        p = np.where(accepted, p, 0) / p[accepted].sum()
    return p


NORMAL = np.random.default_rng(0).standard_normal(256).astype(np.float32)
TIED = np.array([2.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, -30.0], np.float32)


@pytest.mark.parametrize(("logits", "temperature", "top_k", "top_p"), [
    (NORMAL, 1.0, 0, 1.0), (NORMAL, 0.5, 0, 1.0), (NORMAL, 2.0, 0, 1.0), (NORMAL, 1.0, 10, 1.0),
    (NORMAL, 0.7, 0, 0.6), (NORMAL, 0.8, 20, 0.9), (NORMAL, 1.0, 256, 1.0), (NORMAL, 1.0, 1000, 1.0),
    (NORMAL, 1.0, 1, 1.0), (NORMAL, 1.0, 0, 1e-6), (NORMAL, 1.0, 255, 1.0),
    (TIED, 1.0, 0, 1.0), (TIED, 1.0, 1, 1.0), (TIED, 1.0, 2, 1.0), (TIED, 1.0, 4, 1.0), (TIED, 1.0, 5, 1.0),
    (TIED, 1.0, 0, 0.42), (TIED, 1.0, 0, 0.5), (TIED, 1.0, 0, 0.97), (TIED, 1.0, 2, 0.42),
    (np.zeros(8, np.float32), 1.0, 1, 0.1), (TIED, 1.0, 7, 1.0), (TIED, 1.0, 0, 1e-50),
])
def test_sampled_tokens_follow_their_probabilities(
        logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> None:
    n = 20_000 if len(logits) < 10 else 5_000
    samples = np.asarray(sample_many(n, logits, temperature, top_k, top_p))
    counts = np.bincount(samples, minlength=len(logits))
    p = expected_probabilities(logits, temperature, top_k, top_p)
    assert np.all(counts[p == 0] == 0)
    rare = p * n < 5
    counts, p = np.append(counts[~rare], counts[rare].sum()), np.append(p[~rare], p[rare].sum())
    counts, p = counts[p > 0], p[p > 0]
    if len(p) > 1:
        assert scipy.stats.chisquare(counts, p / p.sum() * n).pvalue > 1e-3


@functools.partial(jax.jit, static_argnums=0)
def sample_many(n: int, logits: jax.Array, *arguments: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.key(1), n)
    return jax.lax.map(lambda key: sampling.sample(key, logits, *arguments), keys, batch_size=100)


def test_top_p_of_1_excludes_no_token() -> None:
    """Even if all but the last token sum to 1 in float32."""
    assert np.isfinite(sampling._truncate(TIED, 8, 1.0)).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 2e-38, 1e-30, 1e-3])
def test_low_temperature_takes_the_most_likely_token(temperature: float) -> None:
    tokens = np.asarray(sample_many(200, 10 * NORMAL, temperature, 0, 1.0))
    assert set(tokens.tolist()) == {int(NORMAL.argmax())}
    # Of equal logits, greedy decoding takes the first; sampling takes any.
    samples = set(np.asarray(sample_many(200, np.zeros(4, np.float32), temperature, 0, 1.0)).tolist())
    assert samples == {0} if temperature < 1e-38 else samples == {0, 1, 2, 3}


def test_infinite_temperature_is_uniform() -> None:
    counts = np.bincount(np.asarray(sample_many(20_000, NORMAL, float("inf"), 0, 1.0)), minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_first_bytes_of_many_rows_follow_the_networks_softmax() -> None:
    model = random_network(LITE, seed=0)[0]
    logits = logits_before(forward_of(model), [b"abc"], [b"d"], None)[0, 0]
    n = 1024
    results = tilelli_jax.generate(model, ["abc"] * n, max_new=1, temperature=1.5, batch_size=n)
    p = expected_probabilities(logits, 1.5, 0, 1.0)
    group = np.empty(256, int)
    group[np.argsort(p)] = np.arange(256) // 16  # groups of similar probability, so that none is too rare
    counts = np.bincount(group[[result.data[0] for result in results]], minlength=16)
    assert scipy.stats.chisquare(counts, np.bincount(group, weights=p) * n).pvalue > 1e-3


def test_sampled_bytes_are_independent_over_time_and_rows() -> None:
    results = tilelli_jax.generate(reciter(b"", sureness=0.0), ["a"] * 128, max_new=120, batch_size=128)
    samples = np.array([list(result.data) for result in results])  # uniform if correct
    assert scipy.stats.chisquare(np.bincount(samples.ravel(), minlength=256)).pvalue > 1e-3
    coarse = samples >> 5
    for a, b in ((coarse[:, 1:], coarse[:, :-1]), (coarse[1:], coarse[:-1])):
        pairs = np.bincount((8 * a + b).ravel(), minlength=64)
        assert scipy.stats.chisquare(pairs).pvalue > 1e-3
