"""What all studies share: configuration keys, stages and the command line."""

from __future__ import annotations

import abc
import dataclasses
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from tilelli_jax import config as config_lib
from tilelli_jax import extras
from tilelli_jax.cli.command import INTERRUPTED
from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.training.run import provenance

from ..stages import BusyError, Stages, print_to_stderr
from .networks import TrainingStopped


@dataclasses.dataclass(frozen=True)
class StudyConfig(Section):
    """The keys of every study."""

    name: str = setting("", "title of the report; empty: the last part of out")
    out: str = setting("", "output directory; empty: runs/ and the name of the configuration file")


C = TypeVar("C", bound=StudyConfig)


class Study(abc.ABC, Generic[C]):
    """One configured study. Its attributes and methods run the stages that they need.

    Args:
        config: the configuration of the study.
        out: output directory.
        notify: called with a line of text for each step that starts.
    """

    STAGES: ClassVar[tuple[str, ...]]  # what --stage may name, besides "all"
    MAIN_KEYS: ClassVar[tuple[str, ...]] = ()  # keys that `--help` lists first

    def __init__(self, config: C, out: Path, notify: Callable[[str], None] = lambda line: None) -> None:
        self.config, self.out, self.notify = config, out, notify
        self.stages = Stages(out / "stages", notify)

    @property
    def report_dir(self) -> Path:
        """The directory of the report."""
        return self.out

    @property
    @abc.abstractmethod
    def seeds(self) -> Sequence[int]:
        """The random seeds, for the report."""

    @abc.abstractmethod
    def check(self) -> None:
        """Checks everything that can be checked before the first computation, then opens the stages.

        Raises:
            InputError: a setting or an input is invalid, or the output directory cannot be written.
        """

    @abc.abstractmethod
    def stage_paths(self, stage: str) -> Iterator[tuple[str, Path]]:
        """Runs a stage, after those that it depends on, and yields its results: label and directory.

        Raises:
            InputError: the configuration has no such stage.
        """


S = TypeVar("S", bound=Study[Any])


def study_command(argv: Sequence[str], study_class: type[S], config_class: type[StudyConfig],
                  write_report: Callable[[S, str, Mapping[str, Any]], str], *, prog: str, doc: str | None,
                  shipped: str, example: str, shortcuts: Mapping[str, tuple[str, str, str]] | None = None,
                  prepare: Callable[[S, str], object] = lambda study, config: None) -> int:
    """Runs a study's command: one stage, or all stages and the report. Returns its exit status.

    Args:
        write_report: runs the stages and writes the report, from the study, its name and the rows of the
            section "How to reproduce"; returns the text to print.
        prog: the command, e.g. "tilelli recall".
        doc: the description in `--help`.
        shipped: name of a shipped configuration, as an example.
        example: an override, as an example.
        shortcuts: options that set a key: option → metavar, override with {} for the value, and help.
        prepare: called with the study and the name of its configuration file before `Study.check`.

    Raises:
        InputError: invalid input, or another process is working on the same stage.
        KeyboardInterrupt: after a line on stderr that says which command continues.
    """
    quiet_logs()
    shortcuts = shortcuts or {}
    parser = config_lib.command_line(prog, doc, config_class, shipped, example,
                                     main_keys=study_class.MAIN_KEYS)
    parser.add_argument("--stage", choices=(*study_class.STAGES, "all"), default="all",
                        help="the stage to run, after those that it depends on [%(default)s]")
    for option, (metavar, _, meaning) in shortcuts.items():
        parser.add_argument(option, metavar=metavar, help=meaning)
    options = parser.parse_intermixed_args(argv)
    extras.require("pyarrow", prog)  # imported only when the first table is written
    overrides = [override.format(value) for option, (_, override, _) in shortcuts.items()
                 if (value := getattr(options, option.lstrip("-"))) is not None]
    config = config_lib.load(config_class, options.config, [*options.overrides, *overrides])
    study = study_class(config, Path(config.out or Path("runs", Path(options.config).stem)), print_to_stderr)
    prepare(study, options.config)
    study.check()
    command_line = shlex.join([*prog.split(), *argv])
    try:
        if options.stage == "all":
            rows = provenance_rows(command_line, options.config, study.seeds)
            name = config.name or Path(os.path.abspath(study.out)).name  # not "." or ".."
            print(f"{write_report(study, name, rows)}\n"
                  f"report: {study.report_dir / 'report.html'} (and report.md)")
        else:
            for label, path in study.stage_paths(options.stage):
                print(f"{label}: {path}")
        return 0
    except KeyboardInterrupt:
        _print_continuation(command_line)
        raise
    except TrainingStopped as stopped:
        if stopped.status == INTERRUPTED:
            _print_continuation(command_line)
        return stopped.status
    except BusyError as error:
        raise InputError(str(error)) from None
    finally:
        _end_workers()


def quiet_logs() -> None:
    """Silences Orbax except for errors."""
    logging.getLogger("absl").setLevel(logging.ERROR)


def provenance_rows(command_line: str, config: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Returns the section "How to reproduce": command, configuration, seeds, commit, machine, versions.

    Args:
        config: name of the configuration file.
        seeds: random seeds; none where nothing is random.
    """
    run = provenance(seeds[0] if seeds else 0)
    numbers = {"seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds))} if seeds else {}
    return {"command": command_line, "configuration": config, **numbers,
            "commit": run["git_commit"], "device": run["device"],
            "machine": f"{platform.machine()}, {run['cpus']} cores", "versions": run["versions"]}


def _end_workers() -> None:
    """Ends the processes in which joblib fitted probes; it keeps them for later fits.

    An interrupted command ends without the exit handlers that would do it, and the processes would outlive
    it by minutes and then print warnings.
    """
    reusable = sys.modules.get("joblib.externals.loky.reusable_executor")
    if executor := getattr(reusable, "_executor", None):
        executor.shutdown(wait=True, kill_workers=True)
        executor.terminate(kill_workers=True)  # joblib's addition: also deletes the temporary files


def _print_continuation(command_line: str) -> None:
    print(f"finished stages are kept; to continue: {command_line}", file=sys.stderr)
