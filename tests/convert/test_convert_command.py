"""The convert command: Hugging Face directories to model directories and back."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.extras import needs_transformers
from tests.models.test_llama import GEMMA3, LLAMA, LLAMA3, MISTRAL, QWEN2, QWEN3
from tests.reference_impl.comparison import assert_same_weights
from tests.reference_impl.random_weights import random_weights
from tests.references import STORED, needs
from tilelli_jax.convert.command import main
from tilelli_jax.io import tensors
from tilelli_jax.io.tensors import INDEX, TENSORS
from tilelli_jax.loading import store
from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models import FAMILIES
from tilelli_jax.models.arrays import abstract_arrays, to_arrays
from tilelli_jax.models.chronos import ChronosConfig
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.models.t5 import T5Config
from tilelli_jax.pretrained import mapping

GPT_NEOX = GPTNeoXConfig(vocab_size=61, d_model=24, n_layers=2, max_seq_len=32, n_heads=3, d_hidden=40)
GEMMA4 = Gemma4Config(
    vocab_size=61, d_model=24, layers=("sliding", "full", "sliding", "full"), max_seq_len=64, n_heads=4,
    n_kv_heads=2, d_head=6, n_kv_heads_full=2, d_head_full=12, window=5, n_shared_layers=2, d_hidden=20,
    d_per_layer=4, vocab_per_layer=61)
T5 = T5Config(vocab_size=50, d_model=12, n_layers=2, n_decoder_layers=3, n_heads=3, d_head=5, d_hidden=20)
NETWORKS: dict[str, Any] = {
    "gpt_neox": GPT_NEOX,
    "gpt_neox, in sequence and tied": dataclasses.replace(GPT_NEOX, parallel_residual=False,
                                                          tie_embeddings=True),
    "gemma4": GEMMA4,
    "gemma4, experts": dataclasses.replace(GEMMA4, d_per_layer=0, n_shared_layers=0, key_is_value=True,
                                           n_kv_heads_full=1, n_experts=6, experts_per_token=2, d_expert=8),
    "t5": T5,
    "t5, untied": dataclasses.replace(T5, tie_embeddings=False, scale_decoder_outputs=False),
    "t5, untied and scaled": dataclasses.replace(T5, tie_embeddings=False),
    "t5, tied and not scaled": dataclasses.replace(T5, scale_decoder_outputs=False),
    "t5, gated": dataclasses.replace(T5, activation="gelu_tanh", gated=True, tie_embeddings=False,
                                     scale_decoder_outputs=False),
    "llama": dataclasses.replace(LLAMA, rotary_scaling=LLAMA3),
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "chronos": dataclasses.replace(T5, chronos=ChronosConfig(n_tokens=50, context_length=20,
                                                             prediction_length=6, low_limit=-2.0)),
}
REFERENCES = ["pythia_tiny/parallel", "gemma4_tiny/e4b", "gemma4_tiny/e2b", "chronos_tiny/model",
              "recall_cases/tiny_gemma4_with_tokenizer", "difficulty/tiny_world/tiny_base"]
SLOW_REFERENCES = ["gemma4_tiny/e2b", "recall_cases/tiny_gemma4_with_tokenizer",
                   "difficulty/tiny_world/tiny_base"]
SIMILAR = ("t5, untied", "t5, gated", "mistral", "qwen2", "qwen3")
SMALL = ["gpt_neox", "gemma4", "chronos"]
COMPANIONS = {"tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}",
              "special_tokens_map.json": b"[]", "generation_config.json": b'{"eos_token_id": 1}',
              "spiece.model": b"\x00\xff", "chat_template.jinja": "{{ é }}".encode()}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
    config = NETWORKS[name]
    leaves = abstract_arrays(FAMILIES[config.family][1], config)
    return random_weights({key: leaf.shape for key, leaf in leaves.items()}, 0)


@functools.cache
def network(name: str, dtype: str = "float32") -> Any:
    """The network with random weights, rounded to `dtype`."""
    kind = tensors.DTYPES["BF16" if dtype == "bfloat16" else "F32"]
    return from_arrays(NETWORKS[name],
                       {key: np.float32(array.astype(kind)) for key, array in weights(name).items()})


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A Hugging Face directory of the network and type in the test's parameter."""
    name, dtype = request.param
    network(name, dtype).save_pretrained(tmp_path / "source", dtype=dtype)
    return tmp_path / "source"


def stored(path: Path) -> dict[str, np.ndarray]:
    return {name: array for file in path.glob("*.safetensors")
            for name, array in safetensors.numpy.load_file(file).items()}


def assert_same_arrays(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        assert actual[name].tobytes() == array.tobytes(), name


def config_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())


