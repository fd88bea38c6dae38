"""Model directories that were not converted, written to `.pt` files with default names and read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilelli_jax
from tests.convert.torch_files import (
    ATOME,
    LITE,
    NUMPY,
    PARENT,
    as_torch,
    assert_holds,
    assert_same_tree,
    file_config,
    load_pt,
    network,
    run,
    save_pt,
    state_of,
    weights,
)
from tests.error_lines import assert_one_line
from tilelli_jax.models.vanilla import VanillaConfig

pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")

VANILLA = VanillaConfig(vocab_size=11, d_model=8, n_layers=2, max_seq_len=6, n_heads=2, dense_expand=2)
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Lite": (LITE, {}),
    "one head": (LITE, {"n_heads": 1}),
    "tied": (LITE, {"tie_embeddings": True}),
    "a norm of the dense pathway": (LITE, {"second_norm": "dense"}),
    "a norm of the mix": (LITE, {"second_norm": "mix"}),
    "biases": (LITE, {"conv_bias": True, "router_bias": True}),
    "abstain head": (LITE, {"abstain_head": True}),
    "no positions": (LITE, {"positions": "none", "max_seq_len": 6}),
    "heads summed": (LITE, {"head_reduction": "sum"}),
    "pathways in another order": (LITE, {"pathways": ("dense", "local", "sparse")}),
    "one pathway": (LITE, {"pathways": ("dense",), "n_heads": 8, "d_head": 48, "top_k": 16}),
    "quantised": (LITE, {"quantizer": "ternary_row"}),
    "a rotation": (LITE, {"quantizer": "hadamard"}),
    "other parts quantised": (LITE, {"quantizer": "ternary", "quantize": ("dense", "router", "unembed")}),
    "parent": (PARENT, {}),
    "a wide convolution that is the narrower": (PARENT, {"local_kernel": 7, "wide_kernel": 3}),
    "convolutions of one width": (PARENT, {"local_kernel": 5, "wide_kernel": 5}),
    "the wide convolution alone": (PARENT, {"pathways": ("wide", "state"), "local_kernel": 5, "n_heads": 8,
                                            "d_head": 48, "top_k": 16, "dense_expand": 4}),
    "banks": (LITE, {"n_banks": 2}),
    "parent's banks": (PARENT, {"n_banks": 3, "conv_bias": True}),
    "atome": (ATOME, {}),
    "all at once": (LITE, {"n_banks": 2, "abstain_head": True, "second_norm": "mix", "conv_bias": True,
                           "router_bias": True, "tie_embeddings": True, "quantizer": "power3"}),
    "vanilla": (VANILLA, {}),
    "vanilla, abstaining": (VANILLA, {"abstain_head": True, "tie_embeddings": True}),
    "vanilla, without positions": (VANILLA, {"positions": "none"}),
    "vanilla, quantised": (VANILLA, {"quantizer": "ternary"}),
    "vanilla, other parts quantised": (VANILLA, {"quantizer": "ternary", "quantize": ("dense", "embed")}),
}


# Single features that "all at once" and the vanilla tests below cover together.
SLOW = ("tied", "a norm of the mix", "biases", "abstain head", "quantised", "parent's banks",
        "vanilla, without positions", "vanilla, quantised")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in SLOW))
                                  for name in MODELS])
def test_model_directory_round_trip(name: str, tmp_path: Path) -> None:
    base, changes = MODELS[name]
    config = dataclasses.replace(base, **changes)
    tilelli_jax.save(network(config), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch") == 0
    assert run(tmp_path / "x.pt", tmp_path / "again") == 0
    assert_holds(tmp_path / "again", config)


def test_tensor_names_are_those_of_atome(tmp_path: Path) -> None:
    """So that other programs for these files can read ours."""
    tilelli_jax.save(network(LITE), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch") == 0
    tree = load_pt(tmp_path / "x.pt")
    assert_same_tree(tree["state_dict"], as_torch(state_of(weights(LITE))))
    assert file_config(LITE).items() <= tree["config"].items()


def test_dtype_when_converting(tmp_path: Path) -> None:
    source = save_pt(tmp_path / "source.pt", {"config": file_config(LITE),
                                              "state_dict": state_of(weights(LITE))})
    assert run(source, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert_holds(tmp_path / "out", LITE, "bfloat16", loaded=True)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt")["state_dict"],
                     as_torch(state_of(weights(LITE, "bfloat16"))))


def test_dtype_when_converting_back(tmp_path: Path) -> None:
    tilelli_jax.save(network(LITE), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch", "--dtype", "bfloat16") == 0
    assert_same_tree(load_pt(tmp_path / "x.pt")["state_dict"],
                     as_torch(state_of(weights(LITE, "bfloat16"))))


def test_replaced_network(tmp_path: Path) -> None:
    """After training overwrites the converted network, the `.pt` file holds the new one."""
    source = save_pt(tmp_path / "source.pt", {"config": file_config(LITE), "model": state_of(weights(LITE))})
    assert run(source, tmp_path / "out") == 0
    config = dataclasses.replace(LITE, top_k=2, n_layers=3, quantizer="ternary")
    tilelli_jax.save(network(config), tmp_path / "out")
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert run(tmp_path / "back.pt", tmp_path / "again") == 0
    assert_holds(tmp_path / "again", config)


def test_file_without_configuration(tmp_path: Path) -> None:
    """Settings given by --set are in the written file, so it needs no --set."""
    source = save_pt(tmp_path / "source.pt", {"state_dict": state_of(weights(LITE))})
    settings = ["--set", "top_k=3", "--set", "quantizer=none", "--set", "n_heads=2"]
    assert run(source, tmp_path / "out", *settings) == 0
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt")["state_dict"], load_pt(source)["state_dict"])
    assert run(tmp_path / "back.pt", tmp_path / "again") == 0
    assert_holds(tmp_path / "again", LITE)


def test_training_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The optimizer's tensors are not converted, and a note says so."""
    moments = {0: {"step": np.array(5.0, np.float32), "exp_avg": np.ones(3, np.float32)}}
    source = save_pt(tmp_path / "source.pt", {
        "config": file_config(LITE), "model": state_of(weights(LITE)), "step": 5,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "ema": np.ones(3, np.float32)})
    assert run(source, tmp_path / "out") == 0
    notes = capsys.readouterr().err
    assert "optimizer" in notes and "ema" in notes
    assert_holds(tmp_path / "out", LITE)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert load_pt(tmp_path / "back.pt")["step"] == 5


