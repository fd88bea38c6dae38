"""Reading only regular files within size limits, atomic writes, checksums and leftovers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.io import yaml_text
from tilelli_jax.io.files import (
    check_output,
    check_regular,
    checksums,
    find_damage,
    new_directory,
    read_bytes,
    read_text,
    write_atomically,
    write_together,
)


def is_socket(path: Path) -> None:
    before = Path.cwd()
    try:
        os.chdir(path.parent)  # socket addresses are short
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("make", "message"), [
    (Path.mkdir, "expected a regular file, found a directory"),
    (os.mkfifo, "expected a regular file, found a pipe"),
    (is_socket, "expected a regular file, found a socket"),
    (lambda path: path.symlink_to("/dev/zero"), "expected a regular file, found a device"),
    (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    (lambda path: None, "")],
    ids=["directory", "pipe", "socket", "device", "circle", "nothing"])
def test_only_regular_files_are_read(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    make(path)
    for read in (check_regular, read_bytes, read_text, yaml_text.read):
        with pytest.raises(InputError) as raised:
            read(path)
        expected = f"cannot be read: {message}" if message else "no such file"
        assert str(raised.value) == f"{path}: {expected}"


def test_a_zero_byte_in_a_name() -> None:
    with pytest.raises(InputError, match="cannot be read: embedded null byte"):
        read_bytes(Path("a\0b"))


def test_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345" and check_regular(path) == 5
    with pytest.raises(InputError, match=r"expected at most 4 bytes, found 5$"):
        read_bytes(path, 4)
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(InputError, match=r"expected at most 536,870,912 bytes, found 1,099,511,627,776$"):
        read_bytes(path)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="a system without /proc")
def test_a_file_that_reports_no_size() -> None:
    assert read_text(Path("/proc/version"))
    with pytest.raises(InputError, match=r"expected at most 3 bytes, found more$"):
        read_bytes(Path("/proc/version"), 3)


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbf\xc3\xa4\r\n")
    assert read_text(path) == "ä\r\n"
    path.write_bytes(b"a\xff")
    with pytest.raises(InputError, match=r"cannot be read: not UTF-8 at byte 1$"):
        read_text(path)


@pytest.mark.parametrize(("text", "message"), [
    ("a: !!bool maybe", "a value does not match its tag: 'maybe'"),
    ("a: !!int x", "a value does not match its tag"),
    ("a: !!python/object:os.system x", "could not determine a constructor"),
    ("a: !!binary aGVsbG8=", "expected text, numbers, lists and keys with values, found b'hello'"),
    ("a: !!set {x, y}", "expected text, numbers, lists and keys with values, found {"),
    ("a: 1\na: 2", "the key 'a' is given twice"),
    ("[" * 5000, "expected at most 100 levels and 100,000 values, found more"),
    ("a: &a [*a]", "expected at most 100 levels and 100,000 values, found more"),
    ("\n".join(["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"] + [
        f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 12)]),
     "expected at most 100 levels and 100,000 values, found more"),
    ("a: " + "[" * 150 + "]" * 150, "expected at most 100 levels and 100,000 values, found more"),
    ("a: [", "expected the node content")])
def test_invalid_yaml(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as raised:
        yaml_text.read(tmp_path / "a.yaml")
    assert str(raised.value).startswith(f"{tmp_path / 'a.yaml'}: not YAML: {message}")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_yaml_that_is_not_a_mapping_or_has_invalid_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text, message in (("- 1", "expected keys with values, found a list"), ("", "found null"),
                          ('a: "\\ud800"', "expected text, found a lone surrogate")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            yaml_text.read(path)
    path.write_text("a: &x [1, 2]\nb: *x\n")
    assert yaml_text.read(path) == {"a": [1, 2], "b": [1, 2]}


def test_damage_is_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    small, large = tmp_path / "in" / "small", tmp_path / "large"
    small.write_bytes(b"123")
    large.write_bytes(b"123456")
    expected = checksums(tmp_path, [small, large], max_bytes=5)
    assert expected["large"] == [6] and expected["in/small"][0] == 3 and len(expected["in/small"]) == 2
    assert find_damage(tmp_path, expected) == find_damage(tmp_path, {}) == ""
    (tmp_path / "more").touch()
    large.write_bytes(b"654321")  # only its size is checked
    assert find_damage(tmp_path, expected) == ""
    large.write_bytes(b"12345")
    assert find_damage(tmp_path, expected) == "large was changed after it was written"
    large.write_bytes(b"123456")
    small.write_bytes(b"124")
    assert find_damage(tmp_path, expected) == "in/small was changed after it was written"
    small.unlink()
    assert find_damage(tmp_path, expected) == "in/small is missing"
    for garbage in ([], None, {"large": None}, {"large": []}, {"large": [6, 1, 2]}, {"large": "6"},
                    {"x" * 5000: [6]}, {"in": [6]}):
        assert find_damage(tmp_path, garbage)


def test_a_file_of_the_wrong_size_is_not_read(tmp_path: Path) -> None:
    """Reading 1 TiB would take about ten minutes."""
    (tmp_path / "file").write_bytes(b"123")
    expected = checksums(tmp_path, [tmp_path / "file"])
    os.truncate(tmp_path / "file", 1 << 40)
    assert find_damage(tmp_path, expected) == "file was changed after it was written"


def test_user_files_are_never_treated_as_leftovers(tmp_path: Path) -> None:
    for name in (".notes.20240101", ".notes.original"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".notes.projects").mkdir()
    write_atomically(tmp_path / "notes", b"new")
    with new_directory(tmp_path / "made") as directory:
        (directory / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".notes.20240101", ".notes.original", ".notes.projects", "made", "notes"]


@pytest.mark.parametrize("after", range(4))
def test_an_interrupt_between_two_moves_leaves_old_or_new_or_no_last_file(
        after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt is raised when the rename returns, as for a signal during a rename."""
    replace, count = os.replace, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal count
        replace(source, target)
        count += 1
        if count == after + 1:
            raise KeyboardInterrupt

    for name in "abc":
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_together({tmp_path / name: b"new" for name in "abc"})
    contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert contents in (dict.fromkeys("abc", "old"), dict.fromkeys("abc", "new")) or "c" not in contents
    assert contents.keys() <= set("abc")
    if after == 0:
        assert contents == dict.fromkeys("abc", "old")


@pytest.mark.parametrize(("name", "message"), [
    ("out.json", None), (None, None), (".", "--out: {tmp}: expected a file, found a directory"),
    ("no/out.json", "--out: {tmp}/no/out.json cannot be written: No such file or directory"),
    ("file/out.json", "--out: {tmp}/file/out.json cannot be written: Not a directory")])
def test_check_output(name: str | None, message: str | None, tmp_path: Path) -> None:
    """Reports, with the option's name, whether a file can be written; writes nothing."""
    (tmp_path / "file").touch()
    path = None if name is None else tmp_path / name
    if message is None:
        check_output("--out", path)
    else:
        with pytest.raises(InputError) as error:
            check_output("--out", path)
        assert str(error.value) == message.format(tmp=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
