"""The header of a GGUF file, and its tensors, decoded as they are read.

The package `gguf` decodes the block formats. Its reader is not used: it takes seconds for a vocabulary, and
maps the whole file into memory. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from tilelli_jax import extras
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import check_regular
from tilelli_jax.io.json_text import check_fetched

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
UNQUANTISED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_BLOCK = 1 << 22  # numbers that are decoded at a time
_MAX_HEADER = 100 * 2**20  # bytes; a vocabulary of 262,144 tokens takes 8 MB
# Types of metadata by their number in the file.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
            11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


class StoredTensor(NamedTuple):
    """A tensor in the file: its shape in our order, its offset in bytes, and the sizes of a block."""

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int
    block: int  # numbers
    block_bytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.block_bytes

    def read(self, step: int = 1) -> Iterator[np.ndarray]:
        """The numbers, some rows at a time; the number of rows is a multiple of `step`.

        Raises:
            InputError: the format cannot be decoded, or the file has become shorter.
        """
        from gguf import quants
        # A vector is one row; it may have blocks, too.
        rows, inside = (self.shape[0], self.shape[1:]) if len(self.shape) > 1 else (1, self.shape)
        row_bytes = math.prod(inside) // self.block * self.block_bytes
        many = max(1, _BLOCK // math.prod(inside) // step) * step
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for first in range(0, rows, many):
                content = file.read(min(many, rows - first) * row_bytes)
                if len(content) < min(many, rows - first) * row_bytes:
                    raise InputError(f"{self.path}: truncated inside tensor {self.name}")
                stored = np.frombuffer(content, np.uint8).reshape(-1, row_bytes)
                if self.kind.name in UNQUANTISED:
                    array = stored.view(UNQUANTISED[self.kind.name])
                else:
                    with np.errstate(all="ignore"):  # the reader of the tensor checks for infinite numbers
                        array = quants.dequantize(stored, self.kind)
                yield array.reshape(-1, *self.shape[1:])


def is_gguf(path: Path) -> bool:
    """Whether a path is named like a GGUF file, or is a file that begins like one."""
    if path.suffix == SUFFIX:
        return not path.is_dir()
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # the reader of other formats reports it
        return False


class _Reader:
    """Reads the parts of a header, which must not be longer than the file."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left = file, min(size, _MAX_HEADER)

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("truncated header" if self.left < _MAX_HEADER else "the header is too long")
        self.left -= count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode()

    def name(self) -> str:
        if not (name := self.string()).isprintable():
            raise ValueError(f"expected a printable name, found {name!r:.60}")
        return name

    def value(self) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self._scalars(kind, 1)[0]
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            if 8 * count > self.left:
                raise ValueError("truncated header")
            return [self.string() for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"metadata of an unknown type ({kind})")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Reads the metadata and the tensors of a file.

    Raises:
        InputError: the file is no complete GGUF file, a format cannot be decoded, or the package `gguf` is
            not installed.
    """
    size = check_regular(path)
    try:
        with path.open("rb") as file:
            first = file.read(64)
            if not first.startswith(MAGIC):
                check_fetched(path, first)
                raise InputError(f"{path}: not a GGUF file: expected {MAGIC!r} at its start, "
                                 f"found {first[:4]!r}")
            try:
                import gguf
                import gguf.quants
            except ImportError:
                raise extras.missing("gguf", f"{path}: reading GGUF files") from None
            file.seek(len(MAGIC))
            reader = _Reader(file, size - len(MAGIC))
            if (version := reader.number("<I")) not in VERSIONS:
                raise InputError(f"{path}: version: expected one of {', '.join(map(str, VERSIONS))}, "
                                 f"found {version}")
            n_tensors, n_pairs = reader.number("<Q"), reader.number("<Q")
            metadata: dict[str, Any] = {}
            for _ in range(n_pairs):
                key = reader.name()
                if key in metadata:
                    raise ValueError(f"two values of {key:.60}")
                metadata[key] = reader.value()
            stored: dict[str, StoredTensor] = {}
            for _ in range(n_tensors):
                tensor = _stored(path, reader, gguf)
                if tensor.name in stored:
                    raise ValueError(f"two tensors {tensor.name:.60}")
                stored[tensor.name] = tensor
            step, end = metadata.get("general.alignment", 32), file.tell()
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"general.alignment is {step!r:.40}")
        start = -(-end // step) * step
        placed = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in stored.items()}
        for tensor in placed.values():
            if tensor.offset + tensor.nbytes > size:
                raise ValueError(f"truncated inside tensor {tensor.name:.60}")
    except InputError:
        raise
    except (ValueError, struct.error) as error:  # ValueError: also texts that are not UTF-8
        raise InputError(f"{path}: not a complete GGUF file: {error!s:.200}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return metadata, placed


def _stored(path: Path, reader: _Reader, gguf: Any) -> StoredTensor:
    """The description of one tensor; its offset is that from the start of all tensors."""
    name, n_axes = reader.name(), reader.number("<I")
    if not 1 <= n_axes <= 4:
        raise ValueError(f"{name:.60} has {n_axes} axes")
    shape = tuple(reader.number("<Q") for _ in range(n_axes))[::-1]
    kind, offset = reader.number("<I"), reader.number("<Q")
    try:
        kind = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in UNQUANTISED:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise InputError(f"{path}: {name:.60}: its format {getattr(kind, 'name', kind)} cannot be decoded by "
                         "the installed version of gguf") from None
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"{name:.60} has the shape {shape}, and {kind.name} has blocks of {block}")
    return StoredTensor(path, name, shape, kind, offset, block, block_bytes)
