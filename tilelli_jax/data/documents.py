"""Sources of text as streams of bytes: files, JSON lines, Hugging Face data sets, built-in corpora."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tilelli_jax import extras
from tilelli_jax.data.synthetic import facts, stories, village
from tilelli_jax.data.text_files import text_chunks
from tilelli_jax.errors import InputError
from tilelli_jax.io import files
from tilelli_jax.io.json_text import check_text, kind, parse

SEPARATOR = b"\n\n"  # between two documents: files, or records of one source
BUILT_IN = ("stories", "facts", "village")
HUGGING_FACE = "hf:NAME[#SUBSET][@REVISION][:COLUMN]"  # e.g. hf:HuggingFaceFW/fineweb-edu#sample-10BT


class TextSource(NamedTuple):
    """The bytes of a source for training, and for validation if the source has a validation split."""

    name: str
    train: Iterable[bytes]
    valid: Iterable[bytes] | None = None  # None: the end of `train` is held out
    size: int | None = None  # total bytes, if known in advance


def open_sources(name: str, *, column: str | None = None, separator: bytes = SEPARATOR,
                 stories_bytes: tuple[int, int] = (4_000_000, 400_000)) -> Iterator[TextSource]:
    """Yields the sources of `name`: 'stories', 'facts', 'village', an hf source, a file or a glob.

    Each file of a glob is a source, in the order of their names. `text_files` reads text files; in records,
    too, `\\r\\n` is read as `\\n`.

    Args:
        name: hf sources have the form HUGGING_FACE.
        column: the field with the text, in .jsonl files and Hugging Face data sets; None: 'text', or the only
            field with a string.
        separator: bytes between two records of a .jsonl file or data set.
        stories_bytes: size in bytes of the training and the validation split of 'stories'.

    Raises:
        InputError: a file is missing, nothing matches or an extra is missing; while reading, invalid JSON, a
            missing column or a lone surrogate.
    """
    if name == "stories":
        train, valid = stories_bytes
        yield TextSource(name, first_bytes(stories.stream(0, "train"), train),
                     first_bytes(stories.stream(0, "valid"), valid), train + valid)
    elif name == "facts":
        train_text, valid_text = facts.text(0, split="train"), facts.text(0, split="valid")
        yield TextSource(name, [train_text], [valid_text], len(train_text) + len(valid_text))
    elif name == "village":
        world = village.world()
        train_text, valid_text = village.text(world), village.text(world, split="valid")
        yield TextSource(name, [train_text], [valid_text], len(train_text) + len(valid_text))
    elif is_data_set(name):
        yield _hugging_face(name, column, separator)
    else:
        for path in find_files(name):
            if is_json_lines(path):
                yield TextSource(name, _joined(_text_of(json_lines(path), column), separator))
            else:
                yield TextSource(name, text_chunks(path), size=path.stat().st_size)


def find_files(pattern: str) -> list[Path]:
    """Returns the files that a path or a glob matches, in the order of their names.

    Raises:
        InputError: nothing matches, it is a directory, or a match is not a regular file.
    """
    if os.path.isdir(pattern):
        raise InputError(f"{pattern}: is a directory; give a file or a glob such as "
                         f"'{os.path.join(pattern, '*.txt')}'")
    if os.path.lexists(pattern):
        paths = [Path(pattern)]
    elif not glob.has_magic(pattern):
        raise InputError(f"{pattern}: no such file or directory")
    else:
        paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if not os.path.isdir(path)]
    if not paths:
        raise InputError(f"{pattern}: no file matches")
    for path in paths:
        files.check_regular(path)
    return paths


def named_files(source: str) -> list[Path]:
    """Returns the files of a source; none for a built-in corpus or a data set.

    Raises:
        InputError: see `find_files`.
    """
    return [] if source in BUILT_IN or is_data_set(source) else find_files(source)


def is_data_set(source: str) -> bool:
    """Whether the source's name is that of a Hugging Face data set."""
    return source.startswith("hf:")


def is_json_lines(path: Path) -> bool:
    """Whether a file is read as JSON lines, by its name, instead of as text."""
    return path.suffix.lower() == ".jsonl"


def first_bytes(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Yields the first `limit` bytes of a stream, and reads no chunk beyond them."""
    stream = iter(chunks)
    while limit > 0 and (chunk := next(stream, None)) is not None:
        yield chunk[:limit]
        limit -= len(chunk)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields each non-blank line's location, for error messages, and its JSON value.

    Raises:
        InputError: the file is unreadable, or a line is not UTF-8, not JSON, or has a lone surrogate.
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
    """Yields lines without line feeds, in linear time even for a line that spans many chunks."""
    pieces: list[bytes] = []
    length = 0
    for chunk in chunks:
        first, *lines = chunk.split(b"\n")
        pieces.append(first)
        length = len(lines[-1]) if lines else length + len(first)
        if length > files.MAX_BYTES:
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
    """Yields the text of each row; a row comes with its location for error messages."""
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
        except UnicodeEncodeError:  # in a data set; `json_lines` has checked its lines
            check_text(text, where)
            raise


def _only_text(row: Mapping[str, Any], where: str) -> str:
    names = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in names:
        return "text"
    if not names:
        entries = ", ".join(f"'{name}' with {kind(value)}" for name, value in row.items())
        raise InputError(f"{where}: expected a column with text, found {entries or 'none'}")
    if len(names) > 1:
        raise InputError(f"{where}: which column holds the text? There are {', '.join(row)}")
    return names[0]


def _hugging_face(source: str, column: str | None, separator: bytes) -> TextSource:
    try:
        import datasets
    except ImportError:
        raise extras.missing("datasets", f"{source}: reading a Hugging Face data set") from None
    parts = re.fullmatch(r"hf:([^#@:]+)(?:#([^@:]+))?(?:@([^:]+))?(?::(.+))?", source)
    if parts is None:
        raise InputError(f"{source}: expected {HUGGING_FACE}")
    name, subset, revision, in_name = parts.groups()
    column = in_name or column
    try:
        splits = datasets.load_dataset(name, subset, revision=revision, streaming=True)
    except Exception as error:  # the hub, the network and the files raise many kinds
        raise InputError(f"{source}: cannot be opened: {error}") from error
    if "train" not in splits:
        raise InputError(f"{source}: expected a split 'train', found {', '.join(splits)}")
    held_out = next((split for split in ("validation", "valid") if split in splits), None)

    def text(split: str) -> Iterator[bytes]:
        rows = ((f"{source}, {split} row {i}", row)
                for i, row in zip(itertools.count(), _rows(source, splits[split])))
        return _joined(_text_of(rows, column), separator)

    return TextSource(source, text("train"), text(held_out) if held_out else None)


def _rows(source: str, split: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from split
    except Exception as error:
        raise InputError(f"{source}: reading stopped: {error}") from error
