"""Recording and editing at the named places of a network."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.restated.compiling import quick_jit
from tests.restated.random_weights import random_network
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.decoder import ComputeConfig, Decoder
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.t5 import T5Config
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.tap import OFF, Tap
from tilelli_jax.store import from_arrays

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
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, TIME)))
INSIDE = {"routed": ("router", "mix"), "vanilla": ("attn_out", "resid_mid", "mlp_write")}


def network(name: str, **compute: Any) -> Decoder:
    return from_arrays(CONFIGS[name], random_network(CONFIGS[name], seed=0)[1], ComputeConfig(**compute))


def tapped(model: Decoder, tap: Tap, ids: jax.Array = IDS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    logits, seen = quick_jit(lambda ids: model.tapped(ids, tap))(ids)
    return np.asarray(logits), {place: np.asarray(value) for place, value in seen.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_recorded_adds_up(name: str) -> None:
    model = network(name)
    logits, seen = tapped(model, Tap(record=model.places))
    assert set(seen) == set(model.places) and np.array_equal(seen["logits"], logits)
    assert seen["embed"].shape == (2, TIME, 8) and seen["resid_post"].shape == (LAYERS, 2, TIME, 8)
    np.testing.assert_array_equal(seen["resid_pre"][0], seen["embed"])
    np.testing.assert_array_equal(seen["resid_pre"][1:], seen["resid_post"][:-1])
    if name == "vanilla":
        np.testing.assert_allclose(seen["resid_mid"], seen["resid_pre"] + seen["attn_out"], rtol=1e-6)
        np.testing.assert_allclose(seen["resid_post"], seen["resid_mid"] + seen["mlp_write"], rtol=1e-6)
    else:
        np.testing.assert_allclose(seen["resid_post"], seen["resid_pre"] + seen["mix"], rtol=1e-6)
        assert seen["router"].shape == (LAYERS, 2, TIME, 3)


@pytest.mark.parametrize("compute", [{}, {"scan_layers": False}, {"remat": True}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_some_layers_and_positions(name: str, compute: dict[str, bool]) -> None:
    model = network(name, **compute)
    logits, whole = tapped(model, Tap(record=model.places))
    positions = np.array([[3, 0], [10, 10]])
    tap = Tap(record=model.places, layers=(0, 2), positions=jnp.asarray(positions))
    some_logits, some = tapped(model, tap)
    np.testing.assert_allclose(some_logits, logits, rtol=1e-5, atol=1e-6)
    for place, value in some.items():
        layered = place not in ("embed", "hidden", "logits")
        rows = np.arange(2)[:, None]
        expected = whole[place][[0, 2]][:, rows, positions] if layered else whole[place][rows, positions]
        assert value.shape == expected.shape, place
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_patched_stream_gives_the_other_texts_logits(name: str, layer: int) -> None:
    """From resid_post of one layer on, nothing is left of the text that the stream is taken from."""
    model, other = network(name), (IDS + 1) % 19
    expected, donor = tapped(model, Tap(record=("resid_post",)), other)
    stream = jnp.asarray(donor["resid_post"][layer])
    tap = Tap(record=("resid_post",), edit={"resid_post": lambda value, i: stream if i == layer else value})
    patched, seen = tapped(model, tap)
    np.testing.assert_allclose(patched, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen["resid_post"][layer], donor["resid_post"][layer])  # as edited
    own, _ = tapped(model, OFF)
    assert np.abs(patched - own).max() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_place_can_be_edited(name: str) -> None:
    model = network(name)
    own, _ = tapped(model, OFF)
    for place in model.places:
        same, _ = tapped(model, Tap(edit={place: lambda value, layer: value}))
        np.testing.assert_allclose(same, own, rtol=1e-5, atol=1e-6)
        changed, _ = tapped(model, Tap(edit={place: lambda value, layer: 2 * value + 1}))
        # Adding the same to all of a stream is nothing to the LayerNorm after it; doubling the last
        # stream is neither.
        assert np.abs(changed - own).max() > 1e-3, place


@pytest.mark.parametrize("name", CONFIGS)
def test_unused_it_adds_nothing_to_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(name)

    def program() -> str:
        return jax.jit(lambda ids: model(ids)).lower(IDS).as_text()

    with_it = program()
    monkeypatch.setattr(Tap, "__call__", lambda self, place, value, seen: value)
    assert program() == with_it
    monkeypatch.undo()
    recording = jax.jit(lambda ids: model.tapped(ids, Tap(record=("resid_post",)))).lower(IDS).as_text()
    assert recording != with_it


@pytest.mark.parametrize("name", OTHERS)
def test_unused_it_adds_nothing_to_other_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the compiler makes, too."""
    model, _ = random_network(OTHERS[name], 0)
    graph, params = nnx.split(model)
    ids = [jnp.zeros((2, 7), jnp.int32)] * (2 if name == "t5" else 1)

    def compiled() -> str:
        run = jax.jit(lambda params, *ids: nnx.merge(graph, params)(*ids))
        text = run.lower(params, *ids).compile().as_text()
        lines = [line for line in text.splitlines() if not re.match(r"\d+ ", line)]  # where it was written
        return re.sub(r"(metadata=\{[^}]*\}|stack_frame_id=\d+)", "", "\n".join(lines))

    with_it = compiled()
    monkeypatch.setattr(Tap, "__call__", lambda self, place, value, seen: value)
    assert compiled() == with_it


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "t5"])
def test_other_networks_record_and_edit_as_well(name: str) -> None:
    """Chosen layers and positions, and every place can be edited to some effect."""
    model, _ = random_network(OTHERS[name], 0)
    ids, positions = jnp.arange(14).reshape(2, 7), jnp.array([[6, 2], [0, 0]])
    logits, whole = model.tapped(ids, Tap(record=model.places))
    _, some = model.tapped(ids, Tap(record=model.places, layers=(1,), positions=positions))
    rows = np.arange(2)[:, None]
    for place, value in some.items():
        layered = place not in ("embed", "hidden", "logits")
        expected = whole[place][1:2][:, rows, positions] if layered else whole[place][rows, positions]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for place in model.places:
        edited, _ = model.tapped(ids, Tap(edit={place: lambda value, layer: value[..., ::-1] * 0.5}))
        assert np.abs(np.asarray(edited) - np.asarray(logits)).max() > 1e-3, place
    for bad in (jnp.array([[7], [0]]), jnp.array([[0], [-1]])):
        with pytest.raises(ValueError, match="tap: positions: expected 0 to 6, found "):
            model.tapped(ids, Tap(record=("embed",), positions=bad))
    with pytest.raises(ValueError, match=r"tap: positions: expected whole numbers \[2, n\], found "):
        model.tapped(ids, Tap(record=("embed",), positions=jnp.array([3])))
    with pytest.raises(ValueError, match=r"tap: resid_post: expected an edit to \[2, 7, 16\], found "):
        model.tapped(ids, Tap(edit={"resid_post": lambda value, layer: value[:, :3]}))


