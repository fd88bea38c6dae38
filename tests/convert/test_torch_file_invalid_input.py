"""`.pt` files that are rejected: other files, damaged files, code, and networks that contradict the file."""

from __future__ import annotations

import argparse
import builtins
import json
import os
import pathlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilelli_jax
from tests.convert.torch_files import (
    LITE,
    as_torch,
    assert_holds,
    file_config,
    network,
    run,
    save_pt,
    state_of,
    weights,
)
from tests.error_lines import assert_one_line
from tilelli_jax.convert import checkpoint
from tilelli_jax.errors import InputError

torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
NOT_PYTORCH = "not a PyTorch file, or truncated"


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pt(tmp_path_factory.mktemp("lite") / "lite.pt", tree())


@pytest.fixture
def source(lite: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copy(lite, tmp_path / "source.pt"))


def tree(config: dict[str, Any] | None = None, extra_tensors: dict[str, Any] | None = None,
         without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Contents of a valid file of Lite, with changes to its configuration and its tensors.

    Args:
        without: prefixes of the tensor names to drop.
    """
    state = {name: array for name, array in state_of(weights(LITE)).items()
             if not name.startswith(without)}
    return {"config": {**file_config(LITE), **(config or {})}, "model": {**state, **(extra_tensors or {})}}


def assert_rejected(source: Path, capsys: pytest.CaptureFixture[str], *expected: str,
                   arguments: tuple[str, ...] = ()) -> None:
    before = sorted(source.parent.iterdir())
    assert run(source, source.parent / "out", *arguments) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, *expected)
    assert out == ""
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize("length", [0, 1, 4, 100, 1000, 0.5, 0.9, -22, -1])
def test_truncated_file(length: float, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = source.read_bytes()
    source.write_bytes(content[:int(len(content) * length) if isinstance(length, float) else length])
    assert_rejected(source, capsys, f"{source}: cannot be read: {NOT_PYTORCH}")


@pytest.mark.parametrize(("make", "kind"), [
    (os.mkfifo, "a pipe"), (lambda path: path.symlink_to("/dev/zero"), "a device")])
def test_pipes_and_devices_are_not_read(make: Callable[[Path], None], kind: str, source: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    source.unlink()
    make(source)
    assert_rejected(source, capsys, f"{source}: cannot be read: expected a regular file, found {kind}")


def test_damaged_tensor(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(source.read_bytes())
    numbers = weights(LITE)["blocks.1.dense.down.kernel"].T.tobytes()
    offset = content.find(numbers)
    assert offset > 0
    content[offset + 5] ^= 1
    source.write_bytes(content)
    assert_rejected(source, capsys, f"{source}: cannot be read: ", "/data/",
                   "is damaged (its checksum differs)")


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_any_damaged_byte(bit: int, tmp_path: Path) -> None:
    """The file is rejected, or the contents are unchanged (for dates in the archive); never a traceback."""
    path = save_pt(tmp_path / "x.pt", {"state_dict": {"a": np.arange(6.0), "b": np.ones((2, 3), np.float32)},
                                       "config": {"top_k": 3}})
    content = path.read_bytes()
    expected, outcomes = exact_contents(checkpoint.read(path)), {}
    for offset in range(0, len(content), 5):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ bit]) + content[offset + 1:])
        try:
            same = exact_contents(checkpoint.read(path)) == expected
            outcomes[offset] = "same" if same else "other numbers"
        except InputError as error:
            outcomes[offset] = "rejected" if str(error).startswith(f"{path}: ") else str(error)
        except Exception as error:
            outcomes[offset] = repr(error)
    assert {"rejected", "same"} <= set(outcomes.values())
    assert not {offset: outcome for offset, outcome in outcomes.items()
                if outcome not in ("rejected", "same")}


def exact_contents(contents: Any) -> Any:
    return contents["config"], {name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
                                for name, tensor in contents["state_dict"].items()}


OTHER_FILES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "an old pickle": (lambda p: torch.save(as_torch(tree()), p, _use_new_zipfile_serialization=False),
                      ["a pickle of PyTorch before 1.6"]),
    "text": (lambda p: p.write_text("no tensors here\n" * 100), [NOT_PYTORCH]),
    "another archive": (lambda p: archive(p, zipfile.ZIP_STORED), ["cannot be read"]),
    "a compressed archive": (lambda p: archive(p, zipfile.ZIP_DEFLATED), ["compressed"]),
    "a list": (lambda p: torch.save([torch.ones(3)], p), ["expected a dict of tensors, found a list"]),
    "a tensor": (lambda p: torch.save(torch.ones(3), p), ["expected a dict of tensors, found a Tensor"]),
    "an empty dict": (lambda p: torch.save({}, p), ["expected tensors in a state dict"]),
    "no tensors": (lambda p: torch.save({"model": {}, "config": {"top_k": 3}}, p),
                   ["expected tensors in a state dict"]),
    "another network": (lambda p: torch.save({"fc.weight": torch.ones(3, 3)}, p),
                        ["expected a checkpoint of a known family", "--from",
                         "found tensors like fc.weight"]),
}


def archive(path: Path, compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/notes.txt", "some text " * 100)


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, expected = OTHER_FILES[name]
    write(tmp_path / "source.pt")
    assert_rejected(tmp_path / "source.pt", capsys, f"{tmp_path / 'source.pt'}: ", *expected)


class Call:
    """Pickles as a function call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call, self.arguments


@pytest.mark.parametrize(("call", "name"), [
    (os.system, f"'{os.system.__module__}.system'"), (os.remove, f"'{os.remove.__module__}.remove'"),
    (subprocess.check_output, ".check_output'"),  # of a module with another name in Python 2
    (builtins.exec, "exec'"), (np.load, "'numpy.load'")])
@pytest.mark.parametrize("where", ["state dict", "other entry", "whole file"])
def test_code_is_not_run(call: Callable[..., Any], name: str, where: str, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    mark.write_text("still here")
    argument = {os.system: f"rm {mark}", subprocess.check_output: ["rm", str(mark)], os.remove: str(mark),
                builtins.exec: f"open({str(mark)!r}, 'w')"}.get(call, str(mark))
    call_object = Call(call, argument)
    good = as_torch(tree())
    bad = {"state dict": {**good, "model": {**good["model"], "extra": call_object}},
           "other entry": {**good, "args": {"deep": [call_object]}}, "whole file": call_object}[where]
    torch.save(bad, tmp_path / "source.pt")
    assert_rejected(tmp_path / "source.pt", capsys, f"{tmp_path / 'source.pt'}: not loaded: ", name)
    assert run("--inspect", tmp_path / "source.pt") == 2
    assert_one_line(capsys.readouterr().err, name)
    assert mark.read_text() == "still here"


UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "a module": lambda: torch.nn.Linear(2, 2), "arguments": lambda: argparse.Namespace(lr=1e-3),
    "a path": lambda: pathlib.PurePosixPath("data"), "objects": lambda: np.array([{"a": 1}], object),
    "complex numbers": lambda: torch.zeros(2, dtype=torch.complex64),
    "complex NumPy numbers": lambda: np.zeros(2, complex),
    "a date": lambda: np.array("2020-01-01", "M8[D]"),
    "8-bit floats": lambda: torch.zeros(2).to(torch.float8_e4m3fn),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a tensor without data": lambda: torch.zeros(2, device="meta"), "a cycle": lambda: loop()}


def loop() -> dict[str, Any]:
    tree_arguments: dict[str, Any] = {}
    tree_arguments["again"] = tree_arguments
    return tree_arguments


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("where", ["state dict", "other entry"])
def test_unsupported_objects_are_rejected(name: str, where: str, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The error is one line and does not repeat PyTorch's advice to disable weights_only."""
    bad = as_torch(tree())
    (bad["model"] if where == "state dict" else bad)["odd"] = UNSUPPORTED[name]()
    torch.save(bad, tmp_path / "source.pt")
    before = sorted(tmp_path.iterdir())
    assert run(tmp_path / "source.pt", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert_one_line(err, f"{tmp_path / 'source.pt'}: ")
    assert "weights_only" not in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [
    pytest.param(value, id=str(value)) for value in (
        torch.float32, torch.device("cpu"), torch.ones(2), np.ones(2), {1, 2}, b"x", {(1, 2): 3}, {3: "a"},
        (0.9, 0.95), float("nan"))])
def test_objects_allowed_in_a_configuration(value: Any, tmp_path: Path) -> None:
    """Values that the converter does not use, such as a dtype or a device, do not prevent the conversion."""
    torch.save(as_torch(tree()) | {"config": file_config(LITE) | {"odd": value}}, tmp_path / "source.pt")
    assert run(tmp_path / "source.pt", tmp_path / "out") == 0
    assert_holds(tmp_path / "out", LITE)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0


MATRIX = np.ones((3, 5), np.float32)
# name → arguments of `tree`, further command-line arguments, parts of the error line
NETWORKS: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str]]] = {
    "tensors missing and left over": (
        {"extra_tensors": {"extra": MATRIX, "blocks.0.more": MATRIX[0]},
         "without": ("blocks.1.dense.up.weight", "final_norm.bias")}, (),
        ["missing: blocks.1.dense.up.weight, final_norm.bias;", "not known: blocks.0.more, extra"]),
    "an embedding without columns": (
        {"extra_tensors": {"embed.weight": np.ones((11, 0), np.float32)}}, (),
        ["source.pt: embed.weight: expected a matrix that is not empty, found (11, 0)"]),
    "a superscript for a number": (
        {"extra_tensors": {"blocks.0.²": MATRIX}}, (), ["not known: blocks.0.²"]),
    "a block that is missing": ({"without": ("blocks.0.",)}, (), ["blocks.0."]),
    "no embedding": ({"without": ("embed.weight",)}, (), ["missing: embed.weight"]),
    "no final norm": ({"without": ("final_norm",)}, (), ["missing: final_norm.bias, final_norm.weight"]),
    "a block of another shape": ({"extra_tensors": {"blocks.1.dense.up.weight": MATRIX}}, (),
                                 ["of another shape: blocks.1.dense.up.weight (3, 5) instead of (16, 8)"]),
    "equal names after removing prefixes": ({"extra_tensors": {"base.unembed.weight": np.zeros((11, 8))}}, (),
                                            ["unembed.weight"]),
    **{f"a configuration of {key} {value!r}": (
        {"config": {key: value}}, (), [expected]) for key, value, expected in (
        ("n_heads", 3, "configuration: n_heads: expected 2, the value in the tensors, found 3"),
        ("d_model", 16, "d_model: expected 8, the value in the tensors, found 16"),
        ("n_layers", 3, "n_layers: expected 2, the value in the tensors, found 3"),
        ("vocab_size", 256, "vocab_size: expected 11"), ("dense_expand", 4, "dense_expand: expected 2"),
        ("kernel_size", 7, "kernel_size: expected 5"), ("top_k", "four", "top_k: expected an integer"),
        ("top_k", 0, "top_k: expected an integer ≥ 1"), ("head_reduction", "max", "head_reduction: "),
        ("quantize", "int8", "quantize: expected true, false or"), ("quantize", 1, "quantize: expected"),
        ("n_banks", None, "n_banks"), ("n_banks", "two", "n_banks"), ("n_banks", 0, "n_banks"),
        ("n_banks", 2, "n_banks"), ("n_banks", 1.5, "n_banks"))},
    **{f"--set {setting}": ({}, ("--set", setting), [expected]) for setting, expected in (
        ("top_j=3", "--set: unknown key 'top_j'"), ("top_k=many", "--set: top_k: expected an integer"),
        ("n_banks=two", "--set: n_banks: expected an integer"),
        ("n_banks=0", "n_banks: expected an integer ≥ 1"), ("n_banks=-1", "n_banks: expected an integer ≥ 1"),
        ("n_banks=[2]", "n_banks: expected an integer"),
        ("n_layers=3", "missing: blocks.2."), ("second_norm=mix", "norm2"),
        ("tie_embeddings=true", "not known: unembed.weight"),
        ("quantizer=int8", "quantizer: expected none or"), ("pathways=[local]", "not known: "),
        ("pathways=local", "pathways: expected a list"))},
    **{f"--from {name}": ({}, ("--from", name), [expected]) for name, expected in (
        ("vanilla", "missing: tok_embed.weight"), ("sae", "missing: W_enc"), ("lrd", "T: expected"),
        ("gpt_neox", "--from gpt_neox reads a Hugging Face directory"),
        ("t5", "--from t5 reads a Hugging Face directory"))},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_wrong_network(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree_arguments, arguments, expected = NETWORKS[name]
    source = save_pt(tmp_path / "source.pt", tree(**tree_arguments))
    assert_rejected(source, capsys, *expected, arguments=arguments)


def test_numpy_array_in_the_state_dict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown NumPy array in the state dict is reported, not ignored."""
    tree_arguments = as_torch(tree())
    tree_arguments["model"]["extra"] = np.ones(3)
    torch.save(tree_arguments, tmp_path / "source.pt")
    assert_rejected(tmp_path / "source.pt", capsys, "extra")


def test_existing_output(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tilelli_jax.save(network(LITE), tmp_path / "saved")
    (tmp_path / "back.pt").write_text("mine")
    assert run(tmp_path / "saved", tmp_path / "back.pt", "--to", "torch") == 2
    assert_one_line(capsys.readouterr().err, f"{tmp_path / 'back.pt'}: already exists; choose another OUT")
    assert (tmp_path / "back.pt").read_text() == "mine"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, f"{tmp_path / 'out'}: already exists; choose another OUT")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_file_truncated_while_reading(source: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    original_fromfile, reads = np.fromfile, []

    def fromfile(*arguments: Any) -> np.ndarray:
        reads.append(arguments)
        return original_fromfile(*arguments)[:-1] if len(reads) > 5 else original_fromfile(*arguments)

    monkeypatch.setattr(np, "fromfile", fromfile)
    assert_rejected(source, capsys, f"{source}: truncated inside a tensor")
    assert len(reads) == 6


@pytest.mark.parametrize("change", [
    {"note": {"\ud800": 1}}, {"note": ["\ud800"]}, {"optimizer\ud800": {"a": np.zeros(2)}},
    {"config": {"\ud800": 1}}, {"model": {"\ud800": np.zeros(2)}}])
def test_lone_surrogates_are_rejected(change: dict[str, Any], source: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    contents = tree()
    save_pt(source, {**contents, **{key: {**contents[key], **value} if key in contents else value
                                    for key, value in change.items()}})
    assert_rejected(source, capsys, f"{source}: expected text, found a lone surrogate")


@pytest.mark.parametrize("damage", [
    lambda record: "{", lambda record: "[]", lambda record: json.dumps({"names": 3}),
    lambda record: json.dumps({**record, "names": {"embed.kernel": "x"}}),
    lambda record: json.dumps({**record, "names": {**record["names"], "embed.kernel": ["x", "sideways"]}}),
    lambda record: json.dumps({**record, "names": {**record["names"], "embed.kernel": [["x"], "as it is"]}}),
    lambda record: json.dumps({**record, "names": {**record["names"], "embed.kernel": ["x", {"a": 1}]}}),
    lambda record: json.dumps({**record, "tied_duplicates": {"x": "no such tensor"}}),
    lambda record: json.dumps({**record, "original_names": {"x": 3}}),
    lambda record: json.dumps({**record, "other_entries": 3})],
    ids=["truncated", "list", "no names", "incomplete name", "unknown layout", "name is not text",
         "layout is not text", "duplicate of nothing", "original name is a number", "no other entries"])
def test_invalid_conversion_record(damage: Callable[[Any], str], source: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    """conversion.json edited by hand or from another version."""
    out = source.parent / "out"
    assert run(source, out) == 0
    record = out / "conversion.json"
    record.write_text(damage(json.loads(record.read_text())))
    capsys.readouterr()
    assert run(out, source.parent / "x.pt", "--to", "torch") == 2
    assert_one_line(capsys.readouterr().err, f"{record}: ")
    assert not (source.parent / "x.pt").exists()
