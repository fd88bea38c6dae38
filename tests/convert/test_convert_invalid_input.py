"""Invalid input to the convert command: one line "error: …", exit status 2, no files left behind."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import safetensors.numpy

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax.convert.command import main
from tilelli_jax.errors import InputError
from tilelli_jax.io import files, tensors
from tilelli_jax.io.tensors import INDEX, TENSORS, Tensor, in_memory, write_directory
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig

LITE = RoutedConfig(vocab_size=11, d_model=8, n_layers=2, max_seq_len=6, n_heads=2, d_head=4, top_k=3,
                    dense_expand=2)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def contents_of(path: Path) -> dict[str, bytes | None]:
    """Relative path → content of all files below a directory; None for directories."""
    return {str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None
            for entry in sorted(path.rglob("*"))}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`: a Hugging Face directory; `shards`: the same, sharded; `model` and `lite`: model directories."""
    path = tmp_path_factory.mktemp("originals")
    model, _ = random_network(
        GPTNeoXConfig(vocab_size=61, d_model=24, n_layers=2, max_seq_len=32, n_heads=3, d_hidden=40), 0)
    model.save_pretrained(path / "hf")
    write_directory(path / "shards", {name: in_memory(array) for name, array in safetensors.numpy.load_file(
        path / "hf" / TENSORS).items()}, {"config.json": (path / "hf" / "config.json").read_bytes()},
                    writer="pt", shard_bytes=12_000)
    tilelli_jax.save(model, path / "model")
    tilelli_jax.save(random_network(LITE, 0)[0], path / "lite")
    return path


