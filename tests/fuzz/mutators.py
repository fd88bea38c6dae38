"""Ways to spoil a file, each drawn from a seeded generator: its bytes, what is in it, what it is.

A mutator changes a file in place and returns, in words, what it did. `OF_KIND` lists those of each kind of
file.
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


def cut_off(content: bytes, rng: Rng) -> bytes:
    return content[:rng.integers(len(content) + 1)]


def beheaded(content: bytes, rng: Rng) -> bytes:
    return content[rng.integers(len(content) + 1):]


def emptied(content: bytes, rng: Rng) -> bytes:
    return b""


def flipped(content: bytes, rng: Rng) -> bytes:
    """One to four bytes, all of their bits or one."""
    spoilt = bytearray(content)
    for at in rng.integers(len(content), size=rng.integers(1, 5)) if content else ():
        spoilt[at] ^= rng.choice([255, *(1 << np.arange(8))])
    return bytes(spoilt)


def with_noise(content: bytes, rng: Rng) -> bytes:
    at = rng.integers(len(content) + 1)
    return content[:at] + rng.bytes(rng.integers(1, 40)) + content[at:]


def with_a_chunk_twice(content: bytes, rng: Rng) -> bytes:
    start, stop = _chunk(content, rng)
    return content[:stop] + content[start:]


def with_a_hole(content: bytes, rng: Rng) -> bytes:
    start, stop = _chunk(content, rng)
    return content[:start] + content[stop:]


def with_zeros(content: bytes, rng: Rng) -> bytes:
    start, stop = _chunk(content, rng)
    return content[:start] + bytes(stop - start) + content[stop:]


def with_a_mark(content: bytes, rng: Rng) -> bytes:
    return rng.choice(np.array([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"], object)) + content


def as_utf_16(content: bytes, rng: Rng) -> bytes:
    return content.decode("latin-1").encode("utf-16")


def as_latin_1(content: bytes, rng: Rng) -> bytes:
    """Whose letters are none in UTF-8."""
    return content.replace(b"e", "é".encode("latin-1")) if b"e" in content else content + b"\xe9"


def as_windows_has_it(content: bytes, rng: Rng) -> bytes:
    return content.replace(b"\n", b"\r\n") if b"\n" in content else content + b"\r\n"


def as_a_pointer(content: bytes, rng: Rng) -> bytes:
    """As git-lfs leaves for a file that was not fetched."""
    return LFS


def all_brackets(content: bytes, rng: Rng) -> bytes:
    return b"[" * 100_000


def one_long_line(content: bytes, rng: Rng) -> bytes:
    return b"x" * 200_000


BYTES = (cut_off, beheaded, emptied, flipped, with_noise, with_a_chunk_twice, with_a_hole, with_zeros,
         with_a_mark, as_utf_16, as_latin_1, as_windows_has_it, as_a_pointer, all_brackets, one_long_line)


def _chunk(content: bytes, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(max(len(content), 1)))
    return start, min(start + 1 + int(rng.integers(max(len(content) // 2, 1))), len(content))


# --- What it is -------------------------------------------------------------------------------


def missing(path: Path, rng: Rng) -> str:
    _take_away(path)
    return "taken away"


def a_directory(path: Path, rng: Rng) -> str:
    _take_away(path)
    path.mkdir()
    return "an empty directory"


def a_file(path: Path, rng: Rng) -> str:
    """In place of a directory."""
    _take_away(path)
    path.write_bytes(b"no directory\n")
    return "a file of one line"


def a_pipe(path: Path, rng: Rng) -> str:
    _take_away(path)
    os.mkfifo(path)
    return "a pipe that nobody writes to"


def a_device(path: Path, rng: Rng) -> str:
    _take_away(path)
    path.symlink_to("/dev/zero")
    return "a link to /dev/zero"


def a_circle(path: Path, rng: Rng) -> str:
    _take_away(path)
    path.symlink_to(path.name)
    return "a link to itself"


def a_dangling_link(path: Path, rng: Rng) -> str:
    _take_away(path)
    path.symlink_to("not-there")
    return "a link to nothing"


def unreadable(path: Path, rng: Rng) -> str:
    path.chmod(0)
    return "of mode 0"


def enormous(path: Path, rng: Rng) -> str:
    os.truncate(path, TEBIBYTE)
    return "1 TiB long, zeros after what it had"


def nothing_but_zeros(path: Path, rng: Rng) -> str:
    os.truncate(path, 0)
    os.truncate(path, TEBIBYTE)
    return "1 TiB of zeros"


def with_strangers(path: Path, rng: Rng) -> str:
    """A directory with more in it."""
    (path / "0000").mkdir()
    (path / "notes.json").write_text("[")
    (path / "zz.safetensors").write_bytes(b"?")
    return "with a directory and two files that do not belong there"


def _take_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


LARGE = (enormous, nothing_but_zeros)
MODES = () if os.geteuid() == 0 else (unreadable,)  # root reads everything
AS_SUCH = (missing, a_directory, a_pipe, a_device, a_circle, a_dangling_link, *LARGE, *MODES)
OF_DIRECTORIES = (missing, a_directory, a_file, a_pipe, a_device, a_circle, a_dangling_link, with_strangers,
                  *MODES)


# --- All --------------------------------------------------------------------------------------


def _of_bytes(change: Callable[[bytes, Rng], bytes]) -> Mutator:
    def mutate(path: Path, rng: Rng) -> str:
        before = path.read_bytes()
        after = change(before, rng)
        path.write_bytes(after)
        at = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
        return f"{len(before)} bytes became {len(after)}, other ones from byte {at} on: {after[at:at + 40]!r}"
    mutate.__name__ = change.__name__
    return mutate


_ANY = (*map(_of_bytes, BYTES), *AS_SUCH)
OF_KIND: Mapping[str, tuple[Mutator, ...]] = {
    "directory": OF_DIRECTORIES,
    "bytes": _ANY,
    "json": (*_ANY, *trees.OF_JSON),
    "jsonl": (*_ANY, *trees.OF_JSON_LINES),
    "yaml": (*_ANY, *trees.OF_YAML),
    "safetensors": (*_ANY, *trees.OF_SAFETENSORS),
    "csv": (*_ANY, *columns.OF_CSV),
    "parquet": (*_ANY, *columns.OF_PARQUET),
    "pt": (*_ANY, *trees.OF_PT)}


def kind_of(path: Path) -> str:
    """By a file's name."""
    if path.is_dir():
        return "directory"
    kind = {".yml": "yaml", ".tsv": "csv"}.get(path.suffix, path.suffix.removeprefix("."))
    return kind if kind in OF_KIND and kind != "directory" else "bytes"
