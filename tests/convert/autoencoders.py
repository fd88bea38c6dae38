"""A random autoencoder, its formula in NumPy, and comparisons with converted networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import tilelli_jax
from tilelli_jax.convert.command import main
from tilelli_jax.estimators.sae import TopKSAE

Arrays = dict[str, np.ndarray]
D, N, K = 6, 20, 4
TOLERANCE = 1e-5  # of the largest number
SAELENS = {"d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
           "normalize_activations": "none", "reshape_activations": "none"}
METADATA = {"sae_lens_version": "6.54.0", "sae_lens_training_version": "6.54.0", "model_name": "pythia-70m",
            "hook_name": "blocks.3.hook_resid_post", "prepend_bos": False, "context_size": 128,
            "dataset_path": "me/texts"}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def weights(dtype: Any = np.float32) -> Arrays:
    """Random weights; the decoder's rows have different lengths, the thresholds too."""
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["W_dec"] *= rng.uniform(0.2, 3, (N, 1))
    return {name: (np.abs(array) if name == "threshold" else array).astype(dtype)
            for name, array in arrays.items()}


def rows() -> np.ndarray:
    return (2 * np.random.default_rng(1).standard_normal((30, D)) + np.linspace(-1, 1, D)).astype(np.float32)


def topk(values: np.ndarray) -> np.ndarray:
    return np.where(values >= np.sort(values, axis=1)[:, -K][:, None], np.maximum(values, 0), 0)


def converted(source: Path, out: Path, *settings: str) -> TopKSAE:
    assert run(source, out, *(part for setting in settings for part in ("--set", setting))) == 0
    return tilelli_jax.load(out)


def assert_same(model: TopKSAE, codes: np.ndarray, reconstruction: np.ndarray) -> None:
    assert 0.02 < (codes > 0).mean() < 0.8, "some latents are active, not all"
    found = model.encode(jnp.asarray(rows()))
    for ours, theirs in ((model.dense(found), codes), (model.decode(found), reconstruction)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def saelens_directory(path: Path, tree: dict[str, Any], arrays: Arrays | None = None) -> Path:
    path.mkdir()
    arrays = dict(weights() if arrays is None else arrays)
    if tree.get("architecture") != "jumprelu":
        arrays.pop("threshold")
    if tree.get("architecture") == "batchtopk":
        arrays["topk_threshold"] = np.array(1.1)
    (path / "cfg.json").write_text(json.dumps({**SAELENS, "metadata": METADATA, **tree}))
    safetensors.numpy.save_file(arrays, path / "sae_weights.safetensors")
    return path


def saelens_formula(tree: dict[str, Any], scale: float = 1.0,
                    whitening: Arrays | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstructions, as `SAE.encode` and `decode` compute them."""
    w, x, mean, deviation = weights(np.float64), rows().astype(np.float64) * scale, 0, 1
    if tree.get("normalize_activations") == "layer_norm":
        mean, deviation = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
        x = (x - mean) / (deviation + 1e-5)
    if whitening is not None:
        x = (x - whitening["mean"]) @ whitening["matrix"]
    pre = (x - w["b_dec"] * tree.get("apply_b_dec_to_input", True)) @ w["W_enc"] + w["b_enc"]
    norms = np.linalg.norm(w["W_dec"], axis=1) if tree.get("rescale_acts_by_decoder_norm") else 1
    architecture = tree["architecture"]
    if architecture == "topk":
        codes = topk(pre * norms)
    else:
        threshold = {"standard": 0, "jumprelu": w["threshold"], "batchtopk": 1.1}[architecture]
        codes = np.maximum(pre * norms, 0) * (pre * norms > threshold)
    reconstruction = (codes / norms @ w["W_dec"] + w["b_dec"]) * deviation + mean
    if whitening is not None:
        reconstruction = reconstruction @ whitening["inverse_matrix"] + whitening["mean"]
    return codes, reconstruction / scale


TOPK = {"architecture": "topk", "k": K}
RESCALED = {**TOPK, "rescale_acts_by_decoder_norm": True}
CASES: dict[str, dict[str, Any]] = {
    "topk": TOPK, "TopKTrainingSAE": RESCALED, "jumprelu": {"architecture": "jumprelu"},
    "standard": {"architecture": "standard"},
    "topk, bias": {**TOPK, "apply_b_dec_to_input": False},
    "TopKTrainingSAE, bias": {**RESCALED, "apply_b_dec_to_input": False},
    "jumprelu, bias": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    "standard, bias": {"architecture": "standard", "apply_b_dec_to_input": False, "activation_fn": "relu"},
    "topk, layer norm": {**TOPK, "normalize_activations": "layer_norm"},
    "checkpoint of BatchTopKTrainingSAE": {"architecture": "batchtopk", "k": 4.0, "topk_threshold_lr": 0.01,
                                           "rescale_acts_by_decoder_norm": True}}
