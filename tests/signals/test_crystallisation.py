"""Compares crystallisation and MLP-write specificity with published features and float64 brute force."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from tests.references import STORED, needs
from tests.tolerance import noise
from tilelli_jax.nn.norm import rms_normalized
from tilelli_jax.nn.unembed import Unembedding
from tilelli_jax.signals.crystallisation import (
    BY_LAYER,
    PROMPT_FEATURES,
    Crystallisation,
    LayerActivations,
    band,
    crystallisation,
)
from tilelli_jax.signals.lens import logit_lens, logit_lens_from

CASES = STORED / "recall_cases" / "feature_cases.npz"
NAMES = ("base", "nocontent", "short_content", "nocap", "one_content", "zero_write", "settled", "L42", "bf16")


def distribution(z: np.ndarray) -> dict[str, Any]:
    """Statistics of one row of logits, in float64."""
    log_p = log_softmax(z)
    p, order = np.exp(log_p), np.sort(z)
    return {"entropy": -(p * log_p).sum(), "best": int(z.argmax()), "margin": order[-1] - order[-2],
            "top": p.max(), "log_p": log_p, "p": p}


def logits(x: np.ndarray, table: np.ndarray, scale: np.ndarray, cap: float | None) -> np.ndarray:
    x = x.astype(float)
    z = (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale) @ table.astype(float).T
    return z if cap is None else cap * np.tanh(z / cap)


@pytest.mark.parametrize(("vocab", "chunk", "cap", "large"), [
    (2, 1, None, False), (40, 50, 30.0, False), (33, 10, 3.0, False), (16, 4, None, True)])
def test_chunked_lens_matches_the_full_distribution(
        vocab: int, chunk: int, cap: float | None, large: bool) -> None:
    assert_matches_full_distribution(vocab, chunk, cap, 0, large)


@pytest.mark.exhaustive
@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(2, 40), chunk=st.integers(1, 50), cap=st.sampled_from([None, 3.0, 30.0]),
       seed=st.integers(0, 99), large=st.booleans())
def test_any_chunk_size_matches_the_full_distribution(
        vocab: int, chunk: int, cap: float | None, seed: int, large: bool) -> None:
    assert_matches_full_distribution(vocab, chunk, cap, seed, large)


def assert_matches_full_distribution(
        vocab: int, chunk: int, cap: float | None, seed: int, large: bool) -> None:
    """Compares each statistic with the full distribution; also for large logits and tables by column."""
    rng = np.random.default_rng(seed)
    rows, table = rng.standard_normal((5, 6)).astype(np.float32), rng.standard_normal((vocab, 6))
    table = (table * (100 if large else 1)).astype(np.float32)
    cap = None if large else cap  # with a cap, large logits would all be equal
    before = np.array([0, 0, 1, 4, 2])

    @jax.jit
    def read(rows: jax.Array, table: jax.Array) -> Any:
        unembedding = Unembedding(rms_normalized, table, cap=cap)
        by_column = Unembedding(rms_normalized, table.T, by_column=True, cap=cap)
        result = logit_lens_from(unembedding, rows, jnp.asarray(before), chunk=chunk)
        return *result, logit_lens(unembedding, rows, chunk=chunk), logit_lens(by_column, rows, chunk=chunk)
    z = logits(rows, table, np.ones(6), cap)
    expected = [distribution(row) for row in z]
    stats, divergence, *others = read(rows, table)
    size = np.abs(z).max() + 1
    for name, result in stats._asdict().items():
        np.testing.assert_allclose(result, [row[name] for row in expected], atol=2e-5 * size, rtol=1e-4,
                                   err_msg=name)
    kl = [(row["p"] * (row["log_p"] - expected[i]["log_p"])).sum()
          for row, i in zip(expected, before, strict=True)]
    np.testing.assert_allclose(divergence, kl, atol=2e-5 * size, rtol=1e-4)
    for other in others:
        for a, b in zip(other, stats, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * size)


def test_ties_within_and_across_chunks() -> None:
    """Of equal logits the first is the best, and the margin is 0."""
    table = np.zeros((7, 2), np.float32)
    table[[2, 5]] = 1
    for chunk in (1, 4, 7):
        unembedding = Unembedding(lambda x: x, jnp.asarray(table))
        stats = jax.jit(functools.partial(logit_lens, unembedding, chunk=chunk))(jnp.ones((1, 2)))
        assert (stats.best[0], stats.margin[0]) == (2, 0.0)


def cases() -> list[Any]:
    return [pytest.param(name, marks=needs(CASES)) for name in NAMES]


@pytest.mark.parametrize("name", cases())
def test_matches_the_published_features(name: str) -> None:
    case = {key.partition("/")[2]: value for key, value in np.load(CASES).items()
            if key.startswith(f"{name}/")}
    length = case["hidden_states"].shape[1]
    question = case["content_pos"].tolist() or list(range(length))  # no question found: the whole prompt
    at = [*question, length - 1]
    cap = None if np.isnan(case["softcap"]) else float(case["softcap"])
    unembedding = Unembedding(lambda x: rms_normalized(x) * case["norm_w"], jnp.asarray(case["W_U"]),
                              cap=cap)
    activations = LayerActivations(*(jnp.asarray(case[key][:, None, at])
                                     for key in ("hidden_states", "mlp_writes", "resid_before")))
    rounded = str(case["dtype"]) == "torch.bfloat16"
    result = jax.jit(functools.partial(crystallisation, unembedding, chunk=16, rounded=rounded))(
        activations, np.array([[True] * len(question) + [False]]))
    # One step of bfloat16 is 1/16 for these logits: some round in the other direction, and a margin is the
    # difference of two logits.
    normed = rms_normalized(case["hidden_states"]) * case["norm_w"]
    tolerance = 0.13 if rounded else noise(np.asarray(normed) @ case["W_U"].T, case["feats_f32"])
    np.testing.assert_allclose(result.by_layer[0], case["feats_f32"], atol=tolerance)
    np.testing.assert_allclose(result.prompt_features[0], case["globals"], atol=tolerance)
    assert np.abs(result.by_layer[0] - case["feats_f32"]).mean() < 0.005  # measured: 0.0012
    if not rounded:
        half = np.asarray(result.by_layer[0]).astype(np.float16)
        assert (half == case["feats_f16"]).mean() > 0.95  # except where noise crosses a rounding boundary
        np.testing.assert_allclose(half.astype(float), case["feats_f16"].astype(float), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(result.best[0], case["argmax"])
    assert int(result.strongest_layer[0]) == case["strongest_layer"]
    assert f"t{int(result.strongest_token[0])}" == str(case["strongest_token"])
    low, high = band(len(case["hidden_states"]))
    assert list(range(low, high + 1)) == case["band"].tolist()


def brute(activations: dict[str, np.ndarray], question: list[int], table: np.ndarray,
          cap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The features `[layers, 12]` and `[10]` by loops; activations of one prompt `[layers, positions, d]`."""
    scale, n_layers = np.ones(table.shape[1]), len(activations["stream"])
    question = question or [activations["stream"].shape[1] - 1]
    rows, best = np.zeros((n_layers, 12)), []
    for i in range(n_layers):
        final = distribution(logits(activations["stream"][i, -1], table, scale, cap))
        best.append(final["best"])
        rows[i, :3] = final["entropy"], final["margin"], final["top"]
        if i:
            before = distribution(logits(activations["stream"][i - 1, -1], table, scale, cap))
            rows[i, 3] = (final["p"] * (final["log_p"] - before["log_p"])).sum()
        last = [distribution(logits(activations["stream"][i, p], table, scale, cap)) for p in question[-4:]]
        rows[i, 4:7] = [np.mean([row[key] for row in last]) for key in ("entropy", "margin", "top")]
        base = np.linalg.norm(activations["base"][i], axis=-1)
        size = np.linalg.norm(activations["write"][i], axis=-1) / (base + 1e-6)
        peak = [np.log(len(table)) - distribution(logits(write, table, scale, cap))["entropy"]
                for write in activations["write"][i]]
        rows[i, 7:11] = size[question].max(), size[-1], max(peak[p] for p in question), peak[-1]
        if i:
            a, b = activations["write"][i], activations["write"][i - 1]
            rows[i, 11] = np.mean([a[p] @ b[p] / (np.linalg.norm(a[p]) * np.linalg.norm(b[p]))
                                   for p in question])
    low, high = band(n_layers)
    middle = slice(low, high + 1)
    strongest = low + int(rows[middle, 9].argmax())
    changed = [i for i in range(1, n_layers) if best[i] != best[i - 1]]
    return rows, np.array([
        rows[-1, 0], rows[:, 0].min(), rows[middle, 0].mean(), max(changed, default=0) / (n_layers - 1),
        rows[int(0.75 * n_layers):, 3].mean(), rows[:, 1].max(), rows[middle, 9].max(),
        rows[middle, 9].mean(), rows[middle, 7].max(), strongest / (n_layers - 1)])