@pytest.mark.parametrize(("changes", "dtype"), [
    pytest.param(changes, dtype, marks=[pytest.mark.exhaustive] * (bool(changes) and dtype != "float32"))
    for changes in ({}, {"abstain_head": True, "tie_embeddings": True}, {"positions": "none"})
    for dtype in NUMPY])
def test_vanilla_round_trip(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """With the file's tensor names; the rows of qkv keep their order."""
    config = dataclasses.replace(VANILLA, **changes)
    arrays = weights(config, dtype)
    file_names = {"embed.kernel": "tok_embed.weight", "positions.table": "pos_embed.weight",
                  "final_norm.scale": "norm_final.weight", "final_norm.bias": "norm_final.bias"}
    state = {}
    for name, array in arrays.items():
        is_kernel = name.endswith("kernel") and name != "embed.kernel"
        theirs = file_names.get(name) or name.replace("kernel", "weight").replace("scale", "weight").replace(
            "attention", "attn").replace("dense", "ffn")
        state[theirs] = array.T if is_kernel else array
    config_dict = {key: getattr(config, key) for key in ("vocab_size", "d_model", "n_layers", "n_heads",
                                                         "max_seq_len")} | {"quantize": False}
    source = save_pt(tmp_path / "source.pt", {"config": config_dict, "model": state, "step": 3})
    assert run(source, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", config, dtype)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(source))


@pytest.mark.parametrize("base", [LITE, VANILLA], ids=["Lite", "vanilla"])
def test_lsq_scales_are_rejected(base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`.pt` files have no names for the learned scales of LSQ, so both directions are rejected."""
    tilelli_jax.save(network(dataclasses.replace(base, quantizer="lsq")), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch") == 2
    assert_one_line(capsys.readouterr().err, "alpha")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    source = save_pt(tmp_path / "source.pt", {"config": file_config(LITE) | {"quantize": "lsq"},
                                              "model": state_of(weights(LITE))})
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "alpha")
