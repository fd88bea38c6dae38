"""Round trips of Tilelli's `.pt` files with many plausible tensor names and layouts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilelli_jax
from tests.convert.torch_files import (
    ATOME,
    LITE,
    PARENT,
    as_torch,
    assert_holds,
    assert_same_tree,
    file_config,
    load_pt,
    run,
    save_pt,
    state_of,
    weights,
)
from tests.error_lines import assert_one_line
from tests.reference_impl.comparison import assert_same_weights
from tilelli_jax.loading.store import from_arrays

pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")

OTHER_ENTRIES = {"step": 29000, "val_loss": 1.0545352958142757, "git": None, "done": True, "name": "é",
                 "args": {"lr": 3e-4, "betas": [0.9, 0.95]}}
NUMBERED = {"local": "paths.0", "sparse": "paths.1", "dense": "paths.2"}
GPT2 = {"block": "h", "norm": "ln_1", "embed": "wte.weight", "positions": "wpe.weight", "final_norm": "ln_f",
        "unembed": "head.weight"}
BANKS = {"n_banks": 2}
LONG = {"n_heads": 12, "n_layers": 11}

# name → base configuration, changes to it, tensor names that differ from atome's
LAYOUTS: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
    "heads apart": (LITE, {}, {}),
    "heads fused": (LITE, {}, {"head": ""}),
    "heads fused, of another width than the network": (LITE, {"d_head": 3}, {"head": ""}),
    "one head": (LITE, {"n_heads": 1}, {"head": ""}),
    "projections": (LITE, {}, {"sparse": "attn", "query": "q_proj", "key": "k_proj", "value": "v_proj"}),
    "projections, fused": (LITE, {}, {"sparse": "attn", "query": "q_proj", "key": "k_proj",
                                      "value": "v_proj", "head": ""}),
    "words": (LITE, {}, {"query": "query", "key": "key", "value": "value", "head": "head_{h}."}),
    "numbered pathways": (LITE, {}, NUMBERED),
    "numbered pathways, heads fused": (LITE, {}, NUMBERED | {"head": ""}),
    "pathways numbered in another order": (
        LITE, {"pathways": ("dense", "local", "sparse")},
        {"dense": "paths.0", "local": "paths.1", "sparse": "paths.2"}),
    "a separate module for the convolution": (LITE, {"conv_bias": True}, {"local": "local.conv"}),
    "names of vanilla": (LITE, {}, {"embed": "tok_embed.weight", "final_norm": "norm_final"}),
    "names of GPT-2": (LITE, {}, GPT2),
    "in layers": (LITE, {}, {"block": "layers", "embed": "token_embedding.weight",
                             "positions": "position_embedding.weight", "final_norm": "norm",
                             "unembed": "lm_head.weight"}),
    "tables without a module": (LITE, {}, {"embed": "tok_emb", "positions": "pos_emb"}),
    "tied": (LITE, {"tie_embeddings": True}, {}),
    "no positions": (LITE, {"positions": "none"}, {}),
    "a norm of the dense pathway": (LITE, {"second_norm": "dense"}, {"norm2": "norm_dense"}),
    "a norm within the dense pathway": (LITE, {"second_norm": "dense"}, {"norm2": "dense.norm"}),
    "a norm of the mix": (LITE, {"second_norm": "mix"}, {"norm2": "norm_mix"}),
    "a norm behind the pathways": (LITE, {"second_norm": "mix"}, {"norm2": "post_ln"}),
    "a router without a module": (LITE, {}, {"router": "router"}),
    "a gate": (LITE, {}, {"router": "gate"}),
    "biases": (LITE, {"router_bias": True, "conv_bias": True}, {}),
    "biases, and a router without a module": (LITE, {"router_bias": True, "conv_bias": True},
                                              {"router": "router"}),
    **{f"an abstain head outside of {prefix}": (LITE, {"abstain_head": True}, {"prefix": prefix})
       for prefix in ("", "base.", "module.", "_orig_mod.", "model.", "module._orig_mod.", "base.model.")},
    "parent": (PARENT, {}, {"head": ""}),
    "parent, numbered": (PARENT, {}, {"head": "", "local": "paths.0", "wide": "paths.1", "state": "paths.2",
                                      "sparse": "paths.3", "dense": "paths.4"}),
    "parent, descriptive names": (PARENT, {"conv_bias": True}, {
        "head": "", "local": "conv_local", "wide": "conv_wide", "state": "ssm", "c": "c",
        "sparse": "topk_attn", "dense": "ffn", "up": "fc1", "down": "fc2"}),
    "the wide convolution alone": (PARENT, {"pathways": ("wide", "sparse", "dense"), "local_kernel": 5},
                                   {"head": ""}),
    "banks within pathways": (LITE, BANKS, {"bank": "{path}.{bank}"}),
    "pathways within banks": (LITE, BANKS, {"bank": "banks.{bank}.{path}"}),
    "banks, heads fused": (LITE, BANKS, {"bank": "{path}.{bank}", "head": ""}),
    "parent's banks": (PARENT, {"n_banks": 3, "conv_bias": True}, {"bank": "{path}.{bank}", "head": ""}),
    "more than ten of everything": (LITE, LONG, {}),
    "more than ten banks": (LITE, {"n_banks": 11, "n_layers": 1}, {"bank": "{path}.{bank}"}),
    "a feed-forward of numbers": (LITE, {}, {"up": "0", "down": "2"}),
    "a feed-forward of numbers, in a module": (LITE, {}, {"dense": "dense.net", "up": "0", "down": "2"}),
    "a feed-forward of w1 and w2": (LITE, {}, {"dense": "ffn", "up": "w1", "down": "w2"}),
    "a feed-forward as wide as the network": (LITE, {"dense_expand": 1}, {}),
    "all at once": (LITE, {"tie_embeddings": True, "second_norm": "dense", "conv_bias": True,
                           "router_bias": True, "abstain_head": True, "n_banks": 2, "quantizer": "ternary"},
                    {"prefix": "base.", "norm2": "norm_dense", "router": "router", "bank": "{path}.{bank}"}),
    "atome": (ATOME, {}, {"head": ""}),
}


def config_tree(config: Any) -> dict[str, Any]:
    if config.quantize == ATOME.quantize:
        return {"vocab_size": 11, "d_model": 8, "n_layers": 2, "d_head": 3, "top_k": 3, "kernel_size": 5,
                "n_pathways": 3}
    return file_config(config)


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, marks=[pytest.mark.exhaustive] * (
        dtype == "bfloat16" and name != "all at once"))
    for name in LAYOUTS for dtype in ("float32", "bfloat16")])
def test_layout(name: str, dtype: str, tmp_path: Path) -> None:
    """The weights are bitwise equal, and converting back restores the file exactly."""
    base, changes, part_names = LAYOUTS[name]
    config = dataclasses.replace(base, **changes)
    state = state_of(weights(config, dtype), **part_names)
    source = save_pt(tmp_path / "source.pt", {"model": state, "cfg": config_tree(config), **OTHER_ENTRIES})
    assert run(source, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", config, dtype, loaded=dtype == "float32")
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(source))


@pytest.mark.parametrize(("name", "order"), [
    pytest.param(name, order, marks=[pytest.mark.exhaustive] * ((name, order) not in (
        ("heads apart", "backwards"), ("parent's banks", "at random"), ("a norm of the mix", "by name"),
        ("more than ten of everything", "by name"))))
    for name in ("heads apart", "parent", "banks within pathways", "parent's banks", "a norm of the mix",
                 "more than ten of everything")
    for order in ("by name", "backwards", "at random")])
def test_tensor_order_is_irrelevant(name: str, order: str, tmp_path: Path) -> None:
    base, changes, part_names = LAYOUTS[name]
    config = dataclasses.replace(base, **changes)
    state = state_of(weights(config), **part_names)
    names = {"by name": sorted(state), "backwards": list(state)[::-1],
             "at random": list(np.random.default_rng(0).permutation(list(state)))}[order]
    source = save_pt(tmp_path / "source.pt", {"model": {str(key): state[key] for key in names},
                                              "cfg": config_tree(config)})
    assert run(source, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", config)


@pytest.mark.parametrize(("state_key", "config_key"), [
    pytest.param(state_key, config_key, marks=[pytest.mark.exhaustive] * (i != j))
    for i, state_key in enumerate(("model", "state_dict", "model_state_dict", ""))
    for j, config_key in enumerate(("base_model_cfg", "model_cfg", "config", "cfg"))])
def test_state_and_config_keys(state_key: str, config_key: str, tmp_path: Path) -> None:
    state = state_of(weights(LITE))
    source = save_pt(tmp_path / "source.pt", {**({state_key: state} if state_key else state),
                                              config_key: file_config(LITE), **OTHER_ENTRIES})
    assert run(source, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", LITE)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(source))


def test_several_configurations(tmp_path: Path) -> None:
    """The network's configuration is used; the training configuration is kept for converting back."""
    source = save_pt(tmp_path / "source.pt", {"config": {"lr": 3e-4, "top_k": 5},
                                              "base_model_cfg": file_config(LITE),
                                              "model": state_of(weights(LITE))})
    assert run(source, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", LITE)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(source))


@pytest.mark.parametrize(("quantize", "quantizer"), [
    (True, "ternary"), (False, "none"), (None, "none"), ("ternary", "ternary"), ("none", "none"),
    ("ternary_row", "ternary_row"), ("hadamard", "hadamard"), ("power3", "power3"),
    ("power3_row", "power3_row")])
def test_quantize_values(quantize: Any, quantizer: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(LITE, quantizer=quantizer)
    source = save_pt(tmp_path / "source.pt", {"config": file_config(LITE) | {"quantize": quantize},
                                              "state_dict": state_of(weights(config))})
    assert run(source, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", config)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(source))


@pytest.mark.parametrize(("missing", "key", "value", "changes"), [
    ("top_k", "top_k", "5", {"top_k": 5}), ("quantize", "quantizer", "power3", {"quantizer": "power3"})])
def test_settings_that_no_tensor_determines(missing: str, key: str, value: str, changes: dict[str, Any],
                                            tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {name: entry for name, entry in file_config(LITE).items() if name != missing}
    source = save_pt(tmp_path / "source.pt", {"config": config, "model": state_of(weights(LITE))})
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, f"{source}: {key}: ", f"--set {key}=")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pt"]
    assert run(source, tmp_path / "out", "--set", f"{key}={value}") == 0
    assert_holds(tmp_path / "out", dataclasses.replace(LITE, **changes))


def test_set_overrides_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_pt(tmp_path / "source.pt", {"config": file_config(LITE), "model": state_of(weights(LITE))})
    assert run(source, tmp_path / "assumed") == 0
    assert "note: head_reduction: " in capsys.readouterr().err  # the file does not specify it
    assert run(source, tmp_path / "out", "--set", "top_k=5", "--set", "head_reduction=sum") == 0
    assert capsys.readouterr().err == ""
    assert_holds(tmp_path / "out", dataclasses.replace(LITE, top_k=5, head_reduction="sum"))


@pytest.mark.parametrize("names", [("norm", "norm2"), ("norm1", "norm2"), ("ln_1", "ln_2")])
@pytest.mark.parametrize("second_norm", ["dense", "mix"])
def test_ambiguous_second_norm(second_norm: Any, names: tuple[str, str], tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(LITE, second_norm=second_norm)
    state = state_of(weights(config), norm=names[0], norm2=names[1])
    source = save_pt(tmp_path / "source.pt", {"config": file_config(config), "model": state})
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, f"{source}: second_norm: ", "--set second_norm=")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pt"]
    assert run(source, tmp_path / "out", "--set", f"second_norm={second_norm}") == 0
    assert_holds(tmp_path / "out", config)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(source))


def test_tied_embeddings_stored_twice(tmp_path: Path) -> None:
    """Two names for one storage, as in the state dict of every PyTorch network that shares a parameter."""
    config = dataclasses.replace(LITE, tie_embeddings=True)
    import torch
    state = as_torch(state_of(weights(config)))
    state["unembed.weight"] = state["embed.weight"]
    torch.save({"config": file_config(config), "model": state}, tmp_path / "source.pt")
    assert run(tmp_path / "source.pt", tmp_path / "out") == 0
    assert_holds(tmp_path / "out", config)


def test_non_contiguous_tensors(tmp_path: Path) -> None:
    """Parameters, views into one storage, transposed and expanded tensors."""
    import collections

    import torch
    state = collections.OrderedDict(as_torch(state_of(weights(LITE))))
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    storage = torch.cat([torch.zeros(3), *(tensor.flatten() for tensor in state.values())])
    offset = 3
    for name, tensor in state.items():
        state[name] = storage[offset:offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    state["embed.weight"] = torch.nn.Parameter(state["embed.weight"].clone())
    up = "blocks.1.dense.up.weight"
    state[up] = state[up].T.contiguous().T
    state["blocks.0.norm.weight"] = torch.full((1,), 0.5).expand(8)
    torch.save({"config": file_config(LITE), "model": state}, tmp_path / "source.pt")
    assert run(tmp_path / "source.pt", tmp_path / "out") == 0
    expected = from_arrays(LITE, weights(LITE) | {"blocks.0.norm.scale": np.full(8, 0.5, np.float32)})
    assert_same_weights(tilelli_jax.load(tmp_path / "out"), expected)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt")["model"], state)


MAP = {"net.{i}.mixer.{h}.qq": "blocks.{i}.sparse.heads.{h}.Wq.weight",
       "net.{i}.mixer.{h}.kk": "blocks.{i}.sparse.heads.{h}.Wk.weight",
       "net.{i}.mixer.{h}.vv": "blocks.{i}.sparse.heads.{h}.Wv.weight", "words": "embed.weight"}


@pytest.fixture
def unknown_names(tmp_path: Path) -> Path:
    """Lite, with heads and embedding under unknown names."""
    state = state_of(weights(LITE))
    for i in range(LITE.n_layers):
        for h in range(LITE.n_heads):
            for letter in "qkv":
                known = f"blocks.{i}.sparse.heads.{h}.W{letter}.weight"
                state[f"net.{i}.mixer.{h}.{2 * letter}"] = state.pop(known)
    state["words"] = state.pop("embed.weight")
    return save_pt(tmp_path / "source.pt", {"config": file_config(LITE), "model": state})


def test_map(unknown_names: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(unknown_names, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "embed.weight")
    (tmp_path / "map.yaml").write_text("".join(f"'{name}': {known}\n" for name, known in MAP.items()))
    assert run(unknown_names, tmp_path / "out", "--map", tmp_path / "map.yaml") == 0
    assert_holds(tmp_path / "out", LITE)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(unknown_names))


def test_map_that_drops_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of(weights(LITE)) | {"mask": np.ones((6, 6), bool), "blocks.0.seen": np.ones(3),
                                          "blocks.1.seen": np.ones(3)}
    source = save_pt(tmp_path / "source.pt", {"config": file_config(LITE), "model": state})
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, "not known: blocks.0.seen, blocks.1.seen, mask")
    (tmp_path / "map.yaml").write_text("mask: null\n'blocks.{i}.seen':\n")
    assert run(source, tmp_path / "out", "--map", tmp_path / "map.yaml") == 0
    assert_holds(tmp_path / "out", LITE)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    expected = {key: value for key, value in load_pt(source)["model"].items()
                if not re.search("mask|seen", key)}
    assert_same_tree(load_pt(tmp_path / "back.pt")["model"], expected)
