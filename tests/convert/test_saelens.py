"""Autoencoders of SAELens: their codes and reconstructions by their formulas, and by SAELens itself where
it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import tilelli_jax
from tests.convert.autoencoders import (
    CASES,
    METADATA,
    D,
    K,
    N,
    assert_same,
    converted,
    rows,
    run,
    saelens_directory,
    saelens_formula,
    weights,
)
from tests.error_lines import assert_one_line
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.loading.store import build


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
    ({"metadata": METADATA | {"hook_head_index": 3}}, ["metadata.hook_head_index: expected None, found 3"]),
    ({"metadata": METADATA | {"seqpos_slice": [1, None]}},
     ["metadata.seqpos_slice: expected None or", "[1, None]"]),
    ({"metadata": METADATA | {"hook_name_out": "blocks.3.hook_mlp_out"}},
     ["metadata.hook_name_out: expected None"]),
    ({"metadata": METADATA | {"hook_name": "blocks.3.attn.hook_z"}},
     ["metadata.hook_name: expected a hook of the residual stream", "not of attention heads",
      "found 'blocks.3.attn.hook_z'"]),
    ({"metadata": None, "hook_point": "blocks.3.attn.hook_z"},
     ["hook_name: expected a hook of the residual"]),
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


def test_a_note_names_changed_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"center_writing_weights": True, "fold_ln": False, "device": "cpu"}
    source = saelens_directory(tmp_path / "source", {"architecture": "jumprelu", "metadata": METADATA | {
        "model_from_pretrained_kwargs": options}})
    assert run(source, tmp_path / "out") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert notes[0].startswith("note: metadata.model_from_pretrained_kwargs.center_writing_weights: ")


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


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "MatryoshkaBatchTopK", "JumpReLU", "Standard"])
def test_what_saelens_trains_and_saves_is_read(kind: str, tmp_path: Path) -> None:
    """Its training classes with default settings, saved by `save_inference_model`."""
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed")
    options: dict[str, Any] = {"d_in": D, "d_sae": N}
    if kind.endswith("TopK"):
        options["k"] = K
    if kind == "MatryoshkaBatchTopK":
        options["matryoshka_widths"] = [N // 2, N]
    trained = getattr(sae_lens, f"{kind}TrainingSAE")(
        getattr(sae_lens, f"{kind}TrainingSAEConfig")(**options))
    arrays = {name: torch.from_numpy(array) for name, array in weights().items() if name != "threshold"}
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name in arrays:
                parameter.copy_(arrays[name])
        if hasattr(trained, "topk_threshold"):
            trained.topk_threshold.fill_(0.7)
    metadata = trained.cfg.metadata
    metadata.model_name, metadata.hook_name = "pythia-70m", "blocks.3.hook_resid_post"
    trained.save_inference_model(str(tmp_path / "source"))
    model = converted(tmp_path / "source", tmp_path / "out")
    assert (model.config.source_model, model.config.layer) == ("pythia-70m", 3)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "source")
    x = torch.from_numpy(rows())
    with torch.no_grad():
        assert_same(model, theirs.encode(x).numpy(), theirs(x).numpy())
