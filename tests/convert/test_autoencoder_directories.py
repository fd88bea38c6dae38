"""Autoencoder directories of SAELens and sparsify: cfg.json and a safetensors file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import tilelli_jax
from tests.error_lines import assert_one_line
from tilelli_jax.convert.command import main
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.loading.store import from_arrays

D, N, K = 6, 20, 4
FILES = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors"}
CONFIGS: dict[str, dict[str, Any]] = {
    "saelens": {"architecture": "topk", "d_in": D, "d_sae": N, "k": K, "apply_b_dec_to_input": True,
                "normalize_activations": "none",
                "metadata": {"model_name": "pythia", "hook_name": "blocks.3.hook_resid_post"}},
    "sparsify": {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "k": K,
                 "num_latents": N, "transcode": False, "skip_connection": False, "d_in": D}}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**arrays, "W_dec": arrays["W_dec"] / np.linalg.norm(arrays["W_dec"], axis=1, keepdims=True)}


def arrays_in_layout(layout: str) -> dict[str, np.ndarray]:
    arrays = weights()
    if layout == "saelens":
        return arrays
    return {"encoder.weight": np.ascontiguousarray(arrays["W_enc"].T), "encoder.bias": arrays["b_enc"],
            "W_dec": arrays["W_dec"], "b_dec": arrays["b_dec"]}


@pytest.fixture(params=FILES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory named after its layout."""
    path = tmp_path / request.param
    path.mkdir()
    (path / "cfg.json").write_text(json.dumps(CONFIGS[request.param]))
    safetensors.numpy.save_file(arrays_in_layout(request.param), path / FILES[request.param])
    return path


