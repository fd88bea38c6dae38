"""Recording and editing activations at the hooks of a network."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.reference_impl.comparison import distance
from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.causal_lm import CausalLM, ComputeConfig
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.t5 import T5Config
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.hooks import OFF, Tap

OTHERS: dict[str, Any] = {
    "gpt_neox": GPTNeoXConfig(vocab_size=19, d_model=16, n_layers=2, max_seq_len=16, n_heads=2, d_hidden=24,
                              parallel_residual=False),
    "gemma4": Gemma4Config(
        vocab_size=19, d_model=16, layers=("sliding", "full"), n_heads=2, n_kv_heads=1, d_head=8,
        n_kv_heads_full=1, d_head_full=8, window=3, n_shared_layers=0, d_hidden=24, d_per_layer=4,
        vocab_per_layer=19, n_experts=4, experts_per_token=2, d_expert=8),
    "t5": T5Config(vocab_size=19, d_model=16, n_layers=2, n_decoder_layers=2, n_heads=2, d_head=8,
                   d_hidden=24)}
TIME, LAYERS = 11, 3
SIZES: dict[str, Any] = {"vocab_size": 19, "d_model": 8, "n_layers": LAYERS, "max_seq_len": TIME}
CONFIGS: dict[str, ModelConfig] = {
    "routed": RoutedConfig(**SIZES, n_heads=2, d_head=4, top_k=3, dense_expand=2),
    "vanilla": VanillaConfig(**SIZES, n_heads=2, dense_expand=2)}
IDS = np.random.default_rng(0).integers(0, 19, (2, TIME))


ALL = {**CONFIGS, **{name: config for name, config in OTHERS.items() if name != "t5"}}
NOISE = noise(1, steps=8)  # relative to the largest activation of a hook; measured: 2e-6


def network(name: str, **compute: Any) -> CausalLM:
    arrays = random_network(ALL[name], seed=0)[1]
    return from_arrays(ALL[name], arrays, ComputeConfig(**compute))


def tapped(model: CausalLM, tap: Tap, ids: np.ndarray = IDS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    logits, recorded = jax.jit(lambda ids: model.tapped(ids, tap))(ids)
    return np.asarray(logits), {hook: np.asarray(value) for hook, value in recorded.items()}


@functools.cache
def all_hooks(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits, and the activations at all hooks."""
    model = network(name)
    return tapped(model, Tap(record=model.hooks))


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_writes_sum_to_the_stream(name: str) -> None:
    logits, recorded = all_hooks(name)
    assert set(recorded) == set(network(name).hooks) and np.array_equal(recorded["logits"], logits)
    assert recorded["embed"].shape == (2, TIME, 8) and recorded["resid_post"].shape == (LAYERS, 2, TIME, 8)
    np.testing.assert_array_equal(recorded["resid_pre"][0], recorded["embed"])
    np.testing.assert_array_equal(recorded["resid_pre"][1:], recorded["resid_post"][:-1])
    sums = {"routed": [("resid_post", "resid_pre", "mix")],
            "vanilla": [("resid_mid", "resid_pre", "attn_out"), ("resid_post", "resid_mid", "mlp_write")]}
    for complete, one, other in sums[name]:
        np.testing.assert_allclose(recorded[complete], recorded[one] + recorded[other], rtol=0,
                                   atol=noise(recorded[one], recorded[other]))
    if name == "routed":
        assert recorded["router"].shape == (LAYERS, 2, TIME, 3)


@pytest.mark.parametrize(("name", "compute"), [
    ("routed", {}), ("vanilla", {"remat": True}), ("gpt_neox", {}), ("gemma4", {}),
    *(pytest.param(name, compute, marks=pytest.mark.exhaustive) for name, compute in (
        ("vanilla", {}), ("routed", {"remat": True}), ("routed", {"scan_layers": False}),
        ("vanilla", {"scan_layers": False})))], ids=str)
