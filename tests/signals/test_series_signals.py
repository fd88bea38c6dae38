"""Chronos on many windows: compares activations and patches with transformers; random numbers are stable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.extras import needs_transformers
from tests.reference_impl.comparison import distance
from tests.reference_impl.random_weights import random_network
from tests.references import STORED, needs
from tests.tolerance import noise
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.chronos import Chronos, ChronosConfig, crps
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration, T5Config
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.patching import NOTHING
from tilelli_jax.signals.time_series import (
    ALL_POSITIONS,
    HOOK,
    encoder_activations,
    patch_last_positions,
    patched_crps,
    sample_forecasts,
)

TINY_CHRONOS = (STORED / "difficulty" / "tiny_world"
                / "tiny_chronos")
needs_reference = needs(TINY_CHRONOS)
NOISE = noise(1, steps=3)  # relative to the largest number
CONFIG = T5Config(vocab_size=50, d_model=12, n_layers=3, n_decoder_layers=2, n_heads=3, d_head=5, d_hidden=20,
                  chronos=ChronosConfig(n_tokens=50, context_length=20, prediction_length=6, num_samples=5,
                                        top_k=10))


@pytest.fixture(scope="module")
def chronos() -> Chronos:
    return Chronos(random_network(CONFIG, 0)[0])


@pytest.fixture(scope="module")
def sae() -> TopKSAE:
    result = TopKSAE(SAEConfig(d_model=12, n_latents=48, k=4), rngs=nnx.Rngs(1))
    result.encoder.kernel[...] += 0.1 * np.random.default_rng(5).standard_normal((12, 48))
    result.bias[...] += 0.3
    return result


def walks(windows: int = 5, time: int = 24) -> np.ndarray:
    """Random walks; the first values of the second are missing."""
    series = np.random.default_rng(3).standard_normal((windows, time)).cumsum(axis=1).astype(np.float32)
    series[1, :7] = np.nan
    return series


def directories(tmp_path: Path) -> Iterator[Path]:
    random_network(CONFIG, 0)[0].save_pretrained(tmp_path)
    yield tmp_path
    if TINY_CHRONOS.exists():
        yield TINY_CHRONOS


def with_hooks(path: Path, ids: np.ndarray, mask: np.ndarray, replace: Any = None) -> tuple[list, np.ndarray]:
    """Outputs of transformers' encoder blocks, and of the encoder; `replace`: block → edit of its output."""
    import torch
    import transformers
    encoder = transformers.T5EncoderModel.from_pretrained(path).eval()
    recorded = []

    def hook(block: int, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        if block in (replace or {}):
            first = torch.from_numpy(replace[block](first.numpy()))
        recorded.append(first.numpy())
        return (first, *rest) if isinstance(output, tuple) else first
    for i, block in enumerate(encoder.encoder.block):
        block.layer[-1].register_forward_hook(lambda *call, i=i: hook(i, call[-1]))
    with torch.no_grad():
        last = encoder(input_ids=torch.from_numpy(ids.astype(np.int64)),
                       attention_mask=torch.from_numpy(mask.astype(np.int64))).last_hidden_state
    return recorded, last.numpy()


def reconstruction_of(sae: TopKSAE, x: np.ndarray, without: int | None) -> np.ndarray:
    """Reference implementation of the autoencoder's reconstruction of `[…, d_model]`."""
    weights = {name: np.asarray(array, np.float64) for name, array in to_arrays(sae).items()}
    before = (x - weights["bias"]) @ weights["encoder.kernel"] + weights["encoder.bias"]
    least = np.sort(before, axis=-1)[..., -sae.config.k, None]
    codes = np.where(before >= least, np.maximum(before, 0), 0)
    if without is not None:
        codes[..., without] = 0
    return (codes @ weights["decoder.kernel"] + weights["bias"]).astype(np.float32)


@needs_transformers
def test_activations_match_transformers(tmp_path: Path) -> None:
    for path in directories(tmp_path):
        chronos = Chronos(FlaxT5ForConditionalGeneration.from_pretrained(path))
        tokens = chronos.tokenizer.encode(walks())
        expected, _ = with_hooks(path, tokens.ids, tokens.mask)
        result = dict(encoder_activations(chronos, walks(), layers=(2, 0), batch_size=2))
        assert list(result) == [0, 1, 2, 3, 4]
        time = min(24, chronos.config.context_length)
        for i, values in result.items():
            assert values.shape == (2, time + 1, chronos.network.config.d_model)
            assert values.dtype == np.float32
            for layer, value in zip((2, 0), values, strict=True):
                assert distance(value, expected[layer][i]) < NOISE, (path, layer, i)


@needs_transformers
@pytest.mark.parametrize(("positions", "without"), [
    (ALL_POSITIONS, None), (1, 0), *(pytest.param(*given, marks=pytest.mark.exhaustive)
                             for given in ((ALL_POSITIONS, 0), (1, None)))])
def test_patched_encoder_matches_a_pytorch_hook(sae: TopKSAE, positions: int, without: int | None,
                                                tmp_path: Path) -> None:
    random_network(CONFIG, 0)[0].save_pretrained(tmp_path)
    chronos = Chronos(FlaxT5ForConditionalGeneration.from_pretrained(tmp_path))
    tokens = chronos.tokenizer.encode(walks())
    plain, natural = with_hooks(tmp_path, tokens.ids, tokens.mask)
    active = np.asarray(sae.encode(jnp.asarray(plain[1][:, -1])).latents)[:, 0]
    latent = None if without is None else int(active[without])

    def replace(x: np.ndarray) -> np.ndarray:
        reconstruction = reconstruction_of(sae, x, latent)
        if positions == ALL_POSITIONS:
            return reconstruction
        return np.concatenate([x[:, :-1], reconstruction[:, -1:]], axis=1)
    _, last = with_hooks(tmp_path, tokens.ids, tokens.mask, {1: replace})
    metadata = jnp.tile(jnp.array([positions, NOTHING if latent is None else latent]), (5, 1))
    tap = patch_last_positions(HOOK, 1)(sae, metadata)
    result, _ = chronos.network.encode_tapped(jnp.asarray(tokens.ids), jnp.asarray(tokens.mask), tap)
    assert distance(result, last) < NOISE
    assert distance(last, natural) > 1000 * NOISE
    nothing = patch_last_positions(HOOK, 1)(sae, metadata.at[:, 0].set(0))
    result, _ = chronos.network.encode_tapped(jnp.asarray(tokens.ids), jnp.asarray(tokens.mask), nothing)
    assert distance(result, natural) < NOISE


@pytest.mark.parametrize("batch_sizes", [(2, 5), pytest.param((1, 8), marks=pytest.mark.exhaustive)])
def test_random_numbers_depend_on_the_series_not_on_the_batch(
        chronos: Chronos, batch_sizes: Sequence[int]) -> None:
    """The sampled tokens are the same, so the values are bit-identical."""
    series = walks()
    complete = chronos.predict(series, 9, seed=4)
    for batch_size in batch_sizes:
        parts = list(sample_forecasts(chronos, series, 9, seed=4, batch_size=batch_size))
        assert np.concatenate([indices for indices, _ in parts]).tolist() == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(np.concatenate([predictions for _, predictions in parts]), complete)
    remaining = [3, 1]  # after an interruption, in another order
    (_, rest), = sample_forecasts(chronos, series[remaining], 9, seed=4, stream_ids=remaining, batch_size=2)
    np.testing.assert_array_equal(rest, complete[remaining])
    (_, other), = sample_forecasts(chronos, series[remaining], 9, seed=4, batch_size=2)
    assert (other != complete[remaining]).any()


def test_number_of_samples(chronos: Chronos) -> None:
    (_, more), = sample_forecasts(chronos, walks(), 3, samples=7, batch_size=5)
    assert more.shape == (5, 7, 3) and more.dtype == np.float32


@pytest.mark.parametrize("positions", [pytest.param("all", marks=pytest.mark.exhaustive), "boundary"])
def test_effect_of_ablating_a_latent(chronos: Chronos, sae: TopKSAE, positions: Any) -> None:
    """Also beyond prediction_length, where the end token moves with the longer context and is patched too."""
    series, futures = walks(time=12), np.random.default_rng(8).standard_normal((5, 9))
    natural = crps(chronos.predict(series, 9, seed=4), futures).mean(axis=-1)
    never = 47  # its bias is set so that it is never active
    mute = TopKSAE(sae.config, rngs=nnx.Rngs(1))
    nnx.update(mute, nnx.state(sae))
    mute.encoder.bias[...] = mute.encoder.bias[...].at[never].set(-1e3)
    inner = np.stack([values[0] for _, values in encoder_activations(chronos, series, layers=(1,))])
    codes = mute.encode(jnp.asarray(inner if positions == "all" else inner[:, -1:]))
    counts = np.bincount(np.asarray(codes.latents)[np.asarray(codes.values) > 0], minlength=48)
    often = int(counts.argmax())
    options = {"layer": 1, "positions": positions, "seed": 4}
    result = patched_crps(chronos, mute, series, futures, [never, often], batch_size=5, **options)
    assert result.shape == (5, 4) and result.dtype == np.float64
    np.testing.assert_array_equal(result[:, 0], natural)  # the same random numbers as without a patch
    assert (result[:, 1] != natural).any()
    np.testing.assert_array_equal(result[:, 2], result[:, 1])
    assert (result[:, 3] != result[:, 1]).any()
    rest = patched_crps(chronos, mute, series[3:], futures[3:], [often], stream_ids=[3, 4], batch_size=2,
                        **options)
    np.testing.assert_array_equal(rest, result[3:, [0, 1, 3]])
    # The same in separate calls, appending the patched median.
    metadata = np.tile([ALL_POSITIONS if positions == "all" else 1, often], (5, 1))
    options = {"make_tap": patch_last_positions(HOOK, 1), "aux_model": mute, "metadata": metadata}
    first = chronos.predict(series, 6, seed=4, **options)
    longer = np.concatenate([series, np.sort(first, axis=1)[:, 2]], axis=1)
    second = chronos.predict(longer, 3, seed=4 + 7919, **options)
    np.testing.assert_array_equal(result[:, 3], crps(np.concatenate([first, second], 2), futures).mean(-1))


def test_other_latents_need_no_new_compilation(chronos: Chronos, sae: TopKSAE,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[tuple[int, ...]] = []
    encode = FlaxT5ForConditionalGeneration.encode_tapped
    monkeypatch.setattr(FlaxT5ForConditionalGeneration, "encode_tapped",
                        lambda self, ids, mask, tap: traced.append(ids.shape) or encode(self, ids, mask, tap))
    for latents, positions in (([1, 2, 3], "all"), ([4], "boundary")):
        patched_crps(chronos, sae, walks(), np.zeros((5, 4)), latents, layer=0, positions=positions,
                     samples=3, batch_size=3)
    assert traced == [(3, 21)]  # each window is encoded once, for any number of samples


@pytest.mark.exhaustive
@pytest.mark.eight_devices
def test_eight_devices_match_one(chronos: Chronos, sae: TopKSAE) -> None:
    mesh, series, futures = make_mesh(MeshConfig(data=4, tensor=2)), walks(), np.ones((5, 4))
    alone = dict(encoder_activations(chronos, series, layers=(0, 2)))
    for i, values in encoder_activations(chronos, series, layers=(0, 2), batch_size=3, mesh=mesh):
        assert distance(values, alone[i]) < NOISE
    for one, many in zip(sample_forecasts(chronos, series, 4, batch_size=4),
                         sample_forecasts(chronos, series, 4, batch_size=3, mesh=mesh), strict=True):
        np.testing.assert_array_equal(many[0], one[0])
        np.testing.assert_array_equal(many[1], one[1])
    expected, result = (
        patched_crps(chronos, sae, series, futures, [3], layer=1, positions="all", mesh=placement)
        for placement in (None, mesh))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_invalid_arguments_raise(chronos: Chronos, sae: TopKSAE) -> None:
    series, futures = walks(), np.zeros((5, 4))
    for hook, layer, message in (("decoder.resid_post", 0, "found 'decoder.resid_post'"),
                                  ("embed", 0, "hook: expected one of encoder.resid_pre"),
                                  (HOOK, 3, "layer: expected 0 to 2, found 3")):
        with pytest.raises(ValueError, match=message):
            list(encoder_activations(chronos, series, hook=hook, layers=(layer,)))
        with pytest.raises(ValueError, match=message):
            patched_crps(chronos, sae, series, futures, [], hook=hook, layer=layer, positions="all")
    with pytest.raises(ValueError, match="layers: expected at least one"):
        list(encoder_activations(chronos, series, layers=()))
    with pytest.raises(InputError, match=r"series: expected \[windows, time\], found \[5\]"):
        list(encoder_activations(chronos, series[:, 0], layers=(0,)))
    with pytest.raises(InputError, match=r"series: expected \[windows, time\], found \[5, 0\]"):
        list(sample_forecasts(chronos, series[:, :0], 3))
    with pytest.raises(ValueError, match=r"stream_ids: expected \[5\], found \[2\]"):
        list(sample_forecasts(chronos, series, 3, stream_ids=[1, 2]))
    with pytest.raises(InputError, match="length: expected at least 1, found 0"):
        list(sample_forecasts(chronos, series, 0))
    options: dict[str, Any] = {"layer": 0, "positions": "all"}
    with pytest.raises(InputError, match=r"futures: expected \[5, horizon\], found \[4, 4\]"):
        patched_crps(chronos, sae, series, futures[1:], [], **options)
    for latent in (-3, 48):
        with pytest.raises(ValueError, match=f"latents: expected 0 to 47, found {latent}"):
            patched_crps(chronos, sae, series, futures, [0, latent], **options)
    with pytest.raises(ValueError, match="positions: expected all or boundary, found first"):
        patched_crps(chronos, sae, series, futures, [], layer=0, positions="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sae: expected d_model 12, found 16"):
        patched_crps(chronos, TopKSAE(SAEConfig(d_model=16, n_latents=32, k=4), rngs=nnx.Rngs(0)), series,
                     futures, [], **options)
    with pytest.raises(ValueError, match=r"stream_ids: expected \[5\], found \[1\]"):
        chronos.predict(series, 3, stream_ids=np.array([1]))
    assert list(encoder_activations(chronos, series[:0], layers=(0,))) == []


@pytest.mark.exhaustive
@needs_reference
def test_patching_the_stored_network() -> None:
    """The small stored Chronos has more encoder than decoder blocks, and 4096 tokens."""
    chronos = Chronos(FlaxT5ForConditionalGeneration.from_pretrained(TINY_CHRONOS))
    sae = TopKSAE(SAEConfig(d_model=32, n_latents=64, k=4), rngs=nnx.Rngs(1))
    result = patched_crps(chronos, sae, walks(3), np.zeros((3, 4)), [5], layer=3, positions="all", samples=4,
                          batch_size=3)
    assert np.isfinite(result).all() and (result[:, 1] != result[:, 0]).any()
