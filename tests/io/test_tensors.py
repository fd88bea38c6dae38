"""safetensors files: compatibility with the safetensors library, and invalid files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tilelli_jax.errors import InputError
from tilelli_jax.io import tensors
from tilelli_jax.io.tensors import (
    INDEX,
    TENSORS,
    Tensor,
    count_vanishing,
    in_memory,
    read_directory,
    read_file,
    write_directory,
)

KINDS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8,
         np.uint8, np.bool_]
arrays = st.dictionaries(
    st.text("abc.é", min_size=1, max_size=6),
    st.builds(lambda array, scalar_type: array.astype(scalar_type),
              hnp.arrays(np.int8, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
              st.sampled_from(KINDS)), max_size=5)


def same(result: np.ndarray, expected: np.ndarray) -> bool:
    return result.dtype == expected.dtype and result.shape == expected.shape and (result == expected).all()


@settings(deadline=None)
@given(arrays)
def test_files_are_compatible_with_the_safetensors_library(stored: dict[str, np.ndarray]) -> None:
    import tempfile
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        write_directory(path, {key: in_memory(array) for key, array in stored.items()}, {}, writer="me")
        theirs = safetensors.numpy.load_file(path / TENSORS)
        assert theirs.keys() == stored.keys() and all(same(theirs[key], stored[key]) for key in stored)
        with safetensors.safe_open(path / TENSORS, "np") as file:
            assert file.metadata() == {"format": "me"}
        safetensors.numpy.save_file(stored, path / TENSORS)
        ours = read_directory(path)
        assert ours.keys() == stored.keys() and all(same(ours[key].read(), stored[key]) for key in stored)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_views_and_other_types_are_written_in_blocks(block: int, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_BLOCK", block)
    array = np.random.default_rng(0).standard_normal((7, 5, 3)).astype(np.float32)
    view = np.swapaxes(array, 0, 2)
    parts = Tensor((14, 5, 3), array.dtype, lambda: iter([array, array]))
    stored_tensors = {"view": in_memory(view), "parts": parts, "rounded": parts.astype(ml_dtypes.bfloat16)}
    write_directory(tmp_path, stored_tensors, {}, writer="me")
    result = safetensors.numpy.load_file(tmp_path / TENSORS)
    twice = np.concatenate([array, array])
    assert same(result["view"], view) and same(result["parts"], twice) and same(parts.read(), twice)
    assert same(result["rounded"], twice.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("scalar_type", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_is_finite(scalar_type: type) -> None:
    numbers = np.array([0, -0.0, 1, -3e4, 1e-4, 6e4], scalar_type)
    assert tensors.is_finite(numbers) and tensors.is_finite(numbers.reshape(2, 3).T)
    for bad in (np.nan, np.inf, -np.inf):
        assert not tensors.is_finite(np.append(numbers, scalar_type(bad)).astype(scalar_type))


def test_large_models_are_split_into_several_files(tmp_path: Path) -> None:
    stored = {f"t{i}": np.full((i + 1, 10), i, np.float32) for i in range(5)}  # 40 to 200 bytes
    write_directory(tmp_path, {name: in_memory(array) for name, array in stored.items()},
                    {"config.json": b"{}"}, writer="me", shard_bytes=130)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", *(f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 600 and index["weight_map"].keys() == stored.keys()
    assert index["weight_map"]["t0"] == index["weight_map"]["t1"] != index["weight_map"]["t2"]
    result = read_directory(tmp_path)
    assert all(same(result[name].read(), array) for name, array in stored.items())
    # A smaller model replaces all files of the larger one.
    write_directory(tmp_path, {"a": in_memory(np.ones(3))}, {}, writer="me")
    assert read_directory(tmp_path).keys() == {"a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", TENSORS]


def test_incomplete_directories_raise(tmp_path: Path) -> None:
    stored = {name: in_memory(np.ones(10, np.float32)) for name in "abc"}
    write_directory(tmp_path, stored, {}, writer="me", shard_bytes=40)
    first, second = (tmp_path / f"model-{i:05}-of-00003.safetensors" for i in (1, 2))
    first.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match=f"^{first}: its tensors are not those that {INDEX} says; they "
                                         "differ by a, b$"):
        read_directory(tmp_path)
    first.unlink()
    with pytest.raises(InputError, match=f"^{tmp_path}: {first.name} is missing, which {INDEX} names$"):
        read_directory(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(InputError, match=r"expected names of files in its directory, found '\.\./a"):
        read_directory(tmp_path)


@pytest.mark.parametrize(("entry", "message"), [
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "w is not inside the file"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8000]}, "w is not inside the file"),
    ({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}, "w is not inside the file"),
    ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "header describes [0-9]+ bytes, the file has "),
    ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "w: expected a shape and one of F64, .*'F99'"),
    ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "w: expected a shape"),
    ({"dtype": "F32", "shape": [1]}, "w: expected a shape"), ([], "w: expected a shape")])
def test_invalid_headers_raise(entry: object, message: str, tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(InputError, match=message) as caught:
        read_file(tmp_path / "x")
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("offsets", [[None, 12], [0, [12]], [0, "12"], [0.0, 12.0], [{}, 12], [-12, 0]])
def test_invalid_offsets_raise(offsets: list[object], tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": offsets}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(InputError, match=r"a: cannot be read: w is not inside the file \(truncated\?\)"):
        read_file(tmp_path / "a")


def test_a_file_truncated_after_opening_raises(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(100)}, tmp_path / "x")
    result = read_file(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(InputError, match="truncated inside tensor w"):
        result["w"].read()


def test_overflow_in_conversion_raises(tmp_path: Path) -> None:
    """Reading or writing raises with name and value; numbers that are already infinite are accepted."""
    float16 = np.dtype(np.float16)
    wide = in_memory(np.array([1.0, 70000.0, -1e9, np.inf], np.float32)).astype(float16)
    with pytest.raises(InputError, match=r"^expected numbers .* found 70000 \(and 1 more\)$"):
        wide.read()
    with pytest.raises(InputError, match=r"^b: expected numbers that float16 can hold, found 70000"):
        write_directory(tmp_path / "out", {"a": in_memory(np.ones(3)), "b": wide}, {}, writer="me")
    assert not list(tmp_path.rglob("*.safetensors"))
    named = dataclasses.replace(wide, label="model: b")
    for call in (named.read, lambda: write_directory(tmp_path / "out", {"b": named}, {}, writer="me")):
        with pytest.raises(InputError, match=r"^model: b: expected numbers that float16 can hold"):
            call()
    fine = in_memory(np.array([65504.0, np.inf, np.nan, 1e-9], np.float32)).astype(float16)
    np.testing.assert_array_equal(fine.read(), np.array([65504, np.inf, np.nan, 0], np.float16))


@pytest.mark.parametrize(("stored", "becomes"), [
    (np.float32, np.float16), (np.float64, np.float16), (ml_dtypes.bfloat16, np.float16),
    (np.float64, np.float32), (np.float64, ml_dtypes.bfloat16)])
def test_count_vanishing(stored: type, becomes: type) -> None:
    """The count matches an actual conversion, also close to the limit."""
    limit = float(ml_dtypes.finfo(becomes).smallest_subnormal) / 2
    wide = np.array([0, -0.0, 1, limit, -limit, 1.02 * limit, -0.98 * limit, 1e-12 * limit, np.inf, np.nan])
    with np.errstate(over="ignore"):
        array = np.concatenate([wide, 10.0 ** np.arange(-60, 5)]).astype(stored)
        expected = int(((array.astype(becomes) == 0) & (array != 0)).sum())
    assert count_vanishing(array, np.dtype(becomes)) == expected > 10
    assert count_vanishing(array, array.dtype) == count_vanishing(np.arange(3), np.dtype(becomes)) == 0


@pytest.mark.parametrize("name", [TENSORS, INDEX, "part.safetensors"])
def test_a_pipe_raises(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    (tmp_path / INDEX).unlink() if name == INDEX else None
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: cannot be read: expected a regular file, found a pipe"):
        read_directory(tmp_path)


def test_an_empty_index_raises(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(InputError) as caught:
        read_directory(tmp_path)
    assert str(caught.value) == f"{tmp_path / INDEX}: weight_map: expected at least one tensor, found none"