def file_contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("source", "name", "dtype"), [
    pytest.param((name, dtype), name, dtype, id=f"{name}-{dtype}", marks=[pytest.mark.exhaustive] * (
        (dtype == "bfloat16" and name != "t5") or name in SIMILAR))  # for others see test_dtype
    for name in NETWORKS for dtype in ("float32", "bfloat16")], indirect=["source"])
def test_round_trip(source: Path, name: str, dtype: str, tmp_path: Path) -> None:
    """The weights are bitwise equal, and converting back restores tensors and configuration."""
    assert run(source, tmp_path / "out") == 0
    model = tilelli_jax.load(tmp_path / "out")
    assert model.config == NETWORKS[name]
    assert_same_weights(model, network(name, dtype))
    assert {str(array.dtype) for array in stored(tmp_path / "out").values()} == {dtype}
    assert run(tmp_path / "out", tmp_path / "back", "--to", "torch") == 0
    assert_same_arrays(stored(tmp_path / "back"), stored(source))
    assert config_of(tmp_path / "back") == config_of(source)
    assert file_contents(tmp_path / "back").keys() == {"config.json", TENSORS}


@needs(STORED)
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.exhaustive] * (name in SLOW_REFERENCES)) for name in REFERENCES])
def test_round_trip_of_transformers_directories(name: str, tmp_path: Path) -> None:
    """Directories written by transformers, one in float16: tensors are restored bitwise."""
    source = STORED / name
    assert run(source, tmp_path / "out") == 0
    assert run(tmp_path / "out", tmp_path / "back", "--to", "torch") == 0
    assert_same_arrays(stored(tmp_path / "back"), stored(source))
    assert file_contents(tmp_path / "back").keys() == {
        path.name for path in source.iterdir() if not re.search("npz$|keys", path.name)}
    original = config_of(source)
    assert original.get("text_config", original).keys() <= config_of(tmp_path / "back").keys()
    assert run(tmp_path / "back", tmp_path / "again") == 0
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")
    assert_same_arrays(stored(tmp_path / "again"), stored(tmp_path / "out"))


@pytest.mark.parametrize(("source", "name"), [pytest.param((name, "float32"), name, id=name)
                                              for name in SMALL], indirect=["source"])
def test_sharded_directories_both_ways(source: Path, name: str, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stored(source)
    # The default is bound when the function is defined, so it is patched in __kwdefaults__.
    monkeypatch.setitem(tensors.write_directory.__kwdefaults__, "shard_bytes", 4000)
    network(name).save_pretrained(tmp_path / "shards")
    shards = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert run(tmp_path / "shards", tmp_path / "out") == 0
    assert (tmp_path / "out" / INDEX).is_file() and not (tmp_path / "out" / TENSORS).exists()
    assert_same_weights(tilelli_jax.load(tmp_path / "out"), network(name))
    assert run(tmp_path / "out", tmp_path / "back", "--to", "torch") == 0
    assert config_of(tmp_path / "back") == config_of(source)
    index = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]
    assert index.keys() == expected.keys() and len(set(index.values())) > 3
    assert_same_arrays(stored(tmp_path / "back"), expected)


@pytest.mark.parametrize("source", [("llama", "float32")], indirect=True)
def test_rotary_settings_of_older_versions(source: Path, tmp_path: Path) -> None:
    """Before transformers 5, rope_theta stood beside rope_scaling; kinds had the key type."""
    tree = config_of(source)
    rope = tree.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for key in ("rope_type", "type"):
        (source / "config.json").write_text(json.dumps({
            **tree, "rope_theta": theta, "rope_scaling": {key: kind, **rope}}))
        assert run(source, tmp_path / key) == 0
        assert tilelli_jax.load(tmp_path / key).config == NETWORKS["llama"]
        assert run(tmp_path / key, tmp_path / f"{key} back", "--to", "torch") == 0
        assert tilelli_jax.load(tmp_path / f"{key} back").config == NETWORKS["llama"]
        assert_same_arrays(stored(tmp_path / f"{key} back"), stored(source))


@pytest.mark.parametrize("source", [("t5", "float32")], indirect=True)
def test_unknown_configuration_keys_are_restored(source: Path, tmp_path: Path) -> None:
    extra_keys = {"dropout_rate": 0.25, "task_specific_params": {"summarize": {"prefix": "é"}}}
    original = {**config_of(source), **extra_keys}
    (source / "config.json").write_text(json.dumps(original))
    assert run(source, tmp_path / "out", "--set", "norm_eps=1e-3") == 0
    assert run(tmp_path / "out", tmp_path / "back", "--to", "torch") == 0
    assert config_of(tmp_path / "back") == {**original, "layer_norm_epsilon": 1e-3}
    # After the network was replaced by hand, the extra keys no longer apply.
    config = config_of(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "norm_eps": 2e-3}))
    assert run(tmp_path / "out", tmp_path / "other", "--to", "torch") == 0
    assert not extra_keys.keys() & config_of(tmp_path / "other").keys()


