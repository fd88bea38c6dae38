"""Compares Gemma 4 with stored references, and with transformers on random weights of every variant."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.extras import needs_transformers
from tests.models.gemma4_configs import TINY, VARIANTS
from tests.reference_impl.comparison import assert_same_weights, distance
from tests.reference_impl.random_weights import random_network
from tests.references import STORED, needs
from tests.tolerance import noise
from tilelli_jax.loading.store import from_arrays, load, save
from tilelli_jax.models.arrays import abstract_arrays, to_arrays
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM, Gemma4Config
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.pretrained import hugging_face, mapping
from tilelli_jax.pretrained.gemma4 import GEMMA4

TINY_REFERENCES = {"e4b": STORED / "gemma4_tiny" / "e4b", "e2b": STORED / "gemma4_tiny" / "e2b"}
WITH_TOKENIZER = STORED / "recall_cases" / "tiny_gemma4_with_tokenizer"
needs_reference = needs(STORED)
# Relative to the largest number. Measured: 3.9e-5 on the references, 6.5e-5 on random networks (SSE4.2, AVX2,
# and at full optimisation). Norms of small writes amplify the stream fifty-fold, and rounding errors too.
NOISE = noise(50, steps=3)


def with_exhaustive(names: Iterable[str], *exhaustive: str) -> list[Any]:
    """Test parameters; those in `exhaustive` run in `make test-all` only."""
    return [pytest.param(name, marks=pytest.mark.exhaustive) if name in exhaustive else name
            for name in names]


def tapping(model: FlaxGemma4ForCausalLM) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """ids → logits, and the activations at all hooks."""
    run = jax.jit(lambda ids: model.tapped(ids, Tap(record=model.hooks)))

    def numbers(ids: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        logits, recorded = run(jnp.asarray(ids))
        return np.asarray(logits), {hook: np.asarray(value) for hook, value in recorded.items()}
    return numbers


# All tests use ids of the shape [3, TIME], so that each network is compiled once.
TIME = 17
IDS = np.random.default_rng(1).integers(0, 61, (3, TIME))


@functools.cache
def variant(name: str) -> tuple[FlaxGemma4ForCausalLM, Callable[..., Any]]:
    model = random_network(VARIANTS[name], 0)[0]
    return model, tapping(model)


@functools.cache
def reference(name: str) -> tuple[FlaxGemma4ForCausalLM, Callable[..., Any]]:
    model = FlaxGemma4ForCausalLM.from_pretrained(TINY_REFERENCES[name])
    return model, tapping(model)


@pytest.fixture(scope="module", autouse=True)
def _clear_caches() -> Iterator[None]:
    yield
    variant.cache_clear()
    reference.cache_clear()


@needs_reference
@pytest.mark.parametrize("name", with_exhaustive(TINY_REFERENCES, "e4b"))
def test_matches_the_stored_reference(name: str) -> None:
    path = TINY_REFERENCES[name]
    (model, run), stored = reference(name), np.load(path / "ref_f32.npz")
    logits, recorded = run(stored["input_ids"])
    assert distance(logits, stored["logits"]) < NOISE
    assert distance(recorded["embed"], stored["embeddings"]) == 0
    for hook, theirs in (("resid_post", "hidden"), ("mlp_write", "mlp"), ("resid_mid", "resid")):
        for i, layer in enumerate(recorded[hook]):
            assert distance(layer, stored[theirs][:, i]) < NOISE, (hook, i)
    frequencies = np.load(path / "rope_inv_freq.npz")
    for kind, layer in (("sliding", 0), ("full", model.config.layers.index("full"))):
        ours = jnp.array(model.blocks[layer].attention.inverse_frequencies, jnp.bfloat16)  # as stored
        np.testing.assert_array_equal(np.float32(ours), frequencies[f"{kind}_attention"])


@needs_reference
@pytest.mark.parametrize("name", with_exhaustive(TINY_REFERENCES, "e4b"))
def test_padded_batches_match_the_reference(name: str) -> None:
    (model, run), stored = reference(name), np.load(TINY_REFERENCES[name] / "ref_f32_padded.npz")
    right, recorded = run(stored["input_ids_right"])
    for row, length in enumerate(stored["lens"]):
        assert distance(right[row, :length], stored["logits_right"][row, :length]) < NOISE
        for hook, theirs in (("resid_post", "hidden_right"), ("mlp_write", "mlp_right")):
            assert distance(recorded[hook][:, row, :length], stored[theirs][row, :, :length]) < NOISE
    masked = jax.jit(model)
    for ids, mask, expected in ((f"input_ids_{side}", f"mask_{side}", f"logits_{side}")
                                for side in ("left", "right")):
        counts = stored[mask] > 0
        result = np.asarray(masked(jnp.asarray(stored[ids]), jnp.asarray(stored[mask])))
        assert distance(result[counts], stored[expected][counts]) < NOISE


@needs_reference
@pytest.mark.exhaustive  # in test_bfloat16.py is a smaller network
@pytest.mark.parametrize("path", [*TINY_REFERENCES.values(), WITH_TOKENIZER], ids=lambda path: path.name)
def test_bfloat16_error_is_similar_to_the_original(path: Path) -> None:
    """The errors have the same size as the original's but differ: sums are rounded in another order."""
    reference = path if (path / "ref_f32.npz").exists() else TINY_REFERENCES["e4b"]
    exact, rough = np.load(reference / "ref_f32.npz"), np.load(reference / "ref_bf16.npz")
    model = FlaxGemma4ForCausalLM.from_pretrained(path, ComputeConfig(dtype="bfloat16"),
                                                  param_dtype="bfloat16")
    logits, recorded = tapping(model)(rough["input_ids"])
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {"bfloat16"}
    for result, name in ((logits, "logits"), (np.swapaxes(recorded["mlp_write"], 0, 1), "mlp")):
        theirs = np.abs(rough[name] - exact[name]).mean()
        ours = np.abs(np.float32(result) - exact[name]).mean()
        assert 0 < ours < 1.2 * theirs, name


