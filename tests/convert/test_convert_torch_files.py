"""Converts PyTorch files: SAEs, sidecars, older transformers directories, trained checkpoints."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
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
from tests.reference_impl.random_weights import random_network
from tests.references import STORED, needs
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig

torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")

needs_reference = needs(STORED)


def sae_state(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    return {name: rng.standard_normal(shape).astype(NUMPY[dtype]) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize(("wrap", "settings"), [
    (lambda state: state, ["--set", "k=4"]),
    (lambda state: {"state_dict": state, "config": {"k": 4}}, []),
    (lambda state: {"model": state, "cfg": {"k": 4, "d_model": 6}, "step": 7}, [])],
    ids=["state dict only", "with k", "with training state"])
def test_sae(wrap: Callable[[Any], Any], settings: list[str], dtype: str, tmp_path: Path) -> None:
    source = save_pt(tmp_path / "source.pt", wrap(sae_state(dtype)))
    assert run(source, tmp_path / "out", *settings) == 0
    model = tilelli_jax.load(tmp_path / "out")
    assert model.config == SAEConfig(d_model=6, n_latents=20, k=4, unit_norm="none")
    state = {name: np.float32(array) for name, array in sae_state(dtype).items()}
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    values = (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    codes = np.where(values >= np.sort(values, 1)[:, -4:][:, :1], np.maximum(values, 0), 0)
    np.testing.assert_allclose(model(x), codes @ state["W_dec"] + state["b_dec"], rtol=1e-4, atol=1e-5)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(source))


def test_sae_without_k_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_pt(tmp_path / "sae_topk_8.pt", sae_state())
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, f"{source}: k: ", "--set k=")
    assert run(source, tmp_path / "out", "--set", "k=21") == 2
    assert_one_line(capsys.readouterr().err, "k: expected at most n_latents 20, found 21")


def test_text_settings_are_kept_as_typed(tmp_path: Path) -> None:
    source = save_pt(tmp_path / "sae.pt", sae_state())
    assert run(source, tmp_path / "out", "--set", "k=4", "--set", "source_model=007") == 0
    assert tilelli_jax.load(tmp_path / "out").config.source_model == "007"


def sidecar_tree(**changes: Any) -> dict[str, Any]:
    """The contents of Recall's file: scalers and names are NumPy objects, as scikit-learn makes them."""
    rng = np.random.default_rng(0)
    shapes = {"gru.weight_ih_l0": (15, 3), "gru.weight_hh_l0": (15, 5), "gru.bias_ih_l0": (15,),
              "gru.bias_hh_l0": (15,), "head.0.weight": (5, 14), "head.0.bias": (5,),
              "head.3.weight": (1, 5), "head.3.bias": (1,)}
    state = {name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
             for name, shape in shapes.items()}
    return {"state_dict": state,
            "fscaler": {"mean": rng.standard_normal((1, 1, 3)).astype(np.float32),
                        "std": rng.uniform(0.5, 2, (1, 1, 3)).astype(np.float32)},
            "gscaler": {"mean": rng.standard_normal(4), "scale": rng.uniform(0.5, 2, 4)},
            "T": 0.7310585786300049, "n_feat": 3, "n_global": 4, "hidden": 5,
            "feat_names": [np.str_("entropy"), np.str_("margin"), np.str_("peak")],
            "global_names": [np.str_(f"g{i}") for i in range(4)]} | changes


