"""Rows of data sets: from Hugging Face's hub, and from files."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tilelli_jax.data.documents import json_lines
from tilelli_jax.errors import InputError

Row = dict[str, Any]


def hugging_face(source: str, most: int, *, part: str = "validation", seed: int | None = None) -> list[Row]:
    """Rows of one part of a data set, `hf:NAME[#SUBSET][@REVISION]`.

    Args:
        most: so many of them.
        seed: of the order that the library shuffles them to; None takes the first.

    Raises:
        InputError: the extra is missing, or the data set cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source}: reading it needs the extra 'hf': pip install -e '.[hf]'") from None
    whole, _, revision = source.removeprefix("hf:").partition("@")
    name, _, subset = whole.partition("#")
    given = (name, *([subset] if subset else []))
    how: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        if seed is None:
            return list(itertools.islice(
                datasets.load_dataset(*given, split=part, streaming=True, **how), most))
        rows = datasets.load_dataset(*given, split=part, **how).shuffle(seed=seed)
        return list(rows.select(range(min(most, len(rows)))))
    except Exception as error:  # whatever the hub, the network or the set's files come up with
        raise InputError(f"{source}: cannot be read: {error}; a local file will do as well") from None


def read_rows(path: Path, most: int = 5000) -> list[Row]:
    """Rows of a JSON list, of JSON lines, of CSV with a head, or of a parquet file.

    Raises:
        InputError: it cannot be read, or holds no rows.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).slice(0, most).to_pylist()
        else:
            text = path.read_text(encoding="utf-8-sig")
            rows = (list(_csv(path, text)) if path.suffix == ".csv" else
                    json.loads(text) if text.lstrip().startswith("[") else
                    [row for _, row in json_lines(path)])
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise InputError(f"{path}: expected rows, as a JSON list, JSON lines, CSV or parquet, found none")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {i}: expected columns with values, found {row!r:.40}")
    return rows[:most]


def _csv(path: Path, text: str) -> Iterator[Row]:
    """Empty cells are left out, as JSON leaves out keys."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} "
                                 "cells, as in the head")
            yield {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
