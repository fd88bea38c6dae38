"""Autoencoders of other projects: their codes and reconstructions, computed by their formulas in NumPy, and
by SAELens itself where it is installed."""

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
from tilelli_jax.convert.command import main

import tilelli_jax
from tests.error_lines import assert_one_line
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.loading.store import build

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


# -- SAELens --


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


@pytest.mark.parametrize("name", CASES)
def test_saelens(name: str, tmp_path: Path) -> None:
    """Also written back: SAELens's formula on the written tensors gives the same."""
    tree = CASES[name]
    model = converted(saelens_directory(tmp_path / "source", tree), tmp_path / "out")
    expected = saelens_formula(tree)
    assert_same(model, *expected)
    kind = {"topk": "topk", "batchtopk": "batch_topk"}.get(tree["architecture"], "jumprelu")
    assert model.config == SAEConfig(
        d_model=D, n_latents=N, k=0 if kind == "jumprelu" else K, activation=kind,  # type: ignore[arg-type]
        max_active=N if kind == "batch_topk" else 0,
        input_norm=tree.get("normalize_activations", "none"),
        unit_norm="rows" if "rescale_acts_by_decoder_norm" in tree else "none", source_model="pythia-70m",
        hook="resid_post", layer=3, prepend_bos=False, context_size=128, dataset="me/texts")
    assert run(tmp_path / "out", tmp_path / "back", "--to", "saelens") == 0
    again = converted(tmp_path / "back", tmp_path / "again")
    assert_same(again, *expected)
    written = json.loads((tmp_path / "back" / "cfg.json").read_text())
    assert written["architecture"] == ("topk" if kind == "topk" else "jumprelu")
    hooks = {"hook_layer": 3, "hook_head_index": None, "sae_lens_training_version": None}
    assert written["metadata"] == METADATA | hooks


