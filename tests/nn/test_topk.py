"""Compares top-k selection and attention with loops, with ties in all places."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.tolerance import noise
from tilelli_jax.nn import topk
from tilelli_jax.nn.topk import top_k_attention, top_k_mask

attend = jax.jit(top_k_attention, static_argnums=4, static_argnames="reduction")

SEARCH, SORT = 0, 1 << 30  # values of FEW_QUERIES that force one method for every selection


@pytest.fixture(params=[SEARCH, SORT], ids=["search", "sort"])
def selection_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "FEW_QUERIES", request.param)


def loop_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """Takes the largest score k times; of equal scores the first, never −inf."""
    mask = np.zeros(scores.shape, bool)
    for row in np.ndindex(scores.shape[:-1]):
        remaining = scores[row].astype(np.float64)
        for _ in range(min(k, np.sum(remaining > -np.inf))):
            best = int(np.argmax(remaining))  # the first of equal scores
            mask[(*row, best)] = True
            remaining[best] = -np.inf
    return mask


def loop_attention(
    query: np.ndarray, key: np.ndarray, x: np.ndarray, kernel: np.ndarray, k: int
) -> np.ndarray:
    """Mean over heads in float64, values first: A (x W)."""
    query, key, x, kernel = (a.astype(np.float64) for a in (query, key, x, kernel))
    batch, time, heads, d_head = query.shape
    out = np.zeros((batch, time, kernel.shape[-1]))
    for b, t, h in np.ndindex(batch, time, heads):
        scores = key[b, : t + 1, h] @ query[b, t, h] / np.sqrt(d_head)
        kept = loop_mask(scores, k)
        weights = np.where(kept, np.exp(scores - scores.max()), 0)
        out[b, t] += weights / weights.sum() @ (x[b, : t + 1] @ kernel[h]) / heads
    return out


def operands(time: int, heads: int = 2, integers: bool = False, seed: int = 0) -> list[np.ndarray]:
    """Query, key, x, kernel. Integer operands have exact scores, many of them equal."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        values = rng.integers(-2, 3, shape) if integers else rng.normal(size=shape)
        return values.astype(np.float32)

    heads_of_4 = 2, time, heads, 4
    return [draw(*heads_of_4), draw(*heads_of_4), draw(2, time, 5), draw(heads, 5, 3)]


