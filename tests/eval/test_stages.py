"""Stages on disk: made once, named by what they are made of, and whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilelli_jax.eval import stages
from tilelli_jax.eval.stages import BusyError, Stages, key, once

from tilelli_jax.errors import InputError
from tilelli_jax.files import fingerprint

MADE_OF = {"data": "a", "options": {"k": 3, "layers": [1, 2]}}


def writing(calls: list[list[str]], then: BaseException | None = None) -> Callable[[Path], None]:
    """A stage's work: tells what it finds, adds a file, and perhaps fails."""
    def work(path: Path) -> None:
        calls.append(sorted(file.name for file in path.iterdir()))
        (path / f"part-{len(calls)}").write_text("x")
        if then is not None:
            raise then
    return work


def test_the_same_is_not_made_twice(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    told: list[str] = []
    study = Stages(tmp_path / "deep" / "stages", told.append)
    assert not study.is_made("sae", MADE_OF)
    path = study.make("sae", MADE_OF, writing(calls))
    assert study.is_made("sae", MADE_OF) and path == study.directory("sae", MADE_OF)
    assert path.parent == study.root and path.name.startswith("sae-")
    manifest = MADE_OF | {"files": {"part-1": [1, zlib.crc32(b"x")]}}
    assert json.loads((path / "manifest.json").read_text()) == manifest
    turned = dict(reversed(MADE_OF.items()))
    assert Stages(study.root, told.append).make("sae", turned, writing(calls)) == path
    assert calls == [[]] and told == [f"sae: {path}", f"sae: as it is in {path}"]


def test_anything_else_is_another_directory(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    study = Stages(tmp_path)
    recipes: list[dict[str, Any]] = [
        MADE_OF, MADE_OF | {"data": "b"}, MADE_OF | {"options": {"k": 3, "layers": [2, 1]}},
        MADE_OF | {"seed": None}, {"data": "a"}]
    paths = [study.make("sae", recipe, writing(calls)) for recipe in recipes]
    paths.append(study.make("probe", MADE_OF, writing(calls)))
    assert len(set(paths)) == len(calls) == 6 and calls == [[]] * 6  # none sees another's files
    assert all((path / "manifest.json").is_file() for path in paths)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("part-1", "y", "part-1 is not what was written"), ("part-1", None, "part-1 is missing"),
    ("manifest.json", "{", "not JSON: .*; once you have deleted that directory, the same command makes it")])
def test_a_stage_that_somebody_has_changed(name: str, content: str | None, says: str, tmp_path: Path) -> None:
    path = Stages(tmp_path).make("sae", MADE_OF, writing([]))
    study = Stages(tmp_path)
    study.make("sae", MADE_OF, writing([]))
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content)
    study.make("sae", MADE_OF, writing([]))  # this one has looked before
    with pytest.raises(InputError, match=says) as refused:
        Stages(tmp_path).make("sae", MADE_OF, writing([]))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(("name", "make", "says"), [
    ("", lambda path: path.write_text(""), "cannot be written: File exists"),
    ("", lambda path: path.symlink_to("nothing"), "cannot be written: File exists"),
    ("/manifest.json", os.mkfifo, "expected a regular file; once you have deleted that directory, the same "
                                 "command makes it anew")])
def test_what_is_in_the_place_of_a_stage(name: str, make: Callable[[Path], None], says: str,
                                         tmp_path: Path) -> None:
    study, calls = Stages(tmp_path), list[list[str]]()
    path = study.directory("sae", MADE_OF)
    if name:
        path.mkdir()
    make(Path(f"{path}{name}"))
    with pytest.raises(InputError) as refused:
        study.make("sae", MADE_OF, writing(calls))
    assert str(refused.value) == f"{path}{name}: {says}" and not calls


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
def test_what_is_cut_off_goes_on_with_its_files(error: BaseException, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    study = Stages(tmp_path)
    for _ in range(2):
        with pytest.raises(type(error)):
            study.make("sae", MADE_OF, writing(calls, error))
        assert not study.is_made("sae", MADE_OF)
    path = study.make("sae", MADE_OF, writing(calls))
    assert calls == [[], ["part-1"], ["part-1", "part-2"]] and study.is_made("sae", MADE_OF)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "part-1", "part-2", "part-3"]


