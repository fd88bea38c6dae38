"""AUROC of every estimator in several finished studies: one table and one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError

from .. import figures
from ..conclusions import format_interval
from ..document import Document
from ..estimators import panel
from ..stats import Interval
from .report import read_results

Tree = Mapping[str, Any]
Columns = dict[str, Mapping[str, Interval]]


def read_columns(studies: Sequence[Path]) -> Columns:
    """Returns the AUROCs of each study by method; of each data set too, in a study of several.

    The columns are named "network, task, data".

    Raises:
        InputError: a directory has no results, or two columns have one name.
    """
    columns: Columns = {}
    for path in studies:
        results = read_results(path)
        try:
            start = f"{results['verdict']['network']['name']}, {results['config']['questions']['task']}, "
            names = sorted(results["datasets"])
            parts = {"all" if len(names) > 1 else names[0]: results["methods"],
                     **{name: result["methods"] for name, result in results["within_dataset"].items()}}
        except (KeyError, TypeError):
            raise InputError(f"{path}: expected the results of a recall study, found another results.json"
                             ) from None
        for name, methods in parts.items():
            if start + name in columns:
                raise InputError(f"{path}: expected studies of different networks, tasks or questions, found "
                                 f"{start}{name} twice")
            columns[start + name] = {method: Interval.from_tree(tree["auroc"])
                                     for method, tree in methods.items()}
    return columns


def rows(columns: Columns) -> list[dict[str, Any]]:
    """Returns the table, best mean AUROC first; estimators that some columns lack come last."""
    names = [name for name in panel.ESTIMATORS if any(name in methods for methods in columns.values())]

    def key(name: str) -> tuple[int, float]:
        areas = [methods[name].point for methods in columns.values() if name in methods]
        return -len(areas), -float(np.mean(areas))
    return [{"method": name, "reads": panel.ESTIMATORS[name].group, **{
        column: methods.get(name) for column, methods in columns.items()}} for name in sorted(names, key=key)]


def write(studies: Sequence[Path], out: Path, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Writes report.md, report.html, the figure and results.json; returns the rows of the table."""
    columns = read_columns(studies)
    table = rows(columns)
    report = Document("Estimators over studies")
    report.paragraph(f"AUROC of every estimator in {len(columns)} columns, each a network, a task and "
                     "questions. Intervals are 95 % bootstrap intervals over groups of questions, as in the "
                     "studies' own reports, which have the paired tests. Best mean first; what a column "
                     "lacks was not measured there, or has too few questions.")
    areas = [[row[column].point if row[column] else np.nan for column in columns] for row in table]
    report.figure("matrix", figures.heat_map(areas, [row["method"] for row in table], list(columns)),
                  "AUROC of each estimator (rows) in each study (columns); white is chance.")
    report.table(table)
    report.finish(out, {"columns": list(columns), "rows": [
        {**row, **{column: row[column]._asdict() if row[column] else None for column in columns}}
        for row in table]}, provenance)
    return table


def as_text(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table for the terminal."""
    return [list(table[0]), *([format_interval(cell) if isinstance(cell, Interval) else cell or "–"
                               for cell in row.values()] for row in table)]
