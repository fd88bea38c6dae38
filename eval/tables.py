"""Tables of results, written together as JSON, parquet and Markdown."""

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
from tilelli_jax.files import MAX_BYTES, check_regular, write_atomically, write_together

from .stats import Interval

Row = Mapping[str, Any]

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def write(path: Path, rows: Sequence[Row], title: str = "") -> None:
    """path.json, path.parquet and path.md of the same rows, all or none.

    Args:
        path: without an ending.
        rows: column → text, number, Interval (in parquet three columns) or None.
    """
    flat = [dict(_flat(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    content = parquet({name: [row.get(name) for row in flat] for name in names})
    head = f"# {title}\n\n" if title else ""
    write_together({
        path.with_name(f"{path.name}.json"): as_json([dict(row) for row in rows]),
        path.with_name(f"{path.name}.parquet"): content,
        path.with_name(f"{path.name}.md"): (head + markdown(rows) + "\n").encode()})


def parquet(columns: Mapping[str, Any]) -> bytes:
    """Columns `[rows]` as a parquet file."""
    import pyarrow
    import pyarrow.parquet
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), content)
    return content.getvalue()


def write_columns(path: Path, columns: Mapping[str, Any]) -> None:
    """Columns `[rows]` as parquet, atomically."""
    write_atomically(path, parquet(columns))


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """What `write_columns` wrote; texts as an array of objects. Raises InputError as `read_parquet`."""
    table = read_parquet(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def read_parquet(path: Path, columns: Sequence[str] | None = None, most: int | None = None) -> Any:
    """A pyarrow table of a parquet file.

    Args:
        columns: these alone.
        most: so many rows, its first ones.

    Raises:
        InputError: it is no such file, has no such column, or holds more than MOST_BYTES in these.
    """
    with _opened(path) as file:
        there, about = file.schema_arrow.names, file.metadata
        if missing := [name for name in columns or () if name not in there]:
            raise InputError(f"{path}: expected the column '{missing[0]}', found "
                             f"{', '.join(there) or 'none'}")
        asked = [j for j in range(about.num_columns)
                 if columns is None or about.schema.column(j).path.partition(".")[0] in columns]
        size = sum(about.row_group(i).column(j).total_uncompressed_size
                   for i in range(about.num_row_groups) for j in asked)
        if size > MAX_BYTES:
            raise InputError(f"{path}: cannot be read: expected at most {MAX_BYTES:,} bytes when unpacked, "
                             f"found {size:,}")
        table = file.read(columns if columns is None else list(columns))
        table.validate(full=True)
    return table if most is None else table.slice(0, most)


def column_names(path: Path) -> list[str]:
    """Of a parquet file. Raises InputError where it is none."""
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
    except (OSError, ValueError, NotImplementedError, KeyError, TypeError) as error:  # as pyarrow's are
        raise InputError(f"{path}: cannot be read: {error}") from None


def as_json(tree: Any) -> bytes:
    """JSON without NaN, which JSON does not know: what is not a finite number is null."""
    return json.dumps(_plain(tree), indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


RUN_BY_SPREADSHEETS = ("=", "+", "-", "@")
# Where a spreadsheet may begin another cell or line, whatever the quotes: it opens the file by its language.
BREAKS = re.compile("([;|\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029])")


def as_csv(rows: Sequence[Row]) -> bytes:
    """CSV for a spreadsheet: UTF-8 with a byte-order mark, and no text that it would run as a formula.

    A text that begins with = + - @, a tab or a line break gets an apostrophe in front (OWASP, CSV injection).
    So does what follows a semicolon, a bar, a tab or a line break inside a text, if it begins with = + - @.
    Blanks and invisible characters before them do not count. Numbers stay as they are.
    """
    import csv
    sheet = io.StringIO(newline="")
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(sheet, list(names))
    writer.writerow({name: _harmless(name) for name in names})
    writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    return b"\xef\xbb\xbf" + sheet.getvalue().encode("utf-8", "replace")


def _harmless(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = [f"'{part}" if _first_shown(part) in RUN_BY_SPREADSHEETS else part
             for part in BREAKS.split(value)]
    if len(parts) > 1 and parts[1] not in ";|" and not _first_shown(parts[0]):
        parts.insert(0, "'")
    return "".join(parts)


def _first_shown(text: str) -> str:
    """The first character that is not blank or invisible (Unicode Z, Cc, Cf), a full-width sign as plain."""
    shown = (letter for letter in text if unicodedata.category(letter) not in ("Zs", "Zl", "Zp", "Cc", "Cf"))
    return unicodedata.normalize("NFKC", next(shown, ""))[:1]


def markdown(rows: Sequence[Row]) -> str:
    """A table whose cells line up."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(names))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def shown(value: Any) -> str:
    """A cell: numbers to four digits or so, intervals as `0.590 [0.551, 0.627]`, nothing as a dash."""
    match value:
        case None:
            return "–"
        case Interval():
            return f"{shown(value.point)} [{shown(value.low)}, {shown(value.high)}]"
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
            # What is no text, as bytes that a network makes, would make a file of another kind of a table.
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
