"""Reports: Markdown and HTML have the same content, and no text becomes an HTML tag."""

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
from tilelli_jax.eval.document import Document
from tilelli_jax.eval.stats import Interval

ROWS = [{"rung": "P1 <b>", "AUROC": Interval(0.59, 0.551, 0.627), "n": 12},
        {"rung": "a|b & c", "note": None, "n": 7, "sure": True}]


class Page(HTMLParser):
    """Contents of an HTML page: text by tag, images and tags. Asserts that tags are closed in order."""

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

    def texts_in(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags and text]


def figure(height: float = 1) -> Figure:
    drawn = Figure(figsize=(2, height))
    drawn.subplots().plot([0, 1])
    return drawn


def write_and_read(report: Document, path: Path) -> tuple[str, Page]:
    report.write(path)
    return (path / "report.md").read_text("utf-8"), Page((path / "report.html").read_text("utf-8"))


def test_markdown_and_html_have_the_same_content(tmp_path: Path) -> None:
    report = Document("A study")
    report.heading("Ladder")
    report.heading("Layer 3", 3)
    report.paragraph("Run by `python -m x`: **no** difference.")
    report.points(["one", "`two`"])
    report.table(ROWS)
    report.figure("ladder-3", figure(), "AUROC of **each** rung")
    report.figure("effects", figure(2), "Changes")
    text, page = write_and_read(report, tmp_path / "new" / "out")
    assert sorted(str(file.relative_to(tmp_path / "new" / "out")) for file in tmp_path.rglob("*.*")) == [
        "figures/effects.png", "figures/ladder-3.png", "report.html", "report.md"]
    assert text == ("# A study\n\n## Ladder\n\n### Layer 3\n\nRun by `python -m x`: **no** difference.\n\n"
                    f"- one\n- `two`\n\n{tables.markdown(ROWS)}\n\n"
                    "![AUROC of **each** rung](figures/ladder-3.png)\n\n![Changes](figures/effects.png)\n")
    assert page.texts_in("title") == page.texts_in("h1") == ["A study"]
    assert page.texts_in("h2") == ["Ladder"] and page.texts_in("h3") == ["Layer 3"]
    assert page.texts_in("p", "code", "strong", "li", "figcaption") == [
        "Run by ", "python -m x", ": ", "no", " difference.", "one", "two", "AUROC of ", "each", " rung",
        "Changes"]
    assert page.texts_in("th") == ["rung", "AUROC", "n", "note", "sure"]
    assert page.texts_in("td") == ["P1 <b>", "0.590 [0.551,\u00a00.627]", "12", "–", "–",
                                   "a|b & c", "–", "7", "–", "yes"]
    for image, name, size in zip(page.images, ("ladder-3", "effects"), (120, 240), strict=True):
        content = (tmp_path / "new" / "out" / "figures" / f"{name}.png").read_bytes()
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data) == content
        assert matplotlib.image.imread(io.BytesIO(content)).shape[:2] == (size, 240)


def test_no_text_becomes_a_tag(tmp_path: Path) -> None:
    bad = '"><script>alert("&amp;")</script>'
    report = Document(bad)
    report.heading(bad)
    report.paragraph(bad)
    report.points([bad, f"`{bad}`", f"**{bad}**"])
    report.table([{bad: bad}])
    report.figure("x", figure(), bad)
    _, page = write_and_read(report, tmp_path)
    assert "script" not in page.tags
    texts = page.texts_in("title", "h1", "h2", "p", "li", "code", "strong", "th", "td", "figcaption")
    assert texts == [bad] * 10
    assert page.images[0]["alt"] == bad


@given(st.text('ab<>&"\'`*;#| ', max_size=20))
def test_a_page_is_well_formed_for_any_text(text: str) -> None:
    report = Document("x")
    report.paragraph(text)
    page = Page(report._html[-1])
    assert page.tags <= {"p", "code", "strong"}
    if not set("`*") & set(text):
        assert "".join(page.texts_in("p")) == text


def test_code_and_bold() -> None:
    report = Document("x")
    report.paragraph("`a**` and `b**`, **c `d` e**")
    assert report._html[-1] == ("<p><code>a**</code> and <code>b**</code>, "
                                "<strong>c <code>d</code> e</strong></p>")


def test_empty_tables_and_lists_are_omitted(tmp_path: Path) -> None:
    report = Document("x")
    report.table([])
    report.points([])
    text, page = write_and_read(report, tmp_path)
    assert text == "# x\n" and not page.tags & {"table", "ul"}


def test_figure_names_are_unique() -> None:
    report = Document("x")
    report.figure("a", figure(), "one")
    with pytest.raises(ValueError, match="figure: expected a new name, found 'a' twice"):
        report.figure("a", figure(), "other")


def test_a_report_is_overwritten(tmp_path: Path) -> None:
    for paragraph in ("first", "second"):
        report = Document("x")
        report.paragraph(paragraph)
        text, page = write_and_read(report, tmp_path)
        assert text == f"# x\n\n{paragraph}\n" and page.texts_in("p") == [paragraph]


def test_a_report_ends_with_how_to_reproduce_it(tmp_path: Path) -> None:
    report = Document("x")
    report.finish(tmp_path, {"n": 1}, {"command": "python -m x", "seed": "0"})
    assert (tmp_path / "report.md").read_text().endswith(
        "## How to reproduce\n\n- command: `python -m x`\n- seed: `0`\n")
    assert (tmp_path / "results.json").is_file()
