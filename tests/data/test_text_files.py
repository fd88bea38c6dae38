"""Text files of any system give the same text: encodings, byte-order marks, line ends, warnings."""

from __future__ import annotations

import codecs
import importlib
import json
import logging
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.data import text_files
from tilelli_jax.data.chat_pairs import read_pairs
from tilelli_jax.data.documents import json_lines, open_sources
from tilelli_jax.data.text_files import map_text, text_chunks, with_line_feeds
from tilelli_jax.errors import InputError

TEXT = "Él dijo:\n\n“Nada.”\n\n\rA lone return, 𝄞 and ﬀ.\n"


@pytest.fixture(params=[4, 5, 7, 1 << 20])
def chunk(request, monkeypatch):
    """Chunk sizes that split characters and line ends."""
    monkeypatch.setattr(text_files, "CHUNK", request.param)


def written(path, content):
    path.write_bytes(content)
    return path


def both(path):
    """Returns the text, after checking that streaming and mapping agree."""
    streamed, mapped = b"".join(text_chunks(path)), map_text(path)
    assert mapped.dtype == np.uint8 and mapped.tobytes() == streamed
    return streamed


ENCODED = {
    "utf-8": (b"", "utf-8"), "with a mark": (codecs.BOM_UTF8, "utf-8"),
    "utf-16": (codecs.BOM_UTF16_LE, "utf-16-le"), "utf-16, big": (codecs.BOM_UTF16_BE, "utf-16-be"),
    "utf-32": (codecs.BOM_UTF32_LE, "utf-32-le"), "utf-32, big": (codecs.BOM_UTF32_BE, "utf-32-be")}


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("encoded", ENCODED)
def test_the_same_text_is_the_same_bytes(tmp_path, caplog, chunk, encoded, end):
    mark, encoding = ENCODED[encoded]
    path = written(tmp_path / "a.txt", mark + TEXT.replace("\n", end).encode(encoding))
    assert both(path) == TEXT.encode()
    logged = [record.getMessage() for record in caplog.records]
    assert logged == ([f"{path}: {encoded[:6].upper()}, read as UTF-8"] if "utf-8" not in encoding else [])
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_utf_16_of_the_same_size_as_its_utf_8(tmp_path):
    path = written(tmp_path / "a.txt", "世界人a".encode("utf-16"))
    assert both(path) == "世界人a".encode() and path.stat().st_size == 10 == len(both(path))


@pytest.mark.parametrize("read", [map_text, text_chunks, json_lines])
@pytest.mark.parametrize("kind", ["gzip", "bz2", "lzma", "zip"])
def test_compressed_files_raise_an_error(tmp_path, read, kind):
    path = tmp_path / "a.txt.z"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", TEXT)
    else:
        path.write_bytes(importlib.import_module(kind).compress(TEXT.encode()))
    program = {"bz2": "bzip2", "lzma": "xz"}.get(kind, kind)
    with pytest.raises(InputError) as raised:
        list(read(path))
    message = f"{path}: expected text, found a file compressed with {program}; decompress it first"
    assert str(raised.value) == message


