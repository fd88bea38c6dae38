"""Which network reaches the lower loss at equal size and budget?

    tilelli compare --config NAME [--stage train|evaluate|all] [key=value …]

Trains every model with every seed on every text, and tests the differences in validation loss. Finished
runs are reused: the same command again resumes the comparison. `all` ends with a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tilelli_jax.cli.command import command
from tilelli_jax.cli.tables import table

from ..document import without_markup
from ..inputs.study import study_command
from . import report
from .config import ComparisonConfig
from .study import ComparisonStudy


@command
def main(argv: Sequence[str]) -> int:
    return study_command(
        argv, ComparisonStudy, ComparisonConfig, write_report, prog="tilelli compare", doc=__doc__,
        shipped="lite-vs-vanilla", example="'texts=[stories,my.txt]'")


def write_report(study: ComparisonStudy, name: str, provenance: Mapping[str, Any]) -> str:
    """Runs the comparison and writes its report. Returns the summary to print."""
    results = report.write(study, name, provenance)
    tables = "\n".join(f"\n{text} (p after Holm's correction)\n{table(report.summary(results, text))}"
                       for text in results["texts"])
    verdicts = "\n".join(without_markup(text) for text in report.verdicts(results))
    return f"{tables}\n\n{verdicts}\n"