@pytest.fixture
def work_dir(originals: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit_config(path: Path, **changes: Any) -> None:
    """Changes keys of config.json; the value "deleted" removes a key."""
    tree = json.loads((path / "config.json").read_text())
    tree = {key: value for key, value in {**tree, **changes}.items() if value != "deleted"}
    (path / "config.json").write_text(json.dumps(tree))


def truncate(path: Path, length: int) -> None:
    """Cuts the tensor file to this length, or by this length if it is negative."""
    content = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(content[:length] if length >= 0 else content[:len(content) + length])


def edit_tensors(path: Path, **arrays: np.ndarray | None) -> None:
    """Adds or removes tensors; `__` in a name is a dot."""
    stored = safetensors.numpy.load_file(path / TENSORS)
    for name, array in arrays.items():
        if array is None:
            del stored[name.replace("__", ".")]
        else:
            stored[name.replace("__", ".")] = array
    safetensors.numpy.save_file(stored, path / TENSORS)


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


HF, OUT = "{dir}/hf", "{dir}/out"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
TOO_LARGE = np.full((61, 24), 7e4, np.float32)
NAN = np.full((61, 24), np.nan, np.float32)
BACK = ["{dir}/model", OUT, "--to", "torch"]
BACK_TO_A_FILE = ["{dir}/lite", "{dir}/x.pt", "--to", "torch"]
VECTOR, MATRIX = np.ones(1, np.float32), np.ones((3, 5), np.float32)
# name → damage to the directory, arguments, parts of the error line
SOURCES: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "no such path": (lambda p: None, ["{dir}/nowhere", OUT], ["{dir}/nowhere: no such file or dir"]),
    "a safetensors file": (lambda p: None, [HF + "/model.safetensors", OUT],
                           ["{dir}/hf/model.safetensors: expected its directory"]),
    "no config.json": (lambda p: (p / "hf/config.json").unlink(), [HF, OUT],
                       ["{dir}/hf: ", "config.json is missing"]),
    "an empty directory": (lambda p: (p / "empty").mkdir(), ["{dir}/empty", OUT],
                           ["{dir}/empty: ", "config.json is missing"]),
    "a config.json that is not JSON": (lambda p: write_text(p / "hf/config.json", "{"), [HF, OUT],
                                      ["{dir}/hf/config.json: not JSON"]),
    "a config.json that is a list": (lambda p: write_text(p / "hf/config.json", "[]"), [HF, OUT],
                                     ["{dir}/hf/config.json: expected an object"]),
    "a model type that is not known": (lambda p: edit_config(p / "hf", model_type="falcon"), [HF, OUT],
                                       ["{dir}/hf: ", "'falcon'", "gpt_neox, llama, gemma3", "--from"]),
    "no model type": (lambda p: edit_config(p / "hf", model_type="deleted"), [HF, OUT],
                      ["{dir}/hf: ", "--from"]),
    "a model type of the wrong type": (lambda p: edit_config(p / "hf", model_type=["t5"]), [HF, OUT],
                                       ["{dir}/hf: ", "['t5']"]),
    "a setting that is missing": (lambda p: edit_config(p / "hf", hidden_size="deleted"), [HF, OUT],
                                  ["{dir}/hf/config.json: expected the key 'hidden_size'"]),
    "a setting of the wrong type": (lambda p: edit_config(p / "hf", hidden_size="many"), [HF, OUT],
                                    ["{dir}/hf/config.json: ", "d_model: expected an integer"]),
    **{f"an invalid setting: {key}": (
        lambda p, key=key, value=value: edit_config(p / "hf", **{key: value}), [HF, OUT],
        ["{dir}/hf/config.json: "])
       for key, value in {"rope_parameters": {"rope_theta": "wide"}, "rope_scaling": ["linear"],
                          "layer_norm_eps": None, "eos_token_id": 1.5}.items()},
    "rope parameters that are a list": (
        lambda p: edit_config(p / "hf", rope_parameters=["default"]), [HF, OUT], ["{dir}/hf/config.json: "]),
    "no tensors": (lambda p: (p / "hf" / TENSORS).unlink(), [HF, OUT], ["{dir}/hf: ", "is missing"]),
    "other shapes": (lambda p: edit_config(p / "hf", intermediate_size=41), [HF, OUT],
                     ["of another shape: gpt_neox.layers.0.mlp.dense_4h_to_h.weight (24, 40) instead of ",
                      "gpt_neox.layers.1.mlp.dense_h_to_4h.bias (40,) instead of (41,)"]),
    "tensors missing and left over": (
        lambda p: edit_tensors(p / "hf", extra=VECTOR, gpt_neox__more=MATRIX, embed_out__weight=None,
                               gpt_neox__layers__1__mlp__dense_h_to_4h__bias=None), [HF, OUT],
        ["missing: embed_out.weight, gpt_neox.layers.1.mlp.dense_h_to_4h.bias;",
         "not known: extra, gpt_neox.more"]),
    **{f"a file truncated at {n}": (lambda p, n=n: truncate(p / "hf", n), [HF, OUT],
                                    ["{dir}/hf/model.safetensors: ", "cannot be read"])
       for n in (0, 1, 7, 8, 9, 500, 5000, -1000, -1)},
    "a shard that is missing": (lambda p: shards(p / "shards")[1].unlink(), ["{dir}/shards", OUT],
                                ["{dir}/shards: model-00002-of-", "is missing, which", INDEX]),
    "a shard in the place of another": (
        lambda p: shutil.copy(shards(p / "shards")[0], shards(p / "shards")[1]), ["{dir}/shards", OUT],
        ["{dir}/shards/model-00002-of-", "its tensors are not those that", "they differ by"]),
    "a damaged shard": (lambda p: shards(p / "shards")[2].write_bytes(b"\x00" * 100),
                        ["{dir}/shards", OUT], ["{dir}/shards/model-00003-of-", "not a safetensors file"]),
    "an index without weight_map": (lambda p: write_text(p / "shards" / INDEX, "{}"), ["{dir}/shards", OUT],
                                    [INDEX, "weight_map"]),
    "an index of missing .bin files": (
        lambda p: ((p / "hf" / TENSORS).unlink(),
                   write_text(p / "hf/pytorch_model.bin.index.json", '{"weight_map": {"a": "part-1.bin"}}')),
        [HF, OUT], ["{dir}/hf: part-1.bin is missing"]),
    "an empty index": (lambda p: write_text(p / "shards" / INDEX, '{"weight_map": {}}'),
                       ["{dir}/shards", OUT],
                       [INDEX + ": weight_map: expected at least one tensor, found none"]),
    "an empty index of .bin files": (
        lambda p: ((p / "hf" / TENSORS).unlink(),
                   write_text(p / "hf/pytorch_model.bin.index.json", '{"weight_map": {}}')),
        [HF, OUT], ["pytorch_model.bin.index.json: weight_map: expected at least one tensor, found none"]),
    "a file of no tensors": (lambda p: safetensors.numpy.save_file({}, p / "hf" / TENSORS), [HF, OUT],
                             ["{dir}/hf: expected tensors that fit this configuration, found none"]),
    "an integer weight": (
        lambda p: edit_tensors(p / "hf", embed_out__weight=np.ones((61, 24), np.int64)), [HF, OUT],
        ["{dir}/hf: embed_out.weight: expected floating-point numbers, found int64"]),
    "an integer weight in a model directory": (
        lambda p: edit_tensors(p / "model", unembed__kernel=np.ones((24, 61), np.int8)), BACK,
        ["{dir}/model: unembed.kernel: expected floating-point numbers, found int8"]),
    "a weight that is not finite": (
        lambda p: edit_tensors(p / "hf", embed_out__weight=NAN), [HF, OUT],
        ["error: {dir}/hf: unembed.kernel: contains numbers that are not finite\n"]),
    "a weight in a model directory that is not finite": (
        lambda p: edit_tensors(p / "model", unembed__kernel=NAN.T.copy()), BACK,
        ["error: {dir}/model: unembed.kernel: contains numbers that are not finite\n"]),
    "a weight that is too large": (
        lambda p: edit_tensors(p / "hf", embed_out__weight=TOO_LARGE), [HF, OUT, "--dtype", "float16"],
        ["error: {dir}/hf: unembed.kernel: expected numbers that float16 can hold, found 70000 (and 14"]),
    "a weight in a model directory that is too large": (
        lambda p: edit_tensors(p / "model", unembed__kernel=TOO_LARGE.T.copy()),
        [*BACK, "--dtype", "float16"],
        ["error: {dir}/model: unembed.kernel: expected numbers that float16 can hold, found 70000"]),
    "an end token outside the vocabulary": (
        lambda p: edit_config(p / "hf", eos_token_id=61), [HF, OUT],
        ["{dir}/hf/config.json: eos_token_id: expected ids of the vocabulary, 0 to 60, found 61"]),
    "an end token in generation_config.json outside the vocabulary": (
        lambda p: write_text(p / "hf/generation_config.json", '{"eos_token_id": [1, -1]}'), [HF, OUT],
        ["{dir}/hf/generation_config.json: eos_token_id: expected ids of the vocabulary, 0 to 60"]),
    "quantised weights": (
        lambda p: edit_config(p / "hf", quantization_config={"quant_method": "bitsandbytes"}), [HF, OUT],
        ["{dir}/hf/config.json: quantization_config: expected weights that are not quantised, found quan"]),
    **{f"a pipe called {name}": (lambda p, name=name: pipe(p / "hf" / name), [HF, OUT],
                                 [f"{name}: cannot be read: expected a regular file, found a pipe"])
       for name in (TENSORS, "config.json", "generation_config.json", "tokenizer.json")},
    "a pipe": (lambda p: pipe(p / "pipe.pt"), ["{dir}/pipe.pt", OUT],
               ["{dir}/pipe.pt: cannot be read: expected a regular file, found a pipe"]),
    "a link to itself": (lambda p: (p / "x.pt").symlink_to("x.pt"), ["{dir}/x.pt", OUT],
                         ["{dir}/x.pt: cannot be read: Too many levels of symbolic links"]),
    **{f"a pointer called {name}": (lambda p, name=name: write_text(p / "hf" / name, POINTER), [HF, OUT],
                                    [f"{{dir}}/hf/{name}: is a git-lfs pointer, not the file"])
       for name in ("config.json", "generation_config.json", "tokenizer.json", "spiece.model")},
    "a pointer for an index": (lambda p: write_text(p / "shards" / INDEX, POINTER), ["{dir}/shards", OUT],
                               ["{dir}/shards/" + INDEX + ": is a git-lfs pointer, not the file"]),
    "a pointer in a model directory": (lambda p: write_text(p / "model/tokenizer.json", POINTER), BACK,
                                       ["{dir}/model/tokenizer.json: is a git-lfs pointer"]),
    "a model directory": (lambda p: None, ["{dir}/model", OUT], ["{dir}/model: "]),
}
OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["SOURCE"]),
    "no OUT": ([HF], ["expected SOURCE and OUT"]),
    "too many arguments": ([HF, OUT, "more"], ["more"]),
    "an unknown option": ([HF, OUT, "--fast"], ["--fast"]),
    "inspect with OUT": (["--inspect", HF, OUT], ["--inspect: expected SOURCE alone"]),
    "inspect with --to": (["--inspect", HF, "--to", "torch"], ["--inspect: expected SOURCE alone"]),
    "inspect of a missing path": (["--inspect", "{dir}/nowhere"], ["{dir}/nowhere: no such file"]),
    "an unknown dtype": ([HF, OUT, "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
    "an unknown family": ([HF, OUT, "--from", "falcon"], ["--from: expected one of gpt_neox", "'falcon'"]),
    **{f"of family {name}": ([HF, OUT, "--from", name], ["{dir}/hf", expected]) for name, expected in {
        "t5": "model_type: expected t5, found 'gpt_neox'", "chronos": "model_type: expected t5",
        "gemma4": "model_type: expected gemma4_text", "sae": "missing: W_enc", "lrd": "T: expected",
        "vanilla": "missing: tok_embed.weight", "tilelli": "blocks.0", "atome": "blocks.0"}.items()},
    "an unknown key": ([HF, OUT, "--set", "n_haeds=3"], ["'n_haeds'", "'n_heads'"]),
    "a value of the wrong type": ([HF, OUT, "--set", "n_heads=many"], ["n_heads: expected an integer"]),
    "a value out of bounds": ([HF, OUT, "--set", "n_heads=0"], ["n_heads: expected an integer ≥ 1"]),
    "a value that the tensors contradict": ([HF, OUT, "--set", "d_hidden=48"], ["of another shape: "]),
    "no value": ([HF, OUT, "--set", "n_heads"], ["'n_heads': expected key.subkey=value"]),
    "a missing map": ([HF, OUT, "--map", "{dir}/nowhere"], ["{dir}/nowhere: no such file"]),
    "OUT is SOURCE": ([HF, HF], ["{dir}/hf: already exists"]),
    "OUT exists": ([HF, "{dir}/lite"], ["{dir}/lite: already exists"]),
    "OUT is a file": ([HF, "{dir}/hf/config.json"], ["{dir}/hf/config.json: already exists"]),
    "OUT below a file": ([HF, "{dir}/hf/config.json/out"], ["config.json/out: cannot be written"]),
    "OUT where nothing can be written": ([HF, "/proc/out"], ["/proc/out: cannot be written"]),
    "--to an unknown format": (["{dir}/model", OUT, "--to", "jax"], ["--to", "'jax'"]),
    "--to with --from": ([*BACK, "--from", "t5"], ["--to: expected no --from"]),
    "--to with --set": ([*BACK, "--set", "a=1"], ["--to: expected no --from"]),
    "--to with --check": ([*BACK, "--check"], ["--check"]),
    "--to of a missing path": (["{dir}/nowhere", OUT, "--to", "torch"],
                               ["{dir}/nowhere: expected a model directory", "nothing"]),
    "--to of a file": ([HF + "/config.json", OUT, "--to", "torch"], ["expected a model directory", "a file"]),
    "--to of a Hugging Face directory": ([HF, OUT, "--to", "torch"],
                                         ["{dir}/hf: a Hugging Face directory, not a m"]),
    "--to an existing OUT": (["{dir}/model", HF, "--to", "torch"], ["{dir}/hf: already exists"]),
    "--to a file for a Hugging Face family": (["{dir}/model", "{dir}/x.pt", "--to", "torch"],
                                              ["{dir}/x.pt"]),
    "--to a directory for a family of files": (["{dir}/lite", OUT, "--to", "torch"],
                                               ["{dir}/out: expected a file name that ends in .pt"]),
}
MAPS: dict[str, tuple[str, list[str]]] = {
    "not YAML": ("a: [", ["{map}: not YAML"]),
    "a list": ("- a", ["{map}: expected keys with values, found a list"]),
    "a number for a name": ("embed_out.weight: 3", ["{map}: expected lines of"]),
    "names that match no tensor": ("'gpt_neox.layers.{i}.w': x.{i}\nembed_out.weight: embed_out.weight",
                                   ["--map: expected names of tensors, found 'gpt_neox.layers.{{i}}.w'"]),
    "one name for two tensors": ("embed_out.weight: gpt_neox.embed_in.weight",
                                 ["expected unique tensor names", "'gpt_neox.embed_in.weight'"]),
    "an undefined number": ("'gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias': 'x.{j}'", ["{j}"]),
    "a number twice": ("'gpt_neox.layers.{i}.mlp.{i}': x", ["{i}"]),
    "a number without a name": ("'gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias': 'x.{}'", ["{}"]),
    "a brace alone": ("'gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias': 'x.{'", ["x.{"]),
}


def assert_rejected(work_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
                   *expected: str) -> None:
    before = contents_of(work_dir)
    assert run(*(argument.format(dir=work_dir) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, *expected)
    assert out == ""
    assert contents_of(work_dir) == before


@pytest.mark.parametrize("name", SOURCES)
def test_invalid_source(name: str, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, arguments, expected = SOURCES[name]
    damage(work_dir)
    assert_rejected(work_dir, capsys, arguments,
                   *(part.replace("{dir}", str(work_dir)) for part in expected))


@pytest.mark.parametrize("name", OPTIONS)
def test_invalid_options(name: str, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = OPTIONS[name]
    assert_rejected(work_dir, capsys, arguments,
                   *(part.replace("{dir}", str(work_dir)) for part in expected))


@pytest.mark.parametrize("name", MAPS)
def test_invalid_map(name: str, work_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = MAPS[name]
    (work_dir / "map.yaml").write_text(text)
    assert_rejected(work_dir, capsys, [HF, OUT, "--map", "{dir}/map.yaml"],
                   *(part.replace("{map}", f"{work_dir}/map.yaml").replace("{{i}}", "{i}")
                     for part in expected))


@pytest.mark.parametrize(("directory", "out"), [("model", "out"), ("lite", "x.pt")])
@pytest.mark.parametrize(("changes", "expected"), [
    ({"extra": VECTOR, "blocks__0__more": MATRIX}, ["extra", "blocks.0.more"]),
    ({"final_norm__bias": None, "embed__kernel": None}, ["missing: embed.kernel, final_norm.bias"]),
    ({"embed__kernel": MATRIX}, ["of another shape: embed.kernel (3, 5) instead of"])])
def test_model_directory_with_wrong_tensors(directory: str, out: str, changes: dict[str, Any],
                                            expected: list[str], work_dir: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Must not be written as a checkpoint that other programs cannot read."""
    edit_tensors(work_dir / directory, **changes)
    assert_rejected(work_dir, capsys, ["{dir}/" + directory, "{dir}/" + out, "--to", "torch"], *expected)


@pytest.mark.parametrize("length", [0, 8, 500, -1])
def test_truncated_model_directory(length: int, work_dir: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    truncate(work_dir / "model", length)
    assert_rejected(work_dir, capsys, BACK, f"{work_dir}/model/model.safetensors: ")


FAILURES = [InputError("truncated inside tensor w"), OSError(errno.EIO, "Input/output error"),
            KeyboardInterrupt()]


@pytest.mark.parametrize("arguments", [[HF, OUT], ["{dir}/shards", OUT], BACK, BACK_TO_A_FILE],
                         ids=["convert", "convert shards", "convert back", "convert back to a file"])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_reading_fails_midway(failure: BaseException, arguments: list[str], work_dir: Path,
                              monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[1].endswith(".pt"):
        pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    original_entry, parts_read = tensors._entry, []

    def entry(*entry_arguments: Any) -> Tensor:
        tensor = original_entry(*entry_arguments)

        def parts() -> Iterator[np.ndarray]:
            parts_read.append(entry_arguments[1])
            if len(parts_read) > 10:
                raise failure
            yield from tensor.parts()

        return Tensor(tensor.shape, tensor.dtype, parts)

    monkeypatch.setattr(tensors, "_entry", entry)
    before = contents_of(work_dir)
    assert run(*(argument.format(dir=work_dir) for argument in arguments)) == (
        130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert len(parts_read) == 11
    err = capsys.readouterr().err
    if isinstance(failure, KeyboardInterrupt):
        assert err == "interrupted\n"
    else:
        assert_one_line(err, str(failure.args[-1]))
    assert contents_of(work_dir) == before


@pytest.mark.parametrize(("package", "extra"), [("torch", "torch"), ("transformers", "hf")])
def test_check_without_an_optional_package(package: str, extra: str, work_dir: Path,
                                           monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """The command is rejected before anything is written."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (
        None if name == package else find(name) if name not in ("torch", "transformers") else find("json")))
    assert_rejected(work_dir, capsys, [HF, OUT, "--check"],
                   f"--check needs {package}: pip install 'tilelli_jax[{extra}]'")


@pytest.mark.parametrize("arguments", [[HF, OUT], BACK, BACK_TO_A_FILE],
                         ids=["convert", "convert back", "convert back to a file"])
def test_full_disk(arguments: list[str], work_dir: Path, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[1].endswith(".pt"):
        pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")

    def write_half(content: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_put", write_half)
    out = arguments[1].format(dir=work_dir)
    assert_rejected(work_dir, capsys, arguments, f"{out}: cannot be written: No space left on device")
