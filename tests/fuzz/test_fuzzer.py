"""Tests of the fuzzer: its mutators are deterministic, it detects faults; and a few of its inputs."""

from __future__ import annotations

import mmap
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import networks, recall, running, studies, training
from tests.fuzz.cases import Bases, check
from tests.fuzz.mutators import BY_KIND, kind_of
from tests.fuzz.running import Target, faults_of, generator, run_target
from tilelli_jax.cli.command import command
from tilelli_jax.errors import InputError
from tilelli_jax.eval.tables import write_columns
from tilelli_jax.io.tensors import in_memory, write_file

QUICK = {target.name: target for target in training.TARGETS
         if target.name in ("data", "train, configuration")}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every kind except .pt, and a directory."""
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
    """Properties of a path that can be compared."""
    if path.is_symlink() or not path.is_file():
        return path.is_symlink(), path.is_dir(), path.exists()
    return path.stat().st_size, path.read_bytes() if path.stat().st_size < 10**6 else b""


@pytest.mark.parametrize("kind", sorted(BY_KIND.keys() - {"pt"}))
def test_mutators_are_deterministic(kind: str, samples: Path, tmp_path: Path) -> None:
    file = next(path for path in samples.iterdir() if kind_of(path) == kind)
    for mutate in BY_KIND[kind]:
        outcomes = []
        for number in (0, 0, 1, 2, 3):
            copy = Path(tempfile.mkdtemp(dir=tmp_path)) / file.name
            (shutil.copytree if file.is_dir() else shutil.copy)(file, copy)
            description = mutate(copy, generator("x", number))
            names = sorted(path.name for path in copy.iterdir()) if copy.is_dir() else []
            outcomes.append((description, content(copy), names))
        assert outcomes[0] == outcomes[1], mutate.__name__
        before = content(file), sorted(path.name for path in file.iterdir()) if file.is_dir() else []
        assert any(outcome[1:] != before for outcome in outcomes), f"{mutate.__name__} changes nothing"


def test_plan_uses_all_mutators_before_repeating(bases: Bases) -> None:
    target = QUICK["train, configuration"]
    plan = target.plan(bases.get(target))
    mutators = BY_KIND["yaml"]
    assert plan == target.plan(bases.get(target)) and len(plan) == target.inputs
    assert [mutator for _, mutator in plan[:len(mutators)]] != list(mutators)
    assert {id(mutator) for _, mutator in plan[:len(mutators)]} == set(map(id, mutators))


def test_targets_cover_all_commands() -> None:
    targets = [*networks.TARGETS, *training.TARGETS, *recall.TARGETS, *studies.TARGETS]
    assert sum(target.inputs for target in targets) >= 1000
    assert len({target.name for target in targets}) == len(targets)
    commands = {target.main.__module__ for target in targets} - {recall.__name__}
    assert commands == {
        *(f"tilelli_jax.{name}.command" for name in (
            "convert", "eval.abstention", "eval.claims", "eval.comparison", "eval.difficulty",
            "eval.difficulty.published", "eval.recall")),
        *(f"tilelli_jax.commands.{name}" for name in ("chat", "data", "generate", "launch_check", "splice")),
        "tilelli_jax.train"}, "all commands that read files are covered"


# --- Detection of faults --------------------------------------------------------------------------------


def rejects() -> None:
    raise InputError("a.json: b: expected c, found d")


def raises() -> None:
    raise KeyError("b")


def prints_two_errors() -> None:
    print("error: one", file=sys.stderr)
    rejects()


def leaves_a_directory() -> None:
    Path("out").mkdir()
    rejects()


def exceeds_the_time() -> None:
    try:
        time.sleep(5)
    except Exception:
        print("not reached")


def exceeds_the_memory() -> None:
    """Of its own pages: an array could reuse memory that the process has freed and kept."""
    with mmap.mmap(-1, 1 << 28) as pages:
        pages.write(b"x" * (1 << 28))


def warns() -> None:
    warnings.warn("overflow", RuntimeWarning, stacklevel=1)


@pytest.mark.parametrize(("action", "expected_fault"), [
    (rejects, ""), (lambda: None, ""), (raises, "raised Traceback"),
    (prints_two_errors, "did not end with exactly one line"), (leaves_a_directory, "left out"),
    (exceeds_the_time, "raised Traceback"), (exceeds_the_memory, "took "), (warns, "warned overflow")])
def test_faults_are_detected(action: Callable[[], None], expected_fault: str, tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    @command
    def main(argv: list[str]) -> None:
        assert argv == ["some", "words"]
        action()
    if action is exceeds_the_time:
        monkeypatch.setattr(running, "TIME_LIMIT", 0.5)
    monkeypatch.setattr(running, "MEMORY_LIMIT", running.memory("VmRSS") + (100 << 20))
    target = Target("x", lambda: None, main, "some words", "", 0)
    faults = faults_of(target, run_target(target, tmp_path))
    assert [fault.startswith(expected_fault) for fault in faults[:1]] == [True] * bool(expected_fault), faults


@pytest.mark.parametrize("name", QUICK)
def test_a_few_mutated_inputs(name: str, bases: Bases, tmp_path: Path) -> None:
    """A part of the inputs that `make test-all` runs completely."""
    target = QUICK[name]
    for number in range(8):
        check(target, number, bases.get(target), tmp_path / str(number))
