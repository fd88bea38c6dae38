"""Tables as JSON, parquet, Markdown and CSV, all of the same rows."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from tilelli_jax.eval import tables
from tilelli_jax.eval.stats import Interval

ROWS = [{"rung": "P1|cheap", "auroc": Interval(0.59, 0.551, 0.627), "C": 0.3, "n": np.int64(1500),
         "p": math.nan},
        {"rung": "P2", "auroc": Interval(0.5, 0.5, 0.5), "C": 1e-4, "n": 7, "constant": True}]


def test_write_writes_three_files(tmp_path: Path) -> None:
    tables.write(tmp_path / "probes", ROWS, "Probes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probes.json", "probes.md", "probes.parquet"]
    rows = json.loads((tmp_path / "probes.json").read_text())
    assert rows[0] == {"rung": "P1|cheap", "auroc": {"point": 0.59, "low": 0.551, "high": 0.627}, "C": 0.3,
                       "n": 1500, "p": None}
    columns = pyarrow.parquet.read_table(tmp_path / "probes.parquet").to_pydict()
    assert columns["auroc_low"] == [0.551, 0.5] and columns["constant"] == [None, True]
    assert (tmp_path / "probes.md").read_text().splitlines() == [
        "# Probes", "",
        "| rung      | auroc                | C      | n    | p   | constant |",
        "|-----------|----------------------|--------|------|-----|----------|",
        r"| P1\|cheap | 0.590 [0.551, 0.627] | 0.300  | 1500 | –   | –        |",
        "| P2        | 0.500 [0.500, 0.500] | 0.0001 | 7    | –   | yes      |"]


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0.000"), (-0.25, "−0.250"), (1234.56, "1234.6"), (7.85e6, "7.85e+06"), (-3e-7, "−3e-07"),
    (Interval(-0.5, -1.0, 0.25), "−0.500 [−1.000, 0.250]"),
    (False, "no"), ("two\nlines", "two lines")])
def test_cells(value: object, text: str) -> None:
    assert tables.format_cell(value) == text


def test_json_has_null_for_nan() -> None:
    assert json.loads(tables.json_with_nulls({"a": [math.inf, np.float64(1.5)], 3: np.arange(2)})) == {
        "a": [None, 1.5], "3": [0, 1]}


def test_control_characters_are_removed_from_tables() -> None:
    """An untrained network generates bytes that would make the report a binary file."""
    text = tables.markdown([{"answer": "a\x00b\rc\x1b[0m|\x85é\n"}])
    assert "a b c [0m\\| é" in text and all(letter.isprintable() for letter in text.replace("\n", ""))


def test_csv_contains_no_formulas() -> None:
    """Texts that a spreadsheet would run as formulas get an apostrophe; all others are unchanged."""
    formulas = ["=1+1", "+1", "-1", "@SUM(1)", "\tWho?", "\r1", "\n1", " \n1", " =1", "\u00a0=1", "\ufeff=1",
                "＝1", "＋1", "－1", "＠a", "\u200b=1+1", "\xad=1", "\u2060 \u202e@a", "\x00=1", "\u3000-1"]
    other_texts = ["a=1", "'=1", "1-2", "", "Who?", "a; b|c", "a, -1", "a\nb = 1", "; 1", "\u200b", "ä",
                   "\ud800"]
    rows = [{"text": text, "p": -0.5} for text in [*formulas, *other_texts]] + [{"text": None, "p": 1}]
    content = tables.as_csv(rows)
    assert content.startswith(b"\xef\xbb\xbf")
    cells = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert [row["text"] for row in cells] == [f"'{text}" for text in formulas] + other_texts[:-1] + ["?", ""]
    assert {row["p"] for row in cells} == {"-0.5", "1"}


@pytest.mark.parametrize(("text", "cell"), [
    (" ;=1+1", " ;'=1+1"), ("a;=1", "a;'=1"), ("a; \u200b@b", "a;' \u200b@b"), ("a|+1", "a|'+1"),
    ("a\t-1", "a\t'-1"), ("a\n=b", "a\n'=b"), ("a\r\n=b", "a\r\n'=b"), ("a\u2028=b", "a\u2028'=b"),
    ("\t=1", "'\t'=1"), ("=1;=2", "'=1;'=2")])
def test_csv_contains_no_formulas_within_a_cell(text: str, cell: str) -> None:
    """Some spreadsheets split cells at semicolons, or start a row at a line break inside quotes."""
    content = tables.as_csv([{text: text}]).decode("utf-8-sig")
    assert list(csv.reader(io.StringIO(content, newline=""))) == [[cell], [cell]]
