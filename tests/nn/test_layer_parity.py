"""Compares every layer with PyTorch: output, and gradients of the input and all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.reference_impl import loops
from tests.reference_impl.comparison import distance, farthest
from tests.reference_impl.random_weights import random_weights
from tests.tolerance import noise
from tilelli_jax.models.arrays import named_leaves
from tilelli_jax.nn.attention import CausalAttention, TopKAttention
from tilelli_jax.nn.conv import CausalConv, causal_convolution
from tilelli_jax.nn.dense import FeedForward
from tilelli_jax.nn.linear import Embedding, HeadwiseLinear, Linear
from tilelli_jax.nn.norm import LayerNorm
from tilelli_jax.nn.quantize import quantizer
from tilelli_jax.nn.router import Router
from tilelli_jax.nn.ssm import DiagonalSSM, associative, linear_recurrence, stepwise

BATCH, TIME, WIDTH = 2, 11, 8
NOISE = noise(1, steps=5)  # relative to the largest magnitude; measured in all cases: 8e-7
PLAIN, TERNARY = quantizer("none"), quantizer("ternary")

# Name → our layer, and the PyTorch layer from `torch_layers` or `torch_networks`.
LAYERS: dict[str, tuple[Callable[[nnx.Rngs], Any], Callable[[Any], Any]]] = {
    "linear": (lambda rngs: Linear(WIDTH, 5, PLAIN, rngs=rngs, bias=True),
               lambda theirs: theirs.Linear(WIDTH, 5, bias=True)),
    "linear ternary": (lambda rngs: Linear(WIDTH, 5, TERNARY, rngs=rngs),
                       lambda theirs: theirs.Linear(WIDTH, 5, "ternary")),
    "linear hadamard": (lambda rngs: Linear(WIDTH, 5, quantizer("hadamard"), rngs=rngs),
                        lambda theirs: theirs.Linear(WIDTH, 5, "hadamard")),
    "headwise": (lambda rngs: HeadwiseLinear(3, WIDTH, 5, TERNARY, rngs=rngs),
                 lambda theirs: theirs.Linear(WIDTH, 5, "ternary", heads=(3,))),
    "local": (lambda rngs: CausalConv(WIDTH, 5, PLAIN, rngs=rngs, bias=True),
              lambda theirs: theirs.CausalConv(WIDTH, 5, bias=True)),
    "one tap": (lambda rngs: CausalConv(WIDTH, 1, PLAIN, rngs=rngs),
                lambda theirs: theirs.CausalConv(WIDTH, 1)),
    "wide, wider than the text": (lambda rngs: CausalConv(WIDTH, TIME + 4, TERNARY, rngs=rngs),
                                  lambda theirs: theirs.CausalConv(WIDTH, TIME + 4, "ternary")),
    "state": (lambda rngs: DiagonalSSM(WIDTH, rngs=rngs), lambda theirs: theirs.StateSpace(WIDTH, "fast")),
    "sparse, one head": (
        lambda rngs: TopKAttention(WIDTH, 1, 4, 3, PLAIN, rngs=rngs),
        lambda theirs: theirs.TopKAttention(WIDTH, 1, 4, 3, "mean", "none", "fast")),
    "sparse, mean of three": (
        lambda rngs: TopKAttention(WIDTH, 3, 4, 3, TERNARY, rngs=rngs),
        lambda theirs: theirs.TopKAttention(WIDTH, 3, 4, 3, "mean", "ternary", "fast")),
    "sparse, sum of three": (
        lambda rngs: TopKAttention(WIDTH, 3, 4, 3, PLAIN, rngs=rngs, reduction="sum"),
        lambda theirs: theirs.TopKAttention(WIDTH, 3, 4, 3, "sum", "none", "fast")),
    "sparse, k above the length": (
        lambda rngs: TopKAttention(WIDTH, 2, 4, TIME + 1, PLAIN, rngs=rngs),
        lambda theirs: theirs.TopKAttention(WIDTH, 2, 4, TIME + 1, "mean", "none", "fast")),
    "attention": (lambda rngs: CausalAttention(WIDTH, 2, PLAIN, rngs=rngs),
                  lambda theirs: theirs.SelfAttention(WIDTH, 2, "none")),
    "dense": (lambda rngs: FeedForward(WIDTH, 3 * WIDTH, PLAIN, rngs=rngs),
              lambda theirs: theirs.FeedForward(WIDTH, 3, "none")),
    "norm": (lambda _: LayerNorm(WIDTH), lambda theirs: theirs.nn.LayerNorm(WIDTH, 1e-5)),
}


def with_weights(make: Callable[[nnx.Rngs], Any]) -> tuple[Any, dict[str, np.ndarray]]:
    """The layer with random weights, and these weights by name. The initial weights are not computed."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    leaves = named_leaves(state)
    arrays = random_weights({name: leaf.shape for name, leaf in leaves.items()}, seed=0)
    filled = [jnp.asarray(arrays[name]) for name in leaves]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), filled)), arrays


