"""Autoencoders of Gemma Scope, dictionary_learning and openai: their codes and reconstructions, computed by
their formulas in NumPy."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.convert.autoencoders import (
    TOPK,
    Arrays,
    D,
    K,
    N,
    assert_same,
    converted,
    rows,
    run,
    saelens_formula,
    topk,
    weights,
)
from tests.error_lines import assert_one_line
from tilelli_jax.estimators.sae import SAEConfig

# -- Gemma Scope --


def gemma_scope_arrays() -> Arrays:
    return {name.replace("W_", "w_"): array for name, array in weights().items()}


def test_gemma_scope_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tree = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "width": N, "l0": 3,
            "hf_hook_point_in": "model.layers.7.output", "affine_connection": False}
    (source / "config.json").write_text(json.dumps(tree))
    safetensors.numpy.save_file(gemma_scope_arrays(), source / "params.safetensors")
    model = converted(source, tmp_path / "out")
    assert_same(model, *saelens_formula({"architecture": "jumprelu", "apply_b_dec_to_input": False}))
    assert model.config == SAEConfig(d_model=D, n_latents=N, k=0, activation="jumprelu", unit_norm="none",
                                     source_model="gemma-v3-1b-pt", hook="resid_post", layer=7)
    bounded = converted(source, tmp_path / "bounded", "max_active=3")
    assert bounded.encode(jnp.asarray(rows())).values.shape == (len(rows()), 3)
    for change, message in (({"affine_connection": True}, "affine_connection: expected False"),
                            ({"architecture": "gated"}, "architecture: expected 'jump_relu'"),
                            ({"hf_hook_point_out": "model.layers.8.output"}, "hf_hook_point_out: expected")):
        (source / "config.json").write_text(json.dumps(tree | change))
        assert run(source, tmp_path / "other") == 2
        assert_one_line(capsys.readouterr().err, message)


def test_gemma_scope(tmp_path: Path) -> None:
    """An archive of NumPy, by itself or in a directory; what it does not state is set by the user."""
    np.savez(tmp_path / "params.npz", **gemma_scope_arrays())
    expected = saelens_formula({"architecture": "jumprelu", "apply_b_dec_to_input": False})
    for i, source in enumerate((tmp_path, tmp_path / "params.npz")):
        model = converted(source, tmp_path / f"out{i}", "layer=20", "hook=resid_post")
        assert_same(model, *expected)
        assert (model.config.layer, model.config.hook) == (20, "resid_post")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: np.savez(path, w_enc=np.array([Harmful()], object)), "w_enc.npy: expected numbers, found"),
    (lambda path: np.savez_compressed(path, **gemma_scope_arrays()), "expected an archive of numpy.savez"),
    (lambda path: path.write_bytes(pickle.dumps(Harmful())), "expected an archive of NumPy arrays"),
    (lambda path: path.write_bytes(b""), "expected an archive of NumPy arrays"),
    (lambda path: np.savez(path, w_enc=np.ones((D, N))), "missing: b_dec, b_enc, threshold, w_dec"),
    (lambda path: np.savez(path, **gemma_scope_arrays() | {"w_dec": np.ones((N, 1, D))}), "another shape"),
    (lambda path: np.savez(path, **gemma_scope_arrays() | {"b_dec": np.ones(D, int)}),
     "b_dec: expected floating-point numbers, found int64")])
def test_invalid_archives_of_numpy(write: Callable[[Path], object], message: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                   ) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("params.npz"))
    assert run("params.npz", "out") == 2
    assert_one_line(capsys.readouterr().err, "params.npz", message)
    assert not Path("out").exists() and not Path("harm").exists()


# -- dictionary_learning and openai --


def dictionary(kind: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The state dict of a class of dictionary_learning, its codes and its reconstructions."""
    w, x = weights(np.float64), rows().astype(np.float64)
    own = {name: array.astype(np.float32) for name, array in weights().items()}
    linear = {"encoder.weight": own["W_enc"].T, "encoder.bias": own["b_enc"],
              "decoder.weight": own["W_dec"].T}
    centred = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - w["b_dec"]
    pre = centred @ w["W_enc"] + w["b_enc"]
    match kind:
        case "AutoEncoder":
            state, codes = {**linear, "bias": own["b_dec"]}, np.maximum(pre, 0)
        case "AutoEncoderNew":
            state, codes = {**linear, "decoder.bias": own["b_dec"]}, np.maximum(pre, 0)
        case "AutoEncoderTopK":
            state = {**linear, "b_dec": own["b_dec"], "k": np.int32(K), "threshold": np.float32(-1)}
            codes = topk(pre)
        case "BatchTopKSAE":
            state = {**linear, "b_dec": own["b_dec"], "k": np.int32(K), "threshold": np.float32(1.1)}
            codes = np.maximum(pre, 0) * (pre > 1.1)
        case "MatryoshkaBatchTopKSAE":
            state = {**own, "k": np.int32(K), "threshold": np.float32(1.1), "group_sizes": np.array([5, 15])}
            codes = np.maximum(pre, 0) * (pre > 1.1)
        case _:  # JumpReluAutoEncoder
            state, codes = own, np.maximum(pre, 0) * (pre > w["threshold"])
    reconstruction = codes @ w["W_dec"] + w["b_dec"]
    if kind == "JumpReluAutoEncoder":
        codes = codes * np.linalg.norm(w["W_dec"], axis=1)
    return state, codes, reconstruction


