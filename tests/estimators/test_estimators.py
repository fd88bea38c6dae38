"""Compares the autoencoder and the sidecar with float64 and stored references; model directories."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference_impl.comparison import assert_same_weights, distance
from tests.references import STORED, needs
from tests.tolerance import noise
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.loading import store
from tilelli_jax.models.arrays import abstract_arrays

needs_reference = needs(STORED)
NOISE = noise(1, steps=3)  # relative to the largest number; measured: 2e-7
SAE = SAEConfig(d_model=6, n_latents=20, k=4)
BATCH = SAEConfig(d_model=6, n_latents=20, k=2, activation="batch_topk")
JUMP = SAEConfig(d_model=6, n_latents=20, k=0, activation="jumprelu")
SIDECAR = SidecarConfig(n_features=3, n_prompt_features=4, d_hidden=5)


def random_arrays(config: SAEConfig | SidecarConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    result = abstract_arrays(store.FAMILIES[config.family][1], config)
    return {name: (np.exp if name.endswith(("scale", "temperature")) else np.asarray)(
        0.5 * rng.standard_normal(leaf.shape)).astype(np.float32) for name, leaf in result.items()}


def test_autoencoder_matches_its_formula() -> None:
    arrays = random_arrays(SAE)
    arrays["encoder.bias"] -= 1.5  # so that some rows have fewer than k positive values
    sae = store.from_arrays(SAE, arrays)
    x = np.random.default_rng(1).standard_normal((7, 3, 6))
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    pre = (x - w["bias"]) @ w["encoder.kernel"] + w["encoder.bias"]
    codes = np.where(pre >= np.sort(pre)[..., -4, None], np.maximum(pre, 0), 0)
    assert set(np.unique((codes > 0).sum(-1))) >= {3, 4}
    result = jax.jit(sae.encode)(jnp.asarray(x))
    assert distance(sae.dense(result), codes) < NOISE
    assert distance(jax.jit(sae.__call__)(jnp.asarray(x)), codes @ w["decoder.kernel"] + w["bias"]) < NOISE
    with pytest.raises(InputError, match="k: expected at most n_latents 3, found 4"):
        SAEConfig(n_latents=3, k=4)


def test_batch_topk_autoencoder_applies_its_threshold() -> None:
    """Latents above the threshold are active, limited to the `max_active` largest of a row."""
    arrays = {**random_arrays(BATCH), "threshold": np.float32(0.7)}
    x = np.random.default_rng(1).standard_normal((7, 3, 6))
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    pre = (x - w["bias"]) @ w["encoder.kernel"] + w["encoder.bias"]
    active_codes = np.where(pre > 0.7, pre, 0)
    limited_codes = np.where(pre >= np.sort(pre)[..., -3, None], active_codes, 0)
    assert (active_codes != limited_codes).any() and len(np.unique((active_codes > 0).sum(-1))) > 3
    for limit, codes in ((20, active_codes), (3, limited_codes)):
        sae = store.from_arrays(dataclasses.replace(BATCH, max_active=limit), arrays)
        result = jax.jit(sae.encode)(jnp.asarray(x))
        assert result.values.shape == (7, 3, limit) and distance(sae.dense(result), codes) < NOISE
        prompt_features = jax.jit(sae.__call__)(jnp.asarray(x))
        assert distance(prompt_features, codes @ w["decoder.kernel"] + w["bias"]) < NOISE
        assert jax.eval_shape(lambda x, sae=sae: sae.encode(x, 5), x).values.shape == (7, 3, 5)
    assert jax.eval_shape(store.from_arrays(BATCH, arrays).encode, x).values.shape == (7, 3, 8)


def test_jumprelu_autoencoder_applies_the_threshold_of_each_latent() -> None:
    """All latents above their own threshold are active; with max_active, the largest of these."""
    arrays = {**random_arrays(JUMP), "threshold": np.linspace(-0.5, 2, 20).astype(np.float32)}
    x = np.random.default_rng(1).standard_normal((7, 3, 6))
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    pre = (x - w["bias"]) @ w["encoder.kernel"] + w["encoder.bias"]
    codes = np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    # Some of a row's largest are below their thresholds; they must not count among its 3 largest.
    limited = np.where(codes >= np.sort(codes)[..., -3, None], codes, 0)
    naive = np.where(pre >= np.sort(pre)[..., -3, None], codes, 0)
    assert (limited != codes).any() and (limited != naive).any()
    for limit, expected in ((0, codes), (3, limited)):
        sae = store.from_arrays(dataclasses.replace(JUMP, max_active=limit), arrays)
        result = jax.jit(sae.encode)(jnp.asarray(x))
        assert result.values.shape == (7, 3, limit or 20) and distance(sae.dense(result), expected) < NOISE
        assert (np.diff(result.values, axis=-1) <= 0).all()
        assert distance(sae.decode(result), expected @ w["decoder.kernel"] + w["bias"]) < NOISE


def test_layer_norm_is_undone_after_decoding() -> None:
    config = dataclasses.replace(SAE, input_norm="layer_norm")
    sae = store.from_arrays(config, arrays := random_arrays(config))
    x = 3 + 2 * np.random.default_rng(1).standard_normal((7, 3, 6))
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    mean, deviation = x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)
    pre = ((x - mean) / (deviation + 1e-5) - w["bias"]) @ w["encoder.kernel"] + w["encoder.bias"]
    codes = np.where(pre >= np.sort(pre)[..., -4, None], np.maximum(pre, 0), 0)
    result = jax.jit(sae.encode)(jnp.asarray(x))
    assert distance(sae.dense(result), codes) < 3 * NOISE
    expected = (codes @ w["decoder.kernel"] + w["bias"]) * deviation + mean
    assert distance(sae.decode(result), expected) < 3 * NOISE


@pytest.mark.parametrize(("settings", "message"), [
    ({"activation": "jumprelu"}, "k: expected 0 with activation jumprelu, .* cannot be trained, found 32"),
    ({"k": 0}, "k: expected an integer ≥ 1, found 0"),
    ({"k": 0, "activation": "batch_topk"}, "k: expected an integer ≥ 1, found 0"),
    ({"k": 0, "activation": "jumprelu", "max_active": 9, "n_latents": 8},
     "max_active: expected 0, or from 1 to n_latents 8, found 9")])
def test_inconsistent_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SAEConfig(**settings)


def test_directories_without_the_activation_setting_load(tmp_path: Path) -> None:
    store.save(store.from_arrays(SAE, random_arrays(SAE)), tmp_path)
    stored_config = json.loads((tmp_path / "config.json").read_text())
    old = {name: value for name, value in stored_config.items() if name not in ("activation", "max_active")}
    assert len(old) == len(stored_config) - 2
    (tmp_path / "config.json").write_text(json.dumps(old))
    result = store.load(tmp_path)
    assert result.config == SAE and result.config.activation == "topk" and result.threshold is None


@needs_reference
def test_autoencoder_matches_the_reference() -> None:
    stored = np.load(STORED / "difficulty" / "golden" / "sae_step.npz")
    k = int((stored["nodead_acts"] > 0).sum(1).max())
    sae = store.from_arrays(SAEConfig(d_model=24, n_latents=96, k=k), {
        "encoder.kernel": stored["p0_W_enc"], "encoder.bias": stored["p0_b_enc"],
        "decoder.kernel": stored["p0_W_dec"], "bias": stored["p0_b_dec"]})
    codes = jax.jit(sae.encode)(jnp.asarray(stored["x"]))
    assert distance(sae.dense(codes), stored["nodead_acts"]) < NOISE
    assert distance(sae.decode(codes), stored["nodead_recon"]) < NOISE


def test_sidecar_matches_its_formula() -> None:
    arrays = random_arrays(SIDECAR)
    sidecar = store.from_arrays(SIDECAR, arrays)
    rng = np.random.default_rng(1)
    features, prompt_features = rng.standard_normal((6, 9, 3)), rng.standard_normal((6, 4))
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    h, states = np.zeros((6, 5)), []
    for x in np.moveaxis((features - w["feature_scaler.mean"]) / w["feature_scaler.scale"], 1, 0):
        i = x @ w["gru.input.kernel"] + w["gru.input.bias"]
        s = h @ w["gru.state.kernel"] + w["gru.state.bias"]
        r, z = sigmoid(i[:, :5] + s[:, :5]), sigmoid(i[:, 5:10] + s[:, 5:10])
        n = np.tanh(i[:, 10:] + r * s[:, 10:])
        h = (1 - z) * n + z * h
        states.append(h)
    pooled = np.concatenate([np.mean(states, 0), h,
                             (prompt_features - w["prompt_scaler.mean"]) / w["prompt_scaler.scale"]], 1)
    hidden = np.maximum(pooled @ w["hidden.kernel"] + w["hidden.bias"], 0)
    logits = (hidden @ w["out.kernel"] + w["out.bias"])[:, 0]
    inputs = jnp.asarray(features), jnp.asarray(prompt_features)
    assert distance(jax.jit(sidecar.logits)(*inputs), logits) < NOISE
    assert distance(jax.jit(sidecar.__call__)(*inputs), sigmoid(logits / w["temperature"])) < NOISE


@pytest.mark.parametrize("config", [SAE, BATCH, JUMP, SIDECAR], ids=lambda config: config.family)
def test_a_round_trip_through_a_model_directory(config: SAEConfig | SidecarConfig, tmp_path: Path) -> None:
    model = store.from_arrays(config, random_arrays(config))
    store.save(model, tmp_path)
    again = store.load(tmp_path)
    assert again.config == config
    assert_same_weights(again, model)