def series() -> np.ndarray:
    # Small and not centred, so that a norm without the mean or with another epsilon fails.
    noise = np.random.default_rng(0).standard_normal((BATCH, TIME, WIDTH))
    return (0.1 * noise + 0.05).astype(np.float32)


@pytest.mark.parametrize("case", LAYERS)
def test_layer_matches_pytorch(case: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    from tilelli_jax.convert import torch_networks

    layer, arrays = with_weights(LAYERS[case][0])
    graph, params = nnx.split(layer)

    theirs = LAYERS[case][1](torch_networks)
    torch_networks.load_arrays(theirs, arrays)
    x = torch.from_numpy(series()).requires_grad_()
    y = theirs(x)
    probe = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    (y * torch.from_numpy(probe)).sum().backward()

    @jax.jit
    def run(params: nnx.State, x: jax.Array) -> tuple[tuple[nnx.State, jax.Array], jax.Array]:
        def loss(params: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = nnx.merge(graph, params)(x).reshape(probe.shape)  # ours has an axis for heads
            return jnp.sum(y * probe), y
        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    (gradients, d_x), result = run(params, jnp.asarray(series()))
    assert distance(result, y.detach().numpy()) < NOISE
    assert distance(d_x, x.grad.numpy()) < NOISE
    by_name = {name: np.asarray(value) for name, value in named_leaves(gradients).items()}
    largest, name = farthest(by_name, torch_networks.named_gradients(theirs))
    assert largest < NOISE, name


@pytest.mark.parametrize("kind", ["none", "ternary", "ternary_row", "power3_row", "lsq"])
def test_embedding_and_tied_unembedding_match_pytorch(kind: Any) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    from tilelli_jax.convert import torch_networks

    entries, ids = 7, np.array([[3, 0, 3, 6]], np.int32)
    layer, arrays = with_weights(lambda rngs: Embedding(entries, WIDTH, quantizer(kind), rngs=rngs))
    graph, params = nnx.split(layer)
    probe = np.random.default_rng(1).standard_normal((1, 4, entries)).astype(np.float32)

    theirs = torch_networks.Embedding(entries, WIDTH, kind)
    torch_networks.load_arrays(theirs, arrays)
    y = torch.tanh(theirs(torch.from_numpy(ids))) @ theirs.table().T
    (y * torch.from_numpy(probe)).sum().backward()

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        table = nnx.merge(graph, params)
        y = table.attend(jnp.tanh(table(ids)))
        return jnp.sum(y * probe), y

    gradients, result = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert distance(result, y.detach().numpy()) < NOISE
    by_name = {name: np.asarray(value) for name, value in named_leaves(gradients).items()}
    largest, name = farthest(by_name, torch_networks.named_gradients(theirs))
    assert largest < NOISE, name


@pytest.mark.parametrize("bias", [False, True])
def test_router_sums_to_one_and_is_a_softmax(bias: bool) -> None:
    layer, arrays = with_weights(lambda rngs: Router(WIDTH, 5, PLAIN, rngs=rngs, bias=bias))
    x = series() * np.array([10, 1000], np.float32)[:, None, None]  # the second row saturates
    weights = np.asarray(layer(jnp.asarray(x)))
    logits = x.astype(np.float64) @ arrays["kernel"] + arrays.get("bias", 0.0)
    np.testing.assert_allclose(weights, loops.softmax(logits), rtol=0, atol=noise(logits))
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=0, atol=noise(1.0))
    assert weights.min() >= 0 and weights[1].max() > 0.999


@pytest.mark.parametrize("taps", [1, 5, TIME + 4])
def test_convolution_matches_the_loop(taps: int) -> None:
    layer, arrays = with_weights(lambda rngs: CausalConv(WIDTH, taps, PLAIN, rngs=rngs, bias=True))
    x = series()
    expected = [loops.causal_conv(row.astype(np.float64), arrays["kernel"], arrays["bias"])
                for row in x]
    assert distance(layer(jnp.asarray(x)), np.stack(expected)) < NOISE


@jax.jit
def backwards(kernel: jax.Array, x: jax.Array, d_y: jax.Array) -> tuple[jax.Array, Any]:
    y, pull = jax.vjp(causal_convolution, kernel, x)
    return y, pull(d_y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("taps", [1, 5, TIME + 4])
def test_convolution_gradients_match_the_loop(taps: int, dtype: Any) -> None:
    """Gradients match the float64 loop; in bfloat16 the operands are exact and only the result is rounded."""
    rng = np.random.default_rng(taps)
    kernel, x, d_y = (rng.integers(-4, 5, shape).astype(np.float64)
                      for shape in ((taps, WIDTH), (2, TIME, WIDTH), (2, TIME, WIDTH)))
    d_kernel, d_x = np.zeros_like(kernel), np.zeros_like(x)
    for t in range(TIME):
        for k in range(max(0, taps - 1 - t), taps):
            d_kernel[k] += (x[:, t - taps + 1 + k] * d_y[:, t]).sum(0)
            d_x[:, t - taps + 1 + k] += kernel[k] * d_y[:, t]
    y, gradients = backwards(*(jnp.asarray(value, dtype) for value in (kernel, x, d_y)))
    for result, expected in zip(gradients, (d_kernel, d_x), strict=True):
        assert result.dtype == y.dtype == dtype
        # Sums of small integers are exact in float32; only the result is rounded.
        assert np.array_equal(result, jnp.asarray(expected, dtype))


def test_state_space_matches_recurrence_and_convolution() -> None:
    layer, arrays = with_weights(lambda rngs: DiagonalSSM(WIDTH, rngs=rngs))
    arrays["a_raw"] = np.array([-2, -0.7, 0, 1e-3, 0.5, 1.5, 3, 30], np.float32)  # tanh(30) is 1
    layer.a_raw[...] = jnp.asarray(arrays["a_raw"])
    a_raw, b, c = (arrays[name].astype(np.float64) for name in ("a_raw", "b", "c"))
    x = series()
    loop = np.stack([loops.state_space(row.astype(np.float64), a_raw, b, c) for row in x])
    kernel = loops.state_space_kernel(a_raw, b, c, TIME)
    convolved = np.stack([loops.causal_conv(row.astype(np.float64), kernel) for row in x])

    np.testing.assert_allclose(loop, convolved, atol=1e-12)
    assert distance(layer(jnp.asarray(x)), convolved) < NOISE

    decay, drive = jnp.tanh(layer.a_raw[...]), layer.b[...] * x
    # CPUs use one of these, accelerators the other; the test compares both with the loop.
    for form in (stepwise, associative):
        forwards, backwards = jax.jit(lambda decay, drive, form=form: (
            form(decay, drive), form(decay, drive[:, ::-1], reverse=True)[:, ::-1]))(decay, drive)
        assert distance(forwards * layer.c[...], loop) < NOISE
        assert distance(backwards * layer.c[...], loop) < NOISE  # the form that gradients use


@pytest.mark.parametrize("time", [1, 2, TIME])
def test_recurrence_gradients_match_automatic_differentiation(time: int) -> None:
    """Compares with automatic differentiation of a plain loop."""
    rng = np.random.default_rng(time)
    decay = jnp.asarray(rng.uniform(-1, 1, WIDTH), jnp.float32)
    drive, direction = (jnp.asarray(rng.standard_normal((BATCH, time, WIDTH)), jnp.float32) for _ in range(2))

    def loop(decay: jax.Array, drive: jax.Array) -> jax.Array:
        states = [drive[:, 0]]
        for t in range(1, time):
            states.append(decay * states[-1] + drive[:, t])
        return jnp.stack(states, axis=1)

    ours, expected = jax.jit(lambda *given: tuple(
        jax.vjp(function, decay, drive)[1](*given) for function in (linear_recurrence, loop)))(direction)
    for result, value in zip(ours, expected, strict=True):
        assert result.dtype == value.dtype and distance(result, np.asarray(value)) < NOISE


def test_impulse_response_is_exact_over_the_full_context() -> None:
    """An impulse decays as aⁱ over 256 steps, without a window and without loss of precision."""
    layer, _ = with_weights(lambda rngs: DiagonalSSM(1, rngs=rngs))
    layer.a_raw[...] = jnp.array([3.0])  # a = 0.995
    impulse = jnp.zeros((1, 256, 1)).at[0, 0].set(1.0)
    expected = np.tanh(3.0) ** np.arange(256) * float(layer.b[0]) * float(layer.c[0])
    np.testing.assert_allclose(layer(impulse)[0, :, 0], expected, rtol=1e-4)
