"""Tables of results as JSON, parquet, Markdown and CSV, and reading of parquet."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.io.files import MAX_BYTES, check_regular, write_atomically, write_together

from .stats import Interval

Row = Mapping[str, Any]

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def write(path: Path, rows: Sequence[Row], title: str = "") -> None:
    """Writes the same rows as path.json, path.parquet and path.md: all of them or none.

    Args:
        path: without an extension.
        rows: column → text, number, Interval (three columns in parquet) or None.
        title: heading of the Markdown; empty for none.
    """
    flat = [dict(_flat(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    content = parquet({name: [row.get(name) for row in flat] for name in names})
    head = f"# {title}\n\n" if title else ""
    write_together({
        path.with_name(f"{path.name}.json"): json_with_nulls([dict(row) for row in rows]),
        path.with_name(f"{path.name}.parquet"): content,
        path.with_name(f"{path.name}.md"): (head + markdown(rows) + "\n").encode()})


def parquet(columns: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a parquet file with these columns, each `[rows]`."""
    import pyarrow
    import pyarrow.parquet
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), content)
    return content.getvalue()


def write_columns(path: Path, columns: Mapping[str, Any]) -> None:
    """Writes columns, each `[rows]`, as parquet, atomically."""
    write_atomically(path, parquet(columns))


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Reads columns from parquet, texts as object arrays. Raises InputError like `read_parquet`."""
    table = read_parquet(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def read_parquet(path: Path, columns: Sequence[str] | None = None, max_rows: int | None = None) -> Any:
    """Reads a parquet file as a pyarrow table.

    Args:
        columns: columns to read; None reads all.
        max_rows: number of rows to return from the top; None returns all.

    Raises:
        InputError: the file is not a parquet file, lacks a column, or its columns exceed MAX_BYTES when
            unpacked.
    """
    with _opened(path) as file:
        names, metadata = file.schema_arrow.names, file.metadata
        if missing := [name for name in columns or () if name not in names]:
            raise InputError(f"{path}: expected the column '{missing[0]}', found "
                             f"{', '.join(names) or 'none'}")
        selected = [j for j in range(metadata.num_columns)
                    if columns is None or metadata.schema.column(j).path.partition(".")[0] in columns]
        size = sum(metadata.row_group(i).column(j).total_uncompressed_size
                   for i in range(metadata.num_row_groups) for j in selected)
        if size > MAX_BYTES:
            raise InputError(f"{path}: cannot be read: expected at most {MAX_BYTES:,} bytes when unpacked, "
                             f"found {size:,}")
        table = file.read(columns if columns is None else list(columns))
        table.validate(full=True)
    return table if max_rows is None else table.slice(0, max_rows)


def column_names(path: Path) -> list[str]:
    """Returns the column names of a parquet file. Raises InputError if it is not one."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_regular(path)
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except InputError:
        raise
    except (OSError, ValueError, NotImplementedError, KeyError, TypeError) as error:  # pyarrow raises these
        raise InputError(f"{path}: cannot be read: {error}") from None


def json_with_nulls(tree: Any) -> bytes:
    """Encodes a tree as JSON; non-finite numbers, which JSON lacks, become null."""
    return json.dumps(_plain(tree), indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


FORMULA_STARTS = ("=", "+", "-", "@")
# Characters at which a spreadsheet may start a new cell or row even inside quotes, depending on its locale.
BREAKS = re.compile("([;|\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029])")


def as_csv(rows: Sequence[Row]) -> bytes:
    """Encodes rows as CSV for spreadsheets: UTF-8 with a byte-order mark, without texts that run as formulas.

    A text that starts with = + - @, a tab or a line break gets an apostrophe in front (OWASP, CSV injection).
    So does each part of a text after a semicolon, a bar, a tab or a line break, if it starts with = + - @.
    Blanks and invisible characters before these signs are ignored. Numbers are unchanged.
    """
    import csv
    sheet = io.StringIO(newline="")
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(sheet, list(names))
    writer.writerow({name: _escape_formulas(name) for name in names})
    writer.writerows({name: _escape_formulas(value) for name, value in row.items()} for row in rows)
    return b"\xef\xbb\xbf" + sheet.getvalue().encode("utf-8", "replace")


def _escape_formulas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = [f"'{part}" if _first_visible(part) in FORMULA_STARTS else part
             for part in BREAKS.split(value)]
    if len(parts) > 1 and parts[1] not in ";|" and not _first_visible(parts[0]):
        parts.insert(0, "'")
    return "".join(parts)


def _first_visible(text: str) -> str:
    """Returns the first character that is not blank or invisible (Unicode Z, Cc, Cf), without full width."""
    visible = (char for char in text if unicodedata.category(char) not in ("Zs", "Zl", "Zp", "Cc", "Cf"))
    return unicodedata.normalize("NFKC", next(visible, ""))[:1]


def markdown(rows: Sequence[Row]) -> str:
    """Formats rows as a Markdown table with aligned columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([format_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(names))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def format_cell(value: Any) -> str:
    """Formats a table cell: numbers to about four digits, intervals as `0.590 [0.551, 0.627]`, None as –."""
    match value:
        case None:
            return "–"
        case Interval() if math.isnan(value.point):
            return "–"
        case Interval():
            return f"{format_cell(value.point)} [{format_cell(value.low)}, {format_cell(value.high)}]"
        case bool() | np.bool_():
            return "yes" if value else "no"
        case float() | np.floating():
            number = float(value)
            if math.isnan(number):
                return "–"
            if number and not 1e-3 <= abs(number) < 1e5:
                return f"{number:.3g}"
            return f"{number:.{3 if abs(number) < 10 else 1}f}"
        case _:
            # Control characters, such as bytes that a model generates, would make the report a binary file.
            return CONTROL.sub(" ", str(value).replace("|", "\\|"))


def _flat(row: Row) -> Any:
    for name, value in row.items():
        if isinstance(value, Interval):
            yield from ((name, value.point), (f"{name}_low", value.low), (f"{name}_high", value.high))
        else:
            yield name, value.item() if isinstance(value, np.generic) else value


def _plain(tree: Any) -> Any:
    match tree:
        case Interval():
            return {"point": _plain(tree.point), "low": _plain(tree.low), "high": _plain(tree.high)}
        case Mapping():
            return {str(key): _plain(value) for key, value in tree.items()}
        case np.ndarray() | np.generic():
            return _plain(tree.tolist())
        case list() | tuple():
            return [_plain(value) for value in tree]
        case float():
            return tree if math.isfinite(tree) else None
    return tree