@needs_reference
@pytest.mark.exhaustive  # other tests compare caches with the forward pass, and that with the reference
@pytest.mark.parametrize("name", TINY_REFERENCES)
def test_greedy_tokens_match_the_reference(name: str) -> None:
    stored, model = np.load(TINY_REFERENCES[name] / "ref_generate.npz"), reference(name)[0]
    prompt, out = stored["prompt"], stored["out"]
    n = prompt.shape[1]
    step = jax.jit(model.step)
    prefill = jax.jit(lambda ids, lengths: model.prefill(ids, lengths, out.shape[1]))
    logits, caches = prefill(jnp.asarray(prompt), jnp.array([n]))
    result = [int(jnp.argmax(logits))]
    for at in range(n, out.shape[1] - 1):
        logits, caches = step(jnp.array(result[-1:]), caches, jnp.array([at]))
        result.append(int(jnp.argmax(logits)))
    assert result == out[0, n:].tolist()


@needs_transformers
@pytest.mark.parametrize("name", with_exhaustive(VARIANTS, "E4B"))
def test_transformers_reads_the_saved_directory_and_agrees(name: str, tmp_path: Path) -> None:
    import torch
    import transformers
    config, (model, run) = VARIANTS[name], variant(name)
    model.save_pretrained(tmp_path)
    theirs = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    writes: dict[int, Any] = {}
    for i, layer in enumerate(theirs.model.layers):
        layer.post_feedforward_layernorm.register_forward_hook(
            lambda module, given, n_new, i=i: writes.__setitem__(i, n_new))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS), output_hidden_states=True, use_cache=False)
    logits, recorded = run(IDS)
    assert distance(logits, expected.logits) < NOISE
    for i in range(config.n_layers):
        assert distance(recorded["resid_pre"][i], expected.hidden_states[i]) < NOISE, i
        assert distance(recorded["mlp_write"][i], writes[i]) < NOISE, i

    # The directory written by transformers holds the same network, bit for bit.
    theirs.save_pretrained(tmp_path / "theirs")
    again = FlaxGemma4ForCausalLM.from_pretrained(tmp_path / "theirs")
    assert again.config == config
    assert_same_weights(again, model)


