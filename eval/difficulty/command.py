"""Runs a difficulty study: tilelli difficulty --config NAME [--stage STAGE] [key=value …].

A stage first runs the stages it depends on, and reuses results already on disk: the same command continues an
interrupted run. `--stage all` (the default) ends with a report.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import command
from tilelli_jax.cli.tables import table
from tilelli_jax.errors import InputError

from ..inputs.commands import provenance_rows, quiet_logs, run_study
from ..stages import print_to_stderr
from . import report
from .config import StudyConfig
from .questions import with_source
from .study import Study

STAGES = ("extract", "sae", "probe", "selective", "calibrate", "cascade", "causal", "synthesize", "all")


@command
def main(argv: Sequence[str]) -> int:
    quiet_logs()
    options = _options(argv)
    config = config_lib.load(StudyConfig, options.config, options.overrides)
    if options.data:
        config = with_source(config, options.data)
    name = config.name or Path(options.config).stem
    study = Study(config, Path(config.out or Path("runs", Path(options.config).stem)), print_to_stderr)
    study.check()
    report.other_studies(config)
    command_line = shlex.join(["tilelli", "difficulty", *argv])
    return run_study(lambda: run(study, options.stage, name, command_line), command_line)


def run(study: Study, stage: str, name: str, command_line: str) -> int:
    """Runs one stage and prints its directory, or runs all stages and prints the report's summary."""
    if stage in ("synthesize", "all"):
        rows = report.write(study, name, provenance_rows(command_line, [study.config.seed]))
        print(f"\n{table(report.summary(rows, study.config), right=(0,))}\n")
        for layer, results in report.collect(study)["layers"].items():
            print("\n".join(f"layer {layer}: {text.replace('`', '').replace('**', '')}"
                            for text in report.conclusions_of(results)))
        print(f"\nreport: {study.out / 'report.html'} (and report.md)")
        return 0
    paths: list[Path | None]
    if stage == "extract":
        paths = [study.extract, study.items]
    elif stage == "sae":
        paths = [layer.evaluation_path for layer in study.layers.values()]
    else:
        paths = [getattr(layer, stage) for layer in study.layers.values()]
    for path in paths:
        if path is None:
            required = "a section large_model" if stage == "cascade" else "sae.path or sae.train"
            raise InputError(f"--stage {stage}: expected a configuration with {required}, found none")
        print(f"{stage}: {path}")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line("tilelli difficulty", __doc__, StudyConfig, "difficulty-demo",
                                     "probe.replicates=500")
    parser.add_argument("--stage", choices=STAGES, default="all", help="the stage to run [%(default)s]")
    parser.add_argument("--data", metavar="FILE", help="a local file to read instead of data.source")
    return parser.parse_intermixed_args(argv)