def dictionary_directory(path: Path, kind: str, state: dict[str, Any], **trainer: Any) -> Path:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    path.mkdir()
    tree = {"trainer": {"trainer_class": "Trainer", "dict_class": kind, "activation_dim": D, "dict_size": N,
                        "layer": 8, "lm_name": "EleutherAI/pythia-70m", "k": K,
                        "submodule_name": "resid_post_layer_8", **trainer}, "buffer": {"ctx_len": 128}}
    (path / "config.json").write_text(json.dumps(tree))
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, path / "ae.pt")
    return path


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE",
                                  "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"])
def test_dictionary_learning(kind: str, tmp_path: Path) -> None:
    state, codes, reconstruction = dictionary(kind)
    model = converted(dictionary_directory(tmp_path / "source", kind, state), tmp_path / "out")
    assert_same(model, codes, reconstruction)
    config = model.config
    assert (config.source_model, config.hook, config.layer, config.context_size) == (
        "EleutherAI/pythia-70m", "resid_post", 8, 128)
    assert (config.activation, config.k, config.max_active) == {
        "AutoEncoderTopK": ("topk", K, 0), "BatchTopKSAE": ("batch_topk", K, N),
        "MatryoshkaBatchTopKSAE": ("batch_topk", K, N)}.get(kind, ("jumprelu", 0, 0))


def test_unsupported_dictionaries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = dictionary("AutoEncoderTopK")[0]
    for i, (kind, trainer, message) in enumerate((
            ("GatedAutoEncoder", {}, "trainer.dict_class: expected AutoEncoder or"),
            ("AutoEncoderTopK", {"k": K + 1}, f"trainer.k: expected {K}, the k in ae.pt, found {K + 1}"),
            ("AutoEncoderTopK", {"dict_size": N + 1}, f"trainer.dict_size: expected {N}, the size in"))):
        source = dictionary_directory(tmp_path / str(i), kind, state, **trainer)
        assert run(source, tmp_path / "out") == 2
        assert_one_line(capsys.readouterr().err, str(source), message)
    (source / "config.json").unlink()
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "expected config.json next to ae.pt")


@pytest.mark.parametrize("kind", ["TopK", "ReLU"])
def test_openai(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files with a TopK expect rows of mean 0 and standard deviation 1; a ReLU's do not."""
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    w = {name: torch.from_numpy(array) for name, array in weights().items()}
    state = {"pre_bias": w["b_dec"], "latent_bias": w["b_enc"], "encoder.weight": w["W_enc"].T.contiguous(),
             "decoder.weight": w["W_dec"].T.contiguous(), "stats_last_nonzero": torch.zeros(N).long(),
             "latents_activation_frequency": torch.ones(N), "latents_mean_square": torch.zeros(N),
             "activation": kind}
    if kind == "TopK":
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    torch.save(state, tmp_path / "source.pt")
    model = converted(tmp_path / "source.pt", tmp_path / "out")
    tree = ({**TOPK, "normalize_activations": "layer_norm"} if kind == "TopK" else
            {"architecture": "standard"})
    assert_same(model, *saelens_formula(tree))
    assert run(tmp_path / "out", tmp_path / "back", "--to", "saelens") == 0
    assert_same(converted(tmp_path / "back", tmp_path / "again"), *saelens_formula(tree))
    for to, out in (("sparsify", "other"), ("torch", "other.pt")):
        assert run(tmp_path / "out", tmp_path / out, "--to", to) == 2
        assert_one_line(capsys.readouterr().err, "which only --to saelens can write")
    state["activation"] = "JumpReLU"
    torch.save(state, tmp_path / "other.pt")
    assert run(tmp_path / "other.pt", tmp_path / "other") == 2
    assert_one_line(capsys.readouterr().err, "activation: expected 'ReLU' or 'TopK', found 'JumpReLU'")
