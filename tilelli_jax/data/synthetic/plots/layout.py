"""The format of templates, and what a plot is.

A template is text with blanks such as {hero}, which `stories.py` fills. It consists of beats. Each line of
a beat is one variant, and one of them is chosen; a lone "-" omits the beat. An empty line ends a beat, a
line "----" ends a paragraph.
"""

from __future__ import annotations

from typing import NamedTuple

Beat = tuple[str, ...]
Paragraph = tuple[Beat, ...]


class Plot(NamedTuple):
    """What happens: the pool that {topic} is drawn from, and the paragraphs of its template."""

    topics: tuple[str, ...]
    paragraphs: tuple[Paragraph, ...]


def plot(topics: tuple[str, ...], text: str) -> Plot:
    """A plot of these topics; see `paragraphs` for the text."""
    return Plot(topics, paragraphs(text))


def paragraphs(text: str) -> tuple[Paragraph, ...]:
    """Splits a text: `----` ends a paragraph, an empty line a beat; each line is a variant (-: no words)."""
    return tuple(
        tuple(tuple("" if line == "-" else line for line in beat.split("\n"))
              for beat in paragraph.strip().split("\n\n"))
        for paragraph in text.split("----"))