def test_gradients_flow_through_an_edit() -> None:
    model = network("vanilla")

    def loss(vector: jax.Array) -> jax.Array:
        tap = Tap(edit={"mlp_write": lambda value, layer: value + vector if layer == 1 else value})
        return model.tapped(IDS, tap)[0].sum()

    gradient = jax.grad(loss)(jnp.zeros(8))
    step = 1e-2 * jnp.eye(8)[3]
    assert (loss(step) - loss(-step)) / 2e-2 == pytest.approx(float(gradient[3]), rel=2e-2)


@pytest.mark.parametrize(("tap", "says"), [
    (Tap(record=("resid",)), "tap: no place 'resid' here; expected some of embed, resid_pre, "),
    (Tap(edit={"mlp": lambda value, layer: value}), "tap: no place 'mlp' here"),
    (Tap(record=("embed",), layers=(3,)), "tap: layers: expected 0 to 2, found 3")])
def test_places_that_are_none(tap: Tap, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        network("vanilla").tapped(IDS, tap)


def test_a_tap_says_what_it_is() -> None:
    assert not OFF.by_layer and Tap(layers=(1,)).by_layer and Tap(edit={"embed": lambda v, _: v}).by_layer
    assert dataclasses.replace(OFF, layer=4) == OFF.within(4)