@pytest.mark.parametrize("name", with_exhaustive(
    VARIANTS, "E4B", "31B: shared projection, no per-layer embeddings", "all options of a layer",
    "untied, full layers only"))
def test_cached_logits_match_the_forward_pass(name: str) -> None:
    """Rows of different lengths, beyond the window of the sliding layers."""
    model, run = variant(name)
    expected, lengths = run(IDS)[0], np.array([3, 9, 1])
    prefill = jax.jit(lambda ids, lengths: model.prefill(ids, lengths, 16))
    logits, caches = prefill(jnp.asarray(IDS[:, :9]), jnp.asarray(lengths))
    step, rows = jax.jit(model.step), np.arange(3)
    for n_new in range(5):
        assert distance(logits, expected[rows, lengths + n_new - 1]) < NOISE
        logits, caches = step(jnp.asarray(IDS[rows, lengths + n_new]), caches, jnp.asarray(lengths + n_new))


@pytest.mark.parametrize("name", with_exhaustive(VARIANTS, "E4B"))
def test_logits_do_not_depend_on_later_tokens(name: str) -> None:
    other = IDS.copy()
    other[:, 7] = (IDS[:, 7] + 1) % 61
    before, after = (variant(name)[1](ids)[0] for ids in (IDS, other))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_host_table(tmp_path: Path) -> None:
    """The result is the same; the table is a memory map of the file, not a device array."""
    config = dataclasses.replace(TINY, layers=("full",), n_shared_layers=0)
    model, arrays = random_network(config, 0)
    ids = jnp.asarray(IDS[:2, :9])
    expected = jax.jit(model)(ids)
    save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    compute = ComputeConfig(host_tables=True)
    for result in (load(tmp_path / "ours", compute),
                   FlaxGemma4ForCausalLM.from_pretrained(tmp_path / "theirs", compute)):
        assert isinstance(result.embed_per_layer.rows.array, np.memmap)
        assert not any("embed_per_layer" in str(path) for path, _ in nnx.to_flat_state(nnx.state(result)))
        assert distance(jax.jit(result)(ids), expected) < NOISE
        rows = arrays["embed_per_layer.kernel"][IDS[:2, :9]]
        np.testing.assert_array_equal(result.embed_per_layer(ids), rows)
        assert to_arrays(result).keys() == arrays.keys()
        result.save_pretrained(tmp_path / "again")
        assert_same_weights(FlaxGemma4ForCausalLM.from_pretrained(tmp_path / "again"), model)

    def decoded(lengths: jax.Array) -> jax.Array:
        _, caches = result.prefill(ids, lengths, 12)
        return result.step(jnp.zeros(2, jnp.int32), caches, lengths)[0]
    assert jnp.isfinite(jax.jit(decoded)(jnp.array([9, 4]))).all()
    with pytest.raises(ValueError, match="has no random weights"):
        FlaxGemma4ForCausalLM(config, rngs=nnx.Rngs(0), compute=compute)(ids)


@functools.cache
def sizes(config: Gemma4Config) -> dict[str, tuple[int, ...]]:
    """The shape of every array, by name."""
    return {name: leaf.shape for name, leaf in abstract_arrays(FlaxGemma4ForCausalLM, config).items()}


def n_parameters(config: Gemma4Config) -> int:
    return sum(math.prod(shape) for shape in sizes(config).values())


