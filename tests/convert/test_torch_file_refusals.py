"""`.pt` files that are none, are damaged, would run code, or hold another network than they say."""

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
from tilelli_jax.convert import checkpoint

import tilelli_jax
from tests.convert.torch_files import (
    LITE,
    as_torch,
    assert_holds,
    network,
    run,
    said_of,
    save_pt,
    state_of,
    weights,
)
from tests.refusals import assert_one_line
from tilelli_jax.errors import InputError

torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
NO_FILE = "no PyTorch file, or cut off"


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pt(tmp_path_factory.mktemp("lite") / "lite.pt", tree())


@pytest.fixture
def source(lite: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copy(lite, tmp_path / "source.pt"))


def tree(said: dict[str, Any] | None = None, more: dict[str, Any] | None = None,
         without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a good file of Lite holds, with more tensors and without those whose names begin so."""
    state = {name: array for name, array in state_of(weights(LITE)).items()
             if not name.startswith(without)}
    return {"config": {**said_of(LITE), **(said or {})}, "model": {**state, **(more or {})}}


def refused(source: Path, capsys: pytest.CaptureFixture[str], *says: str,
            arguments: tuple[str, ...] = ()) -> None:
    before = sorted(source.parent.iterdir())
    assert run(source, source.parent / "out", *arguments) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, *says)
    assert out == ""
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize("length", [0, 1, 4, 100, 1000, 0.5, 0.9, -22, -1])
def test_a_file_that_is_cut_off(length: float, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = source.read_bytes()
    source.write_bytes(content[:int(len(content) * length) if isinstance(length, float) else length])
    refused(source, capsys, f"{source}: cannot be read: {NO_FILE}")


@pytest.mark.parametrize(("make", "found"), [
    (os.mkfifo, "a pipe"), (lambda path: path.symlink_to("/dev/zero"), "a device")])
def test_what_might_never_end_is_not_read(make: Callable[[Path], None], found: str, source: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    source.unlink()
    make(source)
    refused(source, capsys, f"{source}: cannot be read: expected a regular file, found {found}")


def test_a_damaged_tensor(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(source.read_bytes())
    numbers = weights(LITE)["blocks.1.dense.down.kernel"].T.tobytes()
    at = content.find(numbers)
    assert at > 0
    content[at + 5] ^= 1
    source.write_bytes(content)
    refused(source, capsys, f"{source}: cannot be read: ", "/data/", "is damaged (its checksum differs)")


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_a_damaged_byte_anywhere(bit: int, tmp_path: Path) -> None:
    """It is refused or changes nothing, as one of a date in the archive does; never a traceback."""
    path = save_pt(tmp_path / "x.pt", {"state_dict": {"a": np.arange(6.0), "b": np.ones((2, 3), np.float32)},
                                       "config": {"top_k": 3}})
    content = path.read_bytes()
    expected, found = told(checkpoint.read(path)), {}
    for at in range(0, len(content), 5):
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1:])
        try:
            found[at] = "same" if told(checkpoint.read(path)) == expected else "other numbers"
        except InputError as error:
            found[at] = "refused" if str(error).startswith(f"{path}: ") else str(error)
        except Exception as error:
            found[at] = repr(error)
    assert {"refused", "same"} <= set(found.values())
    assert not {at: one for at, one in found.items() if one not in ("refused", "same")}


def told(read: Any) -> Any:
    return read["config"], {name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
                            for name, tensor in read["state_dict"].items()}


OTHER_FILES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a pickle of old": (lambda p: torch.save(as_torch(tree()), p, _use_new_zipfile_serialization=False),
                        ["a pickle of PyTorch before 1.6"]),
    "text": (lambda p: p.write_text("no tensors here\n" * 100), [NO_FILE]),
    "an archive of something else": (lambda p: archive(p, zipfile.ZIP_STORED), ["cannot be read"]),
    "a compressed archive": (lambda p: archive(p, zipfile.ZIP_DEFLATED), ["compressed"]),
    "a list": (lambda p: torch.save([torch.ones(3)], p), ["expected a dict of tensors, found a list"]),
    "a tensor": (lambda p: torch.save(torch.ones(3), p), ["expected a dict of tensors, found a Tensor"]),
    "nothing": (lambda p: torch.save({}, p), ["holds no tensors"]),
    "no tensors": (lambda p: torch.save({"model": {}, "config": {"top_k": 3}}, p), ["holds no tensors"]),
    "another network": (lambda p: torch.save({"fc.weight": torch.ones(3, 3)}, p),
                        ["of no family known here (tensors like fc.weight)", "--from"]),
}


def archive(path: Path, compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/notes.txt", "some text " * 100)


@pytest.mark.parametrize("name", OTHER_FILES)
def test_another_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, says = OTHER_FILES[name]
    write(tmp_path / "source.pt")
    refused(tmp_path / "source.pt", capsys, f"{tmp_path / 'source.pt'}: ", *says)


class Runs:
    """Pickled as a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call, self.arguments


@pytest.mark.parametrize(("call", "name"), [
    (os.system, f"'{os.system.__module__}.system'"), (os.remove, f"'{os.remove.__module__}.remove'"),
    (subprocess.check_output, ".check_output'"),  # of a module that Python 2 called otherwise
    (builtins.exec, "exec'"), (np.load, "'numpy.load'")])
@pytest.mark.parametrize("where", ["in the state", "beside it", "in place of the file"])
def test_code_is_not_run(call: Callable[..., Any], name: str, where: str, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    mark.write_text("still here")
    argument = {os.system: f"rm {mark}", subprocess.check_output: ["rm", str(mark)], os.remove: str(mark),
                builtins.exec: f"open({str(mark)!r}, 'w')"}.get(call, str(mark))
    runs = Runs(call, argument)
    good = as_torch(tree())
    bad = {"in the state": {**good, "model": {**good["model"], "extra": runs}},
           "beside it": {**good, "args": {"deep": [runs]}}, "in place of the file": runs}[where]
    torch.save(bad, tmp_path / "source.pt")
    refused(tmp_path / "source.pt", capsys, f"{tmp_path / 'source.pt'}: refused: ", name)
    assert run("--inspect", tmp_path / "source.pt") == 2
    assert_one_line(capsys.readouterr().err, name)
    assert mark.read_text() == "still here"


ODD: dict[str, Callable[[], Any]] = {
    "a module": lambda: torch.nn.Linear(2, 2), "arguments": lambda: argparse.Namespace(lr=1e-3),
    "a path": lambda: pathlib.PurePosixPath("data"), "objects": lambda: np.array([{"a": 1}], object),
    "complex numbers": lambda: torch.zeros(2, dtype=torch.complex64),
    "complex numbers of NumPy's": lambda: np.zeros(2, complex),
    "a date": lambda: np.array("2020-01-01", "M8[D]"),
    "8-bit floats": lambda: torch.zeros(2).to(torch.float8_e4m3fn),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a tensor of no device": lambda: torch.zeros(2, device="meta"), "itself": lambda: loop()}


def loop() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["again"] = made
    return made


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("where", ["in the state", "beside it"])
def test_what_is_not_let_in(name: str, where: str, tmp_path: Path,
                            capsys: pytest.CaptureFixture[str]) -> None:
    """One line; PyTorch's advice to read the file without a guard is not passed on."""
    bad = as_torch(tree())
    (bad["model"] if where == "in the state" else bad)["odd"] = ODD[name]()
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
def test_what_a_configuration_may_hold(value: Any, tmp_path: Path) -> None:
    """Beside what we read of it: a type or a device, as training scripts leave them there."""
    torch.save(as_torch(tree()) | {"config": said_of(LITE) | {"odd": value}}, tmp_path / "source.pt")
    assert run(tmp_path / "source.pt", tmp_path / "out") == 0
    assert_holds(tmp_path / "out", LITE)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "torch") == 0


MANY = np.ones((3, 5), np.float32)
# name → what its file holds (the arguments of `tree`), more arguments, what the line says
NETWORKS: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str]]] = {
    "tensors missing and left over": (
        {"more": {"extra": MANY, "blocks.0.more": MANY[0]},
         "without": ("blocks.1.dense.up.weight", "final_norm.bias")}, (),
        ["missing: blocks.1.dense.up.weight, final_norm.bias;", "not known: blocks.0.more, extra"]),
    "a block that is missing": ({"without": ("blocks.0.",)}, (), ["blocks.0."]),
    "no embedding": ({"without": ("embed.weight",)}, (), ["missing: embed.weight"]),
    "no final norm": ({"without": ("final_norm",)}, (), ["missing: final_norm.bias, final_norm.weight"]),
    "a block of another shape": ({"more": {"blocks.1.dense.up.weight": MANY}}, (),
                                 ["of another shape: blocks.1.dense.up.weight (3, 5) instead of (16, 8)"]),
    "two names for one once prefixes are gone": ({"more": {"base.unembed.weight": np.zeros((11, 8))}}, (),
                                                 ["unembed.weight"]),
    **{f"a configuration of {key} {value!r}": ({"said": {key: value}}, (), [says]) for key, value, says in (
        ("n_heads", 3, "its configuration says n_heads 3, its tensors 2"),
        ("d_model", 16, "its configuration says d_model 16, its tensors 8"),
        ("n_layers", 3, "its configuration says n_layers 3, its tensors 2"),
        ("vocab_size", 256, "vocab_size 256"), ("dense_expand", 4, "dense_expand 4"),
        ("kernel_size", 7, "kernel_size 7"), ("top_k", "four", "top_k: expected a whole number"),
        ("top_k", 0, "top_k: expected a whole number ≥ 1"), ("head_reduction", "max", "head_reduction: "),
        ("quantize", "int8", "quantize: expected true, false or"), ("quantize", 1, "quantize: expected"),
        ("n_banks", None, "n_banks"), ("n_banks", "two", "n_banks"), ("n_banks", 0, "n_banks"),
        ("n_banks", 2, "n_banks"), ("n_banks", 1.5, "n_banks"))},
    **{f"--set {setting}": ({}, ("--set", setting), [says]) for setting, says in (
        ("top_j=3", "'top_j'"), ("top_k=many", "top_k: expected a whole number"),
        ("n_banks=two", "n_banks: expected a whole"), ("n_banks=0", "n_banks: expected a whole number ≥ 1"),
        ("n_banks=-1", "n_banks: expected a whole number ≥ 1"), ("n_banks=[2]", "n_banks: expected a whole"),
        ("n_layers=3", "missing: blocks.2."), ("second_norm=mix", "norm2"),
        ("tie_embeddings=true", "not known: unembed.weight"),
        ("quantizer=int8", "quantizer: expected none or"), ("pathways=[local]", "not known: "),
        ("pathways=local", "pathways: expected a list"))},
    **{f"--from {name}": ({}, ("--from", name), [says]) for name, says in (
        ("vanilla", "missing: tok_embed.weight"), ("sae", "missing: W_enc"), ("lrd", "T: expected"),
        ("gpt_neox", "--from gpt_neox reads a Hugging Face directory"),
        ("t5", "--from t5 reads a Hugging Face directory"))},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_another_network(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, arguments, says = NETWORKS[name]
    refused(save_pt(tmp_path / "source.pt", tree(**made)), capsys, *says, arguments=arguments)


def test_an_array_among_the_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NumPy's, in the state dict: it is none of the network's, and not passed over in silence."""
    made = as_torch(tree())
    made["model"]["extra"] = np.ones(3)
    torch.save(made, tmp_path / "source.pt")
    refused(tmp_path / "source.pt", capsys, "extra")


def test_out_is_there_already(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_file_that_is_changed_while_it_is_read(source: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    real, asked = np.fromfile, []

    def fromfile(*given: Any) -> np.ndarray:
        asked.append(given)
        return real(*given)[:-1] if len(asked) > 5 else real(*given)

    monkeypatch.setattr(np, "fromfile", fromfile)
    refused(source, capsys, f"{source}: the file ends before one of its tensors")
    assert len(asked) == 6


@pytest.mark.parametrize("change", [
    {"note": {"\ud800": 1}}, {"note": ["\ud800"]}, {"optimizer\ud800": {"a": np.zeros(2)}},
    {"config": {"\ud800": 1}}, {"model": {"\ud800": np.zeros(2)}}])
def test_texts_that_no_file_takes(change: dict[str, Any], source: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    whole = tree()
    save_pt(source, {**whole, **{key: {**whole[key], **value} if key in whole else value
                                 for key, value in change.items()}})
    refused(source, capsys, f"{source}: expected text, found half a character (a lone surrogate)")


@pytest.mark.parametrize("spoil", [
    lambda record: "{", lambda record: "[]", lambda record: json.dumps({"names": 3}),
    lambda record: json.dumps({**record, "names": {"embed.kernel": "x"}}),
    lambda record: json.dumps({**record, "names": {**record["names"], "embed.kernel": ["x", "sideways"]}}),
    lambda record: json.dumps({**record, "names": {**record["names"], "embed.kernel": [["x"], "as it is"]}}),
    lambda record: json.dumps({**record, "names": {**record["names"], "embed.kernel": ["x", {"a": 1}]}}),
    lambda record: json.dumps({**record, "doubled": {"x": "no such tensor"}}),
    lambda record: json.dumps({**record, "called": {"x": 3}}),
    lambda record: json.dumps({**record, "rest": 3})],
    ids=["cut off", "a list", "no names", "half a name", "an unknown layout", "no text", "no layout",
         "twice nothing", "called a number", "no rest"])
def test_a_record_that_is_none(spoil: Callable[[Any], str], source: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """conversion.json, edited by hand or of another version."""
    out = source.parent / "out"
    assert run(source, out) == 0
    record = out / "conversion.json"
    record.write_text(spoil(json.loads(record.read_text())))
    capsys.readouterr()
    assert run(out, source.parent / "x.pt", "--to", "torch") == 2
    assert_one_line(capsys.readouterr().err, f"{record}: ")
    assert not (source.parent / "x.pt").exists()
