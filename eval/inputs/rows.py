"""Rows of data sets: from Hugging Face's hub, and from files."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilelli_jax import extras, json_text
from tilelli_jax.data.text_files import MARKS
from tilelli_jax.errors import InputError
from tilelli_jax.files import read_bytes

from ..tables import read_parquet

Row = dict[str, Any]

log = logging.getLogger(__name__)
FORMATS = ("JSON lines, JSON (a list, or SQuAD's or TriviaQA's own files), CSV with a head (.csv, .tsv) or "
           "parquet")
OTHERS = {".xlsx": "a spreadsheet", ".xls": "a spreadsheet", ".ods": "a spreadsheet", ".gz": "compressed",
          ".zip": "compressed", ".bz2": "compressed", ".xz": "compressed", ".zst": "compressed",
          ".feather": "a feather file", ".arrow": "an arrow file", ".pkl": "a pickle", ".pickle": "a pickle",
          ".yaml": "YAML", ".yml": "YAML", ".db": "a database", ".sqlite": "a database"}
SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n])"?(?:\r\n|\r|\n|$)', re.IGNORECASE)  # Excel's, above the head
MAX_CELL = 1 << 30  # csv's own limit is 131,072 characters


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
        raise extras.missing("datasets", f"{source}: reading it") from None
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


def read_rows(path: Path, most: int | None = 5000) -> list[Row]:
    """Rows of a file of one of FORMATS, whatever the case of its ending.

    Text is UTF-8, UTF-16 or UTF-32 with a byte-order mark, or else, with a note, Windows-1252. Cells of a CSV
    file are separated as a first line `sep=;` says, or else by commas, semicolons or tabs, as its head is.

    Args:
        most: so many of them; None for all.

    Raises:
        InputError: it cannot be read, or holds no rows.
    """
    ending = path.suffix.lower()
    if ending in OTHERS:
        raise InputError(f"{path}: is {OTHERS[ending]}; expected {FORMATS}")
    try:
        if ending == ".parquet":
            rows = read_parquet(path, most=most).to_pylist()
        elif ending in (".csv", ".tsv"):
            rows = list(itertools.islice(_cells(path, _text(path), "\t" if ending == ".tsv" else ""), most))
        else:
            rows = _of_json(path, _text(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not rows:
        raise InputError(f"{path}: expected rows, as {FORMATS}, found none")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {i}: expected columns with values, found {_told(row)}")
        json_text.check_text(row, f"{path}: row {i}")
    return rows[:most]


def columns_of(row: Mapping[str, Any]) -> str:
    """The names of its columns, for an error that says which is missing; quoted where blanks surround one."""
    names = (name if name == name.strip() else repr(name) for name in map(str, row))
    return f"the columns here are {', '.join(names) or 'none'}"


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column of a row.

    Raises:
        InputError: there is none; it says what is there instead, and which columns there are.
    """
    found = row.get(column)
    if isinstance(found, str) and found.strip():
        return found
    told = "nothing" if column not in row else repr(found) if isinstance(found, str) else _told(found)
    raise InputError(f"{where}: {column}: expected text, found {told:.40}; {columns_of(row)}")


# ---------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    content = read_bytes(path)
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return content.decode(encoding)
    if b"\0" in content[:4096]:
        raise InputError(f"{path}: is no text, or has no byte-order mark; expected {FORMATS}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}, nor Windows-1252") from None
        log.warning("%s: not UTF-8 at byte %d; read as Windows-1252", path, error.start)
        return text


def _of_json(path: Path, text: str) -> list[Any]:
    start = text.lstrip()[:1]
    if not start:
        return []
    if start == "[":
        return json_text.parse(text, str(path))
    if start != "{":
        raise InputError(f"{path}: expected {FORMATS}, found text that begins with {text.lstrip()[:20]!r}")
    try:
        whole = json_text.parse(text, str(path))
    except InputError:
        return [row for _, row in json_text.lines(text, str(path))]
    for key, flatten in (("data", _squad), ("Data", _triviaqa)):
        if isinstance(whole.get(key), list):
            return list(flatten(path, whole[key]))
    return [whole]


def _squad(path: Path, articles: list[Any]) -> Iterator[Row]:
    """SQuAD's own files: articles with paragraphs with questions, as rows of its published data set."""
    if not all(isinstance(article, dict) and "paragraphs" in article for article in articles):
        yield from articles  # rows under a key
        return
    for i, article in enumerate(articles, 1):
        where = f"{path}: article {i}"
        for paragraph in _part(article, "paragraphs", list, where):
            for asked in _part(paragraph, "qas", list, where):
                answers = _part(asked, "answers", list, where, optional=True)
                yield {"id": asked.get("id"), "title": article.get("title", ""),
                       "context": _part(paragraph, "context", str, where),
                       "question": _part(asked, "question", str, where),
                       "answers": {"text": [_part(answer, "text", str, where) for answer in answers]}}


def _triviaqa(path: Path, asked: list[Any]) -> Iterator[Row]:
    """TriviaQA's own files, as rows of its published data set."""
    for i, one in enumerate(asked, 1):
        where = f"{path}: question {i}"
        question = _part(one, "Question", str, where)
        answer = _part(one, "Answer", dict, where, optional=True)
        yield {"question": question, "question_id": one.get("QuestionId"), "answer": {
            "value": answer.get("Value"), "aliases": _part(answer, "Aliases", list, where, optional=True),
            "normalized_aliases": _part(answer, "NormalizedAliases", list, where, optional=True)}}


KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


def _part(tree: Any, key: str, kind: type, where: str, *, optional: bool = False) -> Any:
    """What is under a key, of one of KINDS; an empty one where it is optional and null or missing."""
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected an object with {key}, found {_told(tree)}")
    found = tree.get(key)
    if optional and found is None:
        return kind()
    if not isinstance(found, kind):
        told = _told(found) if key in tree else "nothing"
        raise InputError(f"{where}: {key}: expected {KINDS[kind]}, found {told}")
    return found


def _told(value: Any) -> str:
    """The kind of a value of JSON, and its beginning."""
    return "null" if value is None else f"{json_text.kind(value)}, {value!r:.40}"


def _cells(path: Path, text: str, separator: str) -> Iterator[Row]:
    """Empty cells are left out, as JSON leaves out keys."""
    before = csv.field_size_limit(MAX_CELL)
    above = SEPARATOR_LINE.match(text)
    if above is not None:
        separator, text = above[1], text[above.end():]
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
                line = reader.line_num + (above is not None)
                raise InputError(f"{path}, line {line}: expected {len(names)} cells, as in the head, found "
                                 f"{len(row)}")
            yield {name: cell for name, cell in zip(names, row, strict=True) if cell}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num + (above is not None)}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