def test_round_trip(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out") == 0
    model = tilelli_jax.load(tmp_path / "out")
    assert (model.config.d_model, model.config.n_latents, model.config.k) == (D, N, K)
    w = weights()
    x = np.random.default_rng(1).standard_normal((7, D)).astype(np.float32)
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    codes = np.where(pre >= np.sort(pre, axis=1)[:, -K:][:, :1], np.maximum(pre, 0), 0)
    np.testing.assert_allclose(model(x), codes @ w["W_dec"] + w["b_dec"], atol=1e-5)
    assert run(tmp_path / "out", tmp_path / "back", "--to", source.name) == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["cfg.json", FILES[source.name]]
    restored = safetensors.numpy.load_file(tmp_path / "back" / FILES[source.name])
    assert restored.keys() == arrays_in_layout(source.name).keys()
    for name, array in arrays_in_layout(source.name).items():
        assert restored[name].tobytes() == array.tobytes(), name
    written_config = json.loads((tmp_path / "back" / "cfg.json").read_text())
    assert {key: written_config[key] for key in ("k", "d_in")} == {"k": K, "d_in": D}
    assert run(tmp_path / "back", tmp_path / "once more") == 0
    assert tilelli_jax.load(tmp_path / "once more").config == model.config


def test_only_saelens_stores_a_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SAELens stores a BatchTopK SAE as a JumpReLU with the same threshold for each latent."""
    config = SAEConfig(d_model=D, n_latents=N, k=K, activation="batch_topk", max_active=N)
    w = weights()
    ours = {"encoder.kernel": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.kernel": w["W_dec"],
            "bias": w["b_dec"], "threshold": np.float32(0.8)}
    model = from_arrays(config, ours)
    tilelli_jax.save(model, tmp_path / "model")
    capsys.readouterr()
    assert run(tmp_path / "model", tmp_path / "out", "--to", "saelens") == 0
    assert not capsys.readouterr().err
    tilelli_jax.save(from_arrays(dataclasses.replace(config, max_active=N - 1), ours), tmp_path / "bounded")
    assert run(tmp_path / "bounded", tmp_path / "bounded out", "--to", "saelens") == 0
    assert f"note: max_active={N - 1} is not stored" in capsys.readouterr().err
    written_config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert written_config["architecture"] == "jumprelu" and "k" not in written_config
    arrays = safetensors.numpy.load_file(tmp_path / "out" / FILES["saelens"])
    assert arrays["threshold"].shape == (N,) and arrays["threshold"].dtype == np.float32
    x = np.random.default_rng(1).standard_normal((7, D)).astype(np.float32)
    pre = (x - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"]
    codes = np.maximum(pre, 0) * (pre > arrays["threshold"])
    np.testing.assert_allclose(model(x), codes @ arrays["W_dec"] + arrays["b_dec"], atol=1e-5)
    capsys.readouterr()
    for to, out in (("sparsify", "other"), ("torch", "other.pt")):
        assert run(tmp_path / "model", tmp_path / out, "--to", to) == 2
        assert_one_line(capsys.readouterr().err, f"--to {to}", "expected topk, found batch_topk")
        assert not (tmp_path / out).exists()


def test_activation_metadata(tmp_path: Path) -> None:
    path = tmp_path / "saelens"
    path.mkdir()
    (path / "cfg.json").write_text(json.dumps(CONFIGS["saelens"]))
    safetensors.numpy.save_file(arrays_in_layout("saelens"), path / FILES["saelens"])
    assert run(path, tmp_path / "out") == 0
    assert tilelli_jax.load(tmp_path / "out").config == SAEConfig(
        d_model=D, n_latents=N, k=K, source_model="pythia", hook="resid_post", layer=3)


def test_check(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    assert run(source, tmp_path / "out", "--check") == 0
    assert "its formula in PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "expected"), [
    ({"transcode": True}, ["transcode: expected False"]),
    ({"activation": "groupmax"}, ["activation", "'topk'"]),
    ({"architecture": "gated"}, ["architecture", "'topk'", "found 'gated'"]),
    ({"normalize_activations": "constant_norm_rescale"}, ["normalize_activations"]),
    ({"activation_fn_str": "relu"}, ["activation_fn_str: expected 'topk', found 'relu'"]),
    ({"signed": True}, ["signed: expected False, found True"]),
    ({"d_in": D + 1}, [f"d_in: expected {D}, the size in the tensors, found {D + 1}"]),
    ({"d_sae": 5}, [f"d_sae: expected {N}"]), ({"num_latents": 5}, [f"num_latents: expected {N}"]),
    ({"activation_fn_kwargs": {"k": K + 1}},
     [f"activation_fn_kwargs.k: expected {K}, the value of k, found {K + 1}"]),
    ({"activation_fn_kwargs": {"k": K, "postact_fn": "relu"}}, ["activation_fn_kwargs: expected only k"]),
    ({"jump": 0.5}, ["jump: unknown key", "remove it from cfg.json"]),
    ({"k": 40}, ["k: expected at most"])])
def test_unsupported_configurations_are_rejected(change: dict[str, Any], expected: list[str], source: Path,
                                                tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "cfg.json").write_text(json.dumps({**CONFIGS[source.name], **change}))
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, str(source), *expected)
    assert not (tmp_path / "out").exists()


def test_k_in_activation_fn_kwargs(source: Path, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    """A different k on the command line is rejected."""
    config = {key: value for key, value in CONFIGS[source.name].items() if key != "k"}
    (source / "cfg.json").write_text(json.dumps({**config, "activation_fn_kwargs": {"k": K}}))
    assert run(source, tmp_path / "out", "--set", f"k={K + 1}") == 2
    assert_one_line(capsys.readouterr().err, f"--set: k: expected {K}, the value in {source}, found {K + 1}")
    assert run(source, tmp_path / "out", "--set", f"k={K}") == 0
    assert tilelli_jax.load(tmp_path / "out").config.k == K


def test_missing_files_and_tensors(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = arrays_in_layout(source.name)
    del arrays["b_dec"]
    safetensors.numpy.save_file(arrays, source / FILES[source.name])
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, str(source), "b_dec")
    (source / FILES[source.name]).unlink()
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, str(source), "sae.safetensors or sae_weights.safetensors")


@pytest.mark.filterwarnings("error")
def test_squares_that_overflow(source: Path, tmp_path: Path) -> None:
    large = {name: np.full_like(array, 3e38) for name, array in arrays_in_layout(source.name).items()}
    safetensors.numpy.save_file(large, source / FILES[source.name])
    assert run(source, tmp_path / "out") == 0
    assert tilelli_jax.load(tmp_path / "out").config.unit_norm == "none"


def test_to_saelens_rejects_other_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tilelli_jax.models.vanilla import VanillaConfig
    model = tilelli_jax.build(VanillaConfig(d_model=8, n_layers=1, max_seq_len=8, n_heads=1), 0)
    tilelli_jax.save(model, tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "out", "--to", "saelens") == 2
    assert_one_line(capsys.readouterr().err, "--to saelens", "expected an autoencoder, found a vanilla")
    assert not (tmp_path / "out").exists()