def dense_in_jax(query, key, x, kernel, mask) -> jax.Array:
    """Dense attention with a given mask `[batch, heads, queries, keys]`, for its gradients."""
    scores = jnp.einsum("bthe,bshe->bhts", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    values = jnp.einsum("bsi,hio->bhso", x, kernel)
    return jnp.einsum("bhts,bhso->bto", weights, values) / query.shape[2]


def causal_loop_mask(query: np.ndarray, key: np.ndarray, k: int) -> np.ndarray:
    scores = np.einsum("bthe,bshe->bhts", query.astype(np.float64), key.astype(np.float64))
    time = scores.shape[-1]
    return loop_mask(np.where(np.tri(time, dtype=bool), scores, -np.inf), k)


# Selection.


@pytest.mark.usefixtures("selection_method")
@pytest.mark.parametrize(("keys", "k"), [
    (7, 3), (7, 9), (300, 16),
    *(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((1, 1), (7, 1), (7, 7), (256, 16)))])
def test_mask_matches_the_loop(keys: int, k: int) -> None:
    rng = np.random.default_rng(keys + k)
    shape = 9, keys
    magnitudes = np.array([-np.inf, -3e38, -1, -2e-38, 2e-38, 1, 3e38, np.inf], np.float32)
    sides = np.array([-1, 1], np.float32)
    scores = np.stack([
        rng.normal(size=shape),
        rng.integers(-2, 3, shape) / 2,
        np.full(shape, -1.5),
        # values that differ in the last bit, over all exponents, both signs, infinities
        np.nextafter(rng.choice(magnitudes, shape), rng.choice(sides, shape)),
    ]).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[:, 0] = -np.inf  # nothing to keep
    expected = loop_mask(scores, k)
    # A new function for each test: a cached compilation would ignore the patched FEW_QUERIES.
    last, first = (jax.jit(lambda s, axis=axis: top_k_mask(s, k, axis)) for axis in (-1, 0))
    np.testing.assert_array_equal(last(scores), expected)
    np.testing.assert_array_equal(np.moveaxis(first(np.moveaxis(scores, -1, 0)), 0, -1), expected)


@pytest.mark.usefixtures("selection_method")
def test_negative_zero_ties_with_zero() -> None:
    scores = jnp.array([[-0.0, 0.0, -1e-30, -0.0, 0.0], [0.0, -0.0, 1e-30, 0.0, -0.0]])
    expected = [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]
    np.testing.assert_array_equal(jax.jit(lambda s: top_k_mask(s, 2))(scores), expected)


@pytest.mark.usefixtures("selection_method")
def test_mask_with_more_keys_than_two_bytes_can_count() -> None:
    scores = jnp.where(jnp.arange(70_000) % 7 == 3, 2.0, 1.0)[None]
    mask = np.asarray(jax.jit(lambda s: top_k_mask(s, 10_500))(scores))[0]
    assert mask[3::7].all()
    assert np.flatnonzero(mask[np.arange(70_000) % 7 != 3]).tolist() == list(range(500))


def test_mask_rejects_k_below_1() -> None:
    with pytest.raises(ValueError, match="k: expected at least 1, found 0"):
        top_k_mask(jnp.zeros((2, 3)), 0)


# Attention.


@pytest.mark.parametrize("integers", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize(("time", "k"), [
    (1, 1), (5, 9), (150, 4),
    *(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((5, 1), (5, 5), (300, 16)))])
def test_attention_matches_the_loop(time: int, k: int, integers: bool) -> None:
    args = operands(time, integers=integers)
    found = attend(*args, k)
    expected = loop_attention(*args, k)
    np.testing.assert_allclose(found, expected, rtol=0, atol=noise(expected, 1.0, steps=4))


def test_identical_keys_give_the_mean_of_the_first_k() -> None:
    query, key, x, kernel = operands(150)
    key = np.broadcast_to(key[:, :1], key.shape)
    found = attend(query, key, x, kernel, 6, reduction="sum")
    values = x @ kernel.sum(0)
    expected = np.stack([values[:, : min(t + 1, 6)].mean(1) for t in range(150)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=noise(values, steps=4))


@functools.cache
def gradients_of(k: int) -> tuple[Callable, Callable]:
    """Gradients of query, key, x and kernel along one direction of the result: ours and dense attention's."""
    def ours(direction, *args):
        return jnp.vdot(direction, top_k_attention(*args, k))

    def theirs(direction, *args):
        return jnp.vdot(direction, dense_in_jax(*args))

    return jax.jit(jax.grad(ours, (1, 2, 3, 4))), jax.jit(jax.grad(theirs, (1, 2, 3, 4)))


@pytest.mark.parametrize("integers", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize(("time", "k"), [(5, 1), pytest.param(5, 9, marks=pytest.mark.exhaustive), (150, 4)])
def test_gradients_match_dense_attention_with_the_same_mask(
    time: int, k: int, integers: bool
) -> None:
    args = operands(time, integers=integers)
    direction = np.random.default_rng(1).normal(size=(2, time, 3)).astype(np.float32)
    mask = causal_loop_mask(*args[:2], k)
    ours, theirs = gradients_of(k)
    for name, a, b in zip(["query", "key", "x", "kernel"], ours(direction, *args),
                          theirs(direction, *args, mask)):
        np.testing.assert_allclose(a, b, rtol=0, atol=noise(b, 1.0, steps=4), err_msg=name)


def test_outputs_do_not_depend_on_later_inputs() -> None:
    args = [jnp.asarray(a) for a in operands(150)]

    def early(*args):
        return jnp.sum(attend(*args, 4)[:, :70] ** 2)

    for gradient in jax.jit(jax.grad(early, argnums=(0, 1, 2)))(*args):
        assert np.all(gradient[:, 70:] == 0)
        assert np.any(gradient[:, :70] != 0)


@pytest.mark.parametrize("integers", [False, True], ids=["random", "ties"])
def test_one_query_to_a_cache_matches_the_row_of_the_full_sequence(integers: bool) -> None:
    time, slots, k = 70, 90, 4
    query, key, x, kernel = operands(slots, integers=integers)
    all_rows = attend(query[:, :time], key[:, :time], x[:, :time], kernel, k)
    for t in (0, 2, 3, 40, time - 1):
        visible = np.broadcast_to(np.arange(slots) <= t, (2, 1, slots))
        row = attend(query[:, t : t + 1], key, x, kernel, k, visible=visible)
        np.testing.assert_allclose(row[:, 0], all_rows[:, t], rtol=0, atol=noise(all_rows, steps=4))


def test_explicit_causal_visibility_has_the_same_gradients() -> None:
    args = operands(70)
    visible = np.broadcast_to(np.tri(70, dtype=bool), (2, 70, 70))

    def total(visible, *args):
        return jnp.sum(jnp.sin(attend(*args, 4, visible=visible)))

    gradients = jax.jit(jax.grad(total, (1, 2, 3, 4)))
    for a, b in zip(gradients(None, *args), gradients(visible, *args)):
        np.testing.assert_allclose(a, b, rtol=0, atol=noise(b, 1.0, steps=4))


def test_vmap_scan_and_remat_change_nothing() -> None:
    examples = [operands(70, seed=seed) for seed in range(3)]
    stacked = tuple(jnp.stack(group) for group in zip(*examples))

    def loss(*args):
        return jnp.sum(jnp.sin(top_k_attention(*args, 4)))

    def gradients(*args):
        return jax.grad(loss, (0, 1, 2, 3))(*args)

    def remat_gradients(_, args):
        return None, jax.grad(jax.checkpoint(loss), (0, 1, 2, 3))(*args)

    compiled = jax.jit(gradients)
    separate = [compiled(*example) for example in examples]
    for combined in (
        jax.jit(jax.vmap(gradients))(*stacked),
        jax.jit(lambda *a: jax.lax.scan(remat_gradients, None, a))(*stacked)[1],
    ):
        for part, parts in zip(combined, zip(*separate)):
            np.testing.assert_allclose(part, np.stack(parts), rtol=0, atol=noise(part, 1.0, steps=4))


def test_bfloat16_operands_keep_their_dtype_and_stay_near_float32() -> None:
    args = operands(70, integers=True)  # operands and scores are exact in bfloat16: the same keys are kept

    @jax.jit
    def out_and_gradients(*args):
        out, pull = jax.vjp(lambda *a: attend(*a, 4), *args)
        return out, *pull(jnp.ones_like(out))

    exact = out_and_gradients(*args)
    for a, b in zip(out_and_gradients(*(jnp.asarray(a, jnp.bfloat16) for a in args)), exact):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * np.abs(b).max())


@pytest.mark.eight_devices
def test_sharded_batch_and_heads_exchange_only_sums() -> None:
    rng = np.random.default_rng(0)
    shapes = (8, 70, 4, 8), (8, 70, 4, 8), (8, 70, 6), (4, 6, 6)
    args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]

    def step(*args):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(top_k_attention(*a, 5))), (0, 1, 2, 3))(*args)

    one_device = jax.jit(step)(*args)
    for sizes in ((8, 1), (2, 4)):
        mesh = jax.make_mesh(sizes, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        heads, x, kernel = P("data", None, "tensor"), P("data"), P("tensor")
        place = [NamedSharding(mesh, s) for s in (heads, heads, x, kernel)]
        sharded = [jax.device_put(a, s) for a, s in zip(args, place)]
        compiled = jax.jit(step, out_shardings=tuple(place)).lower(*sharded).compile()
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in compiled.as_text(), (sizes, collective)
        for a, b in zip(compiled(*sharded), one_device):
            np.testing.assert_allclose(a, b, rtol=0, atol=noise(b, 1.0, steps=4))
