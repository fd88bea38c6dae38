"""PyTorch's `.pt` files, read without running what is in them, one tensor at a time.

torch reads the file's outline (`weights_only`, and without the numbers); the numbers are then read
from where they lie in the archive. Nothing but tensors, plain containers and NumPy arrays is let in.
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
from tilelli_jax.files import check_regular
from tilelli_jax.json_text import GIT_LFS, check_fetched
from tilelli_jax.tensors import Tensor

_STORAGES = {"bfloat16": "BFloat16", "float16": "Half", "float32": "Float", "float64": "Double",
             "bool": "Bool", "int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char",
             "uint8": "Byte"}
Tree = Any  # dicts and lists of Tensors, NumPy arrays and plain values


def read(path: Path) -> Tree:
    """What a `.pt` file holds, its tensors to be read when they are asked for.

    Raises:
        InputError: torch is missing; the file is none, is damaged, or would run code.
    """
    torch = _torch(f"{path}")
    check_regular(path)
    _check_archive(path)
    allowed = [*_numpy_globals(), ("codecs", "encode")]
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
        with (torch.serialization.safe_globals(_resolved(allowed)), FakeTensorMode(),
              warnings.catch_warnings()):
            warnings.simplefilter("ignore")  # of what a damaged file asks for
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, and all of them are the file's
        raise InputError(f"{path}: {_reason(error)}") from None
    try:
        return _with_tensors(path, tree, torch)
    except RecursionError:
        raise InputError(f"{path}: cannot be read: it holds itself, or is nested too deeply") from None


def writer(path: Path, tree: Tree) -> Callable[[BinaryIO], None]:
    """What writes a `.pt` file with this tree, its Tensors as torch's, one in memory at a time.

    The archive is that of `torch.save`: a pickle that rebuilds the tree, and the numbers of each
    tensor in a record of its own. `torch.save` itself would want all of them at once.

    Raises:
        InputError: torch is missing.
    """
    torch = _torch(str(path))
    tensors: list[Tensor] = []

    class Stored:
        """Pickled as torch pickles a contiguous tensor, whose storage is a record of the archive."""

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
        def persistent_id(self, thing: Any) -> Any:
            if not isinstance(thing, Storage):
                return None
            tensor = thing.stored.tensor
            kind = getattr(torch, f"{_STORAGES[str(tensor.dtype)]}Storage")
            return "storage", kind, str(thing.stored.key), "cpu", math.prod(tensor.shape)

    def stored(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Stored(value)
        if isinstance(value, Mapping):
            return {key: stored(one) for key, one in value.items()}
        return [stored(one) for one in value] if isinstance(value, list) else value

    outline = io.BytesIO()
    Pickler(outline, protocol=2).dump(stored(tree))

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            # Dated as zip files begin, so that the same tensors make the same file.
            archive.writestr(zipfile.ZipInfo("archive/data.pkl"), outline.getvalue())
            archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
            for i, tensor in enumerate(tensors):
                with archive.open(zipfile.ZipInfo(f"archive/data/{i}"), "w", force_zip64=True) as record:
                    tensor.write(record)  # type: ignore[arg-type]
            archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")

    return write


def _torch(what: str) -> Any:
    try:
        import torch
    except ImportError:
        raise extras.missing("torch", f"{what}: a PyTorch file") from None
    return torch


def _check_archive(path: Path) -> None:
    """Raises InputError where the file is cut off or its checksums say that it was damaged."""
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
    except Exception:  # zipfile raises many kinds over a damaged archive
        with path.open("rb") as file:
            first = file.read(len(GIT_LFS))
        check_fetched(path, first)
        old = first[:2] in (b"\x80\x02", b"\x80\x04")
        raise InputError(
            f"{path}: cannot be read: " + ("a pickle of PyTorch before 1.6; load it there and save it anew"
                                           if old else "no PyTorch file, or cut off")) from None


def _reason(error: Exception) -> str:
    said = str(error)
    wanted = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)|find_class.*?'(\S+)'", said)
    if wanted:
        name = next(group for group in wanted.groups() if group)
        return f"refused: it wants to run '{name.rstrip('.,')}', and only tensors and plain values are let in"
    if "weights_only" in said:  # torch's advice is to let it in
        return "refused: it holds what is neither a tensor nor a plain value"
    first = next((line for line in said.splitlines() if line.strip()), type(error).__name__)
    return f"cannot be read: {first[:200]}"


def _numpy_globals() -> list[tuple[str, str]]:
    """What NumPy arrays and scalars are rebuilt with: none of it can do anything else."""
    kinds = [f"{kind}DType" for kind in ("Float16", "Float32", "Float64", "Int8", "Int16", "Int32", "Int64",
                                         "UInt8", "Bool", "Str")]
    return [("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
            ("numpy", "ndarray"), ("numpy", "dtype"), *(("numpy.dtypes", kind) for kind in kinds)]


def _resolved(names: list[tuple[str, str]]) -> list[Any]:
    import importlib
    found = []
    for module, name in names:
        thing = getattr(importlib.import_module(module), name)
        found.append(thing)
        if module.startswith("numpy._core"):  # what NumPy before 2 called it
            found.append((thing, f"{module.replace('_core', 'core')}.{name}"))
    return found


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
        raise InputError(f"{path}: expected tensors of floats, whole numbers or bool, found {fake.dtype}")
    if fake.layout != torch.strided or getattr(fake.untyped_storage(), "_checkpoint_offset", None) is None:
        raise InputError(f"{path}: expected tensors with numbers in the file, found a sparse or an empty one")
    dtype, shape = np.dtype(kinds[fake.dtype]), tuple(fake.shape)
    strides = tuple(step * dtype.itemsize for step in fake.stride())
    start = fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * dtype.itemsize
    reach = sum((n - 1) * step for n, step in zip(shape, fake.stride(), strict=True))
    length = 0 if 0 in shape else 1 + reach

    def parts() -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            file.seek(start)
            numbers = np.fromfile(file, dtype, length)
        if len(numbers) != length:
            raise InputError(f"{path}: the file ends before one of its tensors")
        yield np.lib.stride_tricks.as_strided(numbers, shape, strides)

    return Tensor(shape, dtype, parts)
