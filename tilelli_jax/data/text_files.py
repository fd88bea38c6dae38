"""Reads text files as UTF-8 without a byte-order mark, with lines ended by a line feed.

A text from Windows thus equals the same text from Unix: `\\r\\n` is read as `\\n`, and UTF-16 and UTF-32 with
a byte-order mark are decoded. Bytes that are not UTF-8 and zero bytes are kept, with a warning. Binary and
compressed files and git-lfs pointers are errors. Memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tilelli_jax.errors import InputError
from tilelli_jax.io import files
from tilelli_jax.io.json_text import check_fetched

CHUNK = 1 << 17  # bytes read at a time; for larger chunks each read allocates new memory
# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
         (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"),
              (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\0", "xz"), (b"\x04\x22\x4d\x18", "lz4"),
              (b"7z\xbc\xaf\x27\x1c", "7-Zip"), *((b"BZh%d1AY&SY" % i, "bzip2") for i in range(1, 10)))

SAMPLE = 1 << 20  # bytes at the beginning of a file that decide whether it is binary
CONTROLS = bytes(i for i in range(32) if i not in b"\t\n\v\f\r\x1b")
# A file with more zero bytes is binary; so is one with more control characters and more bytes not in UTF-8.
MAX_ZEROS, MAX_CONTROLS, MAX_NOT_UTF8 = 0.01, 0.01, 0.1

log = logging.getLogger(__name__)


def text_chunks(path: Path, *, note: bool = True) -> Iterator[bytes]:
    """Yields the text of a file in chunks.

    Args:
        note: log a warning if the file is not UTF-8 or has zero bytes; false for readers that reject such
            text.

    Raises:
        InputError: the file is unreadable, compressed, a git-lfs pointer or, with `note`, binary, or its
            bytes do not match its byte-order mark.
    """
    chunks = _chunks(path)
    first = next(chunks, b"")
    check_fetched(path, first)
    for magic, program in COMPRESSED:
        if first.startswith(magic):
            raise InputError(f"{path}: expected text, found a file compressed with {program}; decompress it "
                             "first")
    chunks = itertools.chain([first], chunks)
    if encoding := _encoding(first):
        text = _decoded(path, chunks, encoding)
    else:
        if note:
            chunks = _checked(path, chunks)
        text = _without_mark(_with_warnings(path, chunks) if note else chunks)
    yield from with_line_feeds(text)


def with_line_feeds(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Replaces each `\\r\\n` by `\\n`, also across two chunks."""
    held = b""  # a final carriage return, until the next chunk is known
    for chunk in chunks:
        chunk = held + chunk
        held = chunk[-1:] if chunk.endswith(b"\r") else b""
        chunk = chunk.removesuffix(held)
        yield chunk.replace(b"\r\n", b"\n") if b"\r" in chunk else chunk
    yield held


def map_text(path: Path) -> np.ndarray:
    """Maps the text of a file into memory, uint8 [size].

    If the file needs no conversion it is mapped itself; otherwise an unnamed copy in the directory for
    temporary files (TMPDIR), which is deleted when the process ends. To decide, and to warn of bytes that are
    not UTF-8, the file is read once in full.

    Raises:
        InputError: see `text_chunks`; or the copy cannot be written.
    """
    mapped = map_bytes(path)
    first = mapped[:4].tobytes()
    mark = len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0
    with tqdm(total=len(mapped), desc=path.name, unit="B", unit_scale=True, delay=2, leave=False,
              disable=None) as bar:
        size = 0
        for chunk in text_chunks(path):
            size += len(chunk)
            bar.update(len(chunk))
    if size == len(mapped) - mark and _encoding(first) is None:
        return mapped[mark:]
    if not size:
        return np.empty(0, np.uint8)
    try:
        with tempfile.TemporaryFile() as copy:
            copy.writelines(text_chunks(path))
            copy.flush()
            return np.memmap(copy, np.uint8, "r")
    except OSError as error:
        raise InputError(f"{path}: its text as UTF-8 with line feeds cannot be written to TMPDIR "
                         f"({tempfile.tempdir}): {error.strerror or error}") from None


def map_bytes(path: Path) -> np.ndarray:
    """Maps the unchanged bytes of a file into memory, uint8 [size].

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return np.memmap(path, np.uint8, "r") if files.check_regular(path) else np.empty(0, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------


def _chunks(path: Path) -> Iterator[bytes]:
    files.check_regular(path)
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _encoding(first: bytes) -> str | None:
    """Returns the encoding of a file's byte-order mark; None for UTF-8 or without a mark."""
    return next((encoding for mark, encoding in MARKS if first.startswith(mark)), None)


def _decoded(path: Path, chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    _warn_once(f"{path}: {encoding}, read as UTF-8")
    decoder, n_read = codecs.getincrementaldecoder(encoding)(), 0
    for chunk in itertools.chain(chunks, [b""]):
        n_read += len(chunk)
        try:
            yield decoder.decode(chunk, final=not chunk).encode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: expected {encoding}, as its byte-order mark states, found other bytes "
                             f"at byte {_position(error, n_read)}") from None


def _checked(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Returns the chunks. Raises InputError if the first SAMPLE bytes are those of a binary file."""
    first: list[bytes] = []
    size = 0
    while size < SAMPLE and (chunk := next(chunks, b"")):
        first.append(chunk)
        size += len(chunk)
    sample = b"".join(first)[:SAMPLE]
    if (zeros := _share(sample, b"\0")) > MAX_ZEROS:
        raise InputError(f"{path}: expected text, found a binary file (or UTF-16 without a byte-order mark): "
                         f"{zeros:.0%} of its bytes are zero")
    # Text in another encoding is not UTF-8 either, but has no control characters.
    if _share(sample, CONTROLS) > MAX_CONTROLS and (
            len(sample.decode(errors="ignore").encode()) < (1 - MAX_NOT_UTF8) * len(sample)):
        raise InputError(f"{path}: expected text, found a binary file")
    return itertools.chain(first, chunks)


def _share(data: bytes, values: bytes) -> float:
    """Returns the fraction of the bytes that are among `values`; 0 for no bytes."""
    return (len(data) - len(data.translate(None, values))) / max(len(data), 1)


def _with_warnings(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the chunks unchanged; logs the first zero byte and the first byte that is not UTF-8."""
    decoder, n_read, valid = codecs.getincrementaldecoder("utf-8")(), 0, True
    zero = -1
    for chunk in itertools.chain(chunks, [b""]):
        if zero < 0 and (zero := chunk.find(0)) >= 0:
            _warn_once(f"{path}: a zero byte at byte {n_read + zero}, as in UTF-16 without a byte-order mark "
                       "and in binary files; such bytes are kept unchanged")
        n_read += len(chunk)
        try:
            if valid:
                decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            valid = False
            _warn_once(f"{path}: not UTF-8 at byte {_position(error, n_read)}; such bytes are kept unchanged")
        yield chunk


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield next(chunks).removeprefix(codecs.BOM_UTF8)
    yield from chunks


def _position(error: UnicodeDecodeError, n_read: int) -> int:
    """Returns the position in the file at which a decoder failed, after `n_read` bytes."""
    return n_read - len(error.object) + error.start


@functools.cache
def _warn_once(line: str) -> None:
    """Logs a warning once per process, however often the file is opened."""
    log.warning("%s", line)
