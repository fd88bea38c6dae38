"""Compares patches with the stored hook of fm-difficulty-probe and with closed forms."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.references import STORED, needs
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.loading.store import build, from_arrays
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.signals.patching import NOTHING, Patch, PatchedText, patched_nll, patching, reconstructed

GOLDEN = STORED / "difficulty" / "golden"
NAMES = {"encoder.kernel": "w_W_enc", "encoder.bias": "w_b_enc",
         "decoder.kernel": "w_W_dec", "bias": "w_b_dec"}
compiled = nnx.jit(reconstructed)


@needs(GOLDEN)
@pytest.mark.parametrize(("name", "start", "stop"), [
    ("all", 0, 7), ("last", 6, 7), ("span", None, None), ("single", None, None), ("empty", 3, 3)])
def test_matches_the_stored_hook(name: str, start: int | None, stop: int | None) -> None:
    golden = np.load(GOLDEN / "patch_hook.npz")
    before = golden["H"]
    if start is None:  # positions where the stored result differs from the input
        changed = np.flatnonzero((golden[f"rec_{name}"] != before).any(axis=(0, 2)))
        start, stop = int(changed[0]), int(changed[-1]) + 1
        assert len(changed) == stop - start
    k = stored_k()
    sae = from_arrays(SAEConfig(d_model=24, n_latents=96, k=k),
                      {ours: golden[n] for ours, n in NAMES.items()})
    inside = np.arange(7)[(np.arange(7) >= start) & (np.arange(7) < stop)]
    outside = np.setdiff1d(np.arange(7), inside)
    for latent, stored in ((NOTHING, "rec"), (int(golden["feat"]), "abl")):
        result = compiled(sae, before, Patch(*(np.full(2, n) for n in (start, stop, latent))))
        np.testing.assert_allclose(result, golden[f"{stored}_{name}"], atol=1e-5)
        np.testing.assert_array_equal(result[:, outside], before[:, outside])


@functools.cache
def stored_k() -> int:
    """Number of active latents in the stored autoencoder."""
    golden = np.load(GOLDEN / "patch_hook.npz")
    return next(k for k in range(1, 97) if _fits(golden, k))


def _fits(golden: dict, k: int) -> bool:
    sae = from_arrays(SAEConfig(d_model=24, n_latents=96, k=k),
                      {ours: golden[n] for ours, n in NAMES.items()})
    return bool(np.allclose(sae(jnp.asarray(golden["H"])), golden["rec_all"], atol=1e-5))


@pytest.mark.parametrize(("hook", "layer", "target", "message"), [
    ("embed", 1, 3, "hook: expected one of .*, found 'embed'"),
    ("resid_post", 2, 3, "layer: expected 0 to 1"),
    ("resid_post", -1, 3, "layer: expected 0 to 1"), ("resid_post", 1, 0, "target: text 0: expected 1 to 4"),
    ("resid_post", 1, 5, "target: text 0")])
def test_invalid_patches_raise(hook: str, layer: int, target: int, message: str) -> None:
    model = build(GPTNeoXConfig(vocab_size=31, d_model=16, n_layers=2, n_heads=2, d_hidden=32), 0)
    sae = TopKSAE(SAEConfig(d_model=16, n_latents=32, k=4), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=message):
        patched_nll(model, sae, [PatchedText([1, 2, 3, 4, 5], target, 0, 2)], [3], hook=hook, layer=layer)


def test_a_patch_with_a_threshold() -> None:
    sae = TopKSAE(SAEConfig(d_model=16, n_latents=32, k=4, activation="batch_topk"), rngs=nnx.Rngs(1))
    assert sae.threshold is not None
    sae.threshold[...] = jnp.float32(1.0)
    value = np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)
    codes = value @ sae.encoder.kernel[...]
    codes = np.where(codes > 1, codes, 0)
    latent = int(codes.sum(axis=(0, 1)).argmax())
    result = reconstructed(sae, jnp.asarray(value), Patch(
        jnp.array([1, 1, 3]), jnp.array([4, 4, 3]), jnp.array([NOTHING, latent, NOTHING])))
    codes[1, :, latent] = 0
    expected = value.copy()
    expected[:2, 1:4] = codes[:2, 1:4] @ sae.decoder.kernel[...]
    assert (codes > 0).sum(-1).max() <= 16
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_patch_with_thresholds_of_each_latent_and_normalised_rows() -> None:
    """JumpReLU; the mean and the deviation of a row are restored after decoding."""
    sae = TopKSAE(SAEConfig(d_model=16, n_latents=32, k=0, activation="jumprelu", input_norm="layer_norm"),
                  rngs=nnx.Rngs(1))
    assert sae.threshold is not None
    rng = np.random.default_rng(0)
    thresholds = rng.uniform(0, 2, 32).astype(np.float32)
    sae.threshold[...] = jnp.asarray(thresholds)
    value = (3 * rng.standard_normal((2, 5, 16)) + 7).astype(np.float32)
    mean, deviation = value.mean(-1, keepdims=True), value.std(-1, keepdims=True, ddof=1)
    codes = (value - mean) / (deviation + 1e-5) @ np.asarray(sae.encoder.kernel[...])
    codes = np.where(codes > thresholds, codes, 0)
    latent = int(codes.sum(axis=(0, 1)).argmax())
    result = compiled(sae, jnp.asarray(value), Patch(
        jnp.array([1, 1]), jnp.array([4, 4]), jnp.array([NOTHING, latent])))
    codes[1, :, latent] = 0
    expected = value.copy()
    decoded = codes @ np.asarray(sae.decoder.kernel[...]) * deviation + mean
    expected[:, 1:4] = decoded[:, 1:4]
    np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(value).max())


def test_patched_network_matches_separate_passes() -> None:
    """Rows of one batch (unpatched, reconstructed, one latent ablated) match separate passes."""
    model = build(GPTNeoXConfig(vocab_size=31, d_model=16, n_layers=3, n_heads=2, d_hidden=32), 0)
    sae = TopKSAE(SAEConfig(d_model=16, n_latents=32, k=4), rngs=nnx.Rngs(1))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 31, (1, 9)))

    @jax.jit
    def tapped(ids: jax.Array, patch: Patch | None = None, reconstruction: jax.Array | None = None) -> Any:
        tap = Tap(record=("resid_post",), layers=(1,))
        if patch is not None:
            tap = patching(sae, "resid_post", 1, patch)
        elif reconstruction is not None:
            tap = Tap(edit={"resid_post": lambda v, at: reconstruction if at == 1 else v})
        return model.tapped(ids, tap)
    natural, recorded = tapped(ids)
    codes = sae.encode(recorded["resid_post"][0])
    latent = int(codes.latents[0, 4, 0])
    patch = Patch(jnp.array([0, 2, 2]), jnp.array([0, 6, 6]), jnp.array([NOTHING, NOTHING, latent]))
    three = jnp.repeat(ids, 3, axis=0)
    result, _ = tapped(three, patch)
    np.testing.assert_allclose(result[0], natural[0], atol=1e-5)
    for row in (1, 2):
        row_patch = Patch(*(part[row:row + 1] for part in patch))
        reconstruction = compiled(sae, recorded["resid_post"][0], row_patch)
        expected, _ = tapped(ids, None, reconstruction)
        np.testing.assert_allclose(result[row], expected[0], atol=1e-5)
    active = (np.asarray(codes.latents) == latent) & (np.asarray(codes.values) > 0)
    affected = np.flatnonzero(active[0, 2:6].any(axis=1)) + 2
    assert len(affected) and np.abs(result[2] - result[1])[affected[0]:].max() > 1e-4
    np.testing.assert_allclose(result[2, :affected[0]], result[1, :affected[0]], atol=1e-5)  # causal
    # The same by `patched_nll`.
    texts = [PatchedText(ids[0].tolist(), target=7, start=2, stop=6),
             PatchedText(ids[0, :5].tolist(), 3, 0, 5)]
    nll = patched_nll(model, sae, texts, [latent], hook="resid_post", layer=1, batch_size=2)
    chances = jax.nn.log_softmax(result[:, 6:8])
    following = np.asarray(ids[:, 7:9])[..., None]
    expected = -np.take_along_axis(np.asarray(chances), following, axis=2).mean(axis=(1, 2))
    assert nll.shape == (2, 3)
    np.testing.assert_allclose(nll[0], expected, atol=1e-5)
