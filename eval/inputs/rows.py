"""Reads rows of data sets from the Hugging Face hub and from files."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilelli_jax import extras
from tilelli_jax.data.text_files import MARKS
from tilelli_jax.errors import InputError
from tilelli_jax.io import json_text
from tilelli_jax.io.files import read_bytes

from ..tables import read_parquet

Row = dict[str, Any]

log = logging.getLogger(__name__)
FORMATS = ("JSON lines, JSON (a list, or SQuAD's or TriviaQA's own files), CSV with a header (.csv, .tsv) or "
           "parquet")
OTHERS = {".xlsx": "a spreadsheet", ".xls": "a spreadsheet", ".ods": "a spreadsheet", ".gz": "compressed",
          ".zip": "compressed", ".bz2": "compressed", ".xz": "compressed", ".zst": "compressed",
          ".feather": "a feather file", ".arrow": "an arrow file", ".pkl": "a pickle", ".pickle": "a pickle",
          ".yaml": "YAML", ".yml": "YAML", ".db": "a database", ".sqlite": "a database"}
SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n])"?(?:\r\n|\r|\n|$)', re.IGNORECASE)  # Excel's
MAX_CELL = 1 << 30  # csv's own limit is 131,072 characters


def hugging_face(source: str, max_rows: int, *, part: str = "validation",
                 seed: int | None = None) -> list[Row]:
    """Reads rows of one split of a data set, `hf:NAME[#SUBSET][@REVISION]`.

    Args:
        max_rows: maximum number of rows.
        part: name of the split.
        seed: shuffles the split with the datasets library before taking rows; None takes the first rows.

    Raises:
        InputError: the extra is missing, or the data set cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise extras.missing("datasets", f"{source}: reading a Hugging Face data set") from None
    data_set, _, revision = source.removeprefix("hf:").partition("@")
    name, _, subset = data_set.partition("#")
    arguments = (name, *([subset] if subset else []))
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        if seed is None:
            return list(itertools.islice(
                datasets.load_dataset(*arguments, split=part, streaming=True, **options), max_rows))
        rows = datasets.load_dataset(*arguments, split=part, **options).shuffle(seed=seed)
        return list(rows.select(range(min(max_rows, len(rows)))))
    except Exception as error:  # the hub, the connection and the files raise many types
        raise InputError(f"{source}: cannot be read: {error}; a local file works as well") from None