def test_zstandard_and_git_lfs(tmp_path):
    for content, message in ((b"\x28\xb5\x2f\xfd\x20\0", "compressed with zstd"),
                             (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer")):
        with pytest.raises(InputError, match=message):
            map_text(written(tmp_path / "a.txt", content))


def test_zero_bytes_give_a_warning(tmp_path, caplog, chunk):
    path = written(tmp_path / "a.txt", b"a\0" + b"plain " * 100)
    assert both(path) == path.read_bytes()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: a zero byte at byte 1, as in UTF-16 without a byte-order mark and in binary files; such "
        "bytes are kept unchanged"]


NOISE = np.random.default_rng(0).integers(1, 256, 50_000, np.uint8).tobytes()  # 10 % are control characters
BINARY = {
    "utf-16 without a mark": ("Latin, plain\n".encode("utf-16-le"), "50% of its bytes are zero"),
    "two in a hundred": (b"a" * 98 + b"\0\0", "2% of its bytes are zero"),
    "no zero bytes": (NOISE, "binary file$"),
    "a quarter": (b"a" * 150_000 + NOISE, "binary file$")}


@pytest.mark.parametrize("name", BINARY)
def test_binary_files_raise_an_error(tmp_path, chunk, name):
    content, message = BINARY[name]
    path = written(tmp_path / "a.txt", content)
    for read in (map_text, lambda path: list(text_chunks(path))):
        with pytest.raises(InputError, match=f"expected text, found a .*{message}"):
            read(path)


@pytest.mark.parametrize("content", [
    b"a" * 99 + b"\0", "Съешь же ещё этих мягких булок. ".encode("cp1251") * 99,
    "いろはにほへと".encode("shift-jis"),
    b"\x1b[31mred\x1b[0m\ttab\f", b"\x01\x02 in UTF-8", b"a" * 500_000 + NOISE,
    b"a" * (1 << 20) + NOISE * 4],
    ids=["one in a hundred", "Windows", "Shift JIS", "of a terminal", "control characters", "a tenth",
         "late"])
def test_text_is_not_binary(tmp_path, content):
    assert both(written(tmp_path / "a.txt", content)) == content.replace(b"\r\n", b"\n")


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a", b""]), max_size=9))
def test_line_ends_split_between_chunks(chunks):
    assert b"".join(with_line_feeds(chunks)) == b"".join(chunks).replace(b"\r\n", b"\n")


@pytest.mark.parametrize(("content", "position"), [
    ("caf\u00e9 cr\u00e8me".encode("latin-1"), 3), ("caf\u00e9".encode("latin-1"), 3),  # the last byte of all
    (codecs.BOM_UTF8 + "aé\n".encode() + b"\x93quoted\x94\n", 7), ("é".encode() * 9 + b"\xc3", 18),
    ("a\r\né".encode("cp1252"), 3)])
def test_other_bytes_are_kept_with_one_warning(tmp_path, caplog, chunk, content, position):
    path = written(tmp_path / "a.txt", content)
    assert both(path) == content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    (source,) = open_sources(str(path))
    assert b"".join(source.train) == both(path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: not UTF-8 at byte {position}; such bytes are kept unchanged"]


@pytest.mark.parametrize(("content", "message"), [
    (codecs.BOM_UTF16_LE + "abc".encode("utf-16-le") + b"x", "expected UTF-16.* at byte 8"),
    (codecs.BOM_UTF16_LE + "abcdef".encode("utf-16-le") + b"\x00\xd8a\x00", "expected UTF-16.* at byte 14"),
    (codecs.BOM_UTF32_BE + b"\x00\x11\x00\x00", "expected UTF-32.* at byte 4")])
def test_a_wrong_byte_order_mark_raises_an_error(tmp_path, chunk, content, message):
    path = written(tmp_path / "a.txt", content)
    for read in (map_text, lambda path: list(text_chunks(path))):
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF32_LE])
def test_a_file_with_only_a_mark_is_empty(tmp_path, content):
    assert both(written(tmp_path / "a.txt", content)) == b""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
@pytest.mark.parametrize("read", [map_text, text_chunks, json_lines])
def test_a_pipe_raises_an_error_instead_of_blocking(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: cannot be read: expected a regular file, found a pipe"):
        list(read(tmp_path / "pipe"))


def test_text_that_needs_no_conversion_is_mapped_and_copies_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for mark in (b"", codecs.BOM_UTF8):
        path = written(tmp_path / "a.txt", mark + TEXT.encode())
        mapped = map_text(path)
        with path.open("r+b") as file:  # the file itself
            file.seek(len(mark))
            file.write(b"#")
        assert mapped[:2].tobytes() == b"#" + TEXT.encode()[1:2]
    changed = map_text(written(tmp_path / "b.txt", b"a\r\nb"))
    assert list((tmp_path / "temporary").iterdir()) == [] and changed.tobytes() == b"a\nb"
    (tmp_path / "temporary").rmdir()
    with pytest.raises(InputError, match=r"b\.txt: its text .* cannot be written to TMPDIR"):
        map_text(tmp_path / "b.txt")


@pytest.mark.parametrize(("mark", "content"), [(b"", b"x\r\n"), (codecs.BOM_UTF16_LE, b"x\0\r\0\n\0")],
                         ids=["bytes", "utf-16"])
def test_memory_does_not_grow_with_the_text(tmp_path, mark, content):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write(mark)
        file.writelines(content * 100_000 for _ in range(40))
    tracemalloc.start()
    try:
        assert len(map_text(path)) == 8_000_000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


ROWS = [{"prompt": "Where?\n\nIn “Oslo”", "response": "Yes,\nthere."}, {"prompt": "Who?", "response": "Ada."}]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("encoded", ENCODED)
def test_pairs_from_any_system(tmp_path, chunk, encoded, end):
    mark, encoding = ENCODED[encoded]
    lines = [json.dumps(row, ensure_ascii=False).replace(r"\n", json.dumps(end)[1:-1]) for row in ROWS]
    path = written(tmp_path / "a.jsonl", mark + (end.join([lines[0], "", lines[1]]) + end).encode(encoding))
    assert [pair[:2] for pair in read_pairs(path)] == [tuple(row.values()) for row in ROWS]
    assert [where for where, _ in json_lines(path)] == [f"{path}, line {number}" for number in (1, 3)]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_records_from_any_system(tmp_path, end):
    for name in ("a.jsonl", "A.JSONL"):  # as on Windows
        path = written(tmp_path / name, (end.join(json.dumps({"text": f"one{end}{end}{n}"}) for n in "ab")
                                         ).encode("utf-8-sig"))
        (source,) = open_sources(str(path), separator=b"--")
        assert b"".join(source.train) == b"one\n\na--one\n\nb"
        path.unlink()


def test_a_line_that_is_not_utf_8_raises_an_error(tmp_path, caplog):
    path = written(tmp_path / "a.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"line 2: not JSON: expected UTF-8, found byte 0xe9 at position 15"):
        list(json_lines(path))
    assert not caplog.records
