"""Which network learns more, of one size and budget?

    tilelli compare --config FILE [--stage train|evaluate|all] [key=value …]

Trains every model with every seed on every text, and tests what sets them apart. Runs that are there
are taken as they are: the same command again goes on where it stopped. `all` ends with a report.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax.errors import command
from tilelli_jax.tables import table

from ..inputs.commands import carry_out, how_made, quiet_logs
from ..stages import print_to_stderr
from . import report
from .config import ComparisonConfig
from .study import Study

STAGES = ("train", "evaluate", "all")
PROG = "tilelli compare"


@command
def main(argv: Sequence[str]) -> int:
    quiet_logs()
    options = _options(argv)
    config = config_lib.load(ComparisonConfig, options.config, options.overrides)
    name = config.name or Path(options.config).stem
    study = Study(config, Path(config.out or Path("runs", Path(options.config).stem)), print_to_stderr)
    study.check()
    said = shlex.join([*PROG.split(), *argv])
    return carry_out(lambda: run(study, options.stage, name, said))


def run(study: Study, stage: str, name: str, said: str) -> int:
    """One stage, or all of them and the report."""
    if stage == "train":
        count = sum(len(runs) for found in study.runs.values() for runs in found.values())
        print(f"train: {count} runs in {study.out / 'runs'}")
        return 0
    if stage == "evaluate":
        print(f"evaluate: {study.evaluation}")
        return 0
    found = report.write(study, name, how_made(said, study.config.seeds))
    for text in found["texts"]:
        print(f"\n{text} (p corrected by Holm)\n{table(report.summary(found, text))}")
    print("\n" + "\n".join(text.replace("`", "").replace("**", "") for text in report.verdicts(found)))
    print(f"\nreport: {study.out / 'report.html'} (and report.md)")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line(PROG, __doc__, ComparisonConfig, "lite-vs-vanilla",
                                     "'texts=[stories,my.txt]'")
    parser.add_argument("--stage", choices=STAGES, default="all", help="[%(default)s]")
    return parser.parse_intermixed_args(argv)
