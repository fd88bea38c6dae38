"""Rows of data sets: from Hugging Face's hub, and from files."""

from __future__ import annotations

import csv
import io
import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilelli_jax import extras, json_text
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
MARKS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))  # of the byte order
LONGEST_CELL = 1 << 30  # csv's own limit is 131,072 characters


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

    Text is UTF-8, UTF-16 with a byte-order mark, or else, with a note, Windows-1252. Cells of a CSV file are
    separated by commas, by semicolons or by tabs, as its head is.

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
            raise InputError(f"{path}: row {i}: expected columns with values, found {row!r:.40}")
        json_text.check_text(row, f"{path}: row {i}")
    return rows[:most]


def columns_of(row: Mapping[str, Any]) -> str:
    """The names of its columns, for an error that says which is missing."""
    return f"the columns here are {', '.join(map(str, row)) or 'none'}"


# ---------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    content = read_bytes(path)
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return content.decode(encoding)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in content[:4096]:
            raise InputError(f"{path}: is no text; expected {FORMATS}") from None
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
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = asked.get("answers") or []
                    yield {"id": asked.get("id"), "title": article.get("title", ""),
                           "context": paragraph["context"], "question": asked["question"],
                           "answers": {"text": [answer["text"] for answer in answers]}}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected SQuAD's articles, paragraphs and qas: {error!r}") from None


def _triviaqa(path: Path, asked: list[Any]) -> Iterator[Row]:
    """TriviaQA's own files, as rows of its published data set."""
    try:
        for one in asked:
            answer = one.get("Answer") or {}
            yield {"question": one["Question"], "question_id": one.get("QuestionId"), "answer": {
                "value": answer.get("Value"), "aliases": answer.get("Aliases") or [],
                "normalized_aliases": answer.get("NormalizedAliases") or []}}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected TriviaQA's Question and Answer: {error!r}") from None


def _cells(path: Path, text: str, separator: str) -> Iterator[Row]:
    """Empty cells are left out, as JSON leaves out keys."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        if not separator:
            head = next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
            separator = max(",;\t", key="".join(head).count) if len(head) == 1 else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise InputError(f"{path}: expected columns of different names, found {', '.join(names)}")
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}, line {reader.line_num}: expected {len(names)} cells, as in the "
                                 "head")
            yield {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
