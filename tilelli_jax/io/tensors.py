"""Named tensors on disk: safetensors files, read and written one tensor at a time.

The file format is that of https://github.com/huggingface/safetensors: the length of a JSON header, the
header, and the data of all tensors in sequence. This module implements it directly, because the library
safetensors memory-maps the file (its pages count as resident memory) and can only write tensors that are
all in memory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json, check_regular, write_together
from tilelli_jax.io.json_text import GIT_LFS, check_fetched, parse, read_json

log = logging.getLogger(__name__)
TENSORS = "model.safetensors"
INDEX = TENSORS + ".index.json"
CONFIG = "config.json"
SHARD_BYTES = 5 * 10**9  # largest size of a file, in bytes; larger models are split into several files
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(bool)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = tuple(DTYPES[code] for code in ("F64", "F32", "F16", "BF16"))
_MAX_HEADER = 100 * 2**20
_BLOCK = 16 * 2**20  # bytes of a tensor that are transposed or converted at a time


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read lazily.

    Attributes:
        parts: yields arrays whose concatenation along the first axis is the tensor.
        mapped: returns the tensor as a memory map; None if no file contains it in this layout.
        label: name of the tensor in error messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterator[np.ndarray]]
    mapped: Callable[[], np.ndarray] | None = None
    label: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The full array; may be a view that is not contiguous."""
        parts = list(self.parts())
        array = (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(self.shape)
        return self._converted(array)

    def astype(self, dtype: np.dtype) -> Tensor:
        """The tensor in another type; it is converted when it is read, or block by block when written.

        The conversion raises InputError if a finite number is not finite in that type.
        """
        return dataclasses.replace(self, dtype=np.dtype(dtype), mapped=None)

    def write(self, file: BinaryIO) -> None:
        """Writes the numbers in row-major order, without a second copy of the tensor."""
        for part in self.parts():
            for block in blocks(part):
                file.write(np.ascontiguousarray(self._converted(block)).reshape(-1)
                           .view(np.uint8).data)

    def _converted(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == self.dtype or array.dtype not in FLOATS:
            return array.astype(self.dtype, copy=False)
        with np.errstate(over="ignore"):
            converted = array.astype(self.dtype)
        if not is_finite(converted) and (overflow := ~np.isfinite(converted) & np.isfinite(array)).any():
            prefix = f"{self.label}: " if self.label else ""
            raise InputError(f"{prefix}expected numbers that {self.dtype} can hold, found "
                             f"{float(array[overflow].flat[0]):g} (and {int(overflow.sum()) - 1} more)")
        return converted


def check_fit(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str,
              ignored: Callable[[str], bool] = lambda _: False) -> None:
    """Compares the names and shapes of tensors with the expected ones.

    Args:
        wanted: expected shapes by name.
        found: shapes of the tensors by name.
        ignored: whether an additional tensor of this name is allowed.

    Raises:
        InputError: tensors are missing, unknown or of another shape; all such are listed.
    """
    problems = {"missing": sorted(wanted.keys() - found.keys()),
                "not known": sorted(name for name in found.keys() - wanted.keys() if not ignored(name)),
                "of another shape": [f"{name} {found[name]} instead of {shape}"
                                     for name, shape in sorted(wanted.items())
                                     if name in found and found[name] != shape]}
    if any(problems.values()):
        raise InputError(f"{source}: tensors do not fit the configuration; " + "; ".join(
            f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names))


def check_floats(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises InputError if a tensor is not floating-point."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise InputError(f"{source}: {name}: expected floating-point numbers, found {tensor.dtype}")


def in_memory(array: np.ndarray) -> Tensor:
    """Wraps an array as a `Tensor`."""
    return Tensor(array.shape, array.dtype, lambda: iter([array]))


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the array in blocks of at most _BLOCK bytes (at least one number), in row-major order."""
    if array.nbytes <= _BLOCK or array.ndim == 0:
        yield array
    elif (rows := _BLOCK // array[:1].nbytes) > 0 or array.ndim == 1:
        step = max(1, rows)
        yield from (array[first:first + step] for first in range(0, len(array), step))
    else:
        for row in array:
            yield from blocks(row)


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of a floating-point array are finite."""
    if array.dtype == DTYPES["BF16"]:  # checks the bits, because NumPy is slow for bfloat16
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())


def count_vanishing(array: np.ndarray, dtype: np.dtype) -> int:
    """Number of non-zero numbers that become 0 in another floating-point type."""
    if array.dtype == dtype or array.dtype not in FLOATS:
        return 0
    half = float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2  # itself rounds to even, which is 0
    magnitudes = np.abs(array.astype(np.float32) if array.dtype == DTYPES["BF16"] else array)
    return int(((magnitudes > 0) & (magnitudes <= half)).sum())


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Reads only the header; the tensors are read lazily.

    Raises:
        InputError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        size = check_regular(path)
        with path.open("rb") as file:
            first = file.read(8)
            if first == GIT_LFS[:8]:
                check_fetched(path, first + file.read(len(GIT_LFS) - 8))
                file.seek(8)
            length = int.from_bytes(first, "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise InputError(f"{path}: cannot be read: not a safetensors file, or a truncated one")
            content = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = parse(content.decode("utf-8"), str(path))
    except ValueError:
        raise InputError(f"{path}: cannot be read: not a safetensors file: the header is not JSON") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: cannot be read: not a safetensors file: the header is not an object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    end = 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    if end != size:
        raise InputError(f"{path}: cannot be read: header describes {end:,} bytes, the file has {size:,}")
    return tensors


def read_directory(path: Path) -> dict[str, Tensor]:
    """The tensors of a directory, from model.safetensors or otherwise the files in its index.

    If both exist, the single file is read, as in transformers, with a warning.

    Raises:
        InputError: a file is missing or cannot be read, or its tensors differ from the index.
    """
    if os.path.lexists(path / TENSORS):
        if os.path.lexists(path / INDEX):
            log.warning("%s: has both %s and %s; reading the first, as transformers does", path, TENSORS,
                        INDEX)
        return read_file(path / TENSORS)
    if not os.path.lexists(path / INDEX):
        raise InputError(f"{path}: {TENSORS} is missing")
    index = read_weight_map(path / INDEX)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name:
            raise InputError(f"{path / INDEX}: expected names of files in its directory, found '{name}'")
        if not os.path.lexists(path / name):
            raise InputError(f"{path}: {name} is missing, which {INDEX} names")
        part = read_file(path / name)
        if other := sorted(part.keys() ^ {key for key, file in index.items() if file == name}):
            raise InputError(f"{path / name}: its tensors are not those that {INDEX} says; "
                             f"they differ by {', '.join(other)}")
        tensors |= part
    return tensors


def read_weight_map(path: Path) -> dict[str, str]:
    """Reads an index: tensor name → name of the file that contains it.

    Raises:
        InputError: it cannot be read, contains no tensor, or values that are not file names.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise InputError(f"{path}: expected file names under 'weight_map'")
    if not index:
        raise InputError(f"{path}: weight_map: expected at least one tensor, found none")
    return index


def write_directory(path: Path, tensors: Mapping[str, Tensor], others: Mapping[str, bytes], *,
                    writer: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors and other files; large models are split into several files with an index.

    All files are complete before the first one replaces an old file, and each is replaced atomically. A
    killed process leaves the old directory, the new one, or one without config.json. Tensors are read one
    at a time.

    Args:
        others: other files, name → content.
        writer: value of "format" in the metadata of the tensor files.
        shard_bytes: largest size of one file, in bytes, unless a single tensor is larger.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        size = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    names = [TENSORS] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    contents: dict[Path, bytes | Callable[[BinaryIO], None]] = {
        path / name: _writer(shard, writer) for name, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        contents[path / INDEX] = as_json({"metadata": {"total_size": total}, "weight_map": index})
    path.mkdir(parents=True, exist_ok=True)
    # The configuration last: without it the directory is not a model directory.
    ordered = sorted(others, key=lambda name: name == CONFIG)
    existing = (path / INDEX, path / TENSORS, *path.glob("model-?????-of-?????.safetensors"))
    write_together({**contents, **{path / name: others[name] for name in ordered}},
                   # Files of a previous model with another number of files.
                   obsolete=[old for old in existing if old not in contents])


def write_file(path: Path, tensors: Mapping[str, Tensor], *, writer: str = "tilelli_jax") -> None:
    """Writes one file atomically. Raises OSError if it cannot be written."""
    write_together({path: _writer(tensors, writer)})


def _writer(tensors: Mapping[str, Tensor], writer: str) -> Callable[[BinaryIO], None]:
    header: dict[str, Any] = {"__metadata__": {"format": writer}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            dataclasses.replace(tensor, label=tensor.label or name).write(file)

    return write


def _entry(path: Path, name: str, entry: Any, base: int, size: int) -> Tensor:
    try:
        dtype = DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        valid = all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        code = entry.get("dtype") if isinstance(entry, dict) else entry
        raise InputError(f"{path}: {name}: expected a shape and one of {', '.join(DTYPES)}, "
                         f"found {code!r:.60}") from None
    count = math.prod(shape) if valid else -1
    if not valid or count * dtype.itemsize != stop - start or base + stop > size:
        raise InputError(f"{path}: cannot be read: {name} is not inside the file (truncated?)")

    def parts() -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            array = np.empty(count, dtype)
            file.seek(base + start)
            if file.readinto(array.view(np.uint8).data) != stop - start:
                raise InputError(f"{path}: truncated inside tensor {name}")
            yield array.reshape(shape)

    return Tensor(shape, dtype, parts,
                  lambda: np.memmap(path, dtype, mode="r", offset=base + start, shape=shape))
