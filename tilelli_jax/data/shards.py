"""Shards: a directory with train.bin and valid.bin (raw bytes), and meta.json that describes them.

    train.bin   training text: every source without its end, with a separator between two
    valid.bin   validation text: the ends of the sources, or their own validation splits
    meta.json   written last: the sources, the settings, and sizes and checksums of both files

meta.json guarantees that both files are complete and from one run; without it they are not read.
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

from tilelli_jax.data.byte_corpus import ByteCorpus
from tilelli_jax.data.documents import SEPARATOR, TextSource, first_bytes
from tilelli_jax.data.file_sets import left_behind, replace_files
from tilelli_jax.data.text_files import CHUNK, map_bytes
from tilelli_jax.errors import InputError
from tilelli_jax.io import files
from tilelli_jax.io.json_text import read_json

PARTS = ("train.bin", "valid.bin")
META = "meta.json"
FILES = (*PARTS, META)
FORMAT = 2  # of meta.json; format 1 has neither this key nor a fingerprint


def write_shards(out: str | Path, sources: Sequence[TextSource], *, valid_fraction: float,
                 separator: bytes = SEPARATOR, max_bytes: int | None = None, force: bool = False,
                 ) -> dict[str, Any]:
    """Writes the shards of `sources` to the directory `out`, and returns the contents of meta.json.

    If a source has no validation split, the last `valid_fraction` of its bytes becomes one (`split_point`).
    Empty sources are skipped.

    Args:
        separator: bytes between two sources, in both files.
        max_bytes: maximum number of bytes over all sources, without the sources' own validation splits, of
            which at most `max_bytes · valid_fraction` bytes each are added; None: no limit.
        force: replace existing shards, and allow other files in `out`.

    Raises:
        InputError: the sources are empty, or one of the splits would be; `out` has shards and `force` is
            false, has other files, is in use by another process or cannot be written; a source raises it.
    """
    out = Path(out).absolute()
    if not force:
        _check_place(out)
    with replace_files(out, FILES, force=force) as temporary:
        return _write(temporary, sources, valid_fraction, separator, max_bytes)


def read_shards(directory: Path) -> tuple[ByteCorpus, ByteCorpus]:
    """Maps the training and the validation corpus into memory.

    Both files are checked against meta.json: their sizes, and 256 stretches of each, unless an earlier
    version wrote it without a fingerprint.

    Raises:
        InputError: a file is missing or unreadable, or is not the one that meta.json describes.
    """
    remedy = (f"; create them again: tilelli data --source … --out {shlex.quote(str(directory))} "
              "--force")
    _check_complete(directory, remedy)
    train, valid = (ByteCorpus([map_bytes(directory / name)]) for name in PARTS)
    try:
        _check(directory, (train, valid), read_json(directory / META))
    except InputError as error:
        raise InputError(f"{error}{remedy}") from None
    return train, valid


def split_point(data: np.ndarray, valid_fraction: float) -> int:
    """Returns the start of a text's validation split, given its bytes, uint8 [length].

    That is int(length · (1 − valid_fraction)), moved forward to the next start of a UTF-8 character.
    """
    cut = int(len(data) * (1 - valid_fraction))
    # A UTF-8 character has at most three continuation bytes (10xxxxxx).
    following = data[cut:cut + 3] & 0xC0 != 0x80
    return cut + (int(following.argmax()) if following.any() else len(following))


# ---------------------------------------------------------------------------------------------


def _names(directory: Path) -> list[str]:
    """Returns the file names in a directory. Raises InputError if it cannot be read."""
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise InputError(f"{directory}: cannot be read: {error.strerror or error}") from None


def _check_place(out: Path) -> None:
    """Raises InputError if `out` is a directory with other files."""
    names = set(_names(out)) if out.is_dir() else set()
    if names and not names & set(FILES) and names != {path.name for path in left_behind(out, FILES)}:
        raise InputError(f"{out}: holds other files and no shards; choose an empty or new directory")


def _check_complete(directory: Path, remedy: str) -> None:
    """Raises InputError if a file is missing; the message ends with `remedy` if shards were begun there."""
    names = _names(directory)
    if missing := [name for name in FILES if name not in names]:
        found = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        hint = ""
        if len(missing) < len(FILES) or left_behind(directory, FILES):
            hint = remedy
        elif any(name.endswith(".txt") for name in names):
            hint = f"; for its text files give '{directory}/*.txt'"
        absent = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        raise InputError(f"{directory}: expected {', '.join(PARTS)} and {META}; {absent}; "
                         f"found {found or 'nothing'}{hint}")


def _check(directory: Path, parts: Sequence[ByteCorpus], meta: Mapping[str, Any]) -> None:
    """Raises InputError if the splits are not those that meta.json describes."""
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
    """Returns the key of a file in meta.json."""
    return name.removesuffix(".bin")


def _fingerprint(parts: Sequence[ByteCorpus]) -> str:
    """Returns the fingerprints of the training and the validation split, as saved in checkpoints."""
    return " ".join(part.fingerprint() for part in parts)


def _write(temporary: Mapping[str, Path], sources: Sequence[TextSource], valid_fraction: float,
           separator: bytes, max_bytes: int | None) -> dict[str, Any]:
    """Writes train.bin, valid.bin and meta.json to the paths in `temporary`."""
    entries: dict[str, dict[str, Any]] = {}
    remaining = sys.maxsize if max_bytes is None else max_bytes
    most_valid = sys.maxsize if max_bytes is None else int(max_bytes * valid_fraction)
    sizes = [source.size for source in sources if source.size is not None]
    total = min(sum(sizes), remaining) if len(sizes) == len(sources) else max_bytes
    train_path, valid_path = (temporary[name] for name in PARTS)
    with (open(train_path, "x+b") as train, open(valid_path, "xb") as valid,
          tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar):
        for source in sources:
            before = train.tell()
            size = _append(train, _counted(first_bytes(source.train, remaining), bar), separator)
            remaining -= size
            if source.valid is None:
                _move_tail(train, before, size, valid, valid_fraction, separator)
            else:
                size += _append(valid, _counted(first_bytes(source.valid, most_valid), bar),
                                separator)
            entry = entries.setdefault(source.name, {
                "source": source.name, "bytes": 0, "own_validation": source.valid is not None})
            entry["bytes"] += size
    if not any(entry["bytes"] for entry in entries.values()):
        raise InputError(f"{', '.join(entries) or 'no source'}: contains no bytes")
    parts = [ByteCorpus([map_bytes(temporary[name])]) for name in PARTS]
    for name, part in zip(("training", "validation"), parts, strict=True):
        if not len(part):
            raise InputError(f"{', '.join(entries)}: the {name} part is empty: the text is too short")
    meta = {
        "format": FORMAT, "sources": list(entries.values()), "valid_fraction": valid_fraction,
        "max_bytes": max_bytes, "separator": separator.decode(),
        **{_key(name): _summary(temporary[name]) for name in PARTS}, "fingerprint": _fingerprint(parts)}
    temporary[META].write_bytes(files.as_json(meta))
    return meta


def _append(file: BinaryIO, chunks: Iterable[bytes], separator: bytes) -> int:
    """Appends the chunks to `file`, after `separator` unless it is empty; returns their size in bytes."""
    size = 0
    for chunk in chunks:
        if chunk and not size and file.tell():
            file.write(separator)
        file.write(chunk)
        size += len(chunk)
    return size


def _move_tail(train: BinaryIO, before: int, size: int, valid: BinaryIO, valid_fraction: float,
               separator: bytes) -> None:
    """Moves the validation split of the last `size` bytes of `train` to the end of `valid`.

    If that is all of them, the separator is removed as well: `train` then ends at `before`.
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
