"""Reads and writes PyTorch's `.pt` files one tensor at a time, without running code from the file.

torch reads the structure of the file (`weights_only`, without the tensor data). The data are then read from
their offsets in the archive. Only tensors, plain containers and NumPy arrays are accepted.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tilelli_jax import extras
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import check_regular
from tilelli_jax.io.json_text import GIT_LFS, check_fetched
from tilelli_jax.io.tensors import Tensor

_STORAGES = {"bfloat16": "BFloat16", "float16": "Half", "float32": "Float", "float64": "Double",
             "bool": "Bool", "int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char",
             "uint8": "Byte"}
Tree = Any  # dicts and lists of Tensors, NumPy arrays and plain values


def read(path: Path) -> Tree:
    """Returns the contents of a `.pt` file; tensor data are read on access.

    Raises:
        InputError: torch is missing, or the file is not a `.pt` file, is damaged, or would run code.
    """
    torch = _torch(f"{path}")
    check_regular(path)
    _check_archive(path)
    allowed = [*_numpy_globals(), ("codecs", "encode")]
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
        with (torch.serialization.safe_globals(_resolved(allowed)), FakeTensorMode(),
              warnings.catch_warnings()):
            warnings.simplefilter("ignore")  # damaged files cause warnings
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises exceptions of many types for a bad file
        raise InputError(f"{path}: {_reason(error)}") from None
    try:
        return _with_tensors(path, tree, torch)
    except RecursionError:
        raise InputError(f"{path}: cannot be read: it contains itself, or is nested too deeply") from None


def writer(path: Path, tree: Tree) -> Callable[[BinaryIO], None]:
    """Returns a function that writes this tree as a `.pt` file, with one tensor in memory at a time.

    The archive has the format of `torch.save`: a pickle that rebuilds the tree, and one record of data for
    each tensor. `torch.save` itself would need all tensors in memory at once.

    Raises:
        InputError: torch is missing.
    """
    torch = _torch(str(path))
    tensors: list[Tensor] = []

    class Stored:
        """Pickles as torch pickles a contiguous tensor whose storage is a record of the archive."""

        def __init__(self, tensor: Tensor):
            self.tensor, self.key = tensor, len(tensors)
            tensors.append(tensor)

        def __reduce__(self) -> Any:
            shape = self.tensor.shape
            strides = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
            return torch._utils._rebuild_tensor_v2, (
                Storage(self), 0, shape, strides, False, collections.OrderedDict())

    class Storage:
        def __init__(self, stored: Stored):
            self.stored = stored

    class Pickler(pickle.Pickler):
        def persistent_id(self, target: Any) -> Any:
            if not isinstance(target, Storage):
                return None
            tensor = target.stored.tensor
            kind = getattr(torch, f"{_STORAGES[str(tensor.dtype)]}Storage")
            return "storage", kind, str(target.stored.key), "cpu", math.prod(tensor.shape)

    def stored(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Stored(value)
        if isinstance(value, Mapping):
            return {key: stored(item) for key, item in value.items()}
        return [stored(item) for item in value] if isinstance(value, list) else value

    outline = io.BytesIO()
    Pickler(outline, protocol=2).dump(stored(tree))

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            # The first date that zip allows, so that the same tensors make the same file.
            archive.writestr(zipfile.ZipInfo("archive/data.pkl"), outline.getvalue())
            archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
            for i, tensor in enumerate(tensors):
                with archive.open(zipfile.ZipInfo(f"archive/data/{i}"), "w", force_zip64=True) as record:
                    tensor.write(record)  # type: ignore[arg-type]
            archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")

    return write


def _torch(path: str) -> Any:
    try:
        import torch
    except ImportError:
        raise extras.missing("torch", f"{path}: a PyTorch file") from None
    return torch


def _check_archive(path: Path) -> None:
    """Raises InputError if the file is truncated or a checksum differs."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path}: cannot be read: a compressed archive, which PyTorch never writes")
            if (damaged := archive.testzip()) is not None:
                raise InputError(f"{path}: cannot be read: {damaged} is damaged (its checksum differs)")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except Exception:  # zipfile raises exceptions of many types for a damaged archive
        with path.open("rb") as file:
            first = file.read(len(GIT_LFS))
        check_fetched(path, first)
        is_old_pickle = first[:2] in (b"\x80\x02", b"\x80\x04")
        reason = ("a pickle of PyTorch before 1.6; load it with PyTorch and save it again" if is_old_pickle
                  else "not a PyTorch file, or truncated")
        raise InputError(f"{path}: cannot be read: {reason}") from None


def _reason(error: Exception) -> str:
    message = str(error)
    match = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)|find_class.*?'(\S+)'", message)
    if match:
        name = next(group for group in match.groups() if group)
        return (f"not loaded: it would run '{name.rstrip('.,')}'; only tensors and plain values are "
                "allowed")
    if "weights_only" in message:  # torch's message advises to disable the protection
        return "not loaded: it contains an object that is neither a tensor nor a plain value"
    first = next((line for line in message.splitlines() if line.strip()), type(error).__name__)
    return f"cannot be read: {first[:200]}"


def _numpy_globals() -> list[tuple[str, str]]:
    """The functions and classes that rebuild NumPy arrays and scalars; none has another effect."""
    kinds = [f"{kind}DType" for kind in ("Float16", "Float32", "Float64", "Int8", "Int16", "Int32", "Int64",
                                         "UInt8", "Bool", "Str")]
    return [("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
            ("numpy", "ndarray"), ("numpy", "dtype"), *(("numpy.dtypes", kind) for kind in kinds)]


def _resolved(names: list[tuple[str, str]]) -> list[Any]:
    import importlib
    resolved = []
    for module, name in names:
        target = getattr(importlib.import_module(module), name)
        resolved.append(target)
        if module.startswith("numpy._core"):  # the name before NumPy 2
            resolved.append((target, f"{module.replace('_core', 'core')}.{name}"))
    return resolved


def _with_tensors(path: Path, tree: Any, torch: Any) -> Tree:
    if isinstance(tree, torch.Tensor):
        return _tensor(path, tree, torch)
    if isinstance(tree, dict):
        return {key: _with_tensors(path, value, torch) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_with_tensors(path, value, torch) for value in tree]
    return tree.item() if isinstance(tree, np.generic) else tree


def _tensor(path: Path, fake: Any, torch: Any) -> Tensor:
    kinds = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16,
             torch.bfloat16: ml_dtypes.bfloat16, torch.int64: np.int64, torch.int32: np.int32,
             torch.int16: np.int16, torch.int8: np.int8, torch.uint8: np.uint8, torch.bool: np.bool_}
    if fake.dtype not in kinds:
        raise InputError(f"{path}: expected tensors of floats, integers or bool, found {fake.dtype}")
    if fake.layout != torch.strided or getattr(fake.untyped_storage(), "_checkpoint_offset", None) is None:
        raise InputError(f"{path}: expected dense tensors with data, found a sparse or an empty one")
    dtype, shape = np.dtype(kinds[fake.dtype]), tuple(fake.shape)
    strides = tuple(step * dtype.itemsize for step in fake.stride())
    start = fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * dtype.itemsize
    last_index = sum((n - 1) * step for n, step in zip(shape, fake.stride(), strict=True))
    length = 0 if 0 in shape else 1 + last_index

    def parts() -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            file.seek(start)
            numbers = np.fromfile(file, dtype, length)
        if len(numbers) != length:
            raise InputError(f"{path}: truncated inside a tensor")
        yield np.lib.stride_tricks.as_strided(numbers, shape, strides)

    return Tensor(shape, dtype, parts)
