"""What the command refuses: one line that begins with "error: ", status 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import safetensors.numpy
from tilelli_jax.convert.command import main

import tilelli_jax
from tests.refusals import assert_one_line
from tests.restated.random_weights import random_network
from tilelli_jax import files, tensors
from tilelli_jax.errors import InputError
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.tensors import INDEX, TENSORS, Tensor, in_memory, write_directory

LITE = RoutedConfig(vocab_size=11, d_model=8, n_layers=2, max_seq_len=6, n_heads=2, d_head=4, top_k=3,
                    dense_expand=2)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def everything(path: Path) -> dict[str, bytes | None]:
    """What is below a directory; None for a directory."""
    return {str(one.relative_to(path)): one.read_bytes() if one.is_file() else None
            for one in sorted(path.rglob("*"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a Hugging Face directory; `shards`, the same in several files; `model` and `lite`, ours."""
    path = tmp_path_factory.mktemp("made")
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
def there(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def config(path: Path, **changes: Any) -> None:
    tree = json.loads((path / "config.json").read_text())
    tree = {key: value for key, value in {**tree, **changes}.items() if value != "gone"}
    (path / "config.json").write_text(json.dumps(tree))


def cut(path: Path, length: int) -> None:
    content = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(content[:length] if length >= 0 else content[:len(content) + length])


def changed(path: Path, **arrays: np.ndarray | None) -> None:
    """Adds or removes tensors; `__` in a name is a dot."""
    found = safetensors.numpy.load_file(path / TENSORS)
    for name, array in arrays.items():
        if array is None:
            del found[name.replace("__", ".")]
        else:
            found[name.replace("__", ".")] = array
    safetensors.numpy.save_file(found, path / TENSORS)


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def say(path: Path, text: str) -> None:
    path.write_text(text)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


HF, OUT = "{there}/hf", "{there}/out"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HIGH = np.full((61, 24), 7e4, np.float32)
NAN = np.full((61, 24), np.nan, np.float32)
BACK = ["{there}/model", OUT, "--to", "torch"]
BACK_TO_A_FILE = ["{there}/lite", "{there}/x.pt", "--to", "torch"]
ONE, NEXT = np.ones(1, np.float32), np.ones((3, 5), np.float32)
# what is done to the directory, the arguments, and what the line says
SOURCES: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "nothing there": (lambda p: None, ["{there}/nowhere", OUT], ["{there}/nowhere: no such file or dir"]),
    "a safetensors file": (lambda p: None, [HF + "/model.safetensors", OUT],
                           ["{there}/hf/model.safetensors: expected its directory"]),
    "no config.json": (lambda p: (p / "hf/config.json").unlink(), [HF, OUT],
                       ["{there}/hf: ", "it has no config.json"]),
    "an empty directory": (lambda p: (p / "empty").mkdir(), ["{there}/empty", OUT],
                           ["{there}/empty: ", "it has no config.json"]),
    "a config.json that is none": (lambda p: say(p / "hf/config.json", "{"), [HF, OUT],
                                   ["{there}/hf/config.json: not JSON"]),
    "a config.json that is a list": (lambda p: say(p / "hf/config.json", "[]"), [HF, OUT],
                                     ["{there}/hf/config.json: expected an object"]),
    "a model type that is not known": (lambda p: config(p / "hf", model_type="llama"), [HF, OUT],
                                       ["{there}/hf: ", "'llama'", "gpt_neox, gemma4, t5", "--from"]),
    "no model type": (lambda p: config(p / "hf", model_type="gone"), [HF, OUT], ["{there}/hf: ", "--from"]),
    "a model type of another kind": (lambda p: config(p / "hf", model_type=["t5"]), [HF, OUT],
                                     ["{there}/hf: ", "['t5']"]),
    "a setting that is missing": (lambda p: config(p / "hf", hidden_size="gone"), [HF, OUT],
                                  ["{there}/hf/config.json: expected the key 'hidden_size'"]),
    "a setting of another kind": (lambda p: config(p / "hf", hidden_size="many"), [HF, OUT],
                                  ["{there}/hf/config.json: ", "d_model: expected a whole number"]),
    **{f"a setting that makes no sense: {key}": (
        lambda p, key=key, value=value: config(p / "hf", **{key: value}), [HF, OUT],
        ["{there}/hf/config.json: "])
       for key, value in {"rope_parameters": {"rope_theta": "wide"}, "rope_scaling": ["linear"],
                          "layer_norm_eps": None, "eos_token_id": 1.5}.items()},
    "rope parameters that are a list": (lambda p: config(p / "hf", rope_parameters=["default"]), [HF, OUT],
                                        ["{there}/hf/config.json: "]),
    "no tensors": (lambda p: (p / "hf" / TENSORS).unlink(), [HF, OUT], ["{there}/hf: ", "is missing"]),
    "other shapes": (lambda p: config(p / "hf", intermediate_size=41), [HF, OUT],
                     ["of another shape: gpt_neox.layers.0.mlp.dense_4h_to_h.weight (24, 40) instead of ",
                      "gpt_neox.layers.1.mlp.dense_h_to_4h.bias (40,) instead of (41,)"]),
    "tensors missing and left over": (
        lambda p: changed(p / "hf", extra=ONE, gpt_neox__more=NEXT, embed_out__weight=None,
                          gpt_neox__layers__1__mlp__dense_h_to_4h__bias=None), [HF, OUT],
        ["missing: embed_out.weight, gpt_neox.layers.1.mlp.dense_h_to_4h.bias;",
         "not known: extra, gpt_neox.more"]),
    **{f"a file cut off at {n}": (lambda p, n=n: cut(p / "hf", n), [HF, OUT],
                                  ["{there}/hf/model.safetensors: ", "cannot be read"])
       for n in (0, 1, 7, 8, 9, 500, 5000, -1000, -1)},
    "a shard that is missing": (lambda p: shards(p / "shards")[1].unlink(), ["{there}/shards", OUT],
                                ["{there}/shards: model-00002-of-", "is missing, which", INDEX]),
    "a shard in the place of another": (
        lambda p: shutil.copy(shards(p / "shards")[0], shards(p / "shards")[1]), ["{there}/shards", OUT],
        ["{there}/shards/model-00002-of-", "its tensors are not those that", "they differ by"]),
    "a shard that is cut off": (lambda p: shards(p / "shards")[2].write_bytes(b"\x00" * 100),
                                ["{there}/shards", OUT], ["{there}/shards/model-00003-of-", "no safeten"]),
    "an index that is none": (lambda p: say(p / "shards" / INDEX, "{}"), ["{there}/shards", OUT],
                              [INDEX, "weight_map"]),
    "an index of older files that are not there": (
        lambda p: ((p / "hf" / TENSORS).unlink(),
                   say(p / "hf/pytorch_model.bin.index.json", '{"weight_map": {"a": "part-1.bin"}}')),
        [HF, OUT], ["{there}/hf: part-1.bin is missing"]),
    "an index of nothing": (lambda p: say(p / "shards" / INDEX, '{"weight_map": {}}'),
                            ["{there}/shards", OUT],
                            [INDEX + ": weight_map: expected at least one tensor, found none"]),
    "an index of nothing in older files": (
        lambda p: ((p / "hf" / TENSORS).unlink(),
                   say(p / "hf/pytorch_model.bin.index.json", '{"weight_map": {}}')),
        [HF, OUT], ["pytorch_model.bin.index.json: weight_map: expected at least one tensor, found none"]),
    "a file of no tensors": (lambda p: safetensors.numpy.save_file({}, p / "hf" / TENSORS), [HF, OUT],
                             ["{there}/hf: expected tensors that fit this configuration, found none"]),
    "a weight of whole numbers": (
        lambda p: changed(p / "hf", embed_out__weight=np.ones((61, 24), np.int64)), [HF, OUT],
        ["{there}/hf: embed_out.weight: expected floating-point numbers, found int64"]),
    "a weight of ours of whole numbers": (
        lambda p: changed(p / "model", unembed__kernel=np.ones((24, 61), np.int8)), BACK,
        ["{there}/model: unembed.kernel: expected floating-point numbers, found int8"]),
    "a weight that is not finite": (
        lambda p: changed(p / "hf", embed_out__weight=NAN), [HF, OUT],
        ["error: {there}/hf: unembed.kernel: holds numbers that are not finite\n"]),
    "a weight of ours that is not finite": (
        lambda p: changed(p / "model", unembed__kernel=NAN.T.copy()), BACK,
        ["error: {there}/model: unembed.kernel: holds numbers that are not finite\n"]),
    "a weight that is too large": (
        lambda p: changed(p / "hf", embed_out__weight=HIGH), [HF, OUT, "--dtype", "float16"],
        ["error: {there}/hf: unembed.kernel: expected numbers that float16 can hold, found 70000 (and 14"]),
    "a weight of ours that is too large": (
        lambda p: changed(p / "model", unembed__kernel=HIGH.T.copy()), [*BACK, "--dtype", "float16"],
        ["error: {there}/model: unembed.kernel: expected numbers that float16 can hold, found 70000"]),
    "an end outside the vocabulary": (
        lambda p: config(p / "hf", eos_token_id=61), [HF, OUT],
        ["{there}/hf/config.json: eos_token_id: expected ids of the vocabulary, 0 to 60, found 61"]),
    "another end outside the vocabulary": (
        lambda p: say(p / "hf/generation_config.json", '{"eos_token_id": [1, -1]}'), [HF, OUT],
        ["{there}/hf/generation_config.json: eos_token_id: expected ids of the vocabulary, 0 to 60"]),
    "quantised weights": (
        lambda p: config(p / "hf", quantization_config={"quant_method": "bitsandbytes"}), [HF, OUT],
        ["{there}/hf/config.json: quantization_config: expected weights that are not quantised, found quan"]),
    **{f"a pipe called {name}": (lambda p, name=name: pipe(p / "hf" / name), [HF, OUT],
                                 [f"{name}: cannot be read: expected a regular file, found a pipe"])
       for name in (TENSORS, "config.json", "generation_config.json", "tokenizer.json")},
    "a pipe": (lambda p: pipe(p / "pipe.pt"), ["{there}/pipe.pt", OUT],
               ["{there}/pipe.pt: cannot be read: expected a regular file, found a pipe"]),
    "a link to itself": (lambda p: (p / "x.pt").symlink_to("x.pt"), ["{there}/x.pt", OUT],
                         ["{there}/x.pt: cannot be read: Too many levels of symbolic links"]),
    **{f"a pointer called {name}": (lambda p, name=name: say(p / "hf" / name, POINTER), [HF, OUT],
                                    [f"{{there}}/hf/{name}: is a git-lfs pointer, not the file"])
       for name in ("config.json", "generation_config.json", "tokenizer.json", "spiece.model")},
    "a pointer for an index": (lambda p: say(p / "shards" / INDEX, POINTER), ["{there}/shards", OUT],
                               ["{there}/shards/" + INDEX + ": is a git-lfs pointer, not the file"]),
    "a pointer beside a model of ours": (lambda p: say(p / "model/tokenizer.json", POINTER), BACK,
                                         ["{there}/model/tokenizer.json: is a git-lfs pointer"]),
    "a model directory": (lambda p: None, ["{there}/model", OUT], ["{there}/model: "]),
}
OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["SOURCE"]),
    "no OUT": ([HF], ["expected SOURCE and OUT"]),
    "too much": ([HF, OUT, "more"], ["more"]),
    "an option that is none": ([HF, OUT, "--fast"], ["--fast"]),
    "inspect with OUT": (["--inspect", HF, OUT], ["--inspect: expected SOURCE alone"]),
    "inspect with --to": (["--inspect", HF, "--to", "torch"], ["--inspect: expected SOURCE alone"]),
    "inspect of nothing": (["--inspect", "{there}/nowhere"], ["{there}/nowhere: no such file"]),
    "a type that is not known": ([HF, OUT, "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
    "a family that is none": ([HF, OUT, "--from", "llama"], ["--from: expected one of gpt_neox", "'llama'"]),
    **{f"of family {name}": ([HF, OUT, "--from", name], ["{there}/hf", says]) for name, says in {
        "t5": "model_type: expected t5, found 'gpt_neox'", "chronos": "model_type: expected t5",
        "gemma4": "model_type: expected gemma4_text", "sae": "missing: W_enc", "lrd": "T: expected",
        "vanilla": "missing: tok_embed.weight", "tilelli": "blocks.0", "atome": "blocks.0"}.items()},
    "a key that is not known": ([HF, OUT, "--set", "n_haeds=3"], ["'n_haeds'", "'n_heads'"]),
    "a value of another kind": ([HF, OUT, "--set", "n_heads=many"], ["n_heads: expected a whole number"]),
    "a value out of bounds": ([HF, OUT, "--set", "n_heads=0"], ["n_heads: expected a whole number ≥ 1"]),
    "a value that the tensors contradict": ([HF, OUT, "--set", "d_hidden=48"], ["of another shape: "]),
    "no value": ([HF, OUT, "--set", "n_heads"], ["'n_heads': expected key.subkey=value"]),
    "a map that is not there": ([HF, OUT, "--map", "{there}/nowhere"], ["{there}/nowhere: no such file"]),
    "OUT is SOURCE": ([HF, HF], ["{there}/hf: already exists"]),
    "OUT is there": ([HF, "{there}/lite"], ["{there}/lite: already exists"]),
    "OUT is a file": ([HF, "{there}/hf/config.json"], ["{there}/hf/config.json: already exists"]),
    "OUT below a file": ([HF, "{there}/hf/config.json/out"], ["config.json/out: cannot be written"]),
    "OUT where nothing can be written": ([HF, "/proc/out"], ["/proc/out: cannot be written"]),
    "to what is not known": (["{there}/model", OUT, "--to", "jax"], ["--to", "'jax'"]),
    "to, of a family": ([*BACK, "--from", "t5"], ["--to: expected no --from"]),
    "to, with a setting": ([*BACK, "--set", "a=1"], ["--to: expected no --from"]),
    "to, with a check": ([*BACK, "--check"], ["--check"]),
    "to, of nothing": (["{there}/nowhere", OUT, "--to", "torch"],
                       ["{there}/nowhere: expected a model directory", "nothing"]),
    "to, of a file": ([HF + "/config.json", OUT, "--to", "torch"], ["expected a model directory", "a file"]),
    "to, of theirs": ([HF, OUT, "--to", "torch"], ["{there}/hf: a Hugging Face directory, no model"]),
    "to, OUT there": (["{there}/model", HF, "--to", "torch"], ["{there}/hf: already exists"]),
    "to, a file of tensors for a Hugging Face family": (["{there}/model", "{there}/x.pt", "--to", "torch"],
                                                        ["{there}/x.pt"]),
    "to, a directory for a family of files": (["{there}/lite", OUT, "--to", "torch"],
                                              ["{there}/out: expected a file name that ends in .pt"]),
}
MAPS: dict[str, tuple[str, list[str]]] = {
    "no YAML": ("a: [", ["{map}: not YAML"]),
    "a list": ("- a", ["{map}: expected keys with values, found a list"]),
    "a number for a name": ("embed_out.weight: 3", ["{map}: expected lines of"]),
    "names that nothing has": ("'gpt_neox.layers.{i}.w': x.{i}\nembed_out.weight: embed_out.weight",
                               ["--map: no tensor is called 'gpt_neox.layers.{{i}}.w'"]),
    "one name for two": ("embed_out.weight: gpt_neox.embed_in.weight",
                         ["two tensors", "'gpt_neox.embed_in.weight'"]),
    "a number from nowhere": ("'gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias': 'x.{j}'", ["{j}"]),
    "a number twice": ("'gpt_neox.layers.{i}.mlp.{i}': x", ["{i}"]),
    "a number without a name": ("'gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias': 'x.{}'", ["{}"]),
    "a brace alone": ("'gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias': 'x.{'", ["x.{"]),
}


def refused(there: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], *says: str) -> None:
    before = everything(there)
    assert run(*(argument.format(there=there) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert_one_line(err, *says)
    assert out == ""
    assert everything(there) == before


@pytest.mark.parametrize("name", SOURCES)
def test_a_source(name: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, arguments, says = SOURCES[name]
    spoil(there)
    refused(there, capsys, arguments, *(part.replace("{there}", str(there)) for part in says))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, says = OPTIONS[name]
    refused(there, capsys, arguments, *(part.replace("{there}", str(there)) for part in says))


@pytest.mark.parametrize("name", MAPS)
def test_a_map(name: str, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, says = MAPS[name]
    (there / "map.yaml").write_text(text)
    refused(there, capsys, [HF, OUT, "--map", "{there}/map.yaml"],
            *(part.replace("{map}", f"{there}/map.yaml").replace("{{i}}", "{i}") for part in says))


@pytest.mark.parametrize(("directory", "out"), [("model", "out"), ("lite", "x.pt")])
@pytest.mark.parametrize(("changes", "says"), [
    ({"extra": ONE, "blocks__0__more": NEXT}, ["extra", "blocks.0.more"]),
    ({"final_norm__bias": None, "embed__kernel": None}, ["missing: embed.kernel, final_norm.bias"]),
    ({"embed__kernel": NEXT}, ["of another shape: embed.kernel (3, 5) instead of"])])
def test_a_model_directory_that_is_not_whole(directory: str, out: str, changes: dict[str, Any],
                                             says: list[str], there: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """None may come to be a checkpoint that others cannot read."""
    changed(there / directory, **changes)
    refused(there, capsys, ["{there}/" + directory, "{there}/" + out, "--to", "torch"], *says)


@pytest.mark.parametrize("length", [0, 8, 500, -1])
def test_a_model_directory_that_is_cut_off(length: int, there: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    cut(there / "model", length)
    refused(there, capsys, BACK, f"{there}/model/model.safetensors: ")


FAILURES = [InputError("the file ends before it"), OSError(errno.EIO, "Input/output error"),
            KeyboardInterrupt()]


@pytest.mark.parametrize("arguments", [[HF, OUT], ["{there}/shards", OUT], BACK, BACK_TO_A_FILE],
                         ids=["in", "in, from shards", "back", "back to a file"])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_reading_that_fails_in_the_middle(failure: BaseException, arguments: list[str], there: Path,
                                          monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[1].endswith(".pt"):
        pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    real, asked = tensors._entry, []

    def entry(*given: Any) -> Tensor:
        tensor = real(*given)

        def parts() -> Iterator[np.ndarray]:
            asked.append(given[1])
            if len(asked) > 10:
                raise failure
            yield from tensor.parts()

        return Tensor(tensor.shape, tensor.dtype, parts)

    monkeypatch.setattr(tensors, "_entry", entry)
    before = everything(there)
    assert run(*(argument.format(there=there) for argument in arguments)) == (
        130 if isinstance(failure, KeyboardInterrupt) else 2)
    assert len(asked) == 11
    err = capsys.readouterr().err
    if isinstance(failure, KeyboardInterrupt):
        assert err == "interrupted\n"
    else:
        assert_one_line(err, str(failure.args[-1]))
    assert everything(there) == before


@pytest.mark.parametrize("arguments", [[HF, OUT], BACK, BACK_TO_A_FILE], ids=["in", "back", "back to a file"])
def test_a_disk_that_is_full(arguments: list[str], there: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[1].endswith(".pt"):
        pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")

    def put(content: Any, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_put", put)
    out = arguments[1].format(there=there)
    refused(there, capsys, arguments, f"{out}: cannot be written: No space left on device")
