"""JSON is read within limits, and lone surrogates are found anywhere in a tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.io.json_text import (
    MAX_DEPTH,
    as_expected,
    check_text,
    kind,
    lines,
    object_under,
    parse,
    read_json,
    read_text,
)


@pytest.mark.parametrize("tree", ["a", "ä", "\U0001f642", {"ä": [1, None, ("b", {"c": "日本"})]}, None, 1.5])
def test_text(tree: Any) -> None:
    check_text(tree, "here")


@pytest.mark.parametrize("tree", ["\ud800", "ä\udfff", ["a", {"b": "\udc80"}], {"\ud800": 1},
                                  ({"a": ["\ud83d"]},)])
def test_lone_surrogates(tree: Any) -> None:
    with pytest.raises(InputError, match=r"^here: expected text, found a lone surrogate") as raised:
        check_text(tree, "here")
    str(raised.value).encode()


@pytest.mark.parametrize(("text", "message"), [
    ("", "not JSON: Expecting value"), ('{"a": ', "not JSON: "),
    ("[" * 100_000, "expected at most 100 levels, found more"),
    ("[" * 1000 + "]" * 1000, "expected at most 100 levels, found more"),
    ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "expected at most 100 levels, found more"),
    ('"\\ud800"', "expected text, found a lone surrogate"), ("1" * 5000, "not JSON: ")])
def test_invalid_json(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^here: ({message})"):
        parse(text, "here")


def test_the_deepest_valid_tree() -> None:
    assert check_text(parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "here"), "here") is None


def test_lines_are_numbered_and_end_only_at_line_feeds() -> None:
    assert list(lines('{"a": "\u2028"}\r\n\n 2 \n', "here")) == [(1, {"a": "\u2028"}), (3, 2)]
    with pytest.raises(InputError, match=r"^here, line 2: not JSON"):
        list(lines("1\n{\n", "here"))


@pytest.mark.parametrize(("content", "message"), [
    (b"[]", "expected an object, found a list"), (b"null", "expected an object, found null"),
    (b"\xff{}", "cannot be read: not UTF-8 at byte 0"), (b"1.5", "expected an object, found a number"),
    (b"true", "expected an object, found true or false"), (b'"a"', "expected an object, found text")])
def test_a_file_that_is_not_an_object(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_json(tmp_path / "a.json")
    assert str(raised.value) == f"{tmp_path / 'a.json'}: {message}"


@pytest.mark.parametrize("read", [read_json, read_text])
def test_a_git_lfs_pointer(read: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match=r"config\.json: is a git-lfs pointer, not the file; `git lfs pull`"):
        read(tmp_path / "config.json")


def test_an_object_in_an_object() -> None:
    assert object_under({"a": {"b": 0}}, "a") == {"b": 0}
    assert object_under({"a": None}, "a") == object_under({}, "a") == {}
    for value, found in (([1], "a list"), (0, "a number"), (False, "true or false"), ("", "text")):
        with pytest.raises(InputError, match=f"^a: expected an object, found {found}$"):
            object_under({"a": value}, "a")


def test_kinds() -> None:
    assert [kind(value) for value in (None, True, 1, "", b"")] == [
        "null", "true or false", "a number", "text", "a bytes"]


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "a.json") == {}


@pytest.mark.parametrize(("error", "message"), [
    (KeyError("green"), "a.json: green: expected a value, found nothing"),
    (TypeError("no"), "a.json: cannot be read: no"), (OverflowError("no"), "a.json: cannot be read: no"),
    (IndexError("no"), "a.json: cannot be read: no"), (InputError("as it is"), "as it is")])
def test_errors_in_files_of_this_package(error: Exception, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"), as_expected(Path("a.json")):
        raise error