@pytest.mark.parametrize("changes", [{}, {"val_auc": 0.8983, "epoch": 12}], ids=["plain", "further entries"])
def test_sidecar(changes: dict[str, Any], tmp_path: Path) -> None:
    tree = sidecar_tree(**changes)
    torch.save(tree, tmp_path / "source.pt")
    assert run(tmp_path / "source.pt", tmp_path / "out") == 0
    model = tilelli_jax.load(tmp_path / "out")
    assert model.config == SidecarConfig(n_features=3, n_prompt_features=4, d_hidden=5,
                                         features=("entropy", "margin", "peak"),
                                         prompt_features=("g0", "g1", "g2", "g3"))
    arrays = to_arrays(model)
    state = {name: tensor.numpy() for name, tensor in tree["state_dict"].items()}
    np.testing.assert_array_equal(arrays["gru.input.kernel"], state["gru.weight_ih_l0"].T)
    np.testing.assert_array_equal(arrays["gru.state.bias"], state["gru.bias_hh_l0"])
    np.testing.assert_array_equal(arrays["hidden.kernel"], state["head.0.weight"].T)
    np.testing.assert_array_equal(arrays["feature_scaler.scale"], tree["fscaler"]["std"][0, 0])
    np.testing.assert_array_equal(arrays["prompt_scaler.mean"], np.float32(tree["gscaler"]["mean"]))
    assert arrays["temperature"] == np.float32(tree["T"])
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), tree)  # scalers and T are still float64


def test_sidecar_trained_here(tmp_path: Path) -> None:
    """A sidecar that was not converted is written in Recall's format and read back."""
    arrays = {name: np.asarray(leaf) for name, leaf in to_arrays(_sidecar()).items()}
    tilelli_jax.save(_sidecar(), tmp_path / "saved")
    assert run(tmp_path / "saved", tmp_path / "x.pt", "--to", "torch") == 0
    tree = load_pt(tmp_path / "x.pt")
    assert tree.keys() == sidecar_tree().keys()
    assert (tree["n_feat"], tree["n_global"], tree["hidden"]) == (3, 4, 5)
    assert tree["fscaler"]["std"].shape == (1, 1, 3) and tree["gscaler"]["scale"].shape == (4,)
    assert run(tmp_path / "x.pt", tmp_path / "again") == 0
    again = tilelli_jax.load(tmp_path / "again")
    assert again.config == _sidecar().config
    for name, array in to_arrays(again).items():
        np.testing.assert_array_equal(array, arrays[name])


def _sidecar() -> Any:
    from flax import nnx

    from tilelli_jax.estimators.sidecar import Sidecar
    return Sidecar(SidecarConfig(n_features=3, n_prompt_features=4, d_hidden=5, features=("a", "b", "c")),
                   rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_model_bin(shards: int, tmp_path: Path) -> None:
    """Directories without safetensors, in one file or with an index."""
    import safetensors.torch
    config = GPTNeoXConfig(vocab_size=61, d_model=24, n_layers=2, max_seq_len=32, n_heads=3, d_hidden=40)
    model, _ = random_network(config, 0)
    source = tmp_path / "source"
    model.save_pretrained(source)
    state = safetensors.torch.load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}.bin" for i in range(shards)]
    parts = {name: dict(list(state.items())[i::shards]) for i, name in enumerate(names)}
    for name, part in parts.items():
        torch.save(part, source / name)
    if shards > 1:
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(
            {"weight_map": {key: name for name, part in parts.items() for key in part}}))
    assert run(source, tmp_path / "out") == 0
    model = tilelli_jax.load(tmp_path / "out")
    assert model.config == config
    assert_same_weights(model, model)
    assert run(tmp_path / "out", tmp_path / "back", "--to", "torch") == 0
    assert_same_tree(safetensors.torch.load_file(tmp_path / "back" / "model.safetensors"), state)


def tilelli_tree(config: RoutedConfig, **part_names: str) -> dict[str, Any]:
    return {"model": as_torch(state_of(weights(config), **part_names)), "config": file_config(config)}


ALL_AT_ONCE = dataclasses.replace(PARENT, n_banks=2, second_norm="mix", conv_bias=True, router_bias=True,
                                  abstain_head=True, tie_embeddings=True, quantizer="ternary_row", n_heads=2)
VANILLA = {"tok_embed.weight": (11, 8), "pos_embed.weight": (6, 8), "norm_final.weight": (8,),
           "norm_final.bias": (8,), "unembed.weight": (11, 8), "blocks.0.norm1.weight": (8,),
           "blocks.0.norm1.bias": (8,), "blocks.0.attn.qkv.weight": (24, 8),
           "blocks.0.attn.out.weight": (8, 8), "blocks.0.norm2.weight": (8,), "blocks.0.norm2.bias": (8,),
           "blocks.0.ffn.up.weight": (16, 8), "blocks.0.ffn.down.weight": (8, 16)}


