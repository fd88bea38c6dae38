"""Mutators of files: of their bytes, of their contents, and of the kind of file.

A mutator changes a file in place, using a seeded generator, and returns a description of the change.
`BY_KIND` lists the mutators of each kind of file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tests.fuzz import columns, trees

Rng = np.random.Generator
Mutator = Callable[[Path, Rng], str]
TEBIBYTE = 1 << 40
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def truncated(content: bytes, rng: Rng) -> bytes:
    return content[:rng.integers(len(content) + 1)]


def without_start(content: bytes, rng: Rng) -> bytes:
    return content[rng.integers(len(content) + 1):]


def emptied(content: bytes, rng: Rng) -> bytes:
    return b""


def flipped(content: bytes, rng: Rng) -> bytes:
    """Flips all bits or one bit in each of one to four bytes."""
    result = bytearray(content)
    for offset in rng.integers(len(content), size=rng.integers(1, 5)) if content else ():
        result[offset] ^= rng.choice([255, *(1 << np.arange(8))])
    return bytes(result)


def with_noise(content: bytes, rng: Rng) -> bytes:
    offset = rng.integers(len(content) + 1)
    return content[:offset] + rng.bytes(rng.integers(1, 40)) + content[offset:]


def with_repeated_chunk(content: bytes, rng: Rng) -> bytes:
    start, stop = _chunk(content, rng)
    return content[:stop] + content[start:]


def without_a_chunk(content: bytes, rng: Rng) -> bytes:
    start, stop = _chunk(content, rng)
    return content[:start] + content[stop:]


def with_zeros(content: bytes, rng: Rng) -> bytes:
    start, stop = _chunk(content, rng)
    return content[:start] + bytes(stop - start) + content[stop:]


def with_byte_order_mark(content: bytes, rng: Rng) -> bytes:
    return rng.choice(np.array([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"], object)) + content


def as_utf_16(content: bytes, rng: Rng) -> bytes:
    return content.decode("latin-1").encode("utf-16")


def as_latin_1(content: bytes, rng: Rng) -> bytes:
    """With characters that are not valid UTF-8."""
    return content.replace(b"e", "é".encode("latin-1")) if b"e" in content else content + b"\xe9"


def with_crlf(content: bytes, rng: Rng) -> bytes:
    return content.replace(b"\n", b"\r\n") if b"\n" in content else content + b"\r\n"


def as_lfs_pointer(content: bytes, rng: Rng) -> bytes:
    """The pointer that git-lfs leaves in place of a file that was not fetched."""
    return LFS


def all_brackets(content: bytes, rng: Rng) -> bytes:
    return b"[" * 100_000


def one_long_line(content: bytes, rng: Rng) -> bytes:
    return b"x" * 200_000


BYTES = (truncated, without_start, emptied, flipped, with_noise, with_repeated_chunk, without_a_chunk,
         with_zeros, with_byte_order_mark, as_utf_16, as_latin_1, with_crlf, as_lfs_pointer, all_brackets,
         one_long_line)


def _chunk(content: bytes, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(max(len(content), 1)))
    return start, min(start + 1 + int(rng.integers(max(len(content) // 2, 1))), len(content))


# --- The kind of file -------------------------------------------------------------------------------


def missing(path: Path, rng: Rng) -> str:
    _remove(path)
    return "removed"


def a_directory(path: Path, rng: Rng) -> str:
    _remove(path)
    path.mkdir()
    return "an empty directory"


def a_file(path: Path, rng: Rng) -> str:
    """Replaces a directory by a file."""
    _remove(path)
    path.write_bytes(b"no directory\n")
    return "a file of one line"


def a_pipe(path: Path, rng: Rng) -> str:
    _remove(path)
    os.mkfifo(path)
    return "a pipe without a writer"


def a_device(path: Path, rng: Rng) -> str:
    _remove(path)
    path.symlink_to("/dev/zero")
    return "a link to /dev/zero"


def link_to_itself(path: Path, rng: Rng) -> str:
    _remove(path)
    path.symlink_to(path.name)
    return "a link to itself"


def a_dangling_link(path: Path, rng: Rng) -> str:
    _remove(path)
    path.symlink_to("not-there")
    return "a dangling link"


def unreadable(path: Path, rng: Rng) -> str:
    path.chmod(0)
    return "mode set to 0"


def enormous(path: Path, rng: Rng) -> str:
    os.truncate(path, TEBIBYTE)
    return "extended with zeros to 1 TiB"


def only_zeros(path: Path, rng: Rng) -> str:
    os.truncate(path, 0)
    os.truncate(path, TEBIBYTE)
    return "1 TiB of zeros"


def with_extra_entries(path: Path, rng: Rng) -> str:
    """Adds unrelated entries to a directory."""
    (path / "0000").mkdir()
    (path / "notes.json").write_text("[")
    (path / "zz.safetensors").write_bytes(b"?")
    return "a directory and two unrelated files added"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


LARGE = (enormous, only_zeros)
MODES = () if os.geteuid() == 0 else (unreadable,)  # root can read all files
REPLACEMENTS = (missing, a_directory, a_pipe, a_device, link_to_itself, a_dangling_link, *LARGE, *MODES)
DIRECTORY_MUTATORS = (missing, a_directory, a_file, a_pipe, a_device, link_to_itself, a_dangling_link,
                      with_extra_entries, *MODES)


# --- By kind of file --------------------------------------------------------------------------------------


def _file_mutator(change: Callable[[bytes, Rng], bytes]) -> Mutator:
    def mutate(path: Path, rng: Rng) -> str:
        before = path.read_bytes()
        after = change(before, rng)
        path.write_bytes(after)
        offset = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b),
                      min(len(before), len(after)))
        return (f"{len(before)} bytes became {len(after)}, first difference at byte {offset}: "
                f"{after[offset:offset + 40]!r}")
    mutate.__name__ = change.__name__
    return mutate


_ANY = (*map(_file_mutator, BYTES), *REPLACEMENTS)
BY_KIND: Mapping[str, tuple[Mutator, ...]] = {
    "directory": DIRECTORY_MUTATORS,
    "bytes": _ANY,
    "json": (*_ANY, *trees.JSON_MUTATORS),
    "jsonl": (*_ANY, *trees.JSON_LINES_MUTATORS),
    "yaml": (*_ANY, *trees.YAML_MUTATORS),
    "safetensors": (*_ANY, *trees.SAFETENSORS_MUTATORS),
    "csv": (*_ANY, *columns.CSV_MUTATORS),
    "parquet": (*_ANY, *columns.PARQUET_MUTATORS),
    "pt": (*_ANY, *trees.PT_MUTATORS)}


def kind_of(path: Path) -> str:
    """The kind of a path, from its suffix."""
    if path.is_dir():
        return "directory"
    kind = {".yml": "yaml", ".tsv": "csv"}.get(path.suffix, path.suffix.removeprefix("."))
    return kind if kind in BY_KIND and kind != "directory" else "bytes"
