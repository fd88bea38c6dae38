"""Opens the training text of a configuration as two byte corpora, for training and validation."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tilelli_jax.data.byte_corpus import ByteCorpus
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.documents import SEPARATOR, find_files, is_data_set, is_json_lines, open_sources
from tilelli_jax.data.shards import META, read_shards, split_point, write_shards
from tilelli_jax.data.synthetic import facts, stories, village
from tilelli_jax.data.text_files import map_text
from tilelli_jax.errors import InputError
from tilelli_jax.io import files

MAX_FILES = 128  # each mapped file keeps a descriptor open, and macOS allows 256


class TextSplits(NamedTuple):
    """The training and the validation corpus, and their source's name."""

    train: ByteCorpus
    valid: ByteCorpus
    name: str

    def fingerprint(self) -> str:
        """Returns the fingerprints of both splits."""
        return f"{self.train.fingerprint()} {self.valid.fingerprint()}"


def open_corpus(config: DataConfig) -> TextSplits:
    """Opens the corpus that `config.source` names.

    The text files of a glob are joined in the order of their names, with SEPARATOR between two: the end of
    each (`split_point`) goes to the validation split, the rest to the training split. Shards written from the
    same files with the same `valid_fraction` hold the same bytes.

    Raises:
        InputError: no source is given, a file is missing, nothing matches, shards are incomplete or a split
            is empty; for hf sources also if an extra is missing or the data set cannot be read.
    """
    source = config.source
    if not source:
        raise InputError("data.source: expected a text file, a directory of shards, stories, facts, village "
                         "or hf:NAME, found nothing")
    if source == "stories":
        train, valid = _stories(config)
    elif source == "facts":
        train, valid = _facts(config)
    elif source == "village":
        train, valid = _village(config)
    elif is_data_set(source):
        train, valid = read_shards(_cached(config))
    elif os.path.isdir(source):
        train, valid = read_shards(Path(source))
    else:
        train, valid = _texts(source, config.valid_fraction)
    if not len(train) + len(valid):
        raise InputError(f"{source}: is empty")
    for part, corpus in (("training", train), ("validation", valid)):
        if not len(corpus):
            raise InputError(f"{source}: the {part} part is empty: the text is too short")
    return TextSplits(train, valid, source)


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
    prepare = f"prepare shards with: tilelli data --source '{pattern}' --out DIR"
    if len(paths) > MAX_FILES:
        raise InputError(f"{pattern}: {len(paths)} files, more than the {MAX_FILES} that can be "
                         f"open at once; {prepare}")
    if json_paths := [path for path in paths if is_json_lines(path)]:
        raise InputError(f"{json_paths[0]}: is not plain text; {prepare}")
    texts = [map_text(path) for path in paths]
    cuts = [split_point(text, valid_fraction) for text in texts]
    return (_joined([text[:cut] for text, cut in zip(texts, cuts, strict=True)]),
            _joined([text[cut:] for text, cut in zip(texts, cuts, strict=True)]))


def _joined(texts: Iterable[np.ndarray]) -> ByteCorpus:
    """Joins the non-empty texts, with the separator between two."""
    between = np.frombuffer(SEPARATOR, np.uint8)
    segments = [segment for text in texts if len(text) for segment in (between, text)]
    return ByteCorpus(segments[1:])


def _cached(config: DataConfig) -> Path:
    """Returns the directory with the shards of an hf source, and writes them on the first call.

    Of several processes on one file system one writes the shards while the others wait.
    """
    manifest = (config.source, config.valid_fraction, config.hf_bytes)
    key = hashlib.sha256(repr(manifest).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", config.source)
    directory = Path(config.cache_dir, f"{name}-{key}")
    if (directory / META).is_file():
        return directory
    is_new = not directory.parent.exists()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = files.lock(directory.parent, wait=True)
    except OSError as error:
        raise InputError(f"data.cache_dir: {config.cache_dir} cannot be written: {error.strerror}") from None
    try:
        if not (directory / META).is_file():
            write_shards(directory, list(open_sources(config.source)),
                         valid_fraction=config.valid_fraction, max_bytes=config.hf_bytes, force=True)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # another process may have begun to use it
                directory.parent.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)
    return directory
