"""Stages on disk: run once per set of inputs, named by a hash of the inputs, complete or absent."""

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

from tilelli_jax.errors import InputError
from tilelli_jax.eval import stages
from tilelli_jax.eval.stages import BusyError, Stages, cached_method, key
from tilelli_jax.io.files import fingerprint

INPUTS = {"data": "a", "options": {"k": 3, "layers": [1, 2]}}


def writing(calls: list[list[str]], error: BaseException | None = None) -> Callable[[Path], None]:
    """Returns a stage's work: it records the files it finds, adds a file, and raises `error` if given."""
    def work(path: Path) -> None:
        calls.append(sorted(file.name for file in path.iterdir()))
        (path / f"part-{len(calls)}").write_text("x")
        if error is not None:
            raise error
    return work


def test_the_same_inputs_are_not_run_twice(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    lines: list[str] = []
    study = Stages(tmp_path / "deep" / "stages", lines.append)
    assert not study.is_complete("sae", INPUTS)
    path = study.make("sae", INPUTS, writing(calls))
    assert study.is_complete("sae", INPUTS) and path == study.directory("sae", INPUTS)
    assert path.parent == study.root and path.name.startswith("sae-")
    manifest = INPUTS | {"files": {"part-1": [1, zlib.crc32(b"x")]}}
    assert json.loads((path / "manifest.json").read_text()) == manifest
    reordered = dict(reversed(INPUTS.items()))
    assert Stages(study.root, lines.append).make("sae", reordered, writing(calls)) == path
    assert calls == [[]] and lines == [f"sae: {path}", f"sae: reused as it is from {path}"]


def test_other_inputs_have_another_directory(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    study = Stages(tmp_path)
    manifests: list[dict[str, Any]] = [
        INPUTS, INPUTS | {"data": "b"}, INPUTS | {"options": {"k": 3, "layers": [2, 1]}},
        INPUTS | {"seed": None}, {"data": "a"}]
    paths = [study.make("sae", manifest, writing(calls)) for manifest in manifests]
    paths.append(study.make("probe", INPUTS, writing(calls)))
    assert len(set(paths)) == len(calls) == 6 and calls == [[]] * 6  # none sees another's files
    assert all((path / "manifest.json").is_file() for path in paths)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("part-1", "y", "part-1 was changed after it was written"), ("part-1", None, "part-1 is missing"),
    ("manifest.json", "{", "not JSON: .*; delete that directory, and the same command runs the stage again"),
    ("manifest.json", "{}", "its list of files is invalid; delete")])
def test_a_changed_stage_is_rejected(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = Stages(tmp_path).make("sae", INPUTS, writing([]))
    study = Stages(tmp_path)
    study.make("sae", INPUTS, writing([]))
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content)
    study.make("sae", INPUTS, writing([]))  # has already verified the files
    with pytest.raises(InputError, match=message) as rejected:
        Stages(tmp_path).make("sae", INPUTS, writing([]))
    assert str(path) in str(rejected.value)


@pytest.mark.parametrize(("name", "create", "message"), [
    ("", lambda path: path.write_text(""), "cannot be written: File exists"),
    ("", lambda path: path.symlink_to("nothing"), "cannot be written: File exists"),
    ("/manifest.json", os.mkfifo, "expected a regular file; delete that directory, and the same command "
                                 "runs the stage again")])
def test_an_occupied_path_is_rejected(name: str, create: Callable[[Path], None], message: str,
                                     tmp_path: Path) -> None:
    study, calls = Stages(tmp_path), list[list[str]]()
    path = study.directory("sae", INPUTS)
    if name:
        path.mkdir()
    create(Path(f"{path}{name}"))
    with pytest.raises(InputError) as rejected:
        study.make("sae", INPUTS, writing(calls))
    assert str(rejected.value) == f"{path}{name}: {message}" and not calls


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
def test_an_interrupted_stage_continues_with_its_files(error: BaseException, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    study = Stages(tmp_path)
    for _ in range(2):
        with pytest.raises(type(error)):
            study.make("sae", INPUTS, writing(calls, error))
        assert not study.is_complete("sae", INPUTS)
    path = study.make("sae", INPUTS, writing(calls))
    assert calls == [[], ["part-1"], ["part-1", "part-2"]] and study.is_complete("sae", INPUTS)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "part-1", "part-2", "part-3"]


