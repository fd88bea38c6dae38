"""`tilelli convert --packed`: from the original files and from model directories."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tilelli_jax
from tests.convert.torch_files import LITE, file_config, run, save_pt, state_of, weights
from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax import models
from tilelli_jax.loading import store
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.routed import RoutedConfig

TERNARY = dataclasses.replace(LITE, quantizer="ternary")
BYTES = RoutedConfig(d_model=16, n_layers=2, max_seq_len=40, n_heads=2, d_head=4, top_k=3, quantizer="power3")


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    store.save(random_network(BYTES, 0)[0], path)
    return path


def test_an_original_file_with_float_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    tree = {"model": state_of(weights(TERNARY)), "config": file_config(TERNARY)}
    path = save_pt(tmp_path / "model.pt", tree)
    assert run(path, tmp_path / "whole") == run(path, tmp_path / "packed", "--packed") == 0
    n = sum(array.size for array in weights(TERNARY).values())
    assert f"{n:,} parameters (float32, uint8)" in capsys.readouterr().out
    whole, packed = (tilelli_jax.load(tmp_path / name) for name in ("whole", "packed"))
    assert models.is_packed(packed) and packed.config == whole.config
    for name, weight in models.weights(whole).items():
        np.testing.assert_array_equal(models.weights(packed)[name].quantized(), weight.quantized())


def test_a_model_directory(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model_directory, tmp_path / "packed", "--packed") == 0
    out = capsys.readouterr().out
    whole, packed = store.load(model_directory), store.load(tmp_path / "packed")
    n = sum(array.size for array in to_arrays(whole).values())
    assert "packed: routed, " in out and f"{n:,} parameters" in out
    assert f"| parameters | {n:,} |" in (tmp_path / "packed" / "README.md").read_text()
    for name, weight in models.weights(whole).items():
        np.testing.assert_array_equal(models.weights(packed)[name].quantized(), weight.quantized())
    # What is packed can be packed again, and be written for transformers, but not in the original layout.
    assert run(tmp_path / "packed", tmp_path / "again", "--packed") == 0
    capsys.readouterr()
    assert run(tmp_path / "packed", tmp_path / "back.pt", "--to", "torch") == 2
    assert_one_line(capsys.readouterr().err, "--to torch:", "packed: expected full-precision weights, found "
                    "packed ones, from which torch cannot be written")
    assert not (tmp_path / "back.pt").exists()
    assert run(tmp_path / "packed", tmp_path / "hf", "--to", "hf") == 0
    assert run(model_directory, tmp_path / "hf2", "--to", "hf") == 0
    assert ((tmp_path / "hf" / "model.safetensors").read_bytes()
            == (tmp_path / "hf2" / "model.safetensors").read_bytes())


@pytest.mark.parametrize(("options", "message"), [
    (["--to", "torch"], "--to: expected no --from, --map, --set, --tokenizer, --packed or --check"),
    (["--check"], "--packed: expected no --check, --dtype or --inspect"),
    (["--dtype", "bfloat16"], "--packed: expected no --check, --dtype or --inspect"),
    (["--set", "n_layers=2"], "--packed: expected no --from, --map, --set or --tokenizer for a model"),
])
def test_options_that_exclude_it(model_directory: Path, options: list[str], message: str, tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model_directory, tmp_path / "out", "--packed", *options) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.save(random_network(dataclasses.replace(BYTES, quantizer="none"), 0)[0], tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "out", "--packed") == 2
    assert_one_line(capsys.readouterr().err, "packed: expected quantised weights, found none: the network "
                    "has quantizer none")
    assert not (tmp_path / "out").exists()
