"""Schedules, which parameters are decayed or get Muon, and both optimisers against references."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.loading.store import build
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.parallel.sharding import path_name
from tilelli_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from tilelli_jax.training.step import split_params

PEAK = 3e-3


def rates(steps, **settings):
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **settings), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
def test_warm_up(kind):
    rate = rates(100, schedule=kind, warmup_steps=10)
    np.testing.assert_allclose(rate[:11], PEAK * np.arange(1, 12) / 11, rtol=4e-6)
    assert rate[0] > 0 and rate.max() == rate[10]


def test_cosine():
    rate = rates(111, warmup_steps=10, final_fraction=0.2)
    assert rate[60] == pytest.approx(PEAK * 0.6)  # half way
    assert rate[110] == pytest.approx(PEAK * 0.2)  # the last of 111 updates
    assert (np.diff(rate[10:111]) < 0).all()


def test_constant():
    np.testing.assert_allclose(rates(50, schedule="constant", warmup_steps=0), PEAK, rtol=1e-6)


def test_warm_up_stable_decay():
    rate = rates(100, schedule="wsd", warmup_steps=10, decay_fraction=0.3, final_fraction=0.0)
    np.testing.assert_allclose(rate[10:70], PEAK, rtol=1e-6)
    np.testing.assert_allclose(rate[69:100], PEAK * np.arange(30, -1, -1) / 30, atol=4e-9)


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [5, 10, 100, 1000])
def test_the_last_update_has_the_last_rate(kind, steps, warmup_steps):
    for decay_fraction in (0.0, 0.2, 1.0):
        rate = rates(steps, schedule=kind, warmup_steps=warmup_steps, final_fraction=0.1,
                     decay_fraction=decay_fraction)
        assert rate[steps - 1] == pytest.approx(0.1 * PEAK) and rate.max() == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_run_of_one_update(kind):
    assert rates(1, schedule=kind, warmup_steps=0)[0] == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
def test_a_run_shorter_than_its_warm_up(kind):
    rate = rates(5, schedule=kind, warmup_steps=1000)
    assert (np.diff(rate[:5]) > 0).all() and rate[4] < PEAK


# ---------------------------------------------------------------------------------------------

LITE = RoutedConfig(d_model=16, n_layers=2, max_seq_len=8, n_heads=3, d_head=4, dense_expand=2, n_banks=2,
                    pathways=("local", "wide", "state", "sparse", "dense"), quantizer="lsq",
                    second_norm="mix", conv_bias=True, router_bias=True)
VANILLA = VanillaConfig(d_model=16, n_layers=2, max_seq_len=8, n_heads=2, dense_expand=2)


@functools.cache
def params_of(config):
    return jax.device_get(jax.jit(lambda: split_params(build(config, 0))[1])())


def first_update(config, optimizer, grads):
    """Returns the first update and the initial value of each parameter, by path."""
    params = params_of(config)
    rule = make_optimizer(optimizer, 10)
    updates = jax.jit(lambda grads, params: rule.update(grads, rule.init(params), params)[0])(
        grads(params), params)
    return {path_name(path): (np.asarray(update), np.asarray(before)) for (path, update), before in
            zip(jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(params), strict=True)}


def zeros(params):
    return jax.tree.map(np.zeros_like, params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("config", [LITE, VANILLA], ids=["routed", "vanilla"])
def test_kernels_are_decayed_and_nothing_else(config, name):
    settings = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    updates = first_update(config, settings, zeros)
    for path, (update, before) in updates.items():
        np.testing.assert_allclose(update, -0.05 * before if path.endswith(".kernel") else 0.0, rtol=1e-5)
    not_decayed = {path.rsplit(".", 1)[1] for path in updates if not path.endswith(".kernel")}
    assert not_decayed == {"scale", "bias", "table"} | (
        {"a_raw", "b", "c", "alpha"} if config is LITE else set())


def spread_of_update(config):
    """Returns the standard deviation of the first Muon update's absolute entries, by path.

    Adam's first update is ±1 for any gradient; an orthogonalised one has entries of all sizes.
    """
    def grads(params):
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), params)
    settings = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0,
                               clip_norm=0.0)
    return {path: np.abs(update).std() for path, (update, _) in first_update(config, settings, grads).items()}


@pytest.mark.parametrize(("config", "matrices"), [
    (LITE, {f"blocks.{name}.kernel" for bank in ("", "_1") for name in
            (f"sparse{bank}.query", f"sparse{bank}.key", f"sparse{bank}.value",
             f"dense{bank}.up", f"dense{bank}.down")}),
    (VANILLA, {f"blocks.{name}.kernel" for name in
               ("attention.qkv", "attention.out", "dense.up", "dense.down")})], ids=["routed", "vanilla"])
def test_muon_updates_the_matrices_inside_the_blocks(config, matrices):
    spread = spread_of_update(config)
    assert {path for path, deviation in spread.items() if deviation > 1e-2} == matrices


def newton_schulz(matrix, steps=5):
    """Keller Jordan's quintic iteration, in double precision, for one matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def test_muon_orthogonalises_each_layer_and_head_separately():
    shapes = {"blocks": {"sparse": {"query": {"kernel": (2, 3, 16, 4)}, "value": {"kernel": (2, 3, 8, 8)}},
                         "dense": {"up": {"kernel": (2, 6, 12)}}}}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), shapes,
                          is_leaf=lambda node: isinstance(node, tuple))
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(2)]
    beta, rate, decay = 0.9, 0.01, 0.1
    rule = make_optimizer(OptimizerConfig(name="muon", learning_rate=rate, schedule="constant", momentum=beta,
                                          warmup_steps=0, weight_decay=decay, clip_norm=0.0), 10)
    state = rule.init(params)
    _, state = rule.update(grads[0], state, params)
    updates, _ = rule.update(grads[1], state, params)

    def expected(param, first, second):
        # Nesterov momentum with bias correction of both averages, as in optax.
        average = (1 - beta) * (beta * first + second) / (1 - beta**3)
        momentum = beta * average + (1 - beta) * second / (1 - beta**2)
        stacked = momentum.astype(np.float64).reshape(-1, *momentum.shape[-2:])
        orthogonal = np.stack([newton_schulz(matrix) for matrix in stacked]).reshape(momentum.shape)
        return -rate * (0.2 * np.sqrt(max(momentum.shape[-2:])) * orthogonal + decay * param)

    references = jax.tree.map(expected, params, *grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), updates, references)
    # Treating all layers or all heads as one matrix would give other singular values.
    update, param = (tree["blocks"]["dense"]["up"]["kernel"] for tree in (updates, params))
    direction = np.asarray(update + rate * decay * param) / (rate * 0.2 * np.sqrt(12))
    singular = np.linalg.svd(direction, compute_uv=False)
    assert (singular > 0.6).all() and (singular < 1.3).all()