@pytest.mark.parametrize("source", [("gpt_neox", "float32")], indirect=True)
def test_tokenizer_files_are_copied(source: Path, tmp_path: Path) -> None:
    for name, content in COMPANIONS.items():
        (source / name).write_bytes(content)
    (source / "README.md").write_text("not copied")
    (source / "optimizer.pt").write_bytes(b"no")
    assert run(source, tmp_path / "out") == 0
    out = file_contents(tmp_path / "out")
    assert out.keys() == {"README.md", "config.json", TENSORS, "conversion.json", *COMPANIONS}
    assert b"Converted from source, of the family gpt_neox." in out["README.md"]
    assert all(out[name] == content for name, content in COMPANIONS.items())
    assert run(tmp_path / "out", tmp_path / "back", "--to", "torch") == 0
    back = file_contents(tmp_path / "back")
    assert back.keys() == {"config.json", TENSORS, *COMPANIONS}
    assert all(back[name] == content for name, content in COMPANIONS.items())


@pytest.mark.parametrize(("source", "name"), [pytest.param((name, "float32"), name, id=name)
                                              for name in SMALL], indirect=["source"])
def test_dtype(source: Path, name: str, tmp_path: Path) -> None:
    """`--dtype` rounds when converting and when converting back."""
    expected = {key: array.astype(tensors.DTYPES["BF16"]) for key, array in stored(source).items()}
    assert run(source, tmp_path / "small", "--dtype", "bfloat16") == 0
    assert_same_weights(tilelli_jax.load(tmp_path / "small"), network(name, "bfloat16"))
    assert run(tmp_path / "small", tmp_path / "one", "--to", "torch") == 0
    assert run(source, tmp_path / "full") == 0
    assert run(tmp_path / "full", tmp_path / "two", "--to", "torch", "--dtype", "bfloat16") == 0
    for back in ("one", "two"):
        assert_same_arrays(stored(tmp_path / back), expected)
        assert config_of(tmp_path / back) == config_of(source) | {"dtype": "bfloat16",
                                                                  "torch_dtype": "bfloat16"}
    assert run(tmp_path / "small", tmp_path / "wide", "--to", "torch", "--dtype", "float32") == 0
    assert_same_arrays(stored(tmp_path / "wide"),
                       {key: np.float32(array) for key, array in expected.items()})


@pytest.mark.parametrize(("source", "name"), [pytest.param((name, "float32"), name, id=name)
                                              for name in SMALL], indirect=["source"])
