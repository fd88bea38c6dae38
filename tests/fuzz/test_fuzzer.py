"""The fuzzer itself: its mutators repeat what they do, it sees faults, and a few of its inputs."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tilelli_jax.eval.tables import write_columns

from tests.fuzz import networks, recall, running, studies, training
from tests.fuzz.cases import Bases, check
from tests.fuzz.mutators import OF_KIND, kind_of
from tests.fuzz.running import Target, carry_out, complaints, generator
from tilelli_jax.errors import InputError, command
from tilelli_jax.tensors import in_memory, write_file

DAILY = {target.name: target for target in training.TARGETS
         if target.name in ("data", "train, configuration")}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every kind but of pickled ones, and a directory."""
    path = tmp_path_factory.mktemp("samples")
    (path / "a.json").write_text('{"a": {"b": [1, 2.5, "x"]}, "c": null}')
    (path / "a.jsonl").write_text('{"a": 1}\n{"a": [2]}\n')
    (path / "a.yaml").write_text("a: 1\nb: {c: [x, y]}\n")
    (path / "a.csv").write_text("a,b\n1,x\n2,y\n")
    (path / "a.txt").write_text("One.\nTwo, and more of it.\n")
    write_columns(path / "a.parquet", {"a": [1, 2, 3], "b": ["x", "y", "z"]})
    write_file(path / "a.safetensors", {"a": in_memory(np.ones((2, 3), np.float32))})
    (path / "directory").mkdir()
    (path / "directory" / "a").write_text("")
    return path


def content(path: Path) -> object:
    """What can be compared of it."""
    if path.is_symlink() or not path.is_file():
        return path.is_symlink(), path.is_dir(), path.exists()
    return path.stat().st_size, path.read_bytes() if path.stat().st_size < 10**6 else b""


@pytest.mark.parametrize("kind", sorted(OF_KIND.keys() - {"pt"}))
def test_a_mutator_repeats_what_it_does(kind: str, samples: Path, tmp_path: Path) -> None:
    file = next(path for path in samples.iterdir() if kind_of(path) == kind)
    for mutate in OF_KIND[kind]:
        found = []
        for number in (0, 0, 1, 2, 3):
            place = Path(tempfile.mkdtemp(dir=tmp_path)) / file.name
            (shutil.copytree if file.is_dir() else shutil.copy)(file, place)
            told = mutate(place, generator("x", number))
            listed = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
            found.append((told, content(place), listed))
        assert found[0] == found[1], mutate.__name__
        before = content(file), sorted(path.name for path in file.iterdir()) if file.is_dir() else []
        assert any(one[1:] != before for one in found), f"{mutate.__name__} changes nothing"


def test_every_input_is_of_another_kind_before_one_comes_again(bases: Bases) -> None:
    target = DAILY["train, configuration"]
    plan = target.plan(bases.of(target))
    ways = OF_KIND["yaml"]
    assert plan == target.plan(bases.of(target)) and len(plan) == target.inputs
    assert [way for _, way in plan[:len(ways)]] != list(ways)
    assert {id(way) for _, way in plan[:len(ways)]} == set(map(id, ways))


def test_there_are_inputs_enough() -> None:
    targets = [*networks.TARGETS, *training.TARGETS, *recall.TARGETS, *studies.TARGETS]
    assert sum(target.inputs for target in targets) >= 1000
    assert len({target.name for target in targets}) == len(targets)
    commands = {target.main.__module__ for target in targets} - {recall.__name__}
    assert commands == {
        *(f"tilelli_jax.{name}.command" for name in (
            "convert", "eval.abstention", "eval.claims", "eval.comparison", "eval.difficulty",
            "eval.difficulty.published", "eval.recall")),
        *(f"tilelli_jax.commands.{name}" for name in ("chat", "data", "generate", "launch_check", "splice")),
        "tilelli_jax.train"}, "every one that reads a file"


# --- What it sees --------------------------------------------------------------------------------


def refused() -> None:
    raise InputError("a.json: b: expected c, found d")


def wrong() -> None:
    raise KeyError("b")


def in_two_lines() -> None:
    print("error: one", file=sys.stderr)
    refused()


def half_written() -> None:
    Path("out").mkdir()
    refused()


def slow() -> None:
    try:
        time.sleep(5)
    except Exception:
        print("this catches it not")


def greedy() -> None:
    np.ones(1 << 25)


def warning() -> None:
    warnings.warn("overflow", RuntimeWarning, stacklevel=1)


@pytest.mark.parametrize(("work", "said"), [
    (refused, ""), (lambda: None, ""), (wrong, "raised Traceback"),
    (in_two_lines, "did not end with one line"), (half_written, "left out"), (slow, "raised Traceback"),
    (greedy, "took "), (warning, "warned overflow")])
def test_faults_are_seen(work: Callable[[], None], said: str, tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    @command
    def main(argv: list[str]) -> None:
        assert argv == ["some", "words"]
        work()
    if work is slow:
        monkeypatch.setattr(running, "SECONDS", 0.5)
    monkeypatch.setattr(running, "BYTES", running.memory("VmRSS") + (100 << 20))
    target = Target("x", lambda: None, main, "some words", "", 0)
    found = complaints(target, carry_out(target, tmp_path))
    assert [one.startswith(said) for one in found[:1]] == [True] * bool(said), found


@pytest.mark.parametrize("name", DAILY)
def test_a_few_spoilt_inputs(name: str, bases: Bases, tmp_path: Path) -> None:
    """Of those that `make test-all` runs all of."""
    target = DAILY[name]
    for number in range(8):
        check(target, number, bases.of(target), tmp_path / str(number))