# ---------------------------------------------------------------------------------------------

TOY = {"layer": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
                 "bias": np.ones(4, np.float32)}}


def toy_gradients(step):
    return jax.tree.map(lambda p: np.sin(np.arange(p.size) + step).reshape(p.shape).astype(np.float32), TOY)


def descend(rule, steps=5):
    params, state = TOY, rule.init(TOY)
    for step in range(steps):
        updates, state = rule.update(toy_gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


ADAMW = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_steps=0, weight_decay=0.1,
                        b1=0.8, b2=0.9, eps=1e-6, clip_norm=0.0)


def test_adamw_is_optax_adamw():
    reference = optax.adamw(0.05, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1,
                            mask={"layer": {"kernel": True, "bias": False}})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                 descend(make_optimizer(ADAMW, 5)), descend(reference))


def test_adamw_is_torch_adamw():
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in TOY["layer"].items()}
    reference = torch.optim.AdamW(
        [{"params": [params["kernel"]], "weight_decay": 0.1},
         {"params": [params["bias"]], "weight_decay": 0.0}], lr=0.05, betas=(0.8, 0.9), eps=1e-6)
    for step in range(5):
        for name, gradient in toy_gradients(step)["layer"].items():
            params[name].grad = torch.tensor(gradient)
        reference.step()
    params_after = descend(make_optimizer(ADAMW, 5))["layer"]
    for name, value in params.items():
        np.testing.assert_allclose(params_after[name], value.detach().numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e3])
def test_the_global_norm_is_clipped(clip_norm):
    settings = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0,
                               b1=0.0, b2=0.0, eps=1e4, clip_norm=clip_norm)   # Adam becomes SGD / eps
    rule = make_optimizer(settings, 5)
    grads = toy_gradients(0)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
    assert (factor < 1) == (clip_norm == 0.5)
    updates, _ = rule.update(grads, rule.init(TOY), TOY)
    jax.tree.map(lambda update, g: np.testing.assert_allclose(update, -factor * g / 1e4, rtol=1e-3),
                 updates, grads)


@pytest.mark.parametrize(("key", "value"), [
    ("learning_rate", 0.0), ("learning_rate", float("nan")), ("learning_rate", float("inf")), ("eps", 0.0),
    ("warmup_steps", -1), ("clip_norm", -1.0), ("b1", 1.0), ("b2", 1.0), ("momentum", 1.0),
    ("final_fraction", 1.5), ("decay_fraction", -0.1)])
def test_settings_out_of_range(key, value):
    with pytest.raises(InputError, match=f"^{key}: expected an? (integer|number) .*found {value}"):
        OptimizerConfig(**{key: value})