def vanilla_tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"model": {name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
                      for name, shape in VANILLA.items()}, "config": {"n_heads": 2, "quantize": False}}


@pytest.mark.parametrize("arguments", [(), ("--inspect",)], ids=["convert", "inspect"])
@pytest.mark.parametrize(("tensors", "message"), [
    ({"blocks.norm.weight": (8,)}, "not known: blocks.norm.weight"),
    ({"pos_embed.weight": ()}, "pos_embed.weight: expected 2 axes, found ()"),
    ({"pos_embed.weight": (6,)}, "pos_embed.weight: expected 2 axes, found (6,)"),
    ({"tok_embed.weight": (11, 0)}, "tok_embed.weight: expected a matrix that is not empty, found (11, 0)"),
    ({"tok_embed.weight": (0, 8)}, "tok_embed.weight: expected a matrix that is not empty, found (0, 8)")])
def test_wrong_vanilla_tensors(tensors: dict[str, tuple[int, ...]], message: str, arguments: tuple[str, ...],
                               tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = vanilla_tree()
    tree["model"] |= {name: torch.ones(shape) for name, shape in tensors.items()}
    torch.save(tree, tmp_path / "source.pt")
    out = () if arguments else (tmp_path / "out",)
    assert run(tmp_path / "source.pt", *out, *arguments) == (0 if arguments else 2)
    printed = capsys.readouterr()
    if arguments:
        assert printed.out.splitlines()[-1].startswith("cannot be converted: ") and message in printed.out
    else:
        assert_one_line(printed.err, f"{tmp_path / 'source.pt'}: ", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("n_heads", "message"), [
    ("abc", "--set: n_heads: expected an integer, found text 'abc'"),
    ("4", "--set: d_model: expected a multiple of n_heads 4, found 6")])
def test_a_wrong_setting_that_the_file_lacks(n_heads: str, message: str, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """The error names --set, not the file, although the file alone is not a complete configuration."""
    tree = vanilla_tree()
    del tree["config"]["n_heads"]
    tree["model"]["tok_embed.weight"] = torch.ones(11, 6)
    torch.save(tree, tmp_path / "source.pt")
    assert run(tmp_path / "source.pt", tmp_path / "out", "--set", f"n_heads={n_heads}") == 2
    assert_one_line(capsys.readouterr().err, message)


# name → family, contents of the file, required arguments
CASES: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    "Lite": ("tilelli", lambda: tilelli_tree(LITE), []),
    "parent": ("tilelli", lambda: tilelli_tree(PARENT, head=""), []),
    "all at once": ("tilelli", lambda: tilelli_tree(ALL_AT_ONCE, bank="{path}.{bank}", norm2="norm_mix",
                                                    prefix="base."), []),
    "atome": ("atome", lambda: tilelli_tree(ATOME, head="") | {"config": {"top_k": 3, "n_pathways": 3}}, []),
    "vanilla": ("vanilla", vanilla_tree, []),
    "sae": ("sae", lambda: as_torch(sae_state()), ["--set", "k=4"]),
    "lrd": ("lrd", sidecar_tree, [])}


@pytest.mark.parametrize("name", CASES)
def test_inspect(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lists what every tensor becomes, NumPy arrays and the temperature included."""
    family, tree, settings = CASES[name][0], CASES[name][1](), CASES[name][2]
    torch.save(tree, tmp_path / "source.pt")
    before = (tmp_path / "source.pt").read_bytes()
    assert run("--inspect", tmp_path / "source.pt", *settings) == 0
    out = capsys.readouterr().out
    state = dict(tree.get("state_dict") or tree.get("model") or tree)
    if name == "lrd":
        state |= {f"{scaler}.{key}": array for scaler in ("fscaler", "gscaler")
                  for key, array in tree[scaler].items()} | {"T": np.array(tree["T"])}
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    for key, tensor in state.items():
        row, dtype = rows[key], str(tensor.dtype).removeprefix("torch.")
        assert row[1:3] == ["×".join(map(str, tensor.shape)) or "scalar", dtype], key
        assert row[3] not in ("?", "not"), key
    assert f": {len(state)} tensors, " in out and f"\nfamily {family};" in out
    assert "cannot be converted" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]
    assert (tmp_path / "source.pt").read_bytes() == before


def largest_difference(out: str) -> float:
    """The largest difference that `--check` reports, relative to the largest output."""
    match = re.search(r"^largest difference from [^:]+: (\S+), with outputs up to (\S+);", out, re.MULTILINE)
    assert match is not None, out
    return float(match[1]) / float(match[2])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "parent"))
                                  for name in CASES])
def test_check(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tree, settings = CASES[name]
    torch.save(tree(), tmp_path / "source.pt")
    assert run(tmp_path / "source.pt", tmp_path / "out", "--check", *settings) == 0
    assert largest_difference(capsys.readouterr().out) < 1e-5
    if name in ("Lite", "lrd"):  # the check detects rounding
        assert run(tmp_path / "source.pt", tmp_path / "rough", "--check", "--dtype", "bfloat16") == 0
        assert largest_difference(capsys.readouterr().out) > 1e-4


@needs_reference
@pytest.mark.parametrize("case", ["short", "wild", *(pytest.param(case, marks=pytest.mark.exhaustive)
                                                     for case in ("e4b", "one"))])
def test_recall_sidecar_outputs(case: str, sidecar: Path) -> None:
    stored = np.load(STORED / "recall_cases" / "sidecar_cases.npz")
    model = tilelli_jax.load(sidecar)
    features, globals_ = stored[f"{case}/feats"], stored[f"{case}/globals"]
    np.testing.assert_allclose(model.logits(features, globals_), stored[f"{case}/logit"],
                               atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(model(features, globals_), stored[f"{case}/prob"], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sidecar") / "out"
    assert run(STORED / "checkpoints" / "lrd.pt", path) == 0
    return path


@needs_reference
def test_recall_file_round_trip(sidecar: Path, tmp_path: Path) -> None:
    assert run(sidecar, tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), load_pt(STORED / "checkpoints" / "lrd.pt"))


@needs_reference
@pytest.mark.parametrize(("name", "size"), [("golden/sae_topk_8_ref.pt", (64, 256)),
                                            ("tiny_world/sae/squad.pt", (32, 128))])
def test_stored_sae(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    source = STORED / "difficulty" / name
    assert run(source, tmp_path / "out", "--set", "k=8") == 0
    model, state = tilelli_jax.load(tmp_path / "out"), load_pt(source)
    assert model.config == SAEConfig(d_model=size[0], n_latents=size[1], k=8, unit_norm="columns")
    for ours, theirs in (("encoder.kernel", "W_enc"), ("encoder.bias", "b_enc"), ("decoder.kernel", "W_dec"),
                         ("bias", "b_dec")):
        np.testing.assert_array_equal(to_arrays(model)[ours], state[theirs].numpy())
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), state)


@needs_reference
def test_atome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained atome; all matrix products are quantised, which its file does not record."""
    source = STORED / "checkpoints" / "atome_1m_v1.pt"
    assert run(source, tmp_path / "out", "--check") == 0
    captured = capsys.readouterr()
    assert "944,640 parameters" in captured.out and captured.err == ""
    assert largest_difference(captured.out) < 1e-4
    model, tree = tilelli_jax.load(tmp_path / "out"), load_pt(source)
    assert model.config == RoutedConfig(
        d_model=256, n_layers=8, positions="none", n_heads=1, d_head=64, top_k=4, local_kernel=5,
        pathways=("local", "state", "sparse"), quantizer="ternary", quantize=ATOME.quantize)
    arrays = to_arrays(model)
    assert sum(array.size for array in arrays.values()) == 944_640
    assert_same_tree(as_torch(state_of(arrays, head="")), dict(tree["state_dict"]))
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0
    assert_same_tree(load_pt(tmp_path / "back.pt"), tree)
