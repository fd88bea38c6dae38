"""Top-k attention in edge cases: equal scores, fewer keys than k, the first positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.reference_impl import loops
from tests.reference_impl.comparison import distance, farthest
from tests.tolerance import noise
from tilelli_jax.models.arrays import named_leaves
from tilelli_jax.nn.attention import TopKAttention
from tilelli_jax.nn.quantize import quantizer

BATCH, WIDTH, HEADS, D_HEAD = 2, 8, 2, 4
SHORT, LONG = 19, 150  # one causal block, and several
# Relative to the largest magnitude; measured: 2e-6. A different key changes the result by more than 1e-2.
NOISE = noise(1, steps=5)


def layer_and_inputs(time: int, top_k: int, integers: bool) -> tuple[TopKAttention, np.ndarray]:
    """Integer operands give exact scores, hence many exact ties between different rows."""
    rng = np.random.default_rng(top_k)

    def draw(*shape: int) -> np.ndarray:
        values = rng.integers(-1, 2, shape) if integers else rng.standard_normal(shape)
        return values.astype(np.float32)

    layer = TopKAttention(WIDTH, HEADS, D_HEAD, top_k, quantizer("none"), rngs=nnx.Rngs(0))
    for part, out in ((layer.query, D_HEAD), (layer.key, D_HEAD), (layer.value, WIDTH)):
        part.kernel[...] = jnp.asarray(draw(HEADS, WIDTH, out))
    return layer, draw(BATCH, time, WIDTH)


def by_loops(layer: TopKAttention, x: np.ndarray) -> np.ndarray:
    queries, keys, values = (np.asarray(part.kernel[...], np.float64)
                             for part in (layer.query, layer.key, layer.value))
    return np.stack([np.mean([loops.top_k_attention(row @ q, row @ k, row @ v, layer.top_k)
                              for q, k, v in zip(queries, keys, values, strict=True)], axis=0)
                     for row in x.astype(np.float64)])


def run(layer: TopKAttention, x: np.ndarray) -> np.ndarray:
    graph, params = nnx.split(layer)
    return np.asarray(compiled(graph)(params, x))


@functools.lru_cache(maxsize=16)
def compiled(graph: nnx.GraphDef) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, x: nnx.merge(graph, params)(x))


@pytest.mark.parametrize("integers", [False, True], ids=["reals", "ties"])
@pytest.mark.parametrize(("time", "top_k"), [
    (SHORT, 1), (SHORT, 5), (SHORT, 3 * SHORT), (LONG, 16),
    *(pytest.param(*sizes, marks=pytest.mark.exhaustive)
      for sizes in ((SHORT, SHORT - 1), (SHORT, SHORT), (LONG, 1), (LONG, LONG - 1)))])
def test_top_k_attention_matches_the_loop(time: int, top_k: int, integers: bool) -> None:
    layer, x = layer_and_inputs(time, top_k, integers)
    assert distance(run(layer, x), by_loops(layer, x)) < NOISE


@functools.lru_cache(maxsize=4)
def compiled_gradients(graph: nnx.GraphDef) -> Callable[..., Any]:
    return jax.jit(jax.grad(lambda params, x, probe: jnp.sum(nnx.merge(graph, params)(x) * probe), (0, 1)))


@pytest.mark.parametrize("integers", [False, True], ids=["reals", "ties"])
@pytest.mark.parametrize(("time", "top_k"), [(SHORT, 4), (LONG, 16)])
def test_gradients_match_pytorch(time: int, top_k: int, integers: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    from tilelli_jax.convert import torch_networks

    layer, x = layer_and_inputs(time, top_k, integers)
    graph, params = nnx.split(layer)
    probe = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    gradients, d_x = compiled_gradients(graph)(params, x, probe)

    theirs = torch_networks.TopKAttention(WIDTH, HEADS, D_HEAD, top_k, "mean", "none", "exact")
    torch_networks.load_arrays(theirs, {name: np.asarray(v) for name, v in named_leaves(params).items()})
    their_x = torch.from_numpy(x).requires_grad_()
    (theirs(their_x) * torch.from_numpy(probe)).sum().backward()

    assert distance(d_x, their_x.grad.numpy()) < NOISE
    result = {name: np.asarray(value) for name, value in named_leaves(gradients).items()}
    largest, name = farthest(result, torch_networks.named_gradients(theirs))
    assert largest < NOISE, name


def test_breaking_ties_differently_changes_the_result() -> None:
    """Keeping the latest of equal scores selects other rows, so the tests above can fail."""
    top_k = 5
    layer, x = layer_and_inputs(SHORT, top_k, integers=True)
    others = 0
    for row in x:
        for query, key in zip(layer.query.kernel[...], layer.key.kernel[...], strict=True):
            scores = np.asarray((row @ query) @ (row @ key).T)
            for t in range(top_k, SHORT):
                earliest, latest = (sorted(range(t + 1), key=lambda s: (-scores[t, s], sign * s))
                                    for sign in (1, -1))
                first, last = (sorted(map(tuple, row[kept[:top_k]])) for kept in (earliest, latest))
                others += first != last
    assert others > 10


@pytest.mark.parametrize("time", [SHORT, LONG])
def test_equal_keys_keep_the_earliest(time: int) -> None:
    """All scores are 0, so every query attends to positions 0 … k-1, or to all while t < k."""
    top_k = 3
    layer, x = layer_and_inputs(time, top_k, integers=False)
    layer.key.kernel[...] = jnp.zeros_like(layer.key.kernel[...])
    values = np.mean(np.einsum("bti,hio->hbto", x, layer.value.kernel[...]), axis=0)
    expected = np.stack([values[:, : min(t + 1, top_k)].mean(1) for t in range(time)], axis=1)
    assert distance(run(layer, x), expected) < NOISE
