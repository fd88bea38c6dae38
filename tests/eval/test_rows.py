"""Reading rows of files: formats, encodings and separators, and errors for other files."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.eval.difficulty import texts
from tilelli_jax.eval.inputs.rows import read_rows, text_of
from tilelli_jax.eval.recall.questions import of_rows

ROWS = [{"question": "Who wrote Émile?", "answers": "Rousseau"},
        {"question": "Where?", "answers": "Köln; here"}]


def cells(separator: str, end: str = "\n") -> str:
    def quoted(text: str) -> str:
        return f'"{text}"' if separator in text else text
    return end.join(separator.join(map(quoted, row)) for row in ([*ROWS[0]], *(row.values() for row in ROWS)))


@pytest.mark.parametrize(("name", "content"), [
    ("a.csv", cells(",").encode()), ("a.CSV", cells(",", "\r\n").encode("utf-8-sig")),
    ("a.csv", cells(";").encode()), ("a.csv", cells("\t").encode()), ("a.tsv", cells("\t").encode()),
    ("a.TSV", cells("\t").encode("utf-16")), ("a.csv", cells(",").encode("utf-16")),
    ("a.csv", b"\xfe\xff" + cells(",").encode("utf-16-be")),
    ("a.csv", cells(",").encode("utf-32")), ("a.csv", b"\0\0\xfe\xff" + cells(";").encode("utf-32-be")),
    ("a.csv", ("sep=;\r\n" + cells(";", "\r\n")).encode("utf-8-sig")),
    ("a.csv", ("sep=|\n" + cells("|")).encode()),
    ("a.tsv", ('"sep=,"\n' + cells(",")).encode("utf-16")), ("a.jsonl", json.dumps(ROWS).encode("utf-32")),
    ("a.json", json.dumps(ROWS).encode("utf-16")), ("a.JSON", json.dumps(ROWS, indent=1).encode("utf-8-sig")),
    ("a.jsonl", "\r\n".join(map(json.dumps, ROWS)).encode()),
    ("a", "\n\n".join(map(json.dumps, ROWS)).encode()),
    ("a.txt", json.dumps({"data": ROWS}).encode())])
def test_formats(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_rows(tmp_path / name) == ROWS
    assert read_rows(tmp_path / name, 1) == ROWS[:1]


def test_the_case_of_the_suffix_makes_no_difference(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.PARQUET")
    assert read_rows(tmp_path / "a.PARQUET") == ROWS


def test_windows_1252_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_bytes(cells(",").encode("cp1252"))
    with caplog.at_level(logging.WARNING):
        assert read_rows(tmp_path / "a.csv") == ROWS
    assert "not UTF-8 at byte 27; read as Windows-1252" in caplog.text


def test_long_cells(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"question,answers\nq,{'x' * 200_000}\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["answers"]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.xlsx", b"PK", "is a spreadsheet; expected JSON lines"), ("a.csv.gz", b"\x1f\x8b", "is compressed"),
    ("a.csv", b"question\0\xff", "not text"), ("a.txt", b"Who?", "found text that begins with 'Who?'"),
    ("a.csv", b"q\n\x81", "not UTF-8 at byte 2, nor Windows-1252"),
    ("a.csv", b"q,q\n1,2\n", "columns of different names"), ("a.csv", b'"q\n1', "line 2: not CSV"),
    ("a.csv", b"sep=;\nq;r\n1;2\n3\n", "line 4: expected 2 cells, as in the header, found 1"),
    ("a.csv", b"sep=;", "expected rows"), ("a.csv", "q\n1".encode("utf-16-le"), "without a byte-order mark"),
    ("a.csv", b"\xff\xfe\0\0\0", "cannot be read"), ("a.json", b"[5]", "row 1: expected columns with values, "
     "found a number, 5"),
    ("a.json", b'{"data": [{"paragraphs": 5}]}', "article 1: paragraphs: expected a list, found a number, 5"),
    ("a.json", b'{"data": [{"paragraphs": [{"qas": [{"question": "q", "answers": [{"text": 5}]}], '
     b'"context": "c"}]}]}', "article 1: text: expected text, found a number, 5"),
    ("a.json", b'{"data": [{"paragraphs": [{"qas": ["q"]}]}]}', "article 1: expected an object with answers, "
     "found text, 'q'"),
    ("a.json", b'{"Data": [{"Query": "q"}]}', "question 1: Question: expected text, found nothing"),
    ("a.json", b'{"Data": [{"Question": "q", "Answer": {"Aliases": "a"}}]}', "question 1: Aliases: expected "
     "a list, found text, 'a'"),
    ("a.parquet", b"PAR1", "cannot be read"), ("a.jsonl", b'{"a": 1}\n{', "line 2: not JSON"),
    ("a.json", b"[" * 100_000, "expected at most 100 levels"), ("a.jsonl", b'{"a":' * 100_000, "")])
def test_unreadable_files_are_rejected(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as rejected:
        read_rows(tmp_path / name)
    assert message in str(rejected.value) and "\n" not in str(rejected.value)
    assert str(rejected.value).startswith(str(tmp_path / name))


def answers(*rows: dict[str, Any]) -> list[tuple[str, ...]]:
    return [question.answers for question in of_rows([{"question": "q", **row} for row in rows], "f", "f")]


def test_printed_lists_are_parsed() -> None:
    written = ["['Jane Austen', 'Austen']", '["Jane Austen", "Austen"]', "Jane Austen|Austen",
               "[\n'Jane Austen',\n'Austen']", ["Jane Austen", "Austen"]]
    assert answers(*({"answers": text} for text in written)) == [("Jane Austen", "Austen")] * len(written)
    assert answers({"answers": "[sic] a title"}, {"answers": "['it\\'s']"}) == [("[sic] a title",), ("it's",)]
    # Python would concatenate the two texts that NumPy prints; the others are not lists.
    for text in ("['Jane Austen' 'Austen']", "['a', b]", "[" * 5000 + "]" * 5000, "[__import__('os')]"):
        with pytest.raises(InputError, match="answers: expected"):
            answers({"answers": text})


def test_numbers_in_columns_with_missing_values() -> None:
    """1912 becomes 1912.0 if another value is missing; a missing group is None, and NA is a group."""
    assert answers({"answers": 1912.0}, {"answers": "1912.0"}, {"answers": [2.5, 3.0]}) == [
        ("1912",), ("1912",), ("2.5", "3")]
    rows = [{"question": "q", "answers": "a", "group": group} for group in (float("nan"), None, "NA", 7.0)]
    assert [question.entity for question in of_rows(rows, "f", "f")] == [None, None, "f: NA", "f: 7"]


def test_the_error_for_a_missing_column_lists_the_columns() -> None:
    with pytest.raises(InputError, match=r"f, row 1: question: .* the columns here are Query, label"):
        of_rows([{"Query": "q", "label": 1}], "f", "f")
    with pytest.raises(InputError, match=r"the columns here are Question, ' question '"):
        of_rows([{"Question": "q", " question ": "q"}], "f", "f")
    for row, description in (({"text": 5}, "a number, 5"), ({"text": None}, "null"),
                      ({"text": ["a"]}, "a list, ['a']"), ({"text": " "}, "' '"), ({"Text": "a"}, "nothing")):
        with pytest.raises(InputError) as rejected:
            text_of(row, "text", "f, row 1")
        assert str(rejected.value) == (f"f, row 1: text: expected text, found {description}; the columns "
                                      f"here are {', '.join(row)}")
    assert text_of({"text": "a "}, "text", "f") == "a "
    with pytest.raises(InputError, match="f: row 1: context: expected text, found nothing; the columns "
                       "here are question, expected"):
        texts.squad([{"question": "q"}], "f")


SQUAD = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "C", "qas": [
    {"question": "Q?", "id": "1", "answers": [{"text": "A", "answer_start": 0}], "is_impossible": False},
    {"question": "R?", "id": "2", "answers": [], "is_impossible": True}]}]}]}
TRIVIA = {"Data": [{"Question": "Q?", "QuestionId": "1", "Answer": {"Value": "A", "Aliases": ["B"]}}]}


@pytest.mark.parametrize("indent", [None, 2])
def test_original_formats(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD, indent=indent))
    found, = texts.squad(read_rows(tmp_path / "squad.json"), "squad")  # the question with an answer
    assert found.prompt == "Context: C\nQuestion: Q?\nAnswer:" and found.endings == (" A",)
    assert (found.topic, found.group) == ("T", "C")
    (tmp_path / "trivia.json").write_text(json.dumps(TRIVIA, indent=indent))
    question, = of_rows(read_rows(tmp_path / "trivia.json"), "trivia", "trivia")
    assert (question.id, question.text, question.answers) == ("triviaqa-1", "Q?", ("A", "B"))


def test_questions_without_answers_are_rejected() -> None:
    row = {"title": "T", "context": "C", "question": "Q?", "answers": {"text": [], "answer_start": []}}
    with pytest.raises(InputError, match="f: expected at least one question with an answer, found none"):
        texts.squad([row], "f")
