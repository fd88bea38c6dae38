"""Runs a difficulty study: tilelli difficulty --config NAME [--stage STAGE] [key=value …].

A stage first runs the stages it depends on, and reuses results already on disk: the same command continues an
interrupted run. `--stage all` (the default) ends with a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tilelli_jax.cli.command import command
from tilelli_jax.cli.tables import table

from ..document import without_markup
from ..inputs.study import study_command
from . import report
from .config import DifficultyConfig
from .study import DifficultyStudy


@command
def main(argv: Sequence[str]) -> int:
    return study_command(
        argv, DifficultyStudy, DifficultyConfig, write_report, prog="tilelli difficulty", doc=__doc__,
        shipped="difficulty-demo", example="probe.replicates=500",
        shortcuts={"--data": ("FILE", "data.source={}", "a local file to read; short for data.source=FILE")},
        prepare=lambda study, _: report.other_studies(study.config))


def write_report(study: DifficultyStudy, name: str, provenance: Mapping[str, Any]) -> str:
    """Runs the study and writes its report. Returns the summary to print."""
    rows = report.write(study, name, provenance)
    lines = [f"\n{table(report.summary(rows, study.config), right=(0,))}\n"]
    for layer, results in report.collect(study)["layers"].items():
        lines += [f"layer {layer}: {without_markup(text)}"
                  for text in report.conclusions_of(results)]
    return "\n".join(lines) + "\n"