def test_recording_some_layers_and_positions(name: str, compute: dict[str, bool]) -> None:
    model = network(name, **compute)
    logits, complete = tapped(model, Tap(record=model.hooks)) if compute else all_hooks(name)
    layers, rows, positions = (0, ALL[name].n_layers - 1), np.arange(2)[:, None], np.array([[3, 0], [10, 10]])
    some_logits, some = tapped(model, Tap(record=model.hooks, layers=layers,
                                          positions=jnp.asarray(positions)))
    assert distance(some_logits, logits) < NOISE and some.keys() == complete.keys()
    for hook, value in some.items():
        layered = hook not in ("embed", "hidden", "logits")
        expected = (complete[hook][list(layers)][:, rows, positions] if layered else
                    complete[hook][rows, positions])
        assert value.shape == expected.shape, hook
        np.testing.assert_allclose(value, expected, rtol=0, atol=NOISE * np.abs(complete[hook]).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_patched_stream_gives_the_other_texts_logits(name: str) -> None:
    """A donor's stream at resid_post replaces the stream, so the logits are those of the donor's text."""
    model, other = network(name), (IDS + 1) % 19

    @jax.jit
    def patched(ids: jax.Array, stream: jax.Array, layer: jax.Array) -> Any:
        return model.tapped(ids, Tap(record=("resid_post",), edit={
            "resid_post": lambda value, i: jnp.where(i == layer, stream, value)}))
    nothing = jnp.zeros((2, TIME, 8))
    unpatched, _ = patched(IDS, nothing, -1)
    expected, donor = patched(other, nothing, -1)
    assert distance(unpatched, all_hooks(name)[0]) < NOISE < 0.01 < distance(unpatched, expected)
    for layer in range(LAYERS):
        stream = donor["resid_post"][layer]
        result, recorded = patched(IDS, stream, layer)
        assert distance(result, expected) < NOISE
        np.testing.assert_array_equal(recorded["resid_post"][layer], stream)  # as edited


@pytest.mark.parametrize("name", ALL)
def test_every_place_can_be_edited(name: str) -> None:
    """Editing a hook to its own value changes nothing; a different value changes the logits."""
    model = network(name)

    @jax.jit
    def edited(ids: jax.Array, selected: jax.Array) -> jax.Array:
        def edit(i: int) -> Any:
            # A LayerNorm removes a constant added to the stream, and a factor of the last stream.
            return lambda value, layer: jnp.where(selected == i, 0.5 * value[..., ::-1] + 1, value)
        return model.tapped(ids, Tap(edit={hook: edit(i) for i, hook in enumerate(model.hooks)}))[0]
    unedited, _ = all_hooks(name)
    assert distance(edited(IDS, -1), unedited) < NOISE
    for i, hook in enumerate(model.hooks):
        assert np.abs(edited(IDS, i) - unedited).max() > 1e-3, hook


def test_edits_are_called_with_every_place_and_layer() -> None:
    """Inside the blocks the function receives the layer's index, outside None."""
    model, calls = network("vanilla"), []

    def edit(hook: str) -> Any:
        return lambda value, layer: (calls.append((hook, layer)), value)[1]
    tap = Tap(edit={hook: edit(hook) for hook in model.hooks})
    jax.eval_shape(lambda ids: model.tapped(ids, tap), IDS)
    inside = ("resid_pre", "attn_out", "resid_mid", "mlp_write", "resid_post")
    assert calls == [("embed", None), *((hook, i) for i in range(LAYERS) for hook in inside),
                     ("hidden", None), ("logits", None)]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unused_tap_does_not_change_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(name)

    def program() -> str:
        return jax.jit(lambda ids: model(ids)).lower(IDS).as_text()

    with_tap = program()
    monkeypatch.setattr(Tap, "__call__", lambda self, hook, value, recorded: value)
    assert program() == with_tap
    monkeypatch.undo()
    recording = jax.jit(lambda ids: model.tapped(ids, Tap(record=("resid_post",)))).lower(IDS).as_text()
    assert recording != with_tap


@pytest.mark.parametrize("name", OTHERS)
def test_an_unused_tap_does_not_change_other_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = random_network(OTHERS[name], 0)
    graph, params = nnx.split(model)
    ids = [jnp.zeros((2, 7), jnp.int32)] * (2 if name == "t5" else 1)

    def program() -> str:
        return jax.jit(lambda params, *ids: nnx.merge(graph, params)(*ids)).lower(params, *ids).as_text()

    with_tap = program()
    monkeypatch.setattr(Tap, "__call__", lambda self, hook, value, recorded: value)
    assert program() == with_tap


@pytest.mark.parametrize("name", ["gpt_neox", "gemma4"])
def test_invalid_positions_and_edits_raise(name: str) -> None:
    model, ids = network(name), jnp.arange(14).reshape(2, 7)

    def rejects(message: str, **tap: Any) -> None:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda ids: model.tapped(ids, Tap(**tap)), ids)
    for bad in (jnp.array([[7], [0]]), jnp.array([[0], [-1]])):
        rejects("tap: positions: expected 0 to 6, found ", record=("embed",), positions=bad)
    rejects(r"tap: positions: expected integers \[2, n\], found ", record=("embed",),
            positions=jnp.array([3]))
    rejects(r"tap: resid_post: expected an edit to \[2, 7, 16\], found ",
            edit={"resid_post": lambda value, layer: value[:, :3]})


def test_gradients_flow_through_an_edit() -> None:
    """Compares the gradient with finite differences; the tolerance is the rounding error over the step."""
    model, probe = network("vanilla"), np.random.default_rng(1).standard_normal((2, TIME, 19))

    @jax.jit
    @jax.value_and_grad
    def loss(vector: jax.Array) -> jax.Array:
        tap = Tap(edit={"mlp_write": lambda value, layer: value + vector if layer == 1 else value})
        return (model.tapped(IDS, tap)[0] * probe).sum()

    _, gradient = loss(jnp.zeros(8))
    step, slope = np.float32(2e-2), np.zeros(8)
    for i in range(8):
        (above, _), (below, _) = (loss(sign * step * jnp.eye(8)[i]) for sign in (1, -1))
        slope[i] = (float(above) - float(below)) / (2 * step)
    assert distance(gradient, slope) < 2e-3  # measured: 7e-5


@pytest.mark.parametrize(("tap", "message"), [
    (Tap(record=("resid",)), "tap: expected hooks among embed, resid_pre, .*, found 'resid'"),
    (Tap(edit={"mlp": lambda value, layer: value}), "tap: expected hooks among .*, found 'mlp'"),
    (Tap(record=("embed",), layers=(3,)), "tap: layers: expected 0 to 2, found 3")])
def test_unknown_places_and_layers_raise(tap: Tap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network("vanilla").tapped(IDS, tap)


def test_by_layer_and_within() -> None:
    assert not OFF.by_layer and Tap(layers=(1,)).by_layer and Tap(edit={"embed": lambda v, _: v}).by_layer
    assert dataclasses.replace(OFF, layer=4) == OFF.within(4)
