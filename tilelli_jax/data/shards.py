"""Shards: a directory with train.bin and valid.bin (raw bytes), and meta.json that says of what.

They are written beside their place and moved there when all is done, meta.json last: a directory
with meta.json is complete, and an interrupted run leaves nothing. Memory does not grow with the
text.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from tilelli_jax.data.documents import CHUNK, Source, first_bytes
from tilelli_jax.errors import InputError

FILES = ("train.bin", "valid.bin", "meta.json")
PARTIAL = ".partial-"  # how directories begin that hold what is not whole yet


def write_shards(out: str | Path, sources: Sequence[Source], *, valid_fraction: float,
                 separator: bytes = b"\n\n", max_bytes: int | None = None) -> dict[str, Any]:
    """Writes the shards of `sources` to the directory `out` and returns what meta.json says.

    Of a source without a validation part, the last `valid_fraction` of its bytes becomes one
    (`split_point`).

    Args:
        separator: what is put between two sources.
        max_bytes: most bytes taken, over all sources; a validation part that a source has itself
            comes on top, with at most `max_bytes · valid_fraction` bytes.

    Raises:
        InputError: nothing to write, or `out` cannot be written; and whatever the sources raise.
    """
    out = Path(out).absolute()
    beside = next(path for path in (out, *out.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=beside, prefix=PARTIAL) as made:
            meta = _write(Path(made), sources, valid_fraction, separator, max_bytes)
            out.mkdir(parents=True, exist_ok=True)
            (out / "meta.json").unlink(missing_ok=True)
            for name in FILES:
                os.replace(Path(made, name), out / name)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error
    return meta


def split_point(data: np.ndarray, valid_fraction: float) -> int:
    """Where the validation part of a text begins, given its bytes: uint8 [length].

    That is int(length · (1 − valid_fraction)), moved on to the next start of a UTF-8 character.
    """
    cut = int(len(data) * (1 - valid_fraction))
    # A character has at most three continuation bytes (10xxxxxx): more of them is not UTF-8.
    following = data[cut:cut + 3] & 0xC0 != 0x80
    return cut + (int(following.argmax()) if following.any() else len(following))


# ---------------------------------------------------------------------------------------------


def _write(made: Path, sources: Sequence[Source], valid_fraction: float, separator: bytes,
           max_bytes: int | None) -> dict[str, Any]:
    """train.bin, valid.bin and meta.json in the directory `made`."""
    taken: dict[str, dict[str, Any]] = {}
    left = sys.maxsize if max_bytes is None else max_bytes
    most_valid = sys.maxsize if max_bytes is None else int(max_bytes * valid_fraction)
    sizes = [source.size for source in sources if source.size is not None]
    total = min(sum(sizes), left) if len(sizes) == len(sources) else max_bytes
    with (open(made / "train.bin", "w+b") as train, open(made / "valid.bin", "wb") as valid,
          tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar):
        for source in sources:
            size = _append(train, _counted(first_bytes(source.train, left), bar), separator)
            left -= size
            if source.valid is None:
                _move_tail(train, size, valid, valid_fraction, separator)
            else:
                size += _append(valid, _counted(first_bytes(source.valid, most_valid), bar),
                                separator)
            entry = taken.setdefault(source.name, {
                "source": source.name, "bytes": 0, "own_validation": source.valid is not None})
            entry["bytes"] += size
    if not any(entry["bytes"] for entry in taken.values()):
        raise InputError(f"{', '.join(taken) or 'no source'}: no bytes in it")
    meta = {
        "sources": list(taken.values()), "valid_fraction": valid_fraction, "max_bytes": max_bytes,
        "separator": separator.decode(), "train": _summary(made / "train.bin"),
        "valid": _summary(made / "valid.bin"),
    }
    (made / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def _append(file: BinaryIO, chunks: Iterable[bytes], separator: bytes) -> int:
    """Writes the chunks to the end of `file`, after `separator` where something stands before."""
    size = 0
    for chunk in chunks:
        if chunk and not size and file.tell():
            file.write(separator)
        file.write(chunk)
        size += len(chunk)
    return size


def _move_tail(train: BinaryIO, size: int, valid: BinaryIO, valid_fraction: float,
               separator: bytes) -> None:
    """Moves the validation part of the last `size` bytes of `train` to the end of `valid`."""
    if not size:
        return
    train.flush()
    start = train.tell() - size
    text = np.memmap(train, np.uint8, "r", offset=start, shape=(size,))
    cut = split_point(text, valid_fraction)
    _append(valid, (text[i:i + CHUNK].tobytes() for i in range(cut, size, CHUNK)), separator)
    del text
    train.truncate(start + cut)
    train.seek(start + cut)


def _counted(chunks: Iterable[bytes], bar: tqdm) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        bar.update(len(chunk))


def _summary(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
