"""Byte corpora: one long array of bytes, put together from files that are never read in whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tilelli_jax import files
from tilelli_jax.data import facts, stories, village
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.documents import find_files, open_sources
from tilelli_jax.data.shards import split_point, write_shards
from tilelli_jax.errors import InputError

MAX_FILES = 128  # each mapped file holds a descriptor open; macOS allows 256 of them


class ByteCorpus:
    """Segments of bytes, one after the other, read as if they were one array.

    The segments are uint8 [length], usually memory-mapped: reading touches only what is asked for.
    """

    def __init__(self, segments: Sequence[np.ndarray]) -> None:
        self.segments = [segment for segment in segments if len(segment)]
        self.ends = np.cumsum([len(segment) for segment in self.segments], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """The bytes [start, start + length): a copy, uint8 [length].

        Raises:
            IndexError: part of them lies outside the corpus.
        """
        return self.gather([start], length)[0]

    def gather(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """A stretch of `length` bytes from each of `starts` [n]: uint8 [n, length].

        Raises:
            IndexError: part of a stretch lies outside the corpus.
        """
        starts = np.asarray(starts, np.int64)
        if length < 0 or (starts < 0).any() or (starts + length > len(self)).any():
            raise IndexError(f"{length} bytes from {starts.tolist()}: the corpus has {len(self)}")
        out = np.empty((len(starts), length), np.uint8)
        for row, start in zip(out, starts.tolist(), strict=True):
            self._read_into(row, start)
        return out

    def fingerprint(self) -> str:
        """Tells other texts apart by their length and 256 stretches of 4 KiB, spread evenly."""
        length = min(len(self), 4096)
        starts = np.linspace(0, len(self) - length, 256, dtype=np.int64)
        stretches = self.gather(np.unique(starts), length)
        return f"{len(self)}:{hashlib.sha256(stretches.tobytes()).hexdigest()[:16]}"

    def _read_into(self, row: np.ndarray, start: int) -> None:
        done = 0
        at = int(np.searchsorted(self.ends, start, side="right"))
        while done < len(row):
            segment = self.segments[at]
            offset = start + done - (int(self.ends[at]) - len(segment))
            piece = segment[offset:offset + len(row) - done]
            row[done:done + len(piece)] = piece
            done += len(piece)
            at += 1


class Splits(NamedTuple):
    """What is learned from, what is only looked at, and a name for both."""

    train: ByteCorpus
    valid: ByteCorpus
    name: str

    def fingerprint(self) -> str:
        """That of both parts."""
        return f"{self.train.fingerprint()} {self.valid.fingerprint()}"


def open_corpus(config: DataConfig) -> Splits:
    """Opens the corpus that `config.source` names.

    Raises:
        InputError: no such file, nothing matches, not a directory of shards, an empty part; for
            hf sources also a missing extra, or a data set that cannot be read.
    """
    source = config.source
    if source == "stories":
        train, valid = _stories(config)
    elif source == "facts":
        train, valid = _facts(config)
    elif source == "village":
        train, valid = _village(config)
    elif source.startswith("hf:"):
        train, valid = _shards(_cached(config))
    elif os.path.isdir(source):
        train, valid = _shards(Path(source))
    else:
        train, valid = _texts(source, config.valid_fraction)
    if not len(train) + len(valid):
        raise InputError(f"{source}: is empty")
    for part, corpus in (("training", train), ("validation", valid)):
        if not len(corpus):
            raise InputError(f"{source}: nothing is left for the {part} part")
    return Splits(train, valid, source)


# ---------------------------------------------------------------------------------------------


def _stories(config: DataConfig) -> tuple[ByteCorpus, ByteCorpus]:
    size, seed = config.stories_bytes, config.stories_seed
    return (_in_memory(stories.generate(size, seed, "train")),
            _in_memory(stories.generate(int(size * config.valid_fraction), seed, "valid")))


def _facts(config: DataConfig) -> tuple[ByteCorpus, ByteCorpus]:
    seed, people = config.facts_seed, config.facts_people
    return _in_memory(facts.text(seed, people, "train")), _in_memory(facts.text(seed, people, "valid"))


def _village(config: DataConfig) -> tuple[ByteCorpus, ByteCorpus]:
    world = village.world(config.village_seed, config.village_people)
    return (_in_memory(village.text(world, config.village_passes, "train")),
            _in_memory(village.text(world, split="valid")))


def _in_memory(text: bytes) -> ByteCorpus:
    return ByteCorpus([np.frombuffer(text, np.uint8)])


def _texts(pattern: str, valid_fraction: float) -> tuple[ByteCorpus, ByteCorpus]:
    paths = find_files(pattern)
    prepare = f"prepare it with: python -m tilelli_jax.data --source '{pattern}' --out DIR"
    if len(paths) > MAX_FILES:
        raise InputError(f"{pattern}: {len(paths)} files, more than the {MAX_FILES} that are kept "
                         f"open at once; {prepare}")
    if other := [path for path in paths if path.suffix == ".jsonl"]:
        raise InputError(f"{other[0]}: is not plain text; {prepare}")
    texts = [_mapped(path) for path in paths]
    cuts = [split_point(text, valid_fraction) for text in texts]
    return (ByteCorpus([text[:cut] for text, cut in zip(texts, cuts, strict=True)]),
            ByteCorpus([text[cut:] for text, cut in zip(texts, cuts, strict=True)]))


def _shards(directory: Path) -> tuple[ByteCorpus, ByteCorpus]:
    names = sorted(path.name for path in directory.iterdir())
    if missing := [name for name in ("train.bin", "valid.bin") if name not in names]:
        found = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        texts = [name for name in names if name.endswith(".txt")]
        hint = f"; for its text files give '{directory}/*.txt'" if texts else ""
        raise InputError(f"{directory}: expected train.bin and valid.bin, there is no "
                         f"{' and no '.join(missing)}; found {found or 'nothing'}{hint}")
    return (ByteCorpus([_mapped(directory / "train.bin")]),
            ByteCorpus([_mapped(directory / "valid.bin")]))


def _cached(config: DataConfig) -> Path:
    """The directory with the shards of an hf source, made at the first call.

    Of several processes on one file system the first makes them, and the others wait for it.
    """
    made_of = (config.source, config.valid_fraction, config.hf_bytes)
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", config.source)
    directory = Path(config.cache_dir, f"{name}-{key}")
    if (directory / "meta.json").is_file():
        return directory
    made = not directory.parent.exists()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = files.lock(directory.parent, wait=True)
    except OSError as error:
        raise InputError(f"data.cache_dir: {config.cache_dir} cannot be written: {error.strerror}") from None
    try:
        if not (directory / "meta.json").is_file():
            write_shards(directory, list(open_sources(config.source)),
                         valid_fraction=config.valid_fraction, max_bytes=config.hf_bytes)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # another process may have begun to use it
                directory.parent.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)
    return directory


def _mapped(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 [size], read when they are used."""
    try:
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
