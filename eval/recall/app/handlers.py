"""The page's request handlers: they return texts, charts and tables, and do not depend on gradio.

An InputError never becomes a traceback: its message appears in place of the result.
"""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io.files import write_atomically
from tilelli_jax.io.json_text import check_text

from ...inputs.rows import read_rows, text_of
from ...matching import is_match, is_refusal
from ...tables import as_csv
from ..predictor import KnowledgePredictor, Prediction, as_row
from . import charts, thought_seeding
from .request_queue import RequestQueue

MAX_CHARACTERS = 10_000  # of a question; bounds the memory that one request can use
DEPTHS = (0.25, 0.5, 0.75, 1.0)
MAX_ROWS = 1000  # of a batch that the page shows; the files contain all rows


def probed(queue: RequestQueue, question: str | None) -> tuple[Any, ...]:
    """Handles "Probe". Returns text, gauge, two charts, and the table of tokens by depth."""
    try:
        prediction, = queue.predict([_checked(question)])
    except InputError as error:
        return _error(error), None, None, None, None
    predictor = queue.predictor
    return (_prediction_text(prediction), charts.gauge(prediction.p, predictor.rule.thresholds),
            charts.crystallisation(prediction), charts.writes(prediction),
            _tokens_by_depth(predictor, prediction))


def generated(queue: RequestQueue, question: str | None, correct_answers: str | None,
              bounds: tuple[float, float] | None = None) -> Iterator[str]:
    """Handles "Generate". Yields Markdown as tokens arrive.

    Args:
        correct_answers: texts separated by |, compared with the answer; may be empty.
        bounds: low and high of the thought seed, as the client sent them, of any type; None for no seed.
    """
    try:
        text = _checked(question)
        for bound in bounds or ():
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                raise InputError(f"low and high: expected numbers, found {bound!r:.40}")
        thought = "" if bounds is None else thought_seeding.seed(queue.predict([text])[0].p, *bounds)
        head = f"{_fenced('Seed', thought)}\n\n" if thought else ""
        yield f"{head}…"
        correct = [answer for answer in (correct_answers or "").split("|") if answer.strip()]
        for state in queue.answer_seeded(text, thought):
            yield head + _answer_markdown(state, correct)
    except InputError as error:
        yield f"**{html.escape(str(error))}**"


def batched(queue: RequestQueue, path: str | None, files: Path,
            notify: Callable[[int, int], None]) -> tuple[Any, ...]:
    """Handles "Probe all". Returns text, table, and the paths of the files of scores.

    Args:
        path: the uploaded file of questions.
        files: directory for the files of scores.
        notify: called with the number of questions done and the total.
    """
    try:
        if not path:
            raise InputError("choose a file of questions first")
        name = Path(path).name
        try:
            questions = [text_of(row, "question", f"{name}, row {i}")
                         for i, row in enumerate(read_rows(Path(path), 10**9), 1)]
        except InputError as error:
            raise InputError(str(error).replace(path, name)) from None
        for i, question in enumerate(questions, 1):  # check all of them before the network runs
            queue.predictor.prompter(_checked(question, f"{name}, row {i}"), f"{name}, row {i}")
        predictions = queue.predict(questions, lambda n: notify(n, len(questions)))
    except InputError as error:
        return _error(error), None, None
    rows = [as_row(prediction) for prediction in predictions]
    stem = f"{Path(path).stem}-scores"
    directory = Path(tempfile.mkdtemp(dir=files))
    json_lines, csv_file = directory / f"{stem}.jsonl", directory / f"{stem}.csv"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(json_lines, text.encode())
    write_atomically(csv_file, as_csv(rows))
    verdicts = [row["verdict"] for row in rows if row["verdict"] is not None]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    more = f"; the first {MAX_ROWS} are shown" if len(rows) > MAX_ROWS else ""
    shown = [{"P(knows)": f"{row['p']:.3f}", "verdict": row["verdict"] or "–",
              "strongest write": f"layer {row['strongest_write_layer']}: {row['strongest_write']!r}",
              "question": row["question"]} for row in rows[:MAX_ROWS]]
    return (f'<div class="result">{len(rows)} questions{f": {counts}" if counts else ""}{more}.</div>',
            {"headers": list(shown[0]), "data": [list(row.values()) for row in shown]},
            [str(csv_file), str(json_lines)])


# ---------------------------------------------------------------------------------------------


def _checked(question: str | None, where: str = "the question") -> str:
    text = (question or "").strip()
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{where}: expected at most {MAX_CHARACTERS} characters, found {len(text)}")
    check_text(text, where)
    return text


def _error(error: InputError) -> str:
    return f'<div class="input-error">{html.escape(str(error))}</div>'


def _prediction_text(prediction: Prediction) -> str:
    return (f'<div class="result">Calibrated P(knows) = <b>{prediction.p:.3f}</b> → '
            f"<b>{prediction.verdict or 'no verdict: this sidecar has no thresholds'}</b> · strongest write: "
            f"layer {prediction.strongest_layer}, <code>{html.escape(repr(prediction.strongest_write))}"
            "</code></div>")


def _tokens_by_depth(predictor: KnowledgePredictor, prediction: Prediction) -> list[list[str]]:
    """Returns the logit lens's most likely next token at four depths: depth, layer, token."""
    best = prediction.outputs.crystallisation.best
    layers = [max(0, int(depth * len(best)) - 1) for depth in DEPTHS]
    depth_of_layer = {layer: depth for depth, layer in zip(DEPTHS, layers, strict=True)}  # a layer once only
    return [[f"{depth:.0%}", str(layer), repr(predictor.language.tokenizer.decode([int(best[layer])]))]
            for layer, depth in depth_of_layer.items()]


def _answer_markdown(state: thought_seeding.SeededAnswer, correct: Sequence[str]) -> str:
    parts = [_fenced("Thought", state.thought)] if state.thought else []
    if state.answer is not None and (state.answer or state.done is not None):
        parts.append(_fenced("Answer", state.answer))
    if state.done is None:
        return "\n\n".join([*parts, "…"])
    if not state.done:
        parts.append("*Cut off at the maximum length.*")
    if state.answer is None:
        parts.append("**The thought is unfinished: there is no answer.**")
    elif correct:
        parts.append(_grade(state.answer, correct))
    return "\n\n".join(parts)


def _grade(answer: str, correct: Sequence[str]) -> str:
    """Grades an answer by the studies' strict rule: one of its lines must contain a correct answer."""
    lines = answer.splitlines()
    if any(is_match(line, correct) for line in lines):
        return "**✓ correct**"
    if lines and is_refusal(lines[0]):
        mentioned = any(is_match(line, correct, "published") for line in lines)
        return "**– it abstains**" + (", but mentions a correct answer" if mentioned else "")
    return "**✗ not correct**"


def _fenced(title: str, text: str) -> str:
    """Puts text into a code fence that it cannot close: generated Markdown is shown, not rendered."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"**{title}**\n{fence}text\n{text}\n{fence}"
