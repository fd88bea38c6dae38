"""The command of every study: its options, output, exit status, and the line that says how to continue."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.error_lines import assert_one_line
from tests.eval.running import write
from tilelli_jax.cli.command import command
from tilelli_jax.config import setting
from tilelli_jax.errors import InputError
from tilelli_jax.eval.inputs.networks import TrainingStopped
from tilelli_jax.eval.inputs.study import Study, StudyConfig, study_command
from tilelli_jax.eval.stages import BusyError


@dataclasses.dataclass(frozen=True)
class CountConfig(StudyConfig):
    """A study that counts."""

    numbers: tuple[int, ...] = setting((1, 2), "what to count")
    source: str = setting("", "what to read")


class CountStudy(Study[CountConfig]):
    """A study of two stages."""

    STAGES = ("first", "second")
    error: BaseException | None = None

    @property
    def seeds(self) -> Sequence[int]:
        return self.config.numbers

    def check(self) -> None:
        if 0 in self.config.numbers:
            raise InputError("numbers: expected none that is 0")
        self.stages.open()

    def stage_paths(self, stage: str) -> Iterator[tuple[str, Path]]:
        for number in self.config.numbers:
            if number > 1 and self.error is not None:
                raise self.error
            yield f"{stage} {number}", self.out / str(number)


def write_report(study: CountStudy, name: str, provenance: Mapping[str, Any]) -> str:
    list(study.stage_paths("second"))
    return f"{name}: {provenance['command']} ({provenance['configuration']}; {provenance['seeds']})"


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in an empty directory with count.yaml."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "count.yaml", {"numbers": [1, 2]})

    @command
    def main(argv: Sequence[str]) -> int:
        return study_command(
            argv, CountStudy, CountConfig, write_report, prog="tilelli count", doc="Counts.",
            shipped="demo", example="numbers=[3]",
            shortcuts={"--numbers": ("N,…", "numbers=[{}]", "what to count; short for numbers=[N,…]"),
                       "--source": ("FILE", "source={}", "what to read")})

    def run(*argv: str) -> int:
        return main(["--config", "count.yaml", *argv])
    return run


def test_a_stage_prints_its_results(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--stage", "first") == 0
    assert capsys.readouterr().out == "first 1: runs/count/1\nfirst 2: runs/count/2\n"
    assert run("--stage", "second", "out=there", "--numbers", "5") == 0
    assert capsys.readouterr().out == "second 5: there/5\n"


def test_all_stages_end_with_the_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("name=a b") == 0
    assert capsys.readouterr().out == (
        "a b: tilelli count --config count.yaml 'name=a b' (count.yaml; 1, 2)\n"
        "report: runs/count/report.html (and report.md)\n")
    assert run() == 0
    assert capsys.readouterr().out.startswith("count: tilelli count --config count.yaml (")


def test_the_title_is_that_of_the_output_directory(run: Run, capsys: pytest.CaptureFixture[str],
                                                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study with settings of another configuration has its own title."""
    assert run("out=runs/mine/") == 0
    assert capsys.readouterr().out.startswith("mine: tilelli count")
    assert run("out=runs/mine", "name=other") == 0
    assert capsys.readouterr().out.startswith("other: ")
    assert run("out=.") == 0
    assert capsys.readouterr().out.startswith(f"{Path.cwd().name}: ")


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_stopped_study_leaves_no_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """joblib keeps its processes for later fits, and the exit handlers that end them do not run."""
    joblib = pytest.importorskip("joblib", reason="scikit-learn (extra: eval) is not installed")
    workers: set[int] = set()

    def stage_paths(study: CountStudy, stage: str) -> Iterator[tuple[str, Path]]:
        workers.update(joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(8)))
        assert os.getpid() not in workers and all(map(_alive, workers))
        raise KeyboardInterrupt
        yield stage, study.out
    monkeypatch.setattr(CountStudy, "stage_paths", stage_paths)
    assert run("--stage", "first") == 130
    assert workers and not any(map(_alive, workers))


def test_options_that_set_a_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take precedence over key=value, and a text is kept as typed."""
    configs = []
    monkeypatch.setattr(CountStudy, "check", lambda self: configs.append(self.config))
    assert run("numbers=[3]", "--numbers", "4,5", "--source", "007") == 0
    assert run("--source", "") == 0
    assert configs == [CountConfig(numbers=(4, 5), source="007"), CountConfig()]


def test_help_lists_options_and_keys(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    for words in ("--stage {first,second,all}", "--numbers N,…", "  numbers  list of: integer [1, 2]",
                  "title of the report; empty: the last part of out"):
        assert words in shown


@pytest.mark.parametrize(("argv", "message"), [
    (["--stage", "third"], "argument --stage: invalid choice: 'third'"),
    (["numbers=[0]"], "numbers: expected none that is 0"),
    (["--numbers", "x"], "overrides: numbers[0]: expected an integer, found text 'x'")])
def test_invalid_arguments(run: Run, argv: list[str], message: str, tmp_path: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("error", "status", "printed"), [
    (KeyboardInterrupt(), 130, "finished stages are kept; to continue: {}\ninterrupted\n"),
    (TrainingStopped(130), 130, "finished stages are kept; to continue: {}\n"),
    (TrainingStopped(3), 3, ""),
    (BusyError("stages/first-1: another process is running this stage"), 2,
     "error: stages/first-1: another process is running this stage\n")])
@pytest.mark.parametrize("stage", ["first", "all"])
def test_a_study_that_stops(run: Run, error: BaseException, status: int, printed: str, stage: str,
                            monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(CountStudy, "error", error)
    assert run("--stage", stage) == status
    output = capsys.readouterr()
    assert output.err == printed.format(f"tilelli count --config count.yaml --stage {stage}")
    assert output.out == ("first 1: runs/count/1\n" if stage == "first" else "")