def test_inspect(source: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lists every tensor, what it becomes, and the configuration; writes nothing."""
    arrays = stored(source) | {"spare.weight": np.ones((2, 3), np.float16)}
    safetensors.numpy.save_file(arrays, source / TENSORS)
    before = file_contents(tmp_path)
    assert run("--inspect", source) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    for key, array in arrays.items():
        assert " ".join(rows[key].split()).startswith(
            f"{key} {'×'.join(map(str, array.shape)) or 'scalar'} {array.dtype} "), key
    ours = to_arrays(network(name))
    assert all(re.search(rf" {re.escape(key)}($| )", out, re.MULTILINE) for key in ours)
    assert rows["spare.weight"].endswith("not known")
    assert f"{len(arrays)} tensors, {sum(array.size for array in arrays.values()):,} numbers" in out
    assert f"family {NETWORKS[name].family}" in out and f"d_model: {NETWORKS[name].d_model}\n" in out
    assert out.splitlines()[-1].startswith("cannot be converted: ") and "spare.weight" in out.splitlines()[-1]
    assert file_contents(tmp_path) == before


@pytest.mark.parametrize("source", [("gpt_neox", "float32")], indirect=True)
def test_inspect_explains_an_ignored_tensor(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = stored(source) | {"gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), bool)}
    safetensors.numpy.save_file(arrays, source / TENSORS)
    assert run("--inspect", source) == 0
    out = capsys.readouterr().out
    assert re.search(r"^gpt_neox\.layers\.0\.attention\.bias +1×1×4×4 +bool +ignored: the causal mask", out,
                     re.MULTILINE)
    assert "cannot be converted" not in out


@pytest.mark.parametrize("source", [("gpt_neox", "float32")], indirect=True)
def test_companion_file_too_large(source: Path, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out") == 0
    capsys.readouterr()
    for directory, more in ((source, ()), (tmp_path / "out", ("--to", "torch"))):
        file = directory / "tokenizer.json"
        file.touch()
        os.truncate(file, 1 << 40)
        assert run(directory, tmp_path / "other", *more) == 2
        assert_one_line(capsys.readouterr().err, f"{file}: cannot be read: expected at most ")
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("source", [("t5", "float32")], indirect=True)
def test_inspect_of_an_unknown_family(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = set(stored(source))
    (source / "config.json").write_text('{"model_type": "falcon"}')
    assert run("--inspect", source) == 0
    out = capsys.readouterr().out
    assert names <= set(out.split())
    assert re.search("^cannot be converted: .*model_type 'falcon'", out, re.MULTILINE)


def largest_difference(out: str) -> float:
    """The largest difference that `--check` reports, relative to the largest output."""
    match = re.search(r"^largest difference from transformers [\d.]+: (\S+), with outputs up to (\S+);", out,
                      re.MULTILINE)
    assert match is not None, out
    return float(match[1]) / float(match[2])


@needs_transformers
@pytest.mark.parametrize(("source", "name"), [
    pytest.param((name, "float32"), name, id=name, marks=[pytest.mark.exhaustive] * (name != "gpt_neox"))
    for name in ("gpt_neox", "gemma4", "t5")], indirect=["source"])
def test_check(source: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--check") == 0
    assert largest_difference(capsys.readouterr().out) < 6e-5  # measured: 4e-7, 5e-6, 6e-7
    assert_same_weights(tilelli_jax.load(tmp_path / "out"), network(name))


@needs_transformers
@pytest.mark.parametrize("source", [("gpt_neox", "float32")], indirect=True)
def test_check_detects_differences(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "rough", "--check", "--dtype", "bfloat16") == 0
    assert 1e-3 < largest_difference(capsys.readouterr().out) < 0.1
    transposed = mapping.LAYOUTS["transposed"]  # from here on, square kernels are not transposed
    wrong = dataclasses.replace(transposed, ours=lambda a, to: a if a.shape == to else transposed.ours(a, to))
    monkeypatch.setitem(mapping.LAYOUTS, "transposed", wrong)
    assert run(source, tmp_path / "wrong", "--check") == 0
    assert largest_difference(capsys.readouterr().out) > 0.1


@pytest.mark.parametrize("source", [("gpt_neox", "float32")], indirect=True)
def test_empty_output_directory_is_accepted(source: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert run(source, tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"{tmp_path / 'out'}: gpt_neox, {len(stored(source))} arrays, ")
    shutil.rmtree(source)  # the result does not depend on the source
    assert_same_weights(tilelli_jax.load(tmp_path / "out"), network("gpt_neox"))
    assert run(tmp_path / "out", tmp_path / "deep" / "down" / "back", "--to", "torch") == 0
    assert (tmp_path / "deep" / "down" / "back" / TENSORS).is_file()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("back", [False, True])
def test_numbers_that_round_to_zero_are_counted(back: bool, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {key: array.astype(np.float32) for key, array in weights("gpt_neox").items()}
    arrays["unembed.kernel"] = np.full_like(arrays["unembed.kernel"], 1e-12)
    arrays["embed.kernel"][0, :3] = [1e-9, 0, 2.0]
    model = from_arrays(NETWORKS["gpt_neox"], arrays)
    source, out = tmp_path / "source", tmp_path / "out"
    tilelli_jax.save(model, source) if back else model.save_pretrained(source)
    arguments = [source, out, *(["--to", "torch"] if back else [])]
    assert run(*arguments, "--dtype", "float16") == 0
    expected = {key: int(((array.astype(np.float16) == 0) & (array != 0)).sum())
                for key, array in arrays.items()}
    total, unembed = sum(array.size for array in arrays.values()), arrays["unembed.kernel"].size
    assert expected["unembed.kernel"] == unembed and expected["embed.kernel"] >= 1
    assert capsys.readouterr().err == (
        f"note: {sum(expected.values()):,} of the {total:,} numbers are nonzero and become 0 in float16, "
        f"{unembed:,} of them in unembed.kernel\n")
    shutil.rmtree(out)
    assert run(*arguments) == 0 and capsys.readouterr().err == ""


def test_help_says_which_families_are_written_as_directories(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    directories = [name for name, (_, network) in store.FAMILIES.items()
                   if isinstance(network, type) and issubclass(network, PretrainedModel)]
    found = re.search(r"torch: the original layout, a \.pt file for (.*?), else the same as hf", shown)
    assert found and {*re.split(", | and ", found[1]), *directories} == store.FAMILIES.keys()
    assert f"the original layout: a .pt file for {found[1]}, else a Hugging Face directory" in shown
