"""Copying an abstain head to another model: the command, untouched parameters, and PyTorch files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax.commands.splice import main
from tilelli_jax.convert.command import main as convert
from tilelli_jax.models import GPTNeoXConfig, RoutedConfig, VanillaConfig
from tilelli_jax.models.arrays import to_arrays

PLAIN = RoutedConfig(d_model=16, n_layers=1, max_seq_len=64, n_heads=2, d_head=4, top_k=4, dense_expand=2,
                     quantizer="ternary")
WITH = dataclasses.replace(PLAIN, abstain_head=True)
VANILLA = VanillaConfig(d_model=16, n_layers=1, max_seq_len=64, n_heads=2, dense_expand=1)
HEAD = {"abstain.kernel", "abstain.bias"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("splice")
    for i, (name, config) in enumerate({"plain": PLAIN, "with": WITH, "other": WITH, "vanilla": VANILLA,
                                        "wide": dataclasses.replace(VANILLA, d_model=32)}.items()):
        tilelli_jax.save(random_network(config, seed=i)[0], path / name)
    return path


@pytest.mark.parametrize("onto", ["plain", "other", "vanilla"])
def test_a_head_on_another_model(onto: str, folder: Path, tmp_path: Path) -> None:
    assert main(["--head", str(folder / "with"), "--onto", str(folder / onto), str(tmp_path / "out")]) == 0
    head, base, spliced = (tilelli_jax.load(path)
                           for path in (folder / "with", folder / onto, tmp_path / "out"))
    arrays = {name: to_arrays(model) for name, model in (("head", head), ("base", base), ("made", spliced))}
    assert arrays["made"].keys() == arrays["base"].keys() | HEAD
    for name, array in arrays["made"].items():
        assert array.tobytes() == arrays["head" if name in HEAD else "base"][name].tobytes(), name
    assert spliced.config == dataclasses.replace(base.config, abstain_head=True)
    if onto == "vanilla":
        return
    prompts = ["USER: hi\nTILELLI:", "Once"]
    texts = [[output.data for output in tilelli_jax.generate(
        model, prompts, max_new=30, temperature=0.8, seed=1)]
             for model in (base, spliced)]
    assert texts[0] == texts[1]


def test_round_trip_through_torch(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    made, file = tmp_path / "made", tmp_path / "made.pt"
    assert main(["--head", str(folder / "with"), "--onto", str(folder / "plain"), str(made)]) == 0
    assert convert([str(made), str(file), "--to", "torch"]) == 0
    checkpoint = torch.load(file, weights_only=True)
    weights = next(value for value in checkpoint.values()
                   if isinstance(value, dict) and "abstain.weight" in value)
    arrays = to_arrays(tilelli_jax.load(made))
    assert weights["abstain.weight"].shape == (1, 16) and weights["abstain.bias"].shape == (1,)
    np.testing.assert_array_equal(weights["abstain.weight"].numpy().T, arrays["abstain.kernel"])
    assert convert([str(file), str(tmp_path / "back")]) == 0
    back = to_arrays(tilelli_jax.load(tmp_path / "back"))
    assert back.keys() == arrays.keys()
    assert all(back[name].tobytes() == arrays[name].tobytes() for name in arrays)


@pytest.mark.parametrize(("head", "onto", "out", "parts"), [
    ("plain", "other", "out", ["plain: expected a model with an abstain head"]),
    ("with", "wide", "out", ["wide: expected an abstain head of width 32, found 16"]),
    ("nowhere", "plain", "out", ["nowhere: expected a model directory"]),
    ("with", "nowhere", "out", ["nowhere: expected a model directory"]),
    ("with", "neox", "out", ["neox: expected a family that can have an abstain head, found gpt_neox"]),
    ("with", "plain", "", ["already exists"])])
def test_invalid_arguments(head: str, onto: str, out: str, parts: list[str], folder: Path, tmp_path: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:
    if onto == "neox":
        config = GPTNeoXConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2, d_hidden=16)
        tilelli_jax.save(random_network(config, seed=0)[0], folder / "neox")
    assert main(["--head", str(folder / head), "--onto", str(folder / onto), str(tmp_path / out)]) == 2
    assert_one_line(capsys.readouterr().err, *parts)
    assert not (tmp_path / "out").exists()
