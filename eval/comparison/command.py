"""Which network reaches the lower loss at equal size and budget?

    tilelli compare --config NAME [--stage train|evaluate|all] [key=value …]

Trains every model with every seed on every text, and tests the differences in validation loss. Finished
runs are reused: the same command again resumes the comparison. `all` ends with a report.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import command
from tilelli_jax.cli.tables import table

from ..inputs.commands import provenance_rows, quiet_logs, run_study
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
    command_line = shlex.join([*PROG.split(), *argv])
    return run_study(lambda: run(study, options.stage, name, command_line), command_line)


def run(study: Study, stage: str, name: str, command_line: str) -> int:
    """Runs one stage, or all stages and the report."""
    if stage == "train":
        count = sum(len(runs) for by_model in study.runs.values() for runs in by_model.values())
        print(f"train: {count} runs in {study.out / 'runs'}")
        return 0
    if stage == "evaluate":
        print(f"evaluate: {study.evaluation}")
        return 0
    results = report.write(study, name, provenance_rows(command_line, study.config.seeds))
    for text in results["texts"]:
        print(f"\n{text} (p after Holm's correction)\n{table(report.summary(results, text))}")
    print("\n" + "\n".join(text.replace("`", "").replace("**", "") for text in report.verdicts(results)))
    print(f"\nreport: {study.out / 'report.html'} (and report.md)")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line(PROG, __doc__, ComparisonConfig, "lite-vs-vanilla",
                                     "'texts=[stories,my.txt]'")
    parser.add_argument("--stage", choices=STAGES, default="all", help="last stage to run [%(default)s]")
    return parser.parse_intermixed_args(argv)
