"""Text files as UTF-8 without a byte-order mark, their lines ended by a line feed.

So a text from Windows is the same text as from Unix: `\\r\\n` is read as `\\n`, and UTF-16 and UTF-32 with a
byte-order mark are decoded. Bytes that are not UTF-8, and zero bytes, are kept. A log line notes each. What
is compressed, and a git-lfs pointer, is refused. Memory does not grow with a file.
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

from tilelli_jax import files
from tilelli_jax.errors import InputError
from tilelli_jax.json_text import check_fetched

CHUNK = 1 << 17  # bytes read at a time; of larger ones the memory is new at each
# UTF-32 first: in little-endian order its mark begins with that of UTF-16.
MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
         (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"),
              (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\0", "xz"), (b"\x04\x22\x4d\x18", "lz4"),
              (b"7z\xbc\xaf\x27\x1c", "7-Zip"), *((b"BZh%d1AY&SY" % i, "bzip2") for i in range(1, 10)))

log = logging.getLogger(__name__)


def text_chunks(path: Path, *, note: bool = True) -> Iterator[bytes]:
    """The text of a file, piece by piece.

    Args:
        note: log where the file is not UTF-8 or has zero bytes. For readers that refuse such text
            themselves: false.

    Raises:
        InputError: the file cannot be read, is compressed or a git-lfs pointer, or its encoding is not the
            one that its byte-order mark states.
    """
    chunks = _chunks(path)
    first = next(chunks, b"")
    check_fetched(path, first)
    for begins, called in COMPRESSED:
        if first.startswith(begins):
            raise InputError(f"{path}: expected text, found a file compressed with {called}; decompress it "
                             "first")
    chunks = itertools.chain([first], chunks)
    if encoding := _encoding(first):
        text = _decoded(path, chunks, encoding)
    else:
        text = _without_mark(_noted(path, chunks) if note else chunks)
    yield from with_line_feeds(text)


def with_line_feeds(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Each `\\r\\n` as `\\n`, also one that is torn between two chunks."""
    held = b""  # a carriage return: what follows it decides
    for chunk in chunks:
        chunk = held + chunk
        held = chunk[-1:] if chunk.endswith(b"\r") else b""
        chunk = chunk.removesuffix(held)
        yield chunk.replace(b"\r\n", b"\n") if b"\r" in chunk else chunk
    yield held


def map_text(path: Path) -> np.ndarray:
    """The text of a file, uint8 [size], mapped: read when it is used.

    The file itself is mapped if it holds its text as it is to be read, otherwise a copy without a name in
    the directory for temporary files (TMPDIR), which ends with the process. To know which, and to note
    bytes that are not UTF-8, the file is read through once.

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
    """The bytes of a file as they are, uint8 [size], mapped.

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
    """What the mark at a file's beginning states; None for UTF-8, and where there is none."""
    return next((encoding for mark, encoding in MARKS if first.startswith(mark)), None)


def _decoded(path: Path, chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    _note(f"{path}: {encoding}, read as UTF-8")
    decoder, read = codecs.getincrementaldecoder(encoding)(), 0
    for chunk in itertools.chain(chunks, [b""]):
        read += len(chunk)
        try:
            yield decoder.decode(chunk, final=not chunk).encode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: expected {encoding}, as its byte-order mark states, found other bytes "
                             f"at byte {_position(error, read)}") from None


def _noted(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks as they are; the first zero byte of them, and the first that is not UTF-8, are logged."""
    decoder, read, valid = codecs.getincrementaldecoder("utf-8")(), 0, True
    zero = -1
    for chunk in itertools.chain(chunks, [b""]):
        if zero < 0 and (zero := chunk.find(0)) >= 0:
            _note(f"{path}: a zero byte at byte {read + zero}, as in UTF-16 without a byte-order mark and in "
                  "what is no text; such bytes are kept as they are")
        read += len(chunk)
        try:
            if valid:
                decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            valid = False
            _note(f"{path}: not UTF-8 at byte {_position(error, read)}; such bytes are kept as they are")
        yield chunk


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield next(chunks).removeprefix(codecs.BOM_UTF8)
    yield from chunks


def _position(error: UnicodeDecodeError, read: int) -> int:
    """Where in the file a decoder has failed after it was given `read` bytes of it."""
    return read - len(error.object) + error.start


@functools.cache
def _note(line: str) -> None:
    """Once, however often a process opens the file."""
    log.warning("%s", line)