@pytest.mark.parametrize(("function", "activation"), [({"activation_fn_str": "relu"}, "jumprelu"), (
    {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, "topk"), ({}, "jumprelu")])
def test_configurations_of_saelens_before_6(function: dict[str, Any], activation: str,
                                            tmp_path: Path) -> None:
    """Without metadata and with the settings of the run; the architecture is standard, also for a TopK."""
    source = saelens_directory(tmp_path / "source", {"architecture": "standard"})
    (source / "cfg.json").write_text(json.dumps({
        **function, "d_in": D, "d_sae": N, "model_name": "gpt2-small", "hook_point_head_index": None,
        "hook_point": "blocks.7.hook_resid_pre", "hook_point_layer": 7, "lr": 4e-4, "l1_coefficient": 8e-5,
        "use_ghost_grads": False, "context_size": 128, "normalize_activations": False}))
    model = converted(source, tmp_path / "out")
    assert_same(model, *saelens_formula({"architecture": "topk" if activation == "topk" else "standard"}))
    config = model.config
    assert (config.activation, config.source_model, config.hook, config.layer, config.context_size) == (
        activation, "gpt2-small", "resid_pre", 7, 128)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_what_needs_no_folding_is_exact(architecture: str, tmp_path: Path) -> None:
    tree = CASES[architecture]
    source = saelens_directory(tmp_path / "source", tree)
    model = converted(source, tmp_path / "out")
    assert run(tmp_path / "out", tmp_path / "back", "--to", "saelens") == 0
    first, second = (safetensors.numpy.load_file(path / "sae_weights.safetensors")
                     for path in (source, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert converted(tmp_path / "back", tmp_path / "again").config == model.config


@pytest.mark.parametrize("tree", [{"architecture": "standard"},
                                  {"architecture": "jumprelu", "apply_b_dec_to_input": False}])
def test_constant_normalisations_are_folded(tree: dict[str, Any], tmp_path: Path) -> None:
    tree = {**tree, "normalize_activations": "expected_average_only_in"}
    source = saelens_directory(tmp_path / "scaled", tree)
    (source / "activation_scaler.json").write_text('{"scaling_factor": 0.37}')
    assert_same(converted(source, tmp_path / "a"), *saelens_formula(tree, scale=0.37))
    tree["normalize_activations"] = "covariance_whitening"
    source = saelens_directory(tmp_path / "whitened", tree)
    matrix = np.random.default_rng(2).standard_normal((D, D)).astype(np.float32) + 2 * np.eye(D, dtype="f")
    whitening = {"mean": np.linspace(-1, 2, D, dtype="f"), "matrix": matrix,
                 "inverse_matrix": np.linalg.inv(matrix)}
    safetensors.numpy.save_file(whitening, source / "activation_whitening.safetensors")
    assert_same(converted(source, tmp_path / "b"), *saelens_formula(tree, whitening=whitening))


def test_a_stored_batch_topk_is_read_back_as_jumprelu(tmp_path: Path) -> None:
    model = build(SAEConfig(d_model=D, n_latents=N, k=K, activation="batch_topk", max_active=N), 0)
    model.threshold[...] = jnp.float32(0.8)
    tilelli_jax.save(model, tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "back", "--to", "saelens") == 0
    again = converted(tmp_path / "back", tmp_path / "again")
    assert again.config == SAEConfig(d_model=D, n_latents=N, k=0, activation="jumprelu")
    assert np.asarray(again.threshold[...]).tolist() == [np.float32(0.8)] * N
    x = jnp.asarray(rows())
    np.testing.assert_array_equal(again.dense(again.encode(x)), model.dense(model.encode(x)))


def test_check_runs_the_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    for name in ("standard, bias", "topk, layer norm", "checkpoint of BatchTopKTrainingSAE"):
        source = saelens_directory(tmp_path / name, CASES[name])
        assert run(source, tmp_path / f"{name} out", "--check") == 0
        out = capsys.readouterr().out
        assert "its formula in PyTorch" in out and "0.00% of the outputs differ" in out


@pytest.mark.parametrize(("tree", "expected"), [
    ({"normalize_activations": "constant_norm_rescale"},
     ["normalize_activations: expected 'none'", "found 'constant_norm_rescale'"]),
    ({"normalize_activations": "expected_average_only_in"},
     ["normalize_activations: expected 'none', or the factor in activation_scaler.json"]),
    ({"normalize_activations": "covariance_whitening"},
     ["normalize_activations: expected 'none', or the matrices in activation_whitening.safetensors"]),
    ({"architecture": "gated"}, ["architecture: expected 'topk' or", "found 'gated'"]),
    ({"activation_fn": "topk"}, ["activation_fn: expected 'relu', found 'topk'"]),
    ({"rescale_acts_by_decoder_norm": True}, ["rescale_acts_by_decoder_norm: expected False"]),
    ({"finetuning_scaling_factor": True}, ["finetuning_scaling_factor: expected False"])])
def test_unsupported_values_of_saelens(tree: dict[str, Any], expected: list[str], tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    source = saelens_directory(tmp_path / "source", {"architecture": "jumprelu", **tree})
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, str(source), *expected)
    assert not (tmp_path / "out").exists()


def test_constants_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"architecture": "standard", "normalize_activations": "expected_average_only_in"}
    source = saelens_directory(tmp_path / "source", tree)
    for factor in ("null", "0", "true", '"1"'):
        (source / "activation_scaler.json").write_text(f'{{"scaling_factor": {factor}}}')
        assert run(source, tmp_path / "out") == 2
        assert_one_line(capsys.readouterr().err, "activation_scaler.json: scaling_factor: expected a number")
    arrays = {**weights(), "scaling_factor": np.ones(N, np.float32)}
    converted(saelens_directory(tmp_path / "ones", {"architecture": "standard"}, arrays), tmp_path / "ones2")
    arrays["scaling_factor"][1] = 2
    source = saelens_directory(tmp_path / "twos", {"architecture": "standard"}, arrays)
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "not known: scaling_factor")


@pytest.mark.exhaustive  # importing SAELens takes half a minute
@pytest.mark.parametrize("name", CASES)
def test_saelens_itself_agrees(name: str, tmp_path: Path) -> None:
    """Its outputs equal ours, before and after a conversion; it reads our metadata."""
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    source = saelens_directory(tmp_path / "source", CASES[name])
    model = converted(source, tmp_path / "out")
    assert run(tmp_path / "out", tmp_path / "back", "--to", "saelens") == 0
    x = torch.from_numpy(rows())
    for path in (source, tmp_path / "back"):
        if path == source and CASES[name]["architecture"] == "batchtopk":
            continue  # SAELens reads such a checkpoint only to train it
        theirs = sae_lens.SAE.load_from_disk(path)
        with torch.no_grad():
            assert_same(model, theirs.encode(x).numpy(), theirs(x).numpy())
        metadata = theirs.cfg.metadata
        assert metadata.hook_name == "blocks.3.hook_resid_post" and metadata.prepend_bos is False
        assert metadata.model_name == "pythia-70m" and metadata.context_size == 128


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
