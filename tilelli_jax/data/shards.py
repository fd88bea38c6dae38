"""Shards: a directory with train.bin and valid.bin (raw bytes), and meta.json that says of what.

    train.bin   text to learn from: of every source but its end, with a separator between two of them
    valid.bin   text to validate on: the ends of the sources, or the validation parts that they have
    meta.json   written last: the sources, the settings, and of what size and content both files are

meta.json is the proof that both files are whole and of one making: they are read with it or not at all.
Memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from tilelli_jax import files
from tilelli_jax.data.byte_corpus import ByteCorpus
from tilelli_jax.data.documents import SEPARATOR, Source, first_bytes
from tilelli_jax.data.file_sets import left_behind, replace_files
from tilelli_jax.data.text_files import CHUNK, map_bytes
from tilelli_jax.errors import InputError
from tilelli_jax.json_text import read_json

PARTS = ("train.bin", "valid.bin")
META = "meta.json"
FILES = (*PARTS, META)
FORMAT = 2  # of meta.json; those of before state no format and no fingerprint


def write_shards(out: str | Path, sources: Sequence[Source], *, valid_fraction: float,
                 separator: bytes = SEPARATOR, max_bytes: int | None = None, force: bool = False,
                 ) -> dict[str, Any]:
    """Writes the shards of `sources` to the directory `out` and returns what meta.json says.

    Of a source without a validation part, the last `valid_fraction` of its bytes becomes one
    (`split_point`). Sources that are empty are passed over.

    Args:
        separator: what is put between two sources, in both files.
        max_bytes: most bytes taken, over all sources; a validation part that a source has itself
            comes on top, with at most `max_bytes · valid_fraction` bytes.
        force: replace shards that are there, and do not mind other files beside them.

    Raises:
        InputError: nothing to write, or nothing left for one of the parts; `out` has shards and `force` is
            false, has other files, is in use by another process or cannot be written; and whatever the
            sources raise.
    """
    out = Path(out).absolute()
    if not force:
        _check_place(out)
    with replace_files(out, FILES, force=force) as beside:
        return _write(beside, sources, valid_fraction, separator, max_bytes)


def read_shards(directory: Path) -> tuple[ByteCorpus, ByteCorpus]:
    """The training and the validation part, mapped.

    Both files are checked against meta.json: their sizes, and 256 stretches of each (not where an earlier
    version wrote it, which did not state them).

    Raises:
        InputError: a file is missing or is not what meta.json describes, or one cannot be read.
    """
    again = (f"; make them again: tilelli data --source … --out {shlex.quote(str(directory))} "
             "--force")
    _check_complete(directory, again)
    train, valid = (ByteCorpus([map_bytes(directory / name)]) for name in PARTS)
    try:
        _check(directory, (train, valid), read_json(directory / META))
    except InputError as error:
        raise InputError(f"{error}{again}") from None
    return train, valid


def split_point(data: np.ndarray, valid_fraction: float) -> int:
    """Where the validation part of a text begins, given its bytes: uint8 [length].

    That is int(length · (1 − valid_fraction)), moved on to the next start of a UTF-8 character.
    """
    cut = int(len(data) * (1 - valid_fraction))
    # A character has at most three continuation bytes (10xxxxxx): more of them is not UTF-8.
    following = data[cut:cut + 3] & 0xC0 != 0x80
    return cut + (int(following.argmax()) if following.any() else len(following))


# ---------------------------------------------------------------------------------------------


def _names(directory: Path) -> list[str]:
    """Of the files in a directory. Raises InputError where it cannot be read."""
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise InputError(f"{directory}: cannot be read: {error.strerror or error}") from None


def _check_place(out: Path) -> None:
    """Raises InputError where `out` is a directory of something else."""
    names = set(_names(out)) if out.is_dir() else set()
    if names and not names & set(FILES) and names != {path.name for path in left_behind(out, FILES)}:
        raise InputError(f"{out}: holds other files and no shards; choose an empty or new directory")


def _check_complete(directory: Path, again: str) -> None:
    """Raises InputError where a file is missing; `again` says how to make what was begun there."""
    names = _names(directory)
    if missing := [name for name in FILES if name not in names]:
        found = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        hint = ""
        if len(missing) < len(FILES) or left_behind(directory, FILES):
            hint = again
        elif any(name.endswith(".txt") for name in names):
            hint = f"; for its text files give '{directory}/*.txt'"
        raise InputError(f"{directory}: expected {', '.join(PARTS)} and {META}, there is no "
                         f"{' and no '.join(missing)}; found {found or 'nothing'}{hint}")


def _check(directory: Path, parts: Sequence[ByteCorpus], meta: Mapping[str, Any]) -> None:
    """Raises InputError where the parts are not those that meta.json describes."""
    if meta.get("format", 1) not in (1, FORMAT):
        raise InputError(f"{directory / META}: expected format {FORMAT}, found {meta['format']!r:.40}")
    for name, part in zip(PARTS, parts, strict=True):
        described = meta.get(_key(name))
        size = described.get("bytes") if isinstance(described, dict) else None
        if size != len(part):
            raise InputError(f"{directory / name}: expected {size} bytes, as {META} states, found "
                             f"{len(part)}")
    if "format" in meta and meta.get("fingerprint") != _fingerprint(parts):
        raise InputError(f"{directory / META}: expected the {' and '.join(PARTS)} that it describes, found "
                         "others")


def _key(name: str) -> str:
    """What meta.json calls a part."""
    return name.removesuffix(".bin")


def _fingerprint(parts: Sequence[ByteCorpus]) -> str:
    """Of a training and a validation part: what checkpoints keep, too."""
    return " ".join(part.fingerprint() for part in parts)


def _write(beside: Mapping[str, Path], sources: Sequence[Source], valid_fraction: float, separator: bytes,
           max_bytes: int | None) -> dict[str, Any]:
    """train.bin, valid.bin and meta.json, at the places `beside`."""
    taken: dict[str, dict[str, Any]] = {}
    left = sys.maxsize if max_bytes is None else max_bytes
    most_valid = sys.maxsize if max_bytes is None else int(max_bytes * valid_fraction)
    sizes = [source.size for source in sources if source.size is not None]
    total = min(sum(sizes), left) if len(sizes) == len(sources) else max_bytes
    train_path, valid_path = (beside[name] for name in PARTS)
    with (open(train_path, "x+b") as train, open(valid_path, "xb") as valid,
          tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar):
        for source in sources:
            before = train.tell()
            size = _append(train, _counted(first_bytes(source.train, left), bar), separator)
            left -= size
            if source.valid is None:
                _move_tail(train, before, size, valid, valid_fraction, separator)
            else:
                size += _append(valid, _counted(first_bytes(source.valid, most_valid), bar),
                                separator)
            entry = taken.setdefault(source.name, {
                "source": source.name, "bytes": 0, "own_validation": source.valid is not None})
            entry["bytes"] += size
    if not any(entry["bytes"] for entry in taken.values()):
        raise InputError(f"{', '.join(taken) or 'no source'}: no bytes in it")
    parts = [ByteCorpus([map_bytes(beside[name])]) for name in PARTS]
    for name, part in zip(("training", "validation"), parts, strict=True):
        if not len(part):
            raise InputError(f"{', '.join(taken)}: nothing is left for the {name} part")
    meta = {
        "format": FORMAT, "sources": list(taken.values()), "valid_fraction": valid_fraction,
        "max_bytes": max_bytes, "separator": separator.decode(),
        **{_key(name): _summary(beside[name]) for name in PARTS}, "fingerprint": _fingerprint(parts)}
    beside[META].write_bytes(files.as_json(meta))
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


def _move_tail(train: BinaryIO, before: int, size: int, valid: BinaryIO, valid_fraction: float,
               separator: bytes) -> None:
    """Moves the validation part of the last `size` bytes of `train` to the end of `valid`.

    Where that is all of them, the separator goes as well: `train` then ends at `before`.
    """
    if not size:
        return
    train.flush()
    start = train.tell() - size
    text = np.memmap(train, np.uint8, "r", offset=start, shape=(size,))
    cut = split_point(text, valid_fraction)
    _append(valid, (text[i:i + CHUNK].tobytes() for i in range(cut, size, CHUNK)), separator)
    del text
    end = start + cut if cut else before
    train.truncate(end)
    train.seek(end)


def _counted(chunks: Iterable[bytes], bar: tqdm) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        bar.update(len(chunk))


def _summary(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
