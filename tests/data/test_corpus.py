"""Corpora compared with the concatenation of their segments, and the kinds of sources."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.commands.data import main
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.corpus import MAX_FILES, ByteCorpus, open_corpus
from tilelli_jax.data.shards import split_point
from tilelli_jax.data.synthetic import facts
from tilelli_jax.data.text_files import SAMPLE
from tilelli_jax.errors import InputError

segments = st.lists(st.binary(max_size=9), max_size=8)


def corpus_of(parts):
    return ByteCorpus([np.frombuffer(part, np.uint8) for part in parts])


def text_of(corpus):
    return corpus.read(0, len(corpus)).tobytes()


@given(segments, st.data())
def test_reading_equals_slicing_the_concatenation(parts, data):
    whole = b"".join(parts)
    corpus = corpus_of(parts)
    assert len(corpus) == len(whole)
    length = data.draw(st.integers(0, len(whole)))
    starts = data.draw(st.lists(st.integers(0, len(whole) - length), max_size=6))
    rows = corpus.gather(np.array(starts, np.int64), length)
    assert rows.dtype == np.uint8 and rows.shape == (len(starts), length)
    assert [row.tobytes() for row in rows] == [whole[s:s + length] for s in starts]
    for start in starts:
        assert corpus.read(start, length).tobytes() == whole[start:start + length]


@given(segments, st.integers(-3, 80), st.integers(-3, 80))
def test_reading_outside_raises_index_error(parts, start, length):
    size = sum(map(len, parts))
    if start < 0 or length < 0 or start + length > size:
        with pytest.raises(IndexError):
            corpus_of(parts).read(start, length)


def test_fingerprints():
    rng = np.random.default_rng(0)
    for size in (1, 300, 5000, 3_000_000):
        text = rng.integers(0, 256, size).astype(np.uint8)
        known = ByteCorpus([text]).fingerprint()
        assert ByteCorpus([text[:size // 3], text[size // 3:]]).fingerprint() == known
        others = [text[:-1], np.append(text, text[0]), text[::-1] if size > 1 else text + 1]
        for at in (0, size // 2, size - 1):  # the middle of a long text may fall between the stretches
            if size < 2**20 or at != size // 2:
                others.append(text.copy())
                others[-1][at] ^= 1
        assert known not in [ByteCorpus([other]).fingerprint() for other in others]


@given(st.text(max_size=40), st.floats(0.01, 0.99))
def test_split_point_is_the_next_start_of_a_character(text, fraction):
    data = text.encode("utf-8", "replace")
    cut = split_point(np.frombuffer(data, np.uint8), fraction)
    first = int(len(data) * (1 - fraction))
    assert first <= cut <= first + 3
    starts = {len(text[:i].encode("utf-8", "replace")) for i in range(len(text) + 1)}
    assert cut == min(start for start in starts if start >= first)


def test_an_ascii_file_is_split_ninety_to_ten(tmp_path):
    text = bytes(range(32, 127)) * 11 + b"xyz"
    (tmp_path / "a.txt").write_bytes(text)
    splits = open_corpus(DataConfig(source=str(tmp_path / "a.txt")))
    n = int(0.9 * len(text))
    assert (text_of(splits.train), text_of(splits.valid)) == (text[:n], text[n:])
    assert splits.name == str(tmp_path / "a.txt")


def test_a_glob_joins_the_parts_of_its_files_in_order(tmp_path):
    for name, text in (("b.txt", b"B" * 20), ("a.txt", b"A" * 10), ("c.txt", b""), ("d.md", b"D")):
        (tmp_path / name).write_bytes(text)
    splits = open_corpus(DataConfig(source=str(tmp_path / "*.txt"), valid_fraction=0.2))
    assert text_of(splits.train) == b"A" * 8 + b"\n\n" + b"B" * 16
    assert text_of(splits.valid) == b"A" * 2 + b"\n\n" + b"B" * 4


# Files that end with a separator, part of one or none, or that are empty, a byte-order mark or one character.
ENDS = [b"first.", b"second\n", b"third\n\n", "vierte, groß\r\n\r\n".encode(), b"", b"\xef\xbb\xbf", b"x",
        "é".encode(), b"\n\n", b"\xef\xbb\xbflast, marked\r\n", b"caf\xe9\r", "utf-16\n\n".encode("utf-16")]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("order", [1, -1])
def test_a_glob_equals_its_shards(tmp_path, fraction, order):
    for i, text in enumerate(ENDS[::order]):
        (tmp_path / f"{i:02}.txt").write_bytes(text)
    glob, out = str(tmp_path / "*.txt"), str(tmp_path / "out")
    assert main(["--source", glob, "--out", out, "--valid-fraction", str(fraction)]) == 0
    direct, prepared = (open_corpus(DataConfig(source=source, valid_fraction=fraction))
                        for source in (glob, out))
    assert text_of(direct.train) == text_of(prepared.train)
    assert text_of(direct.valid) == text_of(prepared.valid)
    assert direct.fingerprint() == prepared.fingerprint()


def test_text_from_windows_is_the_same_corpus(tmp_path):
    text, fingerprints = "Él dijo:\n\n“Nada.”\n\n" * 9, set()
    windows = text.replace("\n", "\r\n")
    for name, encoded in (("unix", text.encode()), ("windows", windows.encode("utf-8-sig")),
                          ("utf-16", windows.encode("utf-16"))):
        (tmp_path / name).mkdir()
        for part in "ab":
            (tmp_path / name / f"{part}.txt").write_bytes(encoded)
        fingerprints.add(open_corpus(DataConfig(source=str(tmp_path / name / "*.txt"))).fingerprint())
    assert len(fingerprints) == 1


def test_files_are_mapped(tmp_path):
    with open(tmp_path / "big.txt", "wb") as file:
        file.write(b"a" * SAMPLE)
        file.truncate(1 << 26)
    tracemalloc.start()
    try:
        splits = open_corpus(DataConfig(source=str(tmp_path / "big.txt")))
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()
    assert len(splits.train) + len(splits.valid) == 1 << 26
    with open(tmp_path / "big.txt", "r+b") as file:
        file.seek(999)
        file.write(b"x")
    assert splits.train.read(998, 3).tobytes() == b"axa"


def test_stories():
    config = DataConfig(stories_bytes=30_000, valid_fraction=0.2)
    splits = open_corpus(config)
    assert (len(splits.train), len(splits.valid)) == (30_000, 6_000)
    again = open_corpus(dataclasses.replace(config, stories_seed=1))
    assert text_of(again.train) != text_of(splits.train)


def test_facts():
    splits = open_corpus(DataConfig(source="facts", facts_people=60, facts_seed=3))
    assert text_of(splits.train) == facts.text(3, 60, "train")
    assert text_of(splits.valid) == facts.text(3, 60, "valid")
    assert splits.name == "facts"
    again = open_corpus(DataConfig(source="facts", facts_people=60))
    assert again.fingerprint() != splits.fingerprint()


def error_of(**settings):
    with pytest.raises(InputError) as error:
        open_corpus(DataConfig(**settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_sources_are_named(tmp_path):
    assert error_of(source="") == (
        "data.source: expected a text file, a directory of shards, stories, facts, village or hf:NAME, found "
        "nothing")
    assert "no such file" in error_of(source=str(tmp_path / "none.txt"))
    assert "no file matches" in error_of(source=str(tmp_path / "*.txt"))
    assert "found nothing" in error_of(source=str(tmp_path))
    (tmp_path / "empty.txt").touch()
    assert "is empty" in error_of(source=str(tmp_path / "empty.txt"))
    message = error_of(source=str(tmp_path))
    assert "train.bin" in message and "empty.txt" in message and "*.txt'" in message
    (tmp_path / "one.txt").write_bytes(b"x")
    assert "training part" in error_of(source=str(tmp_path / "one.txt"))
    (tmp_path / "train.bin").write_bytes(b"x")
    assert "valid.bin and meta.json; valid.bin an" in error_of(source=str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}")
    assert "tilelli data" in error_of(source=str(tmp_path / "rows.jsonl"))


def test_too_many_files(tmp_path):
    for i in range(MAX_FILES + 1):
        (tmp_path / f"{i}.txt").write_bytes(b"some text")
    assert "tilelli data" in error_of(source=str(tmp_path / "*.txt"))


@pytest.mark.parametrize("settings", [
    {"valid_fraction": 0.0}, {"valid_fraction": 1.0}, {"stories_bytes": 10},
    {"stories_seed": -1}, {"facts_people": 0}, {"facts_people": 90}, {"facts_people": 3660},
    {"facts_seed": -1}, {"shuffle_seed": -1}, {"hf_bytes": 0}, {"prefetch": -1},
])
def test_bad_settings_are_named(settings):
    (key,) = settings
    with pytest.raises(InputError, match=key):
        DataConfig(**settings)
