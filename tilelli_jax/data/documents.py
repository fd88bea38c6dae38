"""Where text comes from, as streams of bytes: files, JSON lines, data sets, what is built in."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tilelli_jax import extras, files
from tilelli_jax.data import facts, stories, village
from tilelli_jax.data.text_files import text_chunks
from tilelli_jax.errors import InputError
from tilelli_jax.json_text import check_text, kind, parse

SEPARATOR = b"\n\n"  # what is put between two documents: files, or records of one source
BUILT_IN = ("stories", "facts", "village")
HUGGING_FACE = "hf:NAME[#SUBSET][@REVISION][:COLUMN]"  # e.g. hf:HuggingFaceFW/fineweb-edu#sample-10BT


class Source(NamedTuple):
    """Bytes to learn from, and those kept back for validation where the source has such a part."""

    name: str
    train: Iterable[bytes]
    valid: Iterable[bytes] | None = None  # None: the end of `train` is kept back
    size: int | None = None  # bytes in all, where that is known beforehand


def open_sources(name: str, *, column: str | None = None, separator: bytes = SEPARATOR,
                 stories_bytes: tuple[int, int] = (4_000_000, 400_000)) -> Iterator[Source]:
    """The sources of `name`: 'stories', 'facts', 'village', an hf source, a file or a glob.

    Each file of a glob is a source, in the order of their names. Text is as `text_files` reads it; in
    records, too, `\\r\\n` is read as `\\n`.

    Args:
        name: of hf sources as HUGGING_FACE has it.
        column: the field that holds the text, in .jsonl files and Hugging Face data sets; None
            takes 'text', or the only field that holds a string.
        separator: what is put between two records of such a source.
        stories_bytes: size of the training and the validation part of 'stories'.

    Raises:
        InputError: no such file, nothing matches, a missing extra; while reading: not JSON, no
            such column, half a character.
    """
    if name == "stories":
        train, valid = stories_bytes
        yield Source(name, first_bytes(stories.stream(0, "train"), train),
                     first_bytes(stories.stream(0, "valid"), valid), train + valid)
    elif name == "facts":
        told, retold = facts.text(0, split="train"), facts.text(0, split="valid")
        yield Source(name, [told], [retold], len(told) + len(retold))
    elif name == "village":
        world = village.world()
        told, retold = village.text(world), village.text(world, split="valid")
        yield Source(name, [told], [retold], len(told) + len(retold))
    elif is_data_set(name):
        yield _hugging_face(name, column, separator)
    else:
        for path in find_files(name):
            if is_json_lines(path):
                yield Source(name, _joined(_text_of(json_lines(path), column), separator))
            else:
                yield Source(name, text_chunks(path), size=path.stat().st_size)


def find_files(pattern: str) -> list[Path]:
    """The files that a path or a glob names, in the order of their names.

    Raises:
        InputError: there are none, it is a directory, or one is no regular file.
    """
    if os.path.isdir(pattern):
        raise InputError(f"{pattern}: is a directory; give a file or a glob such as "
                         f"'{os.path.join(pattern, '*.txt')}'")
    if os.path.lexists(pattern):
        found = [Path(pattern)]
    elif not glob.has_magic(pattern):
        raise InputError(f"{pattern}: no such file or directory")
    else:
        found = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    if not found:
        raise InputError(f"{pattern}: no file matches")
    for path in found:
        files.check_regular(path)
    return found


def named_files(source: str) -> list[Path]:
    """The files of a source; none of what is built in, and of a data set.

    Raises:
        InputError: see `find_files`.
    """
    return [] if source in BUILT_IN or is_data_set(source) else find_files(source)


def is_data_set(source: str) -> bool:
    """Whether it is on Hugging Face, by its name."""
    return source.startswith("hf:")


def is_json_lines(path: Path) -> bool:
    """Whether a file is read as one record on each line, and not as text: by its name."""
    return path.suffix.lower() == ".jsonl"


def first_bytes(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """The first `limit` bytes of a stream; no more of it is read than they need."""
    stream = iter(chunks)
    while limit > 0 and (chunk := next(stream, None)) is not None:
        yield chunk[:limit]
        limit -= len(chunk)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """What each line of a file holds that is not blank, with the words that name the line in an error.

    Raises:
        InputError: the file cannot be read, or a line is not UTF-8, not JSON, or has half a character in it.
    """
    for number, line in enumerate(_lines(path, text_chunks(path, note=False)), 1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not JSON: expected UTF-8, found byte {line[error.start]:#04x} at "
                                 f"position {error.start}") from None
            yield where, parse(text, where)


# ---------------------------------------------------------------------------------------------


def _lines(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their line feeds. In time that is linear in a line that many chunks share."""
    pieces: list[bytes] = []
    held = 0
    for chunk in chunks:
        end, *lines = chunk.split(b"\n")
        pieces.append(end)
        held = len(lines[-1]) if lines else held + len(end)
        if held > files.MAX_BYTES:
            raise InputError(f"{path}: expected lines of at most {files.MAX_BYTES:,} bytes, found more")
        if lines:
            yield b"".join(pieces)
            yield from lines[:-1]
            pieces = lines[-1:]
    yield b"".join(pieces)


def _joined(texts: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    between = b""
    for text in texts:
        yield between + text
        between = separator


def _text_of(rows: Iterable[tuple[str, Any]], column: str | None) -> Iterator[bytes]:
    """The text of each row; a row comes with the words that name it in an error."""
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected fields with values, found {row!r:.40}")
        column = column or _only_text(row, where)
        text = row.get(column)
        if not isinstance(text, str):
            found = kind(text) if column in row else f"only {', '.join(row) or 'nothing'}"
            raise InputError(f"{where}: expected text under '{column}', found {found}")
        try:
            yield text.replace("\r\n", "\n").encode()
        except UnicodeEncodeError:  # in a data set; `json_lines` has looked
            check_text(text, where)
            raise


def _only_text(row: Mapping[str, Any], where: str) -> str:
    names = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in names:
        return "text"
    if not names:
        found = ", ".join(f"'{name}' with {kind(value)}" for name, value in row.items())
        raise InputError(f"{where}: expected a column with text, found {found or 'none'}")
    if len(names) > 1:
        raise InputError(f"{where}: which column holds the text? There are {', '.join(row)}")
    return names[0]


def _hugging_face(source: str, column: str | None, separator: bytes) -> Source:
    try:
        import datasets
    except ImportError:
        raise extras.missing("datasets", f"{source}: reading it") from None
    parts = re.fullmatch(r"hf:([^#@:]+)(?:#([^@:]+))?(?:@([^:]+))?(?::(.+))?", source)
    if parts is None:
        raise InputError(f"{source}: expected {HUGGING_FACE}")
    name, subset, revision, in_name = parts.groups()
    column = in_name or column
    try:
        splits = datasets.load_dataset(name, subset, revision=revision, streaming=True)
    except Exception as error:  # whatever the hub, the network or the set's files come up with
        raise InputError(f"{source}: cannot be opened: {error}") from error
    if "train" not in splits:
        raise InputError(f"{source}: expected a split 'train', found {', '.join(splits)}")
    held_out = next((split for split in ("validation", "valid") if split in splits), None)

    def text(split: str) -> Iterator[bytes]:
        rows = ((f"{source}, {split} row {i}", row)
                for i, row in zip(itertools.count(), _rows(source, splits[split])))
        return _joined(_text_of(rows, column), separator)

    return Source(source, text("train"), text(held_out) if held_out else None)


def _rows(source: str, split: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from split
    except Exception as error:
        raise InputError(f"{source}: reading stopped: {error}") from error
