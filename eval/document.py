"""Reports of headings, paragraphs, tables and figures, written as Markdown and as one HTML file.

The Markdown links to the figures' files. The HTML embeds the figures, so that it can be sent alone.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tilelli_jax.io.files import write_atomically, write_together

from .stages import RESULTS
from .tables import Row, format_cell, json_with_nulls, markdown

# Shadows at the edges beyond which a box can be scrolled: the white covers move with its content.
SCROLL_SHADOWS = """
  background-image: linear-gradient(to right, var(--background-fill-primary, #fff) 30%, transparent),
    linear-gradient(to left, var(--background-fill-primary, #fff) 30%, transparent),
    linear-gradient(to right, #0006, transparent), linear-gradient(to left, #0006, transparent);
  background-position: left, right, left, right; background-repeat: no-repeat;
  background-size: 40px 100%, 40px 100%, 12px 100%, 12px 100%;
  background-attachment: local, local, scroll, scroll"""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
td, th { padding: .2rem .6rem; text-align: left }
th { border-bottom: 2px solid #666 } td { border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
img { max-width: 100%; display: block } figcaption { color: #555; font-size: 13px }
code { background: #f3f3f3; padding: 0 .2rem } figure { margin: 1rem 0 } summary { cursor: pointer }
p, li, h1, h2, h3 { overflow-wrap: anywhere }
.scroll { overflow-x: auto; SHADOWS }
@media (max-width: 600px) { td, th { padding: .2rem .3rem } }
""".replace("SHADOWS", SCROLL_SHADOWS)


class Document:
    """A report, built from top to bottom and then written. Texts may contain `code` and **bold**."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._markdown, self._html = [f"# {title}"], [f"<h1>{_inline(title)}</h1>"]
        self._figures: dict[str, bytes] = {}

    def heading(self, text: str, level: int = 2) -> None:
        self._add(f"{'#' * level} {text}", f"<h{level}>{_inline(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        self._add(text, f"<p>{_inline(text)}</p>")

    def points(self, texts: Sequence[str]) -> None:
        """Adds a list; adds nothing without texts."""
        if texts:
            self._add("\n".join(f"- {text}" for text in texts),
                      "<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>")

    def table(self, rows: Sequence[Row], fold: str = "") -> None:
        """Adds a table of rows as in `tables.write`; adds nothing without rows.

        Args:
            fold: what the table contains; a click on this text shows the table. "" always shows it.
        """
        if not rows:
            return
        names = list(dict.fromkeys(name for row in rows for name in row))
        head = "".join(f"<th>{_inline(name)}</th>" for name in names)
        cells = [[keep_intervals(format_cell(row.get(name))) for name in names] for row in rows]
        body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>"
                       for row in cells)
        table = f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
        if fold:  # GitHub, too, folds these tags in Markdown
            self._add(f"<details><summary>{fold}</summary>\n\n{markdown(rows)}\n\n</details>",
                      f"<details><summary>{_inline(fold)}</summary>{table}</details>")
        else:
            self._add(markdown(rows), table)

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Adds a figure.

        Args:
            name: name of its PNG file, without the extension; unique in the report.
        """
        if name in self._figures:
            raise ValueError(f"figure: expected a new name, found '{name}' twice")
        content = io.BytesIO()
        figure.savefig(content, dpi=120, format="png")
        self._figures[name] = content.getvalue()
        data = base64.b64encode(content.getvalue()).decode()
        self._add(f"![{caption}](figures/{name}.png)",
                  f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
                  f"<figcaption>{_inline(caption)}</figcaption></figure>")

    def finish(self, directory: Path, results: Any, provenance: Mapping[str, Any]) -> None:
        """Adds the section "How to reproduce", then writes the report and the results.

        Args:
            directory: output directory, created if needed.
            results: tree to write as RESULTS.
            provenance: command, commit, seeds, machine and versions; see `inputs.study.provenance_rows`.
        """
        self.heading("How to reproduce")
        self.points([f"{key}: `{value}`" for key, value in provenance.items()])
        self.write(directory)
        write_atomically(directory / RESULTS, json_with_nulls(results))

    def write(self, directory: Path) -> None:
        """Writes report.md, report.html and figures/*.png: all of them or none."""
        (directory / "figures").mkdir(parents=True, exist_ok=True)
        page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}'
                f"</title><style>{STYLE}</style></head><body>\n" + "\n".join(self._html)
                + "\n</body></html>\n")
        write_together({
            **{directory / "figures" / f"{name}.png": content for name, content in self._figures.items()},
            directory / "report.md": ("\n\n".join(self._markdown) + "\n").encode(),
            directory / "report.html": page.encode()})

    def _add(self, markdown_part: str, html_part: str) -> None:
        self._markdown.append(markdown_part)
        self._html.append(html_part)


def without_markup(text: str) -> str:
    """Returns the text without the marks of `code` and **bold**, for the terminal."""
    return text.replace("`", "").replace("**", "")


def keep_intervals(text: str) -> str:
    """Returns text in which no line breaks inside an interval such as [0.551, 0.627]."""
    return re.sub(r"(\[[-+.\de]+,) (?=[-+.\de]+\])", "\\1\u00a0", text)


def _inline(text: str) -> str:
    # Both in one pass: asterisks inside code are not bold.
    return re.sub(r"`([^`]+)`|\*\*([^*]+)\*\*", _tagged, html.escape(text.replace("\\|", "|"), quote=False))


def _tagged(match: re.Match[str]) -> str:
    code, bold = match.groups()
    if code is not None:
        return f"<code>{code}</code>"
    return "<strong>" + re.sub(r"`([^`]+)`", r"<code>\1</code>", bold) + "</strong>"
