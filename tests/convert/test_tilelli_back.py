"""Model directories of our own to `.pt` files, whose names are then ours to choose, and back again."""

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
    load_pt,
    network,
    run,
    said_of,
    save_pt,
    state_of,
    weights,
)
from tests.refusals import assert_one_line
from tilelli_jax.models.vanilla import VanillaConfig

pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")

VANILLA = VanillaConfig(vocab_size=11, d_model=8, n_layers=2, max_seq_len=6, n_heads=2, dense_expand=2)
OWN: dict[str, tuple[Any, dict[str, Any]]] = {
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


# One by one what "all at once" and the tests of vanilla below have together.
EXHAUSTIVE = ("tied", "a norm of the mix", "biases", "abstain head", "quantised", "parent's banks",
              "vanilla, without positions", "vanilla, quantised")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in EXHAUSTIVE))
                                  for name in OWN])
def test_a_directory_of_our_own(name: str, tmp_path: Path) -> None:
    base, changes = OWN[name]
    config = dataclasses.replace(base, **changes)
    tilelli_jax.save(network(config), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch") == 0
    assert run(tmp_path / "x.pt", tmp_path / "again") == 0
    assert_holds(tmp_path / "again", config)


def test_the_names_are_those_of_the_siblings(tmp_path: Path) -> None:
    """Lite's as atome's authors have them: others read our files by them."""
    tilelli_jax.save(network(LITE), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch") == 0
    tree = load_pt(tmp_path / "x.pt")
    assert_same_tree(tree["state_dict"], as_torch(state_of(weights(LITE))))
    assert said_of(LITE).items() <= tree["config"].items()


def test_another_type_on_the_way_in(tmp_path: Path) -> None:
    source = save_pt(tmp_path / "source.pt", {"config": said_of(LITE),
                                              "state_dict": state_of(weights(LITE))})
    assert run(source, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert_holds(tmp_path / "out", LITE, "bfloat16", loaded=True)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt")["state_dict"],
                     as_torch(state_of(weights(LITE, "bfloat16"))))


def test_another_type_on_the_way_back(tmp_path: Path) -> None:
    tilelli_jax.save(network(LITE), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch", "--dtype", "bfloat16") == 0
    assert_same_tree(load_pt(tmp_path / "x.pt")["state_dict"],
                     as_torch(state_of(weights(LITE, "bfloat16"))))


def test_a_network_put_in_the_place_of_the_converted_one(tmp_path: Path) -> None:
    """As a training run does that begins with it: the file tells what is there now."""
    source = save_pt(tmp_path / "source.pt", {"config": said_of(LITE), "model": state_of(weights(LITE))})
    assert run(source, tmp_path / "out") == 0
    config = dataclasses.replace(LITE, top_k=2, n_layers=3, quantizer="ternary")
    tilelli_jax.save(network(config), tmp_path / "out")
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert run(tmp_path / "back.pt", tmp_path / "again") == 0
    assert_holds(tmp_path / "again", config)


def test_a_file_without_a_configuration(tmp_path: Path) -> None:
    """What had to be said by hand need not be said again of the file that is written."""
    source = save_pt(tmp_path / "source.pt", {"state_dict": state_of(weights(LITE))})
    settings = ["--set", "top_k=3", "--set", "quantizer=none", "--set", "n_heads=2"]
    assert run(source, tmp_path / "out", *settings) == 0
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt")["state_dict"], load_pt(source)["state_dict"])
    assert run(tmp_path / "back.pt", tmp_path / "again") == 0
    assert_holds(tmp_path / "again", LITE)


def test_what_training_left_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The optimizer's tensors are no part of a model directory: that they stay behind is said."""
    moments = {0: {"step": np.array(5.0, np.float32), "exp_avg": np.ones(3, np.float32)}}
    source = save_pt(tmp_path / "source.pt", {
        "config": said_of(LITE), "model": state_of(weights(LITE)), "step": 5,
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
def test_vanilla_and_back(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """Their names for it, and the rows of qkv as they lie."""
    config = dataclasses.replace(VANILLA, **changes)
    arrays = weights(config, dtype)
    renamed = {"embed.kernel": "tok_embed.weight", "positions.table": "pos_embed.weight",
               "final_norm.scale": "norm_final.weight", "final_norm.bias": "norm_final.bias"}
    state = {}
    for name, array in arrays.items():
        turned = name.endswith("kernel") and name != "embed.kernel"
        theirs = renamed.get(name) or name.replace("kernel", "weight").replace("scale", "weight").replace(
            "attention", "attn").replace("dense", "ffn")
        state[theirs] = array.T if turned else array
    said = {key: getattr(config, key) for key in ("vocab_size", "d_model", "n_layers", "n_heads",
                                                  "max_seq_len")} | {"quantize": False}
    source = save_pt(tmp_path / "source.pt", {"config": said, "model": state, "step": 3})
    assert run(source, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", config, dtype)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(source))


@pytest.mark.parametrize("base", [LITE, VANILLA], ids=["Lite", "vanilla"])
def test_what_such_files_do_not_hold(base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The learned scales of LSQ have no name in them; and the other way likewise."""
    tilelli_jax.save(network(dataclasses.replace(base, quantizer="lsq")), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch") == 2
    assert_one_line(capsys.readouterr().err, "alpha")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    source = save_pt(tmp_path / "source.pt", {"config": said_of(LITE) | {"quantize": "lsq"},
                                              "model": state_of(weights(LITE))})
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "alpha")