def read_rows(path: Path, max_rows: int | None = 5000) -> list[Row]:
    """Reads rows of a file in one of FORMATS; upper and lower case of its suffix are equivalent.

    Text is UTF-8, UTF-16 or UTF-32 with a byte-order mark, otherwise Windows-1252, with a warning. A CSV file
    may declare its separator in a first line `sep=;`; otherwise it is the most frequent of comma, semicolon
    and tab in the header.

    Args:
        max_rows: maximum number of rows; None reads all.

    Raises:
        InputError: the file cannot be read, or has no rows.
    """
    suffix = path.suffix.lower()
    if suffix in OTHERS:
        raise InputError(f"{path}: is {OTHERS[suffix]}; expected {FORMATS}")
    try:
        if suffix == ".parquet":
            rows = read_parquet(path, None, max_rows).to_pylist()
        elif suffix in (".csv", ".tsv"):
            separator = "\t" if suffix == ".tsv" else ""
            rows = list(itertools.islice(_csv_rows(path, _text(path), separator), max_rows))
        else:
            rows = _json_rows(path, _text(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not rows:
        raise InputError(f"{path}: expected rows, as {FORMATS}, found none")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {i}: expected columns with values, found {_describe(row)}")
        json_text.check_text(row, f"{path}: row {i}")
    return rows[:max_rows]


def columns_of(row: Mapping[str, Any]) -> str:
    """Lists the columns of a row for an error message; quotes names with surrounding blanks."""
    names = (name if name == name.strip() else repr(name) for name in map(str, row))
    return f"the columns here are {', '.join(names) or 'none'}"


def describe_cell(row: Mapping[str, Any], column: str) -> str:
    """Returns the value of a row in a column for an error message: shortened, or `nothing` without quotes."""
    return f"{row[column]!r:.40}" if column in row else "nothing"


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """Returns the text in a column of a row.

    Args:
        where: location of the row, for error messages.

    Raises:
        InputError: the cell is missing, blank or not text; the message lists the columns.
    """
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        return value
    description = ("nothing" if column not in row else
                   repr(value) if isinstance(value, str) else _describe(value))
    raise InputError(f"{where}: {column}: expected text, found {description:.40}; {columns_of(row)}")


# ---------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    content = read_bytes(path)
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return content.decode(encoding)
    if b"\0" in content[:4096]:
        raise InputError(f"{path}: not text, or UTF-16 without a byte-order mark; expected {FORMATS}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}, nor Windows-1252") from None
        log.warning("%s: not UTF-8 at byte %d; read as Windows-1252", path, error.start)
        return text


def _json_rows(path: Path, text: str) -> list[Any]:
    start = text.lstrip()[:1]
    if not start:
        return []
    if start == "[":
        return json_text.parse(text, str(path))
    if start != "{":
        raise InputError(f"{path}: expected {FORMATS}, found text that begins with {text.lstrip()[:20]!r}")
    try:
        tree = json_text.parse(text, str(path))
    except InputError:  # not one document: JSON lines
        return [row for _, row in json_text.lines(text, str(path))]
    for key, flatten in (("data", _squad), ("Data", _triviaqa)):
        if isinstance(tree.get(key), list):
            return list(flatten(path, tree[key]))
    return [tree]


def _squad(path: Path, articles: list[Any]) -> Iterator[Row]:
    """Converts SQuAD's original format (articles, paragraphs, questions) to rows as on Hugging Face."""
    if not all(isinstance(article, dict) and "paragraphs" in article for article in articles):
        yield from articles  # plain rows under the key "data"
        return
    for i, article in enumerate(articles, 1):
        where = f"{path}: article {i}"
        for paragraph in _part(article, "paragraphs", list, where):
            for question in _part(paragraph, "qas", list, where):
                answers = _part(question, "answers", list, where, optional=True)
                yield {"id": question.get("id"), "title": article.get("title", ""),
                       "context": _part(paragraph, "context", str, where),
                       "question": _part(question, "question", str, where),
                       "answers": {"text": [_part(answer, "text", str, where) for answer in answers]}}


def _triviaqa(path: Path, questions: list[Any]) -> Iterator[Row]:
    """Converts TriviaQA's original format to rows as on Hugging Face."""
    for i, entry in enumerate(questions, 1):
        where = f"{path}: question {i}"
        question = _part(entry, "Question", str, where)
        answer = _part(entry, "Answer", dict, where, optional=True)
        yield {"question": question, "question_id": entry.get("QuestionId"), "answer": {
            "value": answer.get("Value"), "aliases": _part(answer, "Aliases", list, where, optional=True),
            "normalized_aliases": _part(answer, "NormalizedAliases", list, where, optional=True)}}


KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


def _part(tree: Any, key: str, kind: type, where: str, *, optional: bool = False) -> Any:
    """Returns the value of type `kind` under a key; an empty one if it is optional and null or missing."""
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected an object with {key}, found {_describe(tree)}")
    value = tree.get(key)
    if optional and value is None:
        return kind()
    if not isinstance(value, kind):
        description = _describe(value) if key in tree else "nothing"
        raise InputError(f"{where}: {key}: expected {KINDS[kind]}, found {description}")
    return value


def _describe(value: Any) -> str:
    """Returns the type of a JSON value and its first characters."""
    return "null" if value is None else f"{json_text.kind(value)}, {value!r:.40}"


def _csv_rows(path: Path, text: str, separator: str) -> Iterator[Row]:
    """Yields the rows of a CSV file. A row has no key for an empty cell, as in JSON."""
    field_size_limit = csv.field_size_limit(MAX_CELL)
    separator_line = SEPARATOR_LINE.match(text)
    if separator_line is not None:
        separator, text = separator_line[1], text[separator_line.end():]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator or ",", strict=True)
    try:
        names = next(reader, [])
        if not separator and len(names) == 1:
            separator = max(",;\t", key=names[0].count)
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
            names = next(reader, [])
        if len(set(names)) < len(names):
            raise InputError(f"{path}: expected columns of different names, found {', '.join(names)}")
        for row in filter(None, reader):
            if len(row) != len(names):
                line = reader.line_num + (separator_line is not None)
                raise InputError(f"{path}, line {line}: expected {len(names)} cells, as in the header, found "
                                 f"{len(row)}")
            yield {name: cell for name, cell in zip(names, row, strict=True) if cell}
    except csv.Error as error:
        line = reader.line_num + (separator_line is not None)
        raise InputError(f"{path}, line {line}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(field_size_limit)
