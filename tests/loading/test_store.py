"""Model directories: round trips are exact, and interrupted writes leave a consistent directory."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tilelli_jax
from tests.kill_points import kill_at_every_file_operation
from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.io import files, tensors
from tilelli_jax.loading import store
from tilelli_jax.loading.store import from_arrays, load, save
from tilelli_jax.models import ModelConfig, freeze
from tilelli_jax.models.arrays import check_sizes, to_arrays
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.t5 import T5Config
from tilelli_jax.models.vanilla import VanillaConfig

SMALL = VanillaConfig(d_model=8, n_layers=2, max_seq_len=6, n_heads=2, dense_expand=2)
GEMMA4 = Gemma4Config(layers=("full",), n_shared_layers=0)
QUANTIZERS = ["none", "ternary", "ternary_row", "hadamard", "lsq", "power3", "power3_row"]


def equal(result: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    return result.keys() == expected.keys() and all(
        result[name].dtype == expected[name].dtype and result[name].shape == expected[name].shape
        and result[name].tobytes() == expected[name].tobytes() for name in expected)


def listing(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


routed = st.builds(
    RoutedConfig, vocab_size=st.just(32), d_model=st.sampled_from([8, 12]), n_layers=st.integers(1, 3),
    max_seq_len=st.integers(1, 9), positions=st.sampled_from(["learned", "none"]),
    tie_embeddings=st.booleans(),
    pathways=st.permutations(["local", "wide", "state", "sparse", "dense"]).flatmap(
        lambda every: st.integers(1, 5).map(lambda n: tuple(every[:n]))),
    n_banks=st.integers(1, 2), n_heads=st.integers(1, 2), d_head=st.just(4), dense_expand=st.integers(1, 3),
    second_norm=st.sampled_from(["none", "mix", "dense"]), conv_bias=st.booleans(), router_bias=st.booleans(),
    quantizer=st.sampled_from(QUANTIZERS),
    quantize=st.sets(st.sampled_from(["conv", "attention", "dense", "router", "embed", "unembed"])).map(
        lambda parts: tuple(sorted(parts))))
vanilla = st.builds(
    VanillaConfig, vocab_size=st.just(32), d_model=st.just(12), n_layers=st.integers(1, 3),
    max_seq_len=st.integers(1, 9), positions=st.sampled_from(["learned", "none"]),
    tie_embeddings=st.booleans(), n_heads=st.integers(1, 3), quantizer=st.sampled_from(QUANTIZERS))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=routed | vanilla, seed=st.integers(0, 99))
def test_round_trip_is_bit_identical(config: ModelConfig, seed: int, tmp_path: Path) -> None:
    model, arrays = random_network(config, seed)
    assert equal(to_arrays(model), arrays)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == config and type(again) is type(model)
    assert equal(to_arrays(again), arrays)


@pytest.mark.parametrize("quantizer", ["ternary", "hadamard"])
def test_a_frozen_model_is_stored_without_quantiser(quantizer: Any, tmp_path: Path) -> None:
    config = RoutedConfig(vocab_size=7, d_model=6, n_layers=2, max_seq_len=5, n_heads=2, d_head=3, top_k=2,
                          quantizer=quantizer)
    frozen = freeze(random_network(config, 0)[0])
    save(frozen, tmp_path / "frozen")
    again = load(tmp_path / "frozen")
    assert again.config == dataclasses.replace(config, quantizer="none")
    assert equal(to_arrays(again), to_arrays(frozen))
    ids = jnp.arange(5)[None]
    result, expected = (np.asarray(jax.jit(lambda ids, model=model: model(ids))(ids))
                        for model in (again, frozen))
    np.testing.assert_allclose(result, expected, rtol=0, atol=noise(expected, 10, steps=2))


def test_directory_contents(tmp_path: Path) -> None:
    """Files in standard formats, with separate layers and without pickles."""
    model, arrays = random_network(SMALL, 0)
    tilelli_jax.save(model, tmp_path / "some" / "where")
    written = listing(tmp_path / "some" / "where")
    assert written.keys() == {"README.md", "config.json", "model.safetensors"}
    assert json.loads(written["config.json"]) == dataclasses.asdict(SMALL) | {
        "quantize": ["attention", "dense"]}
    assert equal(safetensors.numpy.load(written["model.safetensors"]), arrays)
    assert {"blocks.0.attention.qkv.kernel", "blocks.1.norm2.bias"} < arrays.keys()
    with safetensors.safe_open(tmp_path / "some/where/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "tilelli_jax"}


def test_a_model_of_another_shape_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save(random_network(SMALL, 0)[0], tmp_path)
    other, arrays = random_network(RoutedConfig(d_model=8, n_layers=1, n_heads=1, d_head=4), 1)
    save(other, tmp_path)
    assert load(tmp_path).config == other.config and equal(to_arrays(load(tmp_path)), arrays)
    assert sorted(listing(tmp_path)) == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    assert "# routed\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("failing", "at"), [
    ("open", 0), ("open", 1), ("write", 0), ("write", 1), ("rename", 0)])
def test_a_failed_write_leaves_the_old_model(
        failing: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(random_network(SMALL, 0)[0], tmp_path)
    before, calls = listing(tmp_path), []

    def full(real):
        def maybe(*arguments, **options):
            calls.append(1)
            if len(calls) == at + 1:
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)
        return maybe

    match failing:
        case "open":
            monkeypatch.setattr(files.tempfile, "mkstemp", full(files.tempfile.mkstemp))
        case "write":
            monkeypatch.setattr(os, "fdopen", full(os.fdopen))
        case "rename":
            monkeypatch.setattr(os, "replace", full(os.replace))
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        save(random_network(dataclasses.replace(SMALL, n_layers=1), 1)[0], tmp_path)
    assert listing(tmp_path) == before


def test_write_together_is_consistent_when_killed(tmp_path: Path) -> None:
    """After a kill all files are old, all are new, or the last one is missing."""
    def old() -> None:
        for name in "abc":
            (tmp_path / name).write_text("old")
        (tmp_path / "obsolete").write_text("old")

    def write() -> None:
        files.write_together({tmp_path / name: b"new" for name in "abc"}, [tmp_path / "obsolete"])

    def inspect(at: int) -> None:
        result = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name[0] != "."}
        states.add("torn" if "c" not in result else "".join(sorted({*result.values()})))
        if "c" in result:
            assert result == dict.fromkeys(["a", "b", "c", "obsolete"], "old") or (
                result == dict.fromkeys("abc", "new"))
        write()
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "new")

    states: set[str] = set()
    assert kill_at_every_file_operation(write, inspect, prepare=old, below=tmp_path) > 15
    assert states == {"old", "new", "torn"}


@pytest.mark.exhaustive
def test_a_replaced_model_directory_is_consistent_when_killed(tmp_path: Path) -> None:
    """After a kill it is the old model, the new model, or not a model directory."""
    other = dataclasses.replace(SMALL, n_layers=1)
    arrays = {model_config: random_network(model_config, 0)[1] for model_config in (SMALL, other)}
    path = tmp_path / "model"

    def write(model_config: VanillaConfig, shard_bytes: int) -> None:
        tensors.write_directory(
            path, {name: tensors.in_memory(array) for name, array in arrays[model_config].items()},
            {store.CONFIG: files.as_json(config_lib.to_dict(model_config)), "other.json": b"{}"},
            writer="tilelli_jax", shard_bytes=shard_bytes)

    def inspect(at: int) -> None:
        try:
            result = store.load_config(path)
        except InputError as error:
            assert str(error) == f"{path}: not a model directory: config.json is missing"
            result = None
        else:
            stored = {name: tensor.read() for name, tensor in store.read_tensors(path).items()}
            assert equal(stored, arrays[result])
        states.add(result)

    for before, after in ((1 << 30, 4000), (4000, 1 << 30)):
        states: set[VanillaConfig | None] = set()

        def prepare(size: int = before) -> None:
            shutil.rmtree(path, ignore_errors=True)  # including files of the previous iteration
            write(SMALL, size)

        kill_at_every_file_operation(functools.partial(write, other, after), inspect, below=tmp_path,
                                     prepare=prepare)
        assert states == {SMALL, other, None}


def test_symlinks_are_followed_and_pipes_are_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    files.write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_atomically(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_an_unwritable_path_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"^{path}: cannot be written: "):
            save(random_network(SMALL, 0)[0], path)


# Reading files of other writers.

def write(path: Path, arrays: Mapping[str, np.ndarray], config: ModelConfig = SMALL) -> Path:
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    safetensors.numpy.save_file(dict(arrays), path / "model.safetensors")
    return path


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_are_converted_to_float32(dtype: type, tmp_path: Path) -> None:
    stored = {name: array.astype(dtype) for name, array in random_network(SMALL, 0)[1].items()}
    result = to_arrays(load(write(tmp_path, stored)))
    assert equal(result, {name: array.astype(np.float32) for name, array in stored.items()})


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.int64])
def test_tensors_that_are_not_floating_point_raise(dtype: type, tmp_path: Path) -> None:
    arrays = random_network(SMALL, 0)[1]
    arrays["final_norm.bias"] = arrays["final_norm.bias"].astype(dtype)
    with pytest.raises(InputError, match=r"final_norm.bias: expected floating-point numbers, found "):
        load(write(tmp_path, arrays))


def test_an_unknown_float_type_raises(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    write(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(InputError, match=r"w: expected a shape and one of F64, F32, .*, found 'F8_E4M3'"):
        load(tmp_path)


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    arrays = random_network(SMALL, 0)[1]
    del arrays["blocks.1.norm1.bias"], arrays["embed.kernel"]
    arrays["blocks.2.norm1.bias"] = arrays["more"] = np.zeros(3, np.float32)
    arrays["blocks.0.norm2.bias"] = np.zeros(9, np.float32)  # unlike the other layer's
    arrays["final_norm.scale"] = np.zeros((8, 1), np.float32)
    message = ("tensors do not fit the configuration; missing: blocks.1.norm1.bias, embed.kernel; "
               "not known: blocks.2.norm1.bias, more; of another shape: "
               "blocks.0.norm2.bias (9,) instead of (8,), final_norm.scale (8, 1) instead of (8,)")
    with pytest.raises(InputError) as error:
        load(write(tmp_path, arrays))
    assert str(error.value) == f"{tmp_path}/model.safetensors: {message}"
    with pytest.raises(InputError) as error:
        from_arrays(SMALL, arrays)
    assert str(error.value) == f"arrays: {message}"


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 100, struct.pack("<Q", 2) + b"[]",
                                     b"\x80\x04\x95pickle"])
def test_invalid_tensor_files_raise(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read: "):
        load(tmp_path)


def test_truncated_files_raise(tmp_path: Path) -> None:
    size = (write(tmp_path, random_network(SMALL, 0)[1]) / "model.safetensors").stat().st_size
    for length in (size - 1, size // 2, 100, 8, 1):
        os.truncate(tmp_path / "model.safetensors", length)
        with pytest.raises(InputError, match=r"model.safetensors: cannot be read: "):
            load(tmp_path)


@pytest.mark.parametrize(("config", "message"), [
    ("", "not JSON: "),
    ("{", "not JSON: "),
    ("[]", "expected an object, found a list"),
    ("{}", "family: expected one of routed, vanilla, .*, found None"),
    ('{"family": ["routed"]}', r"family: expected one of routed, vanilla, .*, found \['routed'\]"),
    ('{"family": "gpt"}', "family: expected one of routed, vanilla, .*, found 'gpt'"),
    ('{"family": "vanilla", "n_head": 2}', "unknown key 'n_head' .did you mean 'n_heads'"),
    ('{"family": "vanilla", "n_heads": 2.0}', "n_heads: expected an integer, found a number 2.0"),
    ('{"family": "vanilla", "n_heads": 7}', "d_model: expected a multiple of n_heads 7, found 320"),
    ('{"family": "routed", "d_model": 0}', "d_model: expected an integer ≥ 1, found 0"),
])
def test_invalid_configurations_raise(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=f"^{tmp_path}/config.json: {message}"):
        store.load_config(tmp_path)


def test_a_run_directory_raises_with_a_hint(tmp_path: Path) -> None:
    save(random_network(SMALL, 0)[0], tmp_path / "model")
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert str(error.value) == (f"{tmp_path}: not a model directory: config.json is missing; "
                                f"did you mean '{tmp_path}/model'?")


@pytest.mark.parametrize("key", ["n_layers", "n_banks"])
def test_more_layers_than_tensors_raise(key: str, tmp_path: Path) -> None:
    """Raises before the layers are built, which would take minutes and gigabytes."""
    save(random_network(RoutedConfig(d_model=8, n_layers=1, pathways=("local",)), 0)[0], tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {key: 2**31 - 1}))
    with pytest.raises(InputError, match=rf"{key}: expected at most \d+, the number of its tensors, found"):
        load(tmp_path)


@pytest.mark.parametrize(("config", "message"), [
    (dataclasses.replace(GEMMA4, d_head=2**30), "d_head: expected at most 4096, the largest size of"),
    (dataclasses.replace(GEMMA4, d_head_full=5000), "d_head_full: expected at most 4096, the largest size"),
    (T5Config(n_layers=1, n_decoder_layers=3), "n_decoder_layers: expected at most 2, the number of its")])
def test_head_widths_and_depths_beyond_the_tensors_raise(config: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^here: {message}"):
        check_sizes(config, {"a": (3, 4), "b": ()}, "here")
    check_sizes(config, {str(i): (2**30,) for i in range(100)}, "here")


def test_a_configuration_with_lists_instead_of_tuples() -> None:
    """Such a configuration cannot be hashed, so its shapes are not cached, but it is accepted."""
    config = RoutedConfig(d_model=8, n_layers=1, max_seq_len=8, n_heads=1, d_head=4, top_k=2, dense_expand=1)
    listed = dataclasses.replace(config, pathways=list(config.pathways))  # type: ignore[arg-type]
    arrays = random_network(config, 0)[1]
    assert to_arrays(from_arrays(listed, arrays)).keys() == arrays.keys()
