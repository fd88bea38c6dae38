"""Reports: the same in Markdown and HTML, where nothing that is said becomes a tag."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tilelli_jax.eval import tables
from tilelli_jax.eval.report import Report
from tilelli_jax.eval.stats import Interval

ROWS = [{"rung": "P1 <b>", "AUROC": Interval(0.59, 0.551, 0.627), "n": 12},
        {"rung": "a|b & c", "note": None, "n": 7, "sure": True}]


class Page(HTMLParser):
    """What a page holds: its text by tag, its images, and whether every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def of(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags and text]


def figure(height: float = 1) -> Figure:
    found = Figure(figsize=(2, height))
    found.subplots().plot([0, 1])
    return found


def written(report: Report, path: Path) -> tuple[str, Page]:
    report.write(path)
    return (path / "report.md").read_text("utf-8"), Page((path / "report.html").read_text("utf-8"))


def test_both_say_the_same(tmp_path: Path) -> None:
    report = Report("A study")
    report.heading("Ladder")
    report.heading("Layer 3", 3)
    report.paragraph("Run by `python -m x`: **no** difference.")
    report.points(["one", "`two`"])
    report.table(ROWS)
    report.figure("ladder-3", figure(), "AUROC of **each** rung")
    report.figure("effects", figure(2), "Changes")
    told, page = written(report, tmp_path / "new" / "out")
    assert sorted(str(file.relative_to(tmp_path / "new" / "out")) for file in tmp_path.rglob("*.*")) == [
        "figures/effects.png", "figures/ladder-3.png", "report.html", "report.md"]
    assert told == ("# A study\n\n## Ladder\n\n### Layer 3\n\nRun by `python -m x`: **no** difference.\n\n"
                    f"- one\n- `two`\n\n{tables.markdown(ROWS)}\n\n"
                    "![AUROC of **each** rung](figures/ladder-3.png)\n\n![Changes](figures/effects.png)\n")
    assert page.of("title") == page.of("h1") == ["A study"]
    assert page.of("h2") == ["Ladder"] and page.of("h3") == ["Layer 3"]
    assert page.of("p", "code", "strong", "li", "figcaption") == [
        "Run by ", "python -m x", ": ", "no", " difference.", "one", "two", "AUROC of ", "each", " rung",
        "Changes"]
    assert page.of("th") == ["rung", "AUROC", "n", "note", "sure"]
    assert page.of("td") == ["P1 <b>", "0.590 [0.551, 0.627]", "12", "–", "–",
                             "a|b & c", "–", "7", "–", "yes"]
    for image, name, size in zip(page.images, ("ladder-3", "effects"), (120, 240), strict=True):
        content = (tmp_path / "new" / "out" / "figures" / f"{name}.png").read_bytes()
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data) == content
        assert matplotlib.image.imread(io.BytesIO(content)).shape[:2] == (size, 240)


def test_nothing_that_is_said_becomes_a_tag(tmp_path: Path) -> None:
    bad = '"><script>alert("&amp;")</script>'
    report = Report(bad)
    report.heading(bad)
    report.paragraph(bad)
    report.points([bad, f"`{bad}`", f"**{bad}**"])
    report.table([{bad: bad}])
    report.figure("x", figure(), bad)
    _, page = written(report, tmp_path)
    assert "script" not in page.tags
    assert page.of("title", "h1", "h2", "p", "li", "code", "strong", "th", "td", "figcaption") == [bad] * 10
    assert page.images[0]["alt"] == bad


@given(st.text('ab<>&"\'`*;#| ', max_size=20))
def test_a_page_is_well_formed_whatever_is_said(text: str) -> None:
    report = Report("x")
    report.paragraph(text)
    page = Page(report._html[-1])
    assert page.tags <= {"p", "code", "strong"}
    if not set("`*") & set(text):
        assert "".join(page.of("p")) == text


def test_code_and_stress() -> None:
    report = Report("x")
    report.paragraph("`a**` and `b**`, **c `d` e**")
    assert report._html[-1] == ("<p><code>a**</code> and <code>b**</code>, "
                                "<strong>c <code>d</code> e</strong></p>")


def test_nothing_of_nothing(tmp_path: Path) -> None:
    report = Report("x")
    report.table([])
    report.points([])
    told, page = written(report, tmp_path)
    assert told == "# x\n" and not page.tags & {"table", "ul"}


def test_two_figures_of_one_name() -> None:
    report = Report("x")
    report.figure("a", figure(), "one")
    with pytest.raises(ValueError, match="figure: there are two called 'a'"):
        report.figure("a", figure(), "other")


def test_a_report_is_written_anew(tmp_path: Path) -> None:
    for text in ("first", "second"):
        report = Report("x")
        report.paragraph(text)
        told, page = written(report, tmp_path)
        assert told == f"# x\n\n{text}\n" and page.of("p") == [text]
