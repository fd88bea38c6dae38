"""Runs a study of difficulty: tilelli difficulty --config FILE [--stage STAGE] [key=value …].

A stage makes what it needs of those before it, and takes what is there: the same command again goes on
where it stopped. `all` ends with a report.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError, command
from tilelli_jax.tables import table

from ..inputs.commands import carry_out, how_made, quiet_logs
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
    report.others(config)
    said = shlex.join(["tilelli", "difficulty", *argv])
    return carry_out(lambda: run(study, options.stage, name, said))


def run(study: Study, stage: str, name: str, said: str) -> int:
    """One stage, or all of them and the report."""
    if stage in ("synthesize", "all"):
        rows = report.write(study, name, how_made(said, [study.config.seed]))
        print(f"\n{table(report.summary(rows, study.config), right=(0,))}\n")
        for layer, told in report.collect(study)["layers"].items():
            print("\n".join(f"layer {layer}: {text.replace('`', '').replace('**', '')}"
                            for text in report.verdicts(told)))
        print(f"\nreport: {study.out / 'report.html'} (and report.md)")
        return 0
    paths: list[Path | None]
    if stage == "extract":
        paths = [study.extract, study.items]
    elif stage == "sae":
        paths = [layer.judged_path for layer in study.layers.values()]
    else:
        paths = [getattr(layer, stage) for layer in study.layers.values()]
    for path in paths:
        if path is None:
            needed = "a section dear" if stage == "cascade" else "sae.path or sae.train"
            raise InputError(f"--stage {stage}: expected a configuration with {needed}")
        print(f"{stage}: {path}")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line("tilelli difficulty", __doc__, StudyConfig, "difficulty-demo",
                                     "probe.replicates=500")
    parser.add_argument("--stage", choices=STAGES, default="all", help="[%(default)s]")
    parser.add_argument("--data", metavar="FILE", help="a local file in place of data.source")
    return parser.parse_intermixed_args(argv)
