"""safetensors files against the library of that name, and what is none."""

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

from tilelli_jax import tensors
from tilelli_jax.errors import InputError
from tilelli_jax.tensors import (
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
    st.builds(lambda array, kind: array.astype(kind),
              hnp.arrays(np.int8, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
              st.sampled_from(KINDS)), max_size=5)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and (found == expected).all()


@settings(deadline=None)
@given(arrays)
def test_the_library_reads_what_is_written_and_back(stored: dict[str, np.ndarray]) -> None:
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
    kept = {"view": in_memory(view), "parts": parts, "rounded": parts.astype(ml_dtypes.bfloat16)}
    write_directory(tmp_path, kept, {}, writer="me")
    found = safetensors.numpy.load_file(tmp_path / TENSORS)
    twice = np.concatenate([array, array])
    assert same(found["view"], view) and same(found["parts"], twice) and same(parts.read(), twice)
    assert same(found["rounded"], twice.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite(kind: type) -> None:
    numbers = np.array([0, -0.0, 1, -3e4, 1e-4, 6e4], kind)
    assert tensors.is_finite(numbers) and tensors.is_finite(numbers.reshape(2, 3).T)
    for bad in (np.nan, np.inf, -np.inf):
        assert not tensors.is_finite(np.append(numbers, kind(bad)).astype(kind))


def test_large_directories_are_in_several_files(tmp_path: Path) -> None:
    stored = {f"t{i}": np.full((i + 1, 10), i, np.float32) for i in range(5)}  # 40 to 200 bytes
    write_directory(tmp_path, {name: in_memory(array) for name, array in stored.items()},
                    {"config.json": b"{}"}, writer="me", shard_bytes=130)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", *(f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 600 and index["weight_map"].keys() == stored.keys()
    assert index["weight_map"]["t0"] == index["weight_map"]["t1"] != index["weight_map"]["t2"]
    found = read_directory(tmp_path)
    assert all(same(found[name].read(), array) for name, array in stored.items())
    # A smaller model in its place is read, not what is left of the larger one.
    write_directory(tmp_path, {"a": in_memory(np.ones(3))}, {}, writer="me")
    assert read_directory(tmp_path).keys() == {"a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", TENSORS]


def test_half_a_directory_is_none(tmp_path: Path) -> None:
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
    with pytest.raises(InputError, match=r"expected names of files beside it, found '\.\./a"):
        read_directory(tmp_path)


@pytest.mark.parametrize(("entry", "says"), [
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "w does not lie in the file"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8000]}, "w does not lie in the file"),
    ({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}, "w does not lie in the file"),
    ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "its header tells of [0-9]+ bytes, it has "),
    ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "w: expected a shape and one of F64, .*'F99'"),
    ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "w: expected a shape"),
    ({"dtype": "F32", "shape": [1]}, "w: expected a shape"), ([], "w: expected a shape")])
def test_headers_that_lie(entry: object, says: str, tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(InputError, match=says) as raised:
        read_file(tmp_path / "x")
    assert str(raised.value).startswith(f"{tmp_path / 'x'}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("offsets", [[None, 12], [0, [12]], [0, "12"], [0.0, 12.0], [{}, 12], [-12, 0]])
def test_offsets_that_are_none(offsets: list[object], tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": offsets}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(InputError, match=r"a: cannot be read: w does not lie in the file \(cut off\?\)"):
        read_file(tmp_path / "a")


def test_a_file_that_is_changed_after_it_was_opened(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(100)}, tmp_path / "x")
    found = read_file(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(InputError, match="w: the file ends before it"):
        found["w"].read()


def test_numbers_that_another_type_cannot_hold(tmp_path: Path) -> None:
    """Refused when they are read or written, by name and value; what is infinite already stays so."""
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
def test_how_many_numbers_become_zero(stored: type, becomes: type) -> None:
    """As many as converting them shows; among them what lies just about the limit."""
    limit = float(ml_dtypes.finfo(becomes).smallest_subnormal) / 2
    wide = np.array([0, -0.0, 1, limit, -limit, 1.02 * limit, -0.98 * limit, 1e-12 * limit, np.inf, np.nan])
    with np.errstate(over="ignore"):
        array = np.concatenate([wide, 10.0 ** np.arange(-60, 5)]).astype(stored)
        expected = int(((array.astype(becomes) == 0) & (array != 0)).sum())
    assert count_vanishing(array, np.dtype(becomes)) == expected > 10
    assert count_vanishing(array, array.dtype) == count_vanishing(np.arange(3), np.dtype(becomes)) == 0


@pytest.mark.parametrize("name", [TENSORS, INDEX, "part.safetensors"])
def test_a_pipe_is_not_called_missing(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    (tmp_path / INDEX).unlink() if name == INDEX else None
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: cannot be read: expected a regular file, found a pipe"):
        read_directory(tmp_path)


def test_an_index_of_nothing(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(InputError) as refused:
        read_directory(tmp_path)
    assert str(refused.value) == f"{tmp_path / INDEX}: weight_map: expected at least one tensor, found none"