@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_batch_of_different_questions_matches_brute_force(cap: float | None) -> None:
    rng = np.random.default_rng(1)
    questions = [[0, 1, 2, 3, 4, 5], [0, 1], [], [0]]
    activations = {name: rng.standard_normal((6, 4, 7, 8)).astype(np.float32)
                   for name in ("stream", "write", "base")}
    table = rng.standard_normal((33, 8)).astype(np.float32)
    mask = np.zeros((4, 7), bool)
    for row, question in enumerate(questions):
        mask[row, question] = True
    unembedding = Unembedding(rms_normalized, jnp.asarray(table), cap=cap)
    result = jax.jit(functools.partial(crystallisation, unembedding, chunk=10))(
        LayerActivations(**activations, attention=activations["write"][:, :, ::-1]), mask)
    assert result.by_layer.shape == (4, 6, len(BY_LAYER))
    assert result.prompt_features.shape == (4, len(PROMPT_FEATURES))
    for row, question in enumerate(questions):
        alone = {name: values[:, row] for name, values in activations.items()}
        by_layer, prompt_features = brute(alone, question, table, cap)
        np.testing.assert_allclose(result.by_layer[row], by_layer, atol=2e-5)
        np.testing.assert_allclose(result.prompt_features[row], prompt_features, atol=2e-5)
        entropy = [distribution(logits(write, table, np.ones(8), cap))["entropy"]
                   for write in activations["write"][:, row, 0]]
        np.testing.assert_allclose(result.entropies[row, :, 0], entropy, atol=2e-5)
        np.testing.assert_allclose(result.entropies[row, :, 1], np.log(33) - by_layer[:, 10], atol=2e-5)
        np.testing.assert_allclose(result.entropies[row, :, 2], by_layer[:, 0], atol=2e-5)


def test_nan_features_become_0() -> None:
    activations = LayerActivations(*(jnp.full((3, 1, 2, 4), jnp.nan) for _ in range(3)))
    unembedding = Unembedding(rms_normalized, jnp.ones((5, 4)))
    result: Crystallisation = jax.jit(functools.partial(crystallisation, unembedding))(
        activations, np.array([[True, False]]))
    assert np.isfinite(result.by_layer).all() and np.isfinite(result.prompt_features).all()
