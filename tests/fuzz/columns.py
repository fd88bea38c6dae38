"""Mutators of CSV and parquet tables: columns, types, cells and rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator
Columns = dict[str, list[Any]]
CELLS: tuple[Any, ...] = (None, "", "nan", float("nan"), float("inf"), -1.0, 1e308, 0.0, 2.0, "word", "=1+1",
                          "x" * 200_000, "a\nb", '"', "\ud7ff", True)


def dropped(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    name = _random_name(columns, rng)
    return {key: cells for key, cells in columns.items() if key != name}, f"{name}: dropped"


def renamed(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    name = _random_name(columns, rng)
    new_name = (f"{name}s", "", name.upper(), " ", "x" * 5000)[rng.integers(5)]
    return ({new_name if key == name else key: cells for key, cells in columns.items()},
            f"{name}: renamed to {new_name!r:.30}")


def with_another_type(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    name = _random_name(columns, rng)
    conversions: dict[str, Callable[[Any], Any]] = {
        "text": lambda cell: f"{cell}!", "numbers": lambda cell: 0.5, "lists": lambda cell: [str(cell)],
        "true": lambda cell: True, "null": lambda cell: None, "mappings": lambda cell: {"a": str(cell)},
        "bytes": lambda cell: b"\xff\xfe"}
    conversion = list(conversions)[rng.integers(len(conversions))]
    cells = [conversions[conversion](cell) for cell in columns[name]]
    return columns | {name: cells}, f"{name}: became {conversion}"


def with_a_cell(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    name = _random_name(columns, rng)
    cells = list(columns[name])
    row = int(rng.integers(len(cells)))
    cells[row] = CELLS[rng.integers(len(CELLS))]
    cells_present = [cell for cell in cells if cell is not None]
    if len({type(cell) for cell in cells_present}) > 1:  # a column has one type
        cell_type = float if all(isinstance(cell, int | float) for cell in cells_present) else str
        cells = [cell if cell is None else cell_type(cell) for cell in cells]
    return columns | {name: cells}, f"{name}: row {row} became {cells[row]!r:.30}"


def with_repeated_rows(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    return {name: [*cells, *cells] for name, cells in columns.items()}, "all rows repeated"


def without_rows(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    return {name: [] for name in columns}, "no rows"


def one_row(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    return {name: cells[:1] for name, cells in columns.items()}, "one row"


def with_constant_column(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    name = _random_name(columns, rng)
    return columns | {name: columns[name][:1] * len(columns[name])}, f"{name}: all rows set to the first"


def shuffled(columns: Columns, rng: Rng) -> tuple[Columns, str]:
    order = rng.permutation(len(next(iter(columns.values()))))
    return {name: [cells[i] for i in order] for name, cells in columns.items()}, "rows in another order"


CHANGES = (*(dropped,) * 2, renamed, *(with_another_type,) * 3, *(with_a_cell,) * 3, with_repeated_rows,
           without_rows, one_row, with_constant_column, shuffled)


def _parquet(change: Callable[[Columns, Rng], tuple[Columns, str]]) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        import pyarrow
        import pyarrow.parquet
        columns, description = change(pyarrow.parquet.read_table(path).to_pydict(), rng)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return description
    mutate.__name__ = change.__name__
    return mutate


def _csv(change: Callable[[Columns, Rng], tuple[Columns, str]]) -> Callable[[Path, Rng], str]:
    def mutate(path: Path, rng: Rng) -> str:
        separator = "\t" if path.suffix == ".tsv" else ","
        head, *rows = csv.reader(io.StringIO(path.read_text()), delimiter=separator)
        columns, description = change({name: [row[i] for row in rows] for i, name in enumerate(head)}, rng)
        text = io.StringIO()
        writer = csv.writer(text, delimiter=separator)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        path.write_text(text.getvalue())
        return description
    mutate.__name__ = change.__name__
    return mutate


def ragged(path: Path, rng: Rng) -> str:
    """A CSV line with an additional or a missing cell, or with an unclosed quote."""
    lines = path.read_text().splitlines()
    number, kind = int(rng.integers(len(lines))), int(rng.integers(3))
    lines[number] = (lines[number] + ",more", lines[number].rpartition(",")[0], '"' + lines[number])[kind]
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1} became {lines[number]!r:.60}"


def with_repeated_header(path: Path, rng: Rng) -> str:
    text = path.read_text()
    head = text.partition("\n")[0]
    path.write_text(f"{head},{head}\n" + text.partition("\n")[2])
    return "header repeated"


PARQUET_MUTATORS = tuple(map(_parquet, CHANGES))
CSV_MUTATORS = (*map(_csv, CHANGES), ragged, with_repeated_header)


def _random_name(columns: Columns, rng: Rng) -> str:
    return list(columns)[rng.integers(len(columns))]
