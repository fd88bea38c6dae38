"""What the page draws, says and refuses at a click."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tilelli_jax.eval.recall import evaluate, info, report, thought_seeding, verdicts
from tilelli_jax.eval.recall.answering import answer_ends
from tilelli_jax.eval.recall.config import AnswersConfig
from tilelli_jax.eval.recall.predictor import KnowledgePredictor, Prediction, open_predictor
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.eval.thresholds import Thresholds

from tests.eval.recall.small import (
    AIM,
    ASKED,
    BATCHED,
    GEMMA,
    MAX_NEW,
    PROMPT,
    Place,
    sidecar_of_chance,
)
from tests.references import needs
from tilelli_jax.decoding import generate_ids
from tilelli_jax.signals.crystallisation import BY_LAYER, band

pytest.importorskip("plotly", reason="plotly (extra: app) is not installed")
from tilelli_jax.eval.recall import charts, handlers
from tilelli_jax.eval.recall.request_queue import RequestQueue

# What is drawn.

def test_the_gauge_has_the_colours_of_the_words() -> None:
    def steps(green: float | None, red: float | None) -> list[tuple[Any, str]]:
        figure = charts.gauge(0.4, Thresholds(green, red))
        indicator = figure.data[0]
        assert indicator.value == 0.4 and tuple(indicator.gauge.axis.range) == (0, 1)
        return [(step.range, step.color) for step in indicator.gauge.steps]

    red, amber, green = charts.RED, charts.AMBER, charts.GREEN
    assert steps(0.7, 0.3) == [((0, 0.3), red), ((0.3, 0.7), amber), ((0.7, 1), green)]
    assert steps(None, 0.3) == [((0, 0.3), red), ((0.3, 1), amber)]
    assert steps(0.7, None) == [((0, 0.7), amber), ((0.7, 1), green)]
    assert steps(0.3, 0.7) == [((0, 0.3), red), ((0.3, 1), green)], "where both could be said, green is"
    assert steps(None, None) == []


def test_the_charts_show_what_was_read(told: list[Prediction]) -> None:
    low, high = band(5)
    for one in told:
        features = one.read.crystallisation.by_layer
        for figure, left, right in ((charts.crystallisation(one), "a_entropy_final", "a_margin_final"),
                                    (charts.writes(one), "b_cmax_peak", "b_cmax_rel_norm")):
            for trace, name, axis in zip(figure.data, (left, right), ("y", "y2")):
                assert trace.yaxis == axis and list(trace.x) == [0, 1, 2, 3, 4]
                np.testing.assert_array_equal(np.float32(trace.y), features[:, BY_LAYER.index(name)])
            shaded = [shape for shape in figure.layout.shapes if shape.type == "rect"]
            assert [(shape.x0, shape.x1) for shape in shaded] == [(low - 0.5, high + 0.5)]
            json.loads(figure.to_json())
        star, line = charts.writes(one).data[2], charts.writes(one).layout.shapes[-1]
        peak = features[low:high + 1, BY_LAYER.index("b_cmax_peak")]
        assert star.x == (one.strongest_layer,) and star.y[0] == peak.max() and low <= star.x[0] <= high
        assert line.type == "line" and line.x0 == line.x1 == one.strongest_layer


def test_symbols_are_text_in_a_chart(told: list[Prediction]) -> None:
    figure = charts.writes(told[0]._replace(strongest_write="<b>%{y}&\n"))
    assert "&lt;b&gt;&#37;{y}&amp;\\n" in figure.data[2].hovertemplate


# What it is made to think.


# Clicks.

def test_a_probe(predictor: KnowledgePredictor, told: list[Prediction]) -> None:
    queue = RequestQueue(predictor)
    words = set()
    for question, one in zip(ASKED, told):
        text, gauge, first, second, table = handlers.probed(queue, f" {question} ")
        assert f"Calibrated P(knows) = <b>{one.p:.3f}</b> → <b>{one.verdict}</b>" in text
        assert f"layer {one.strongest_layer}, <code>" in text
        assert gauge.data[0].value == one.p
        assert [step.range[1] for step in gauge.data[0].gauge.steps] == [
            *sorted(predictor.rule.thresholds), 1.0]  # type: ignore[type-var]
        assert first.data[0].name == "entropy, nats" and second.data[0].name == "peak, nats"
        best = one.read.crystallisation.best
        assert [row[:2] for row in table] == [["25%", "0"], ["50%", "1"], ["75%", "2"], ["100%", "4"]]
        assert [row[2] for row in table] == [
            repr(predictor.language.tokenizer.decode([int(best[layer])])) for layer in (0, 1, 2, 4)]
        words.add(one.verdict)
    assert words == set(evaluate.WORDS)


@pytest.mark.parametrize(("question", "says"), [
    (None, "the question is empty"), ("  \n", "the question is empty"),
    ("w" * 200, "the question has 207 tokens with its prompt, and the network reads 192"),
    ("w" * 10_001, "the question has 10001 letters; expected 10000 at most")])
def test_what_cannot_be_asked_is_said_in_the_page(
        predictor: KnowledgePredictor, question: str | None, says: str) -> None:
    queue = RequestQueue(predictor)
    assert handlers.probed(queue, question) == (f'<div class="refused">{says}</div>', None, None, None, None)
    assert list(handlers.generated(queue, question, "Rome"))[-1] == f"**{says}**"
    assert list(handlers.generated(queue, question, "Rome", (0.4, 0.7)))[-1] == f"**{says}**"


def test_a_generation_in_the_page(predictor: KnowledgePredictor, told: list[Prediction]) -> None:
    queue = RequestQueue(predictor, MAX_NEW)
    expected = list(thought_seeding.answer_seeded(predictor, ASKED[0], most=MAX_NEW))[-1].answer
    pieces = list(handlers.generated(queue, ASKED[0], f"x| {expected} "))
    assert pieces[0] == "…" and len(pieces) > 3 and pieces[-2].endswith("…")
    assert pieces[-1] == (f"**Answer**\n```text\n{expected}\n```\n\n"
                          "*Cut off: there was no room for more.*\n\n**✓ a right answer**")
    assert list(handlers.generated(queue, ASKED[0], "x"))[-1].endswith("**✗ none of the right answers**")
    assert list(handlers.generated(queue, ASKED[0], " | "))[-1].endswith("no room for more.*")
    *_, led = handlers.generated(queue, ASKED[0], "", (0.4, 0.7))
    thought = thought_seeding.seed(told[0].p)
    assert led.startswith(f"**Seed**\n```text\n{thought}\n```")
    assert list(thought_seeding.answer_seeded(predictor, ASKED[0], thought, most=MAX_NEW))[-1].answer in led
    refused, = handlers.generated(queue, ASKED[0], "", (0.8, 0.2))
    assert refused.startswith("**low and high: expected")
    for bad in (None, "0.5", True):
        refused, = handlers.generated(queue, ASKED[0], "", (0.4, bad))  # type: ignore[arg-type]
        assert refused == f"**low and high: expected numbers, found {html.escape(repr(bad))}**"


@pytest.mark.parametrize(("spoken", "shown"), [
    (thought_seeding.SeededAnswer("hm", None, True), "**The thought is unfinished: there is no answer.**"),
    (thought_seeding.SeededAnswer("hm", None, False), "**The thought is unfinished: there is no answer.**"),
    (thought_seeding.SeededAnswer("hm", "Well.\nIt is Rome.", True), "**✓ a right answer**"),
    (thought_seeding.SeededAnswer("", "I am not sure, but Rome.", True),
     "**– it declines**, and names a right answer all the same"),
    (thought_seeding.SeededAnswer("", "I do not know.", True), "**– it declines**"),
    (thought_seeding.SeededAnswer("", "Paris", True), "**✗ none of the right answers**"),
    (thought_seeding.SeededAnswer("", "", True), "**✗ none of the right answers**")])
def test_what_is_said_of_an_answer(spoken: thought_seeding.SeededAnswer, shown: str) -> None:
    text = handlers._spoken(spoken, ["Rome"])
    assert text.endswith(f"\n\n{shown}")
    assert ("**Thought**\n```text\nhm\n```" in text) == bool(spoken.thought)
    assert ("**Answer**" in text) == (spoken.answer is not None)


def test_what_a_network_says_stays_inside_its_fence() -> None:
    text = handlers._spoken(thought_seeding.SeededAnswer("", "```\n# <b>bold</b>\n````", True), [])
    assert text == "**Answer**\n`````text\n```\n# <b>bold</b>\n````\n`````"


def test_a_batch(predictor: KnowledgePredictor, told: list[Prediction], tmp_path: Path) -> None:
    given, counted = tmp_path / "mine.jsonl", []
    given.write_text("".join(json.dumps({"question": question}) + "\n" for question in ASKED))
    (tmp_path / "files").mkdir()
    small = dataclasses.replace(predictor, reader=SimpleNamespace(batch_size=3))
    asked: list[int] = []
    small.ask = lambda questions: asked.append(len(questions)) or predictor.ask(questions)  # type: ignore
    text, table, files = handlers.batched(RequestQueue(small), str(given), tmp_path / "files",
                                      lambda n, of: counted.append((n, of)))
    assert counted == [(3, 4), (4, 4)] and asked == [3, 1]
    assert "4 questions: " in text and all(word in text for word in evaluate.WORDS)
    assert [float(row[0]) for row in table["data"]] == pytest.approx([one.p for one in told], abs=0.001)
    lines = [json.loads(line) for line in Path(files[1]).read_text().splitlines()]
    cells = list(csv.DictReader(io.StringIO(Path(files[0]).read_text("utf-8-sig"), newline="")))
    assert [Path(file).name for file in files] == ["mine-scores.csv", "mine-scores.jsonl"]
    for one, line, row in zip(told, lines, cells, strict=True):
        assert line["question"] == row["question"] == one.question and line["verdict"] == one.verdict
        assert line["p"] == pytest.approx(one.p, abs=BATCHED) and float(row["p"]) == line["p"]


@pytest.mark.parametrize(("name", "content", "says"), [
    ("q.jsonl", '{"question": "a"}\n{"question": \n', "q.jsonl, line 2: not JSON"),
    ("q.csv", "question,id\na,1\nb\n", "q.csv, line 3: expected 2 cells, as in the head"),
    ("q.csv", "question,id\na,1\n,2\n", "q.csv, row 2: question: expected text, found nothing; the "
     "columns here are id<"),
    ("q.jsonl", '{"question": "a"}\n{"asked": "b"}\n', "q.jsonl, row 2: question: expected text, found "
     "nothing; the columns here are asked<"),
    ("q.csv", "Question, question \na,b\n", "q.csv, row 1: question: expected text, found nothing; the "
     "columns here are Question, &#x27; question &#x27;<"),
    ("q.jsonl", '{"question": 5}\n', "q.jsonl, row 1: question: expected text, found a number, 5; the "),
    ("q.json", json.dumps([{"question": "a"}, {"question": "b" * 200}]),
     "q.json, row 2 has 207 tokens with its prompt, and the network reads 192"),
    ("q.json", json.dumps([{"question": "b" * 20_000}]), "q.json, row 1 has 20000 letters"),
    ("q.jsonl", "", "q.jsonl: expected rows"), ("q.parquet", "no", "q.parquet: cannot be read"),
    (None, "", "choose a file of questions first")])
def test_a_batch_that_cannot_be_asked(predictor: KnowledgePredictor, name: str | None, content: str, says: str,
                                      tmp_path: Path) -> None:
    path = tmp_path / (name or "none")
    path.write_text(content)
    text, table, files = handlers.batched(RequestQueue(predictor), str(path) if name else None, tmp_path, print)
    assert text.startswith(f'<div class="refused">{says}') and (table, files) == (None, None)
    assert str(tmp_path) not in text, "nobody knows where it was put"


def test_clicks_that_come_together_wait_for_each_other(predictor: KnowledgePredictor, told: list[Prediction]) -> None:
    """Each has its own answer, and the network is never asked two things at once."""
    inside, most = [], []
    lock = threading.Lock()

    def watched(questions: Sequence[str]) -> list[Prediction]:
        with lock:
            inside.append(1)
            most.append(len(inside))
        time.sleep(0.01)
        try:
            return predictor.ask(questions)
        finally:
            inside.pop()

    counted = dataclasses.replace(predictor)
    counted.ask = watched  # type: ignore[method-assign]
    queue = RequestQueue(counted, MAX_NEW)
    alone = [list(queue.answer_seeded(question))[-1] for question in ASKED]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(queue.ask, [question]) for question in ASKED * 3]
        spoken = [pool.submit(lambda q: list(queue.answer_seeded(q))[-1], question) for question in ASKED]
        for one, future in zip(told * 3, asked, strict=True):
            assert future.result()[0].p == one.p
        assert [future.result() for future in spoken] == alone
    assert max(most) == 1 and len(most) == 12


def test_a_click_is_heard_while_a_batch_goes_on() -> None:
    heard: list[str] = []
    started = threading.Event()

    def ask(questions: Sequence[str]) -> list[Any]:
        heard.extend(questions)
        started.set()
        time.sleep(0.1)
        return list(questions)

    slow: Any = SimpleNamespace(ask=ask, reader=SimpleNamespace(batch_size=1))
    queue = RequestQueue(slow)
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(queue.ask, ["first", "second", "third"])
        started.wait()
        assert queue.ask(["a click"]) == ["a click"]
        assert batch.result() == ["first", "second", "third"]
    assert heard == ["first", "a click", "second", "third"]


# What else there is to see.

def test_a_sidecar_without_thresholds(place: Place, tmp_path: Path) -> None:
    """One that was converted has no verdict.json."""
    bare = sidecar_of_chance(tmp_path / "sidecar")
    verdicts.write(bare, VerdictRule(prompt=PROMPT))
    predictor = open_predictor(place.model, bare)
    text, gauge, *_ = handlers.probed(RequestQueue(predictor), ASKED[0])
    assert "no thresholds" in text and gauge.data[0].gauge.steps == ()
    told = {row["what"]: row["is"] for row in info.facts(predictor, "the model", "the sidecar")}
    assert told["thresholds"] == "none: P(knows) is told, and no word" and told["learned on"] is None


def test_what_is_told_of_the_network(predictor: KnowledgePredictor, place: Place) -> None:
    told = {row["what"]: row["is"] for row in info.facts(predictor, str(place.model), str(place.sidecar))}
    green, red = predictor.rule.thresholds
    assert (told["family"], told["layers"], told["width"], told["vocabulary"]) == ("vanilla", 5, 32, 256)
    assert told["middle of the depth"] == "layers 1 to 3, counted from 0"
    assert told["learned on"] == "tiny"
    assert told["asked as"] == f"`{PROMPT.template!r}`" and told["type"] == "float32"
    assert told["thresholds"] == (
        f"likely knows from {green:.3f}; likely beyond its knowledge below {red:.3f} "
        "(a precision of 85%, reached on the questions to calibrate on, and not promised)")
    promised = dataclasses.replace(predictor.rule, red=None, aim=AIM | {"guarantee": True})
    assert info._thresholds(dataclasses.replace(predictor, rule=promised)).endswith(
        "below – (a precision of 85%, promised for new questions of the same kind with 90% confidence)")
    assert re.fullmatch(r"\*\*Memory\*\*: \d+\.\d\d GiB at most so far.*\.", info.memory_told())


def test_the_tables_are_those_of_the_study(place: Place) -> None:
    found = report.read_results(place.study)
    shown = dict(info.tables(found))
    methods, words, _, places, slices = shown.values()
    assert [row["method"] for row in methods] == ["sidecar", "negative entropy", "words"]
    assert [row["word"] for row in words] == list(evaluate.WORDS) and len(slices) == 8
    assert methods[0]["AUROC"].point == found["methods"]["sidecar"]["auroc"]["point"]
    assert [row["where"] for row in places] == [
        "within north", "within south", "north → south", "south → north"]


# A network that chats and thinks.

@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> KnowledgePredictor:
    return open_predictor(GEMMA, sidecar_of_chance(tmp_path_factory.mktemp("thinker") / "sidecar"))


@needs(GEMMA)
def test_how_a_network_is_asked_that_thinks(thinker: KnowledgePredictor) -> None:
    predictor = thinker
    question = "Who wrote it?"
    turn = "<|turn>user\nWho wrote it? Answer concisely with just the answer.<turn|>\n<|turn>model\n"
    thinking = f"<bos><|turn>system\n<|think|>\n<turn|>\n{turn}"
    assert predictor.prompter.text(question) == f"<bos>{turn}", "it is probed without"
    assert thought_seeding.asked(predictor, question) == (thinking, thought_seeding.CHANNELS[0], False, False)
    led = thought_seeding.asked(predictor, question, "a seed")
    assert led == (f"{thinking}<|channel>thought\na seed", thought_seeding.CHANNELS[0], True, False)
    told = {row["what"]: row["is"] for row in info.facts(predictor, "m", "s")}
    assert told["soft cap of the logits"] == 30 and told["asked as"].startswith("a chat, with `' Answer")
    ends = answer_ends(predictor.language, AnswersConfig())
    assert {predictor.language.tokenizer.token("<turn|>"), 1} <= set(ends)


@pytest.mark.exhaustive
@needs(GEMMA)
def test_a_network_that_thinks(thinker: KnowledgePredictor) -> None:
    predictor, question = thinker, "Who wrote it?"
    language, ends = predictor.language, answer_ends(predictor.language, AnswersConfig())
    for thought in ("", "a seed"):
        how = thought_seeding.asked(predictor, question, thought)
        made, = generate_ids(language.model, [language.encode(how.text)], max_new=30, temperature=0,
                             end_ids=ends)
        *_, last = thought_seeding.answer_seeded(predictor, question, thought, most=30)
        assert last[:2] == thought_seeding.split(language.tokenizer.decode(made.ids.tolist()), how)
        assert last.done == made.ended
    queue = RequestQueue(predictor, 30)
    text, gauge, *_, forming = handlers.probed(queue, question)
    assert "no thresholds" in text and [row[1] for row in forming] == ["2", "5", "8", "11"]
    *_, led_text = handlers.generated(queue, question, "Rome", (0.4, 0.7))
    assert thought_seeding.seed(gauge.data[0].value) in led_text and "unfinished" in led_text