def test_two_at_once(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def work(path: Path) -> None:
        with pytest.raises(BusyError, match=f"{path}: another process is at work there"):
            Stages(tmp_path).make("sae", MADE_OF, writing(calls))
        Stages(tmp_path).make("sae", {"data": "b"}, writing(calls))  # which nobody is at
    path = Stages(tmp_path).make("sae", MADE_OF, work)
    assert calls == [[]] and (path / "manifest.json").is_file() and not (path / "part-1").exists()


def test_what_another_has_just_ended_is_not_made_again(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the lock another process has made it."""
    def lock(path: Path, *, wait: bool) -> None:
        (path / "manifest.json").write_text("{}")
    monkeypatch.setattr(stages, "lock", lock)
    calls: list[list[str]] = []
    Stages(tmp_path).make("sae", MADE_OF, writing(calls))
    assert not calls


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
BRANCHES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=3), LEAVES, max_size=3)
TREES = BRANCHES | st.lists(BRANCHES, max_size=3) | st.dictionaries(st.text(max_size=3), BRANCHES, max_size=3)


@given(st.dictionaries(st.text(max_size=3), TREES, max_size=4), TREES)
def test_a_key_is_of_the_tree_and_not_of_its_order(tree: dict[str, Any], other: Any) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: turned(value[name]) for name in reversed(value)}
        return [turned(each) for each in value] if isinstance(value, list) else value
    assert key(tree) == key(turned(tree)) and len(key(tree)) == 12
    assert (key({"a": tree}) == key({"a": other})) == (json.dumps(tree, sort_keys=True)
                                                       == json.dumps(other, sort_keys=True))


def test_a_key_stays() -> None:
    """Else every study would be made anew."""
    assert key({"b": [1, None], "a": "é"}) == hashlib.sha256(
        b'{"a": "\\u00e9", "b": [1, null]}').hexdigest()[:12]


def test_a_fingerprint_is_of_contents(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    paths = [tmp_path / "x" / name for name in ("a.json", "b.bin")]
    for path in paths:
        path.write_bytes(path.name.encode() * 100_000)
    first = fingerprint(paths)
    os.utime(paths[0], (0, 0))
    other = [Path(shutil.copy(path, tmp_path)) for path in paths]
    assert len(first) == 16 and first == fingerprint(reversed(paths)) == fingerprint(other)
    assert fingerprint([paths[0], other[1]]) == first != fingerprint(paths[:1])
    content = other[0].read_bytes()
    other[0].write_bytes(content[:-1] + b"!")
    assert fingerprint(other) != first
    other[0].write_bytes(content)
    other[1].rename(tmp_path / "c.bin")
    assert fingerprint([other[0], tmp_path / "c.bin"]) != first
    with pytest.raises(InputError, match=f"{other[1]}: no such file"):
        fingerprint(other)


def test_what_was_looked_up_is_kept() -> None:
    class Two:
        def __init__(self) -> None:
            self.asked: list[tuple[str, int]] = []

        @once
        def of(self, name: str, seed: int) -> str:
            """It tells."""
            self.asked.append((name, seed))
            return f"{name}-{seed}"
    one, other = Two(), Two()
    assert [one.of("a", 0), one.of("a", 0), one.of("a", 1), other.of("a", 0)] == ["a-0", "a-0", "a-1", "a-0"]
    assert one.asked == [("a", 0), ("a", 1)] and other.asked == [("a", 0)] and Two.of.__doc__ == "It tells."


@pytest.mark.parametrize("content", ["NaN", "[]", "{", "", '{"a": "\\ud800"}'])
def test_a_result_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / stages.RESULT).write_text(content)
    with pytest.raises(InputError, match=rf"^{tmp_path / stages.RESULT}: ") as refused:
        stages.read_result(tmp_path)
    assert "\n" not in str(refused.value)


def test_what_a_killed_process_has_left_is_no_part_of_a_stage(tmp_path: Path) -> None:
    def work(path: Path) -> None:
        (path / "part").write_text("x")
        (path / ".manifest.json.abcd1234.tilelli-tmp").write_text("{")
    path = Stages(tmp_path).make("sae", MADE_OF, work)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "part"]
    assert Stages(tmp_path).make("sae", MADE_OF, work) == path
