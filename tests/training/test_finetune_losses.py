"""Fine-tuning losses compared with explicit float64 sums, and the parameters that they update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
import pytest
from flax import nnx

from tests.reference_impl.random_weights import random_network
from tilelli_jax.data.chat_pairs import ChatPair
from tilelli_jax.data.chat_rows import ChatBatch, ChatRows, pack_rows, training_rows
from tilelli_jax.data.turns import model_turn, user_turn
from tilelli_jax.loading.store import build
from tilelli_jax.models import ModelConfig, RoutedConfig, VanillaConfig
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh, path_name, place_rows
from tilelli_jax.training.groups import GROUPS, Group, merge, select, trained_of
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import make_training, parameter_count, split_params
from tilelli_jax.training.tasks.chat_loss import ChatLoss, FinetuneConfig

TIME = 48
ROUTED = RoutedConfig(d_model=8, n_layers=2, max_seq_len=TIME, dense_expand=2, pathways=("local", "dense"),
                      router_bias=True, abstain_head=True)
PAIRS = [ChatPair("hi", "ok", True, "1"), ChatPair("who is Xu?", "I do not know.", False, "2"),
         ChatPair("what", "a b c", True, "3"), ChatPair("wég", "d", False, "4"),
         ChatPair("a", "b", True, "5"),
         ChatPair("abc", "de", True, "6"), ChatPair("xy", "z", False, "7"), ChatPair("u", "vw", True, "8")]
ALL = FinetuneConfig(cross_entropy_weight=0.5, abstain_weight=2.0, router_entropy_weight=3.0,
                     router_kl_weight=0.7)
ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-3, clip_norm=0.0, weight_decay=0.5)


def batch_of(source: ChatRows, parts: int = 1) -> dict[str, np.ndarray]:
    """Returns all rows as one batch `[parts, rows, …]`, as the task places it."""
    batch: ChatBatch = next(iter(training_rows(source, batch_size=len(source), seed=0, prefetch=0)))
    return {name: (array if array.dtype != np.float32 else array * np.float32(parts)).reshape(
        parts, -1, array.shape[-1]) for name, array in batch._asdict().items() if name != "rows"}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_network(ROUTED, seed=3)[0]


@pytest.fixture(scope="module")
def before() -> Any:
    """The starting network for router_kl: the same network with another router."""
    other = random_network(ROUTED, seed=4)[0]
    model = random_network(ROUTED, seed=3)[0]
    model.blocks.router.kernel[...] = other.blocks.router.kernel[...]
    return model


@functools.cache
def jitted(graph: Any) -> Any:
    return jax.jit(lambda state, ids: nnx.merge(graph, state).tapped(ids, Tap(record=("router", "abstain"))))


def forward_pass(model: Any) -> Callable[[bytes], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns a function: bytes, of which all but the last are read → logits `[time, 256]`, abstain logits
    `[time]`, routing `[blocks, time, paths]`, float64. Padding follows the bytes and does not affect them."""
    graph, state = nnx.split(model)

    def run(text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = np.frombuffer(text.ljust(TIME + 1, b"\0"), np.uint8).astype(np.int32)[None, :-1]
        logits, seen = jitted(graph)(state, ids)
        n = len(text) - 1
        return (np.asarray(logits, np.float64)[0, :n], np.asarray(seen["abstain"], np.float64)[0, :n],
                np.asarray(seen["router"], np.float64)[:, 0, :n])
    return run


def by_hand(model: Any, before: Any, pairs: list[ChatPair]) -> dict[str, float]:
    """Returns the terms, computed for each pair separately."""
    nats, abstain, unsure, drift = [], [], [], []
    run, run_before = forward_pass(model), forward_pass(before)
    for pair in pairs:
        given = user_turn(pair.prompt).encode()
        text = given + model_turn(pair.response).encode()
        logits, z, r = run(text)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats += [-log_p[t - 1, text[t]] for t in range(len(given), len(text))]
        z = z[len(given) - 1]
        abstain.append(-np.log(1 / (1 + np.exp(z if pair.answerable else -z))))
        h = (-(r * np.log(r)).sum(-1) / np.log(r.shape[-1]))[:, :len(given)].mean()
        unsure.append(h if pair.answerable else 1 - h)
        p = run_before(text)[2]
        drift += list((p * (np.log(p) - np.log(r))).sum(-1).mean(0))
    return {"nats": np.mean(nats), "abstain": np.mean(abstain), "router_entropy_loss": np.mean(unsure),
            "router_kl": np.mean(drift)}


def test_the_terms_of_rows_with_one_pair_are_those_of_each_pair_alone(model: Any, before: Any) -> None:
    batch = {name: array[0] for name, array in batch_of(pack_rows(PAIRS, TIME, pack=False)).items()}
    batch["start"] = split_params(before)[1]
    total, metrics = jax.jit(ChatLoss(ALL))(model, batch, jax.random.key(0))
    expected = by_hand(model, before, PAIRS)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=2e-5), name
    objective = (0.5 * expected["nats"] + 2 * expected["abstain"] + 3 * expected["router_entropy_loss"]
                 + 0.7 * expected["router_kl"])
    assert float(total) == float(metrics["loss"]) == pytest.approx(objective, rel=1e-5)
    assert metrics["router_entropy"].shape == (2,) and 0.1 < expected["router_entropy_loss"] < 0.9


