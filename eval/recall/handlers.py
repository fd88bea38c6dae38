"""What a click on the page comes to: text, charts and tables, whatever draws them.

Nothing that is asked ends in a traceback: what is refused is said where the answer would stand.
"""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.files import write_atomically
from tilelli_jax.json_text import check_text

from ..inputs.rows import read_rows, text_of
from ..matching import is_match, is_refusal
from ..tables import as_csv
from . import charts, thought_seeding
from .predictor import KnowledgePredictor, Prediction, as_row
from .request_queue import RequestQueue

LONGEST = 10_000  # letters of a question: no end to it would be an end to the memory
DEPTHS = (0.25, 0.5, 0.75, 1.0)
ROWS = 1000  # of a batch in the page; all are in its files


def probed(queue: RequestQueue, question: str | None) -> tuple[Any, ...]:
    """A click on Probe: text, gauge, two charts, and what is forming."""
    try:
        told, = queue.ask([_short(question)])
    except InputError as error:
        return _refused(error), None, None, None, None
    predictor = queue.predictor
    return (_said(told), charts.gauge(told.p, predictor.rule.thresholds), charts.crystallisation(told),
            charts.writes(told), _forming(predictor, told))


def generated(queue: RequestQueue, question: str | None, golds: str | None,
               bounds: tuple[float, float] | None = None) -> Iterator[str]:
    """A click on Generate: Markdown, as it comes.

    Args:
        bounds: low and high of the thought seed, which a client may have sent as anything; None for none.
    """
    try:
        text = _short(question)
        for bound in bounds or ():
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                raise InputError(f"low and high: expected numbers, found {bound!r:.40}")
        thought = "" if bounds is None else thought_seeding.seed(queue.ask([text])[0].p, *bounds)
        head = f"{_fenced('Seed', thought)}\n\n" if thought else ""
        yield f"{head}…"
        for spoken in queue.answer_seeded(text, thought):
            yield head + _spoken(spoken, [gold for gold in (golds or "").split("|") if gold.strip()])
    except InputError as error:
        yield f"**{html.escape(str(error))}**"


def batched(queue: RequestQueue, path: str | None, files: Path,
             notify: Callable[[int, int], None]) -> tuple[Any, ...]:
    """A click on Probe them all: text, table, and the files of the scores."""
    try:
        if not path:
            raise InputError("choose a file of questions first")
        name = Path(path).name
        try:
            questions = [text_of(row, "question", f"{name}, row {i}")
                         for i, row in enumerate(read_rows(Path(path), 10**9), 1)]
        except InputError as error:
            raise InputError(str(error).replace(path, name)) from None
        for i, question in enumerate(questions, 1):  # all of them, before any is read
            queue.predictor.prompter(_short(question, f"{name}, row {i}"), f"{name}, row {i}")
        found = [as_row(told) for told in queue.ask(questions, lambda n: notify(n, len(questions)))]
    except InputError as error:
        return _refused(error), None, None
    stem = f"{Path(path).stem}-scores"
    room = Path(tempfile.mkdtemp(dir=files))
    lines, cells = room / f"{stem}.jsonl", room / f"{stem}.csv"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    write_atomically(lines, text.encode())
    write_atomically(cells, as_csv(found))
    words = [row["verdict"] for row in found if row["verdict"] is not None]
    counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    more = f"; the first {ROWS} are shown" if len(found) > ROWS else ""
    shown = [{"P(knows)": f"{row['p']:.3f}", "verdict": row["verdict"] or "–",
              "strongest write": f"layer {row['strongest_write_layer']}: {row['strongest_write']!r}",
              "question": row["question"]} for row in found[:ROWS]]
    return (f'<div class="said">{len(found)} questions{f": {counted}" if counted else ""}{more}.</div>',
            {"headers": list(shown[0]), "data": [list(row.values()) for row in shown]},
            [str(cells), str(lines)])


# ---------------------------------------------------------------------------------------------


def _short(question: str | None, where: str = "the question") -> str:
    text = (question or "").strip()
    if len(text) > LONGEST:
        raise InputError(f"{where} has {len(text)} letters; expected {LONGEST} at most")
    check_text(text, where)
    return text


def _refused(error: InputError) -> str:
    return f'<div class="refused">{html.escape(str(error))}</div>'


def _said(told: Prediction) -> str:
    return (f'<div class="said">Calibrated P(knows) = <b>{told.p:.3f}</b> → '
            f"<b>{told.verdict or 'no thresholds, and so no word'}</b> · strongest write: layer "
            f"{told.strongest_layer}, <code>{html.escape(repr(told.strongest_write))}</code></div>")


def _forming(predictor: KnowledgePredictor, told: Prediction) -> list[list[str]]:
    """The likeliest next token in the lens, at four depths."""
    best = told.read.crystallisation.best
    layers = [max(0, int(depth * len(best)) - 1) for depth in DEPTHS]
    shown = {layer: depth for depth, layer in zip(DEPTHS, layers, strict=True)}  # of few layers, each once
    return [[f"{depth:.0%}", str(layer), repr(predictor.language.tokenizer.decode([int(best[layer])]))]
            for layer, depth in shown.items()]


def _spoken(spoken: thought_seeding.SeededAnswer, golds: Sequence[str]) -> str:
    parts = [_fenced("Thought", spoken.thought)] if spoken.thought else []
    if spoken.answer is not None and (spoken.answer or spoken.done is not None):
        parts.append(_fenced("Answer", spoken.answer))
    if spoken.done is None:
        return "\n\n".join([*parts, "…"])
    if not spoken.done:
        parts.append("*Cut off: there was no room for more.*")
    if spoken.answer is None:
        parts.append("**The thought is unfinished: there is no answer.**")
    elif golds:
        parts.append(_matched(spoken.answer, golds))
    return "\n\n".join(parts)


def _matched(answer: str, golds: Sequence[str]) -> str:
    """A line of the answer has to have a right one in it, by the rule of the studies."""
    lines = answer.splitlines()
    if any(is_match(line, golds) for line in lines):
        return "**✓ a right answer**"
    if lines and is_refusal(lines[0]):
        named = any(is_match(line, golds, "recall") for line in lines)
        return "**– it declines**" + (", and names a right answer all the same" if named else "")
    return "**✗ none of the right answers**"


def _fenced(title: str, text: str) -> str:
    """Whatever a network says is shown, and never followed."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"**{title}**\n{fence}text\n{text}\n{fence}"