@needs_reference
@pytest.mark.exhaustive
def test_the_shapes_of_e4b() -> None:
    """Compares names and shapes of all tensors of the published network, without allocating them."""
    stored = json.loads((STORED / "gemma4_tiny/e4b_real_text_keys.json").read_text())
    tree = json.loads((STORED / "gemma4_tiny/e4b_real_text_config.json").read_text())
    config = Gemma4Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in
                             hugging_face.settings(GEMMA4, tree, {}, "config.json").items()})
    assert config == Gemma4Config()
    links = mapping.link(GEMMA4.names(config), sizes(config))
    shapes = {name: list(link.their_shape) for link in links for name in link.theirs}
    assert shapes | {"lm_head.weight": [262144, 2560]} == {
        name: shape[0] if isinstance(shape[0], list) else shape for name, shape in stored.items()}


LARGE = Gemma4Config(d_model=5376, layers=(*("sliding",) * 5, "full") * 10, n_heads=32, n_kv_heads=16,
                     n_kv_heads_full=4, window=1024, n_shared_layers=0, key_is_value=True, d_hidden=21504,
                     d_per_layer=0, max_seq_len=262144)
EXPERTS = Gemma4Config(d_model=2816, layers=(*("sliding",) * 5, "full") * 5, n_heads=16, n_kv_heads=8,
                       n_kv_heads_full=2, window=1024, n_shared_layers=0, key_is_value=True, d_hidden=2112,
                       n_experts=128, experts_per_token=8, d_expert=704, d_per_layer=0, max_seq_len=262144)


@pytest.mark.exhaustive
def test_published_sizes() -> None:
    """E4B's count is published; for the others the name gives it, for 26B-A4B that of active parameters.

    All layers of a kind have the same size, so the totals follow from networks with two and three layers.
    """
    def extrapolated(config: Gemma4Config) -> float:
        both, one_more_full, one_more_sliding = (
            n_parameters(dataclasses.replace(config, layers=layers))
            for layers in (("sliding", "full"), ("sliding", "full", "full"), ("sliding", "sliding", "full")))
        full = sum(kind == "full" for kind in config.layers)
        return both + (full - 1) * (one_more_full - both) + (
            config.n_layers - full - 1) * (one_more_sliding - both)

    assert n_parameters(Gemma4Config()) / 1e9 == pytest.approx(7.463, abs=5e-4)
    assert round(extrapolated(LARGE) / 1e9) == 31
    unused = EXPERTS.n_layers * 120 * 3 * EXPERTS.d_model * EXPERTS.d_expert
    assert round((extrapolated(EXPERTS) - unused) / 1e9) == 4


@pytest.mark.exhaustive
def test_published_sizes_layer_by_layer() -> None:
    large, experts = (n_parameters(config) / 1e9 for config in (LARGE, EXPERTS))
    unused = EXPERTS.n_layers * 120 * 3 * EXPERTS.d_model * EXPERTS.d_expert / 1e9
    assert round(large) == 31 and round(experts - unused) == 4


def test_a_round_trip_through_our_own_directory(tmp_path: Path) -> None:
    for name, config in VARIANTS.items():
        model = random_network(config, 0)[0]
        save(model, tmp_path / name)
        again = load(tmp_path / name)
        assert again.config == config
        assert_same_weights(again, model)


def test_edits_apply_to_the_named_layer() -> None:
    """Without its writes, the last layer multiplies its input by its scalar."""
    model = random_network(TINY, 0)[0]

    def ablate(value: jax.Array, layer: int | None) -> jax.Array:
        return jnp.zeros_like(value) if layer == 3 else value

    tap = Tap(record=("resid_pre", "resid_post"), layers=(3,),
              edit=dict.fromkeys(("attn_out", "mlp_write", "ple_write"), ablate))
    _, recorded = jax.jit(lambda ids: model.tapped(ids, tap))(jnp.arange(8)[None])
    scalar = model.blocks[3].scalar[...]
    np.testing.assert_allclose(recorded["resid_post"][0], recorded["resid_pre"][0] * scalar, rtol=1e-5)
    assert recorded["resid_pre"].shape == (1, 1, 8, 24)


def test_arrays_round_trip(tmp_path: Path) -> None:
    model, arrays = random_network(VARIANTS["all options of a layer"], 1)
    np.testing.assert_equal(to_arrays(model), arrays)
    assert_same_weights(from_arrays(model.config, arrays), model)