def test_packed_rows_are_one_conversation(model: Any) -> None:
    """Each term covers the same bytes, but the earlier turns are visible."""
    source = pack_rows(PAIRS, TIME, pack=True)
    assert len(source) < len(PAIRS)
    batch = {name: array[0] for name, array in batch_of(source).items()} | {"start": split_params(model)[1]}
    found = jax.jit(ChatLoss(ALL))(model, batch, jax.random.key(0))[1]
    nats, entropies, run = [], [], forward_pass(model)
    for row in source.rows:
        text = b"".join(source.turns[pair][0][:-len("USER:")] for pair in row) + b"USER:"
        logits, _, r = run(text)
        log_p, at = logits - np.log(np.exp(logits).sum(-1, keepdims=True)), 0
        for pair in row:
            whole, given, _ = source.turns[pair]
            nats += [-log_p[t - 1, text[t]] for t in range(at + given, at + len(whole))]
            h = (-(r * np.log(r)).sum(-1) / np.log(2))[:, at:at + given].mean()
            entropies.append(h if PAIRS[pair].answerable else 1 - h)
            at += len(whole) - len("USER:")
    assert float(found["nats"]) == pytest.approx(np.mean(nats), rel=2e-5)
    assert float(found["router_entropy_loss"]) == pytest.approx(np.mean(entropies), rel=2e-5)
    assert float(found["router_kl"]) == pytest.approx(0, abs=1e-6)


def test_the_router_entropy_loss_moves_entropy_in_both_directions(model: Any) -> None:
    """Along the negative gradient, entropy falls on prompts with an answer and rises on the others."""
    loss = ChatLoss(FinetuneConfig(cross_entropy_weight=0, router_entropy_weight=1.0))
    network, params = split_params(model)
    gradient = jax.jit(jax.grad(lambda p, batch: loss(network.merge(p), batch, jax.random.key(0))[0]))

    def entropies(params: Any) -> list[float]:
        return [by_hand(network.merge(params), network.merge(params), [pair])["router_entropy_loss"]
                for pair in (PAIRS[0], PAIRS[1])]
    for pair in (PAIRS[0], PAIRS[1]):
        batch = {name: array[0] for name, array in batch_of(pack_rows([pair], TIME, pack=False)).items()}
        step = select(jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient(params, batch)),
                   trained_of(["router"]))
        at = int(not pair.answerable)
        assert entropies(merge(params, step))[at] < entropies(params)[at] - 1e-4


# ---------------------------------------------------------------------------------------------
# Groups, and the parameters that an update of a group leaves unchanged.


EVERY = (dataclasses.replace(ROUTED, pathways=("local", "state", "sparse", "dense")),
         dataclasses.replace(ROUTED, pathways=("local", "wide", "dense"), n_banks=2, conv_bias=True,
                                     second_norm="mix", quantizer="lsq"),
         dataclasses.replace(ROUTED, tie_embeddings=True, positions="none", second_norm="dense"),
         VanillaConfig(d_model=16, n_layers=2, n_heads=2, quantizer="lsq", abstain_head=True))


@pytest.mark.parametrize("config", EVERY)
def test_every_parameter_is_in_one_group(config: ModelConfig) -> None:
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(config, 0)), nnx.Param))
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    single = [group for group in GROUPS if group not in ("everything", "paths")]
    assert {sum(trained_of([group])(name) for group in single) for name in names} == {1}
    assert all(trained_of(["everything"])(name) for name in names)
    whole = parameter_count(params)
    assert sum(parameter_count(select(params, trained_of([group]))) for group in single) == whole
    paths = ["conv", "state", "attention", "dense"]
    assert {name for name in names if trained_of(["paths"])(name)} == {
        name for name in names if trained_of(paths)(name)}
    assert get_args(Group) == tuple(GROUPS)


@pytest.mark.parametrize(("groups", "expected"), [
    (["router"], 6144), (["abstain"], 257), (["router", "abstain"], 6401), (["everything"], 10_179_329)])
def test_number_of_trained_parameters_of_lite(groups: list[str], expected: int) -> None:
    lite = dataclasses.replace(RoutedConfig(), abstain_head=True)
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(lite, 0)), nnx.Param))
    assert parameter_count(select(params, trained_of(groups))) == expected