def test_a_stage_that_another_process_completes_meanwhile(tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check that it is not complete and the lock."""
    study, calls = Stages(tmp_path), list[list[str]]()
    is_complete = Stages.is_complete

    def completed_after_the_check(self: Stages, name: str, manifest: dict[str, Any]) -> bool:
        monkeypatch.undo()
        found = is_complete(self, name, manifest)
        Stages(tmp_path).make("sae", INPUTS, writing([]))
        return found
    monkeypatch.setattr(Stages, "is_complete", completed_after_the_check)
    assert study.make("sae", INPUTS, writing(calls)) == study.directory("sae", INPUTS) and not calls


def test_two_processes_at_once(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def work(path: Path) -> None:
        with pytest.raises(BusyError, match=f"{path}: another process is running this stage"):
            Stages(tmp_path).make("sae", INPUTS, writing(calls))
        Stages(tmp_path).make("sae", {"data": "b"}, writing(calls))  # another stage is free
    path = Stages(tmp_path).make("sae", INPUTS, work)
    assert calls == [[]] and (path / "manifest.json").is_file() and not (path / "part-1").exists()


def test_a_stage_completed_by_another_process_is_not_run_again(tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process completes the stage between the first check and the lock."""
    def lock(path: Path, *, wait: bool) -> None:
        (path / "manifest.json").write_text("{}")
    monkeypatch.setattr(stages, "lock", lock)
    calls: list[list[str]] = []
    Stages(tmp_path).make("sae", INPUTS, writing(calls))
    assert not calls


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
BRANCHES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=3), LEAVES, max_size=3)
TREES = BRANCHES | st.lists(BRANCHES, max_size=3) | st.dictionaries(st.text(max_size=3), BRANCHES, max_size=3)


@given(st.dictionaries(st.text(max_size=3), TREES, max_size=4), TREES)
def test_a_key_depends_on_the_tree_but_not_on_the_order_of_its_keys(tree: dict[str, Any], other: Any) -> None:
    def reordered(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: reordered(value[name]) for name in reversed(value)}
        return [reordered(element) for element in value] if isinstance(value, list) else value
    assert key(tree) == key(reordered(tree)) and len(key(tree)) == 12
    assert (key({"a": tree}) == key({"a": other})) == (json.dumps(tree, sort_keys=True)
                                                       == json.dumps(other, sort_keys=True))


def test_keys_are_stable() -> None:
    """Otherwise every existing stage would be run again."""
    assert key({"b": [1, None], "a": "é"}) == hashlib.sha256(
        b'{"a": "\\u00e9", "b": [1, null]}').hexdigest()[:12]


def test_a_fingerprint_depends_on_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    paths = [tmp_path / "x" / name for name in ("a.json", "b.bin")]
    for path in paths:
        path.write_bytes(path.name.encode() * 100_000)
    first = fingerprint(paths)
    os.utime(paths[0], (0, 0))
    copies = [Path(shutil.copy(path, tmp_path)) for path in paths]
    assert len(first) == 16 and first == fingerprint(reversed(paths)) == fingerprint(copies)
    assert fingerprint([paths[0], copies[1]]) == first != fingerprint(paths[:1])
    content = copies[0].read_bytes()
    copies[0].write_bytes(content[:-1] + b"!")
    assert fingerprint(copies) != first
    copies[0].write_bytes(content)
    copies[1].rename(tmp_path / "c.bin")
    assert fingerprint([copies[0], tmp_path / "c.bin"]) != first
    with pytest.raises(InputError, match=f"{copies[1]}: no such file"):
        fingerprint(copies)


def test_a_cached_method_caches_per_object_and_arguments() -> None:
    class Study:
        def __init__(self) -> None:
            self.calls: list[tuple[str, int]] = []

        @cached_method
        def run(self, name: str, seed: int) -> str:
            """Names a run."""
            self.calls.append((name, seed))
            return f"{name}-{seed}"
    a, b = Study(), Study()
    assert [a.run("a", 0), a.run("a", 0), a.run("a", 1), b.run("a", 0)] == ["a-0", "a-0", "a-1", "a-0"]
    assert a.calls == [("a", 0), ("a", 1)] and b.calls == [("a", 0)] and Study.run.__doc__ == "Names a run."


@pytest.mark.parametrize("content", ["NaN", "[]", "{", "", '{"a": "\\ud800"}'])
def test_a_damaged_result_is_rejected(content: str, tmp_path: Path) -> None:
    (tmp_path / stages.RESULT).write_text(content)
    with pytest.raises(InputError, match=rf"^{tmp_path / stages.RESULT}: ") as rejected:
        stages.read_result(tmp_path)
    assert "\n" not in str(rejected.value)


def test_temporary_files_of_a_killed_process_are_not_part_of_a_stage(tmp_path: Path) -> None:
    def work(path: Path) -> None:
        (path / "part").write_text("x")
        (path / ".manifest.json.abcd1234.tilelli-tmp").write_text("{")
    path = Stages(tmp_path).make("sae", INPUTS, work)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "part"]
    assert Stages(tmp_path).make("sae", INPUTS, work) == path
