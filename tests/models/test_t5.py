"""Compares T5 and Chronos with stored references, closed forms, and transformers on random weights."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.extras import needs_transformers
from tests.reference_impl.comparison import assert_same_weights, distance
from tests.references import STORED, needs
from tests.tolerance import noise
from tilelli_jax.errors import InputError
from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models.arrays import abstract_arrays
from tilelli_jax.models.chronos import Chronos, ChronosConfig, MeanScaleUniformBins, crps
from tilelli_jax.models.sampling import sample
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration, T5Config, bucket_of
from tilelli_jax.models.t5_decoding import continue_ids
from tilelli_jax.nn.hooks import Tap

REFERENCE = STORED / "chronos_tiny"
needs_reference = needs(REFERENCE)
# Relative to the largest number; measured: 5e-7 on the reference, 2.5e-6 on random weights.
NOISE = noise(1, steps=8)

TINY = T5Config(vocab_size=50, d_model=12, n_layers=2, n_decoder_layers=2, n_heads=3, d_head=5, d_hidden=20)
VARIANTS = {
    "as Chronos": TINY,
    "a deeper decoder": dataclasses.replace(TINY, n_decoder_layers=3, n_layers=1),
    "untied": dataclasses.replace(TINY, tie_embeddings=False, scale_decoder_outputs=False),
    "untied and scaled": dataclasses.replace(TINY, tie_embeddings=False),
    "tied and not scaled": dataclasses.replace(TINY, scale_decoder_outputs=False),
    "gated, tanh GELU, untied (Flan-T5)": dataclasses.replace(
        TINY, activation="gelu_tanh", gated=True, tie_embeddings=False, scale_decoder_outputs=False),
    "gated SiLU": dataclasses.replace(TINY, activation="silu", gated=True),
    "exact GELU": dataclasses.replace(TINY, activation="gelu"),
    "few buckets": dataclasses.replace(TINY, n_buckets=8, max_distance=10, norm_eps=1e-3),
}


def random_model(config: T5Config) -> FlaxT5ForConditionalGeneration:
    graph, state = random_state(config)
    return nnx.merge(graph, jax.tree.map(jnp.asarray, state))


@functools.cache
def random_state(config: T5Config) -> tuple[Any, Any]:
    """The structure of the network, and random weights as NumPy arrays."""
    rng = np.random.default_rng(0)
    arrays = {name: (1 + 0.3 * rng.standard_normal(leaf.shape) if name.endswith("scale") else
                     0.4 * rng.standard_normal(leaf.shape)).astype(np.float32)
              for name, leaf in abstract_arrays(FlaxT5ForConditionalGeneration, config).items()}
    graph, state = nnx.split(from_arrays(config, arrays))
    return graph, jax.tree.map(np.asarray, state)


def tapped(model: FlaxT5ForConditionalGeneration, *inputs: Any) -> tuple[Any, dict[str, Any]]:
    return jax.jit(lambda *a: model.tapped(*a, Tap(record=model.hooks)))(*inputs)


@needs_reference
def test_matches_the_stored_reference() -> None:
    stored = np.load(REFERENCE / "model_ref.npz")
    model = FlaxT5ForConditionalGeneration.from_pretrained(REFERENCE / "model")
    inputs = [stored[name] for name in ("input_ids", "decoder_input_ids", "attention_mask")]
    logits, recorded = tapped(model, *inputs)
    assert distance(logits, stored["logits"]) < NOISE
    for hook, name in (("encoder.resid_post", "enc_layer"), ("decoder.resid_post", "dec_layer"),
                        ("encoder.mlp_write", "enc_ff"), ("decoder.mlp_write", "dec_ff")):
        assert distance(jnp.swapaxes(recorded[hook], 0, 1), stored[name]) < NOISE, hook
    real = stored["attention_mask"]
    assert distance(jax.jit(model.encode)(inputs[0], inputs[2])[real], stored["embed"][real]) < NOISE
    decoded = continue_ids(model, jnp.asarray(inputs[0]), jnp.asarray(inputs[2]), n=12, temperature=0.0)
    np.testing.assert_array_equal(decoded, stored["greedy_tokens"][:, 1:])


@needs_reference
def test_tokenizer_and_crps_match_the_reference() -> None:
    stored = np.load(REFERENCE / "tokenizer_ref.npz")
    tokenizer = MeanScaleUniformBins(ChronosConfig())
    np.testing.assert_array_equal(tokenizer.centers, stored["centers"])
    np.testing.assert_array_equal(tokenizer.boundaries, stored["boundaries"])
    cases = [name.removesuffix("/series") for name in stored.files if name.endswith("/series")]
    for case in cases:
        result = tokenizer.encode(stored[f"{case}/series"][None])
        np.testing.assert_array_equal(result.ids[0], stored[f"{case}/token_ids"], case)
        np.testing.assert_array_equal(result.mask[0], stored[f"{case}/mask"], case)
        np.testing.assert_allclose(result.scale, stored[f"{case}/scale"], rtol=1e-6)
    assert len(cases) == 10
    np.testing.assert_allclose(tokenizer.decode(stored["out_ids"][0], np.array([2.0])),
                               stored["out_vals_scale2"][0], rtol=1e-6)
    stored = np.load(REFERENCE / "crps_ref.npz")
    result = crps(stored["samples"], stored["truth"])
    np.testing.assert_allclose(result, stored["crps_per_step"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.mean(-1), stored["crps_mean"], rtol=1e-12)


@needs_reference
def test_first_sampled_tokens_follow_the_reference_probabilities() -> None:
    chronos = Chronos.from_pretrained(REFERENCE / "model")
    context = np.load(REFERENCE / "model_ref.npz")["context"]
    expected = np.load(REFERENCE / "first_step_probs.npz")["probs"]
    tokens = chronos.tokenizer.encode(context)
    logits = np.array(jax.jit(chronos.network)(tokens.ids, np.zeros((3, 1), np.int32), tokens.mask)[:, 0])
    logits[:, 1] = -np.inf  # the end token is banned
    logits = np.float64(logits)
    likely = np.where(logits >= np.sort(logits)[:, -50:-49], np.exp(logits), 0)
    np.testing.assert_allclose(likely / likely.sum(1, keepdims=True), expected, rtol=0,
                               atol=NOISE * np.abs(logits[:, 2:]).max() * expected.max())
    # Sampled tokens have these frequencies.
    keys = jax.random.split(jax.random.key(0), 1500)
    first = jnp.asarray(logits[0], jnp.float32)
    draws = jax.jit(jax.vmap(lambda key: sample(key, first, 1.0, 50, 1.0)))(keys)
    counts, p = np.bincount(draws, minlength=4096), np.asarray(expected[0], np.float64)
    assert counts[p == 0].sum() == 0
    assert scipy.stats.chisquare(counts[p > 0], p[p > 0] / p.sum() * 1500).pvalue > 1e-3


@needs_transformers
@pytest.mark.parametrize("name", [
    pytest.param("as Chronos", marks=pytest.mark.exhaustive), "a deeper decoder", "untied", "few buckets",
    "untied and scaled", "tied and not scaled", "gated, tanh GELU, untied (Flan-T5)",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("gated SiLU", "exact GELU"))])
def test_transformers_reads_the_saved_directory_and_agrees(name: str, tmp_path: Path) -> None:
    import torch
    import transformers
    config = VARIANTS[name]
    model = random_model(config)
    model.save_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    rng = np.random.default_rng(1)
    ids, decoder_ids = rng.integers(0, 50, (3, 19)), rng.integers(0, 50, (3, 7))
    mask = np.arange(19) >= np.array([0, 4, 12])[:, None]  # padded on the left
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids), decoder_input_ids=torch.from_numpy(decoder_ids),
                          attention_mask=torch.from_numpy(mask.astype(np.int64)), output_hidden_states=True)
    logits, recorded = tapped(model, ids, decoder_ids, mask)
    assert distance(logits, expected.logits) < NOISE
    for i in range(config.n_decoder_layers):
        assert distance(recorded["decoder.resid_pre"][i], expected.decoder_hidden_states[i]) < NOISE
    theirs.save_pretrained(tmp_path / "theirs")
    again = FlaxT5ForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    assert again.config == config
    assert_same_weights(again, model)


@pytest.mark.parametrize("name", [
    "a deeper decoder", "few buckets",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("as Chronos", "untied"))])
def test_cached_decoding_matches_the_forward_pass(name: str) -> None:
    model, rng = random_model(VARIANTS[name]), np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, 50, (3, 9)))
    mask = jnp.arange(9) >= jnp.array([0, 2, 8])[:, None]
    decoded = np.asarray(continue_ids(model, ids, mask, n=12, temperature=0.0, banned=(1,)))
    text = np.zeros((3, 1), np.int32)
    forward = jax.jit(lambda text: model(ids, text, mask))
    for step in range(12):
        logits = np.array(forward(jnp.pad(jnp.asarray(text), ((0, 0), (0, 12 - step)))))[:, step]
        logits[:, 1] = -np.inf
        text = np.concatenate([text, logits.argmax(1)[:, None].astype(np.int32)], 1)
    np.testing.assert_array_equal(decoded, text[:, 1:])


def test_copies_equal_separate_rows() -> None:
    model, rng = random_model(TINY), np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, 50, (3, 9)))
    mask = jnp.arange(9) >= jnp.array([0, 2, 8])[:, None]
    expected, same, others = (
        continue_ids(model, jnp.repeat(ids, 4, axis=0), jnp.repeat(mask, 4, axis=0), n=7, seed=seed)
        for seed in (3, 3, 4))
    assert np.array_equal(expected, same) and not np.array_equal(expected, others)
    result = continue_ids(model, ids, mask, n=7, seed=3, copies=4)
    np.testing.assert_array_equal(result, expected)
    assert len(np.unique(result[:4], axis=0)) > 1
    # Each copy alone, by its index in the random stream.
    alone = continue_ids(model, ids[1:2], mask[1:2], n=7, seed=3, copies=2, rows=jnp.array([6, 5]))
    np.testing.assert_array_equal(alone, np.asarray(expected)[[6, 5]])


def test_encoder_edits_apply_in_decoding() -> None:
    """Cached decoding with an auxiliary network and metadata matches the forward pass."""
    model, other = random_model(VARIANTS["a deeper decoder"]), random_model(TINY)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 50, (3, 9)))
    metadata = jnp.array([[0], [3], [8]])  # number of edited positions

    def make_tap(aux_model: Any, metadata: jax.Array) -> Tap:
        def edit(value: jax.Array, layer: int | None) -> jax.Array:
            if layer != 0:
                return value
            selected = (jnp.arange(value.shape[1]) < metadata)[..., None]
            return jnp.where(selected, value[:, ::-1] * aux_model.encoder.norm.scale[...], value)
        return Tap(edit={"encoder.resid_post": edit})
    decoded, plain = (
        np.asarray(continue_ids(model, ids, n=12, temperature=0.0, make_tap=make_tap, aux_model=other,
                                metadata=positions))
        for positions in (metadata, 0 * metadata))
    text = np.zeros((3, 1), np.int32)
    forward = jax.jit(lambda text: model.tapped(ids, text, None, make_tap(other, metadata))[0])
    for step in range(12):
        logits = np.array(forward(jnp.pad(jnp.asarray(text), ((0, 0), (0, 12 - step)))))[:, step]
        text = np.concatenate([text, logits.argmax(1)[:, None].astype(np.int32)], 1)
    np.testing.assert_array_equal(decoded, text[:, 1:])
    assert np.array_equal(plain[0], decoded[0]) and (plain[1:] != decoded[1:]).any(axis=1).all()


def test_encoder_only_pass() -> None:
    """The encoder has more blocks than the decoder; edits and recordings match those of the full network."""
    model = random_model(dataclasses.replace(TINY, n_layers=3, n_decoder_layers=1))
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 50, (3, 9)))
    tap = Tap(record=("embed", "encoder.resid_mid", "encoder.resid_post"), layers=(0, 2),
              edit={"encoder.mlp_write": lambda value, layer: value * (layer == 2)})
    stream, recorded = jax.jit(lambda ids: model.encode_tapped(ids, None, tap))(ids)
    _, expected = jax.jit(lambda ids: model.tapped(ids, ids, None, tap))(ids)
    assert recorded["encoder.resid_post"].shape == (2, 3, 9, 12) and recorded.keys() == expected.keys()
    for hook, value in recorded.items():
        assert distance(value, expected[hook]) < NOISE
    assert distance(stream, model.encoder.norm(recorded["encoder.resid_post"][1])) < NOISE
    for bad, message in (
            (Tap(record=("decoder.resid_post",)), "found 'decoder.resid_post'"),
            (Tap(record=("encoder.resid_post",), layers=(3,)), "layers: expected 0 to 2, found 3")):
        with pytest.raises(ValueError, match=message):
            model.encode_tapped(ids, None, bad)
        with pytest.raises(ValueError, match=message):
            continue_ids(model, ids, n=2, make_tap=lambda aux_model, metadata, bad=bad: bad)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"copies": 0}, "copies: expected at least 1, found 0"),
    ({"copies": 2, "rows": np.arange(3)}, r"rows: expected \[4\], found \[3\]"),
    ({"metadata": np.zeros(2, np.int32)}, r"metadata: expected \[2, n\], found \[2\]"),
    ({"metadata": np.zeros((4, 1), np.int32), "copies": 2}, r"metadata: expected \[2, n\], found \[4, 1\]")])
def test_mismatched_rows_and_metadata_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continue_ids(random_model(TINY), jnp.zeros((2, 3), jnp.int32), n=2, **arguments)


@pytest.mark.parametrize(("layers", "d_model", "d_hidden", "heads", "count"), [
    (12, 768, 3072, 12, 201_374_976), (6, 512, 2048, 8, 46_154_240)])
def test_published_sizes(layers: int, d_model: int, d_hidden: int, heads: int, count: int) -> None:
    """Chronos-T5-base (201 M) and -small (46 M)."""
    config = T5Config(d_model=d_model, n_layers=layers, n_decoder_layers=layers, d_hidden=d_hidden,
                      n_heads=heads)
    model = nnx.eval_shape(lambda: FlaxT5ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_relative_position_buckets() -> None:
    """As in the paper: 8 exact buckets in each direction, then logarithmic ones up to 128."""
    offsets = jnp.arange(-200, 201)
    both = np.asarray(bucket_of(offsets, bidirectional=True, n_buckets=32, max_distance=128))
    assert both[200:208].tolist() == [0, 17, 18, 19, 20, 21, 22, 23]
    assert both[192:201][::-1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert both.max() == 31 and (both[offsets >= 128] == 31).all() and (both[offsets <= -128] == 15).all()
    past = np.asarray(bucket_of(offsets, bidirectional=False, n_buckets=32, max_distance=128))
    assert (past[offsets >= 0] == 0).all() and past[200 - 15] == 15 and (past[offsets <= -128] == 31).all()
    assert (np.diff(past[:201]) <= 0).all()


def test_long_forecasts_append_the_median(tmp_path: Path) -> None:
    settings = ChronosConfig(n_tokens=50, context_length=20, prediction_length=6, num_samples=4, top_k=10)
    chronos = Chronos(random_model(dataclasses.replace(TINY, chronos=settings)))
    series = np.array([[np.nan, 1, 2, 3, 4], [5, 4, 3, np.nan, 1]], np.float32)
    drawn = chronos.predict(series, 9, seed=2)
    assert drawn.shape == (2, 4, 9) and np.isfinite(drawn).all()
    np.testing.assert_array_equal(chronos.predict(series, 6, seed=2), drawn[:, :, :6])
    longer = np.concatenate([series, np.sort(drawn[:, :, :6], axis=1)[:, 1]], axis=1)
    rest = chronos.predict(longer, 3, seed=2 + 7919)
    np.testing.assert_array_equal(rest, drawn[:, :, 6:])
    for bad, message in ((np.zeros(3), r"series: expected \[batch, time\], found \[3\]"),
                         (np.zeros((2, 0)), "series: expected")):
        with pytest.raises(InputError, match=message):
            chronos.predict(bad, 3)
    with pytest.raises(InputError, match="length: expected at least 1, found 0"):
        chronos.predict(series, 0)
    with pytest.raises(InputError, match="chronos: expected a network whose configuration has a tokenizer"):
        Chronos(random_model(TINY))
    chronos.network.save_pretrained(tmp_path)
    assert Chronos.from_pretrained(tmp_path).config == settings
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["chronos_config"]["tokenizer_class"] = "Another"
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="chronos_config: expected an object with tokenizer_class"):
        Chronos.from_pretrained(tmp_path)
    tree["chronos_config"] = {"tokenizer_class": "MeanScaleUniformBins", "n_tokens": 50, "num_samples": 3,
                              "tokenizer_kwargs": {"low_limit": -2.0, "high_limit": 2.0},
                              "model_type": "seq2seq"}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    again = Chronos.from_pretrained(tmp_path)
    assert again.config == ChronosConfig(n_tokens=50, num_samples=3, low_limit=-2.0, high_limit=2.0)


@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-100, 100, width=32)))
def test_values_decode_to_their_bin_centre(series: np.ndarray) -> None:
    tokenizer = MeanScaleUniformBins(ChronosConfig())
    tokens = tokenizer.encode(series)
    assert tokens.ids.dtype == np.int32 and (tokens.ids[:, -1] == 1).all() and tokens.mask.all()
    back = tokenizer.decode(tokens.ids[:, :-1], tokens.scale)
    width = tokens.scale[:, None] * np.float32(30 / 4092)
    inside = np.abs(series) < 15 * tokens.scale[:, None]
    assert (np.abs(back - series)[inside] <= (0.51 * width + 1e-6 * np.abs(series))[inside]).all()


@given(hnp.arrays(np.float64, (4, 6, 3), elements=st.floats(-9, 9)),
       hnp.arrays(np.float64, (4, 3), elements=st.floats(-9, 9)))
def test_crps_matches_its_definition(samples: np.ndarray, truth: np.ndarray) -> None:
    error = np.abs(samples - truth[:, None]).mean(1)
    spread = np.abs(samples[:, :, None] - samples[:, None]).mean((1, 2))
    np.testing.assert_allclose(crps(samples, truth), error - spread / 2, atol=1e-12)
    assert (crps(samples, truth) >= -1e-12).all()


def test_unknown_places_and_layers_raise() -> None:
    ids, tap = jnp.zeros((1, 2), jnp.int32), Tap(record=("resid_post",))
    model = random_model(VARIANTS["a deeper decoder"])
    with pytest.raises(ValueError, match=r"tap: expected hooks among .*, found 'resid_post'"):
        model.tapped(ids, ids, None, tap)
    last = Tap(record=("decoder.resid_post",), layers=(2,))
    jax.eval_shape(lambda ids: model.tapped(ids, ids, None, last), ids)
    with pytest.raises(ValueError, match="tap: layers: expected 0 to 0, found 2"):
        model.tapped(ids, ids, None, Tap(record=("encoder.resid_post",), layers=(2,)))


@pytest.mark.parametrize(("ids", "message"), [
    ([[50]], "ids: expected 0 to 49, found 50"), ([[-1]], "ids: expected 0 to 49, found -1"),
    ([1], r"ids: expected integers \[batch, time\]"), ([[1.5]], "ids: expected integers")])
def test_invalid_ids_raise(ids: Any, message: str) -> None:
    model, good = random_model(TINY), jnp.zeros((1, 1), jnp.int32)
    for arguments in ((jnp.asarray(ids), good), (good, jnp.asarray(ids))):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match=message):
        continue_ids(model, jnp.asarray(ids), n=2)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_decoder_layers": 0}, "n_decoder_layers: expected an integer ≥ 1, found 0"),
    ({"decoder_start_token_id": 10**6}, "decoder_start_token_id: expected ids of the vocabulary, 0 to "),
    ({"eos_token_id": -1}, "eos_token_id: expected ids of the vocabulary, 0 to "),
    ({"chronos_config": {"tokenizer_class": "MeanScaleUniformBins", "tokenizer_kwargs": [1]}},
     "chronos_config.tokenizer_kwargs: expected an object, found a list")])
def test_invalid_settings_raise(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_model(TINY).save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, **changes}))
    with pytest.raises(InputError) as caught:
        FlaxT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {message}")


def test_exactly_one_end_id_is_accepted(tmp_path: Path) -> None:
    """A single id or a list with one id is accepted; a list of several ids raises."""
    random_model(TINY).save_pretrained(tmp_path)
    for ends, message in ((1, ""), ([1], ""), ([1, 2], r"eos_token_id: expected one id, found \[1, 2\]"),
                          ([], r"eos_token_id: expected one id, found \[\]")):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        if message:
            with pytest.raises(InputError, match=message):
                FlaxT5ForConditionalGeneration.from_pretrained(tmp_path)
        else:
            assert FlaxT5ForConditionalGeneration.from_pretrained(tmp_path).config.end_id == 1