class Run:
    """A training state and its updates on some devices."""

    def __init__(self, start: Any, goal: FinetuneConfig, sizes: tuple[int, int, int] = (1, 1, 1),
                 optimizer: OptimizerConfig = ADAMW) -> None:
        self.mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
        with jax.set_mesh(self.mesh):
            self.training = make_training(start.config, ComputeConfig(), optimizer, steps=3,
                                          loss=ChatLoss(goal), seed=0, mesh=self.mesh, model=start)
            self.state = self.training.make_state()

    def __call__(self, batch: dict[str, np.ndarray], times: int = 1) -> Any:
        with jax.set_mesh(self.mesh):
            placed = {name: place_rows(array, self.mesh, array.shape[1], axis=1)
                      for name, array in batch.items()}
            for _ in range(times):
                self.state, metrics = self.training.update(self.state, placed, np.int32(self.state.step))
        return jax.device_get(metrics)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.parametrize("goal", [
    dataclasses.replace(ALL, trainable=("router",)),
    FinetuneConfig(trainable=("abstain",), cross_entropy_weight=0, abstain_weight=1),
    FinetuneConfig(trainable=("norms", "embed"))])
def test_untrained_parameters_stay_unchanged(model: Any, goal: FinetuneConfig) -> None:
    """Even with weight decay; they have no gradient and no moments either."""
    run, trained = Run(model, goal), trained_of(goal.trainable)
    start = flat(jax.device_get(run.state.params))
    metrics = run(batch_of(pack_rows(PAIRS, TIME, pack=False)), times=2)
    assert metrics["finite"]
    for name, value in flat(run.state.params).items():
        assert np.array_equal(value, start[name]) != trained(name), name
    moments = {name for name in flat(run.state.opt_state) if "." in name and ".mu." in f".{name}"}
    assert moments and all(trained(name.partition("mu.")[2]) for name in moments)
    assert (metrics.keys() & {"router_kl"}) == ({"router_kl"} if goal.router_kl_weight else set())
    if goal.router_kl_weight:
        assert flat(run.state.loss_state).keys() == {name for name in start if trained(name)}
        for name, value in flat(run.state.loss_state).items():
            np.testing.assert_array_equal(value, start[name])


def test_gradients_of_the_abstain_head_reach_the_router(model: Any) -> None:
    """If both are trained, the head's loss alone moves the router."""
    run = Run(model, FinetuneConfig(trainable=("router", "abstain"), cross_entropy_weight=0,
                                    abstain_weight=1))
    start = flat(jax.device_get(run.state.params))["blocks.router.kernel"]
    run(batch_of(pack_rows(PAIRS, TIME, pack=False)))
    assert np.abs(flat(run.state.params)["blocks.router.kernel"] - start).max() > 1e-4


def test_router_kl_limits_the_change_of_routing(model: Any) -> None:
    """It starts at 0, and a larger weight keeps the routing closer to the start."""
    drifts = []
    for weight in (1e-6, 10.0):
        run = Run(model, FinetuneConfig(trainable=("router",), cross_entropy_weight=0,
                                        router_entropy_weight=1,
                                        router_kl_weight=weight))
        batch = batch_of(pack_rows(PAIRS, TIME, pack=False))
        assert run(batch)["router_kl"] == pytest.approx(0, abs=1e-6)
        drifts.append(float(run(batch, times=6)["router_kl"]))
    assert 0 < drifts[1] < 0.5 * drifts[0]


def test_accumulated_parts_equal_one_batch(model: Any) -> None:
    """Also if the parts have different numbers of pairs and bytes."""
    source = pack_rows(PAIRS, TIME, pack=True)
    source = dataclasses.replace(source, rows=source.rows[:len(source) // 2 * 2])
    assert len({tuple(counts) for counts in source.counts}) == len(source) > 1
    goal = dataclasses.replace(ALL, trainable=("router", "abstain", "norms"), router_kl_weight=0)
    one_batch, parts = Run(model, goal), Run(model, goal)
    expected, found = one_batch(batch_of(source)), parts(batch_of(source, parts=2))
    for name in ("loss", "nats", "abstain", "router_entropy_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=2e-5), name


@pytest.mark.exhaustive
@pytest.mark.eight_devices
def test_eight_devices_equal_one() -> None:
    model = random_network(ROUTED, seed=3)[0]
    goal = dataclasses.replace(ALL, trainable=("router", "abstain", "norms"))
    batch = batch_of(pack_rows(PAIRS, TIME, pack=False))
    alone, shared = Run(model, goal), Run(model, goal, (2, 2, 2))
    expected, found = alone(batch, times=3), shared(batch, times=3)
    for name in ("loss", "nats", "abstain", "router_entropy_loss", "router_kl", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=2e-5, abs=1e-7), name
    for name, value in flat(alone.state.params).items():
        np.testing.assert_allclose(flat(shared.state.params)[name], value, rtol=1e-5,
                                   atol=1e-5 * np.abs(value).max())


def test_muon_without_any_matrix_to_train(model: Any) -> None:
    goal = FinetuneConfig(trainable=("router", "abstain"), abstain_weight=1)
    run = Run(model, goal, optimizer=dataclasses.replace(ADAMW, name="muon"))
    start = flat(jax.device_get(run.state.params))
    assert run(batch_of(pack_rows(PAIRS, TIME, pack=False)))["finite"]
    assert {name for name, value in flat(run.state.params).items()
            if not np.array_equal(value, start[name])} == {
        "blocks.router.kernel", "blocks.router.bias", "abstain.kernel", "abstain.bias"}
