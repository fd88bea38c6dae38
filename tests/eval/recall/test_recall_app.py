"""The page of a network and its sidecar: what it draws, says and refuses, and itself in a browser."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import eval.recall
from eval.calibration import Platt
from eval.inputs.networks import NetworkConfig, contents
from eval.recall import evaluate, report, thoughts, verdicts
from eval.recall.__main__ import main
from eval.recall.answering import answer, answer_ends, said
from eval.recall.config import AnswersConfig, PromptConfig, RecallConfig
from eval.recall.knower import Knower, Told, open_knower
from eval.recall.prompting import Prompter
from eval.recall.scores import Methods, Scores
from eval.recall.table import Table
from eval.recall.verdicts import Judge
from eval.stages import write_result
from eval.thresholds import Thresholds
from tests.references import STORED, needs
from tests.refusals import assert_one_line
from tests.restated.random_weights import random_network
from tests.restated.reciter import reciter
from tilelli_jax import store
from tilelli_jax.decoding import generate_ids
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.language import Bytes, Language
from tilelli_jax.models.arrays import outline
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.signals.crystallisation import BY_LAYER, OVERALL, band

app = pytest.importorskip("eval.recall.app", reason="gradio and plotly (extra: app) are not installed",
                          exc_type=ImportError)
charts = pytest.importorskip("eval.recall.charts")
GEMMA = STORED / "recall_cases" / "tiny_gemma4_with_tokenizer"
PROMPT = PromptConfig(template="Q: {question}\nA: ", instruction="")
VANILLA = VanillaConfig(d_model=32, n_layers=5, max_seq_len=192, n_heads=2, dense_expand=2)
AIM = {"precision": 0.85, "guarantee": False, "confidence": 0.9}
ASKED = ["Where does Mira Holt live?", "Who has written all of this?", "What colour is the deep sea?",
         "How many are there, of what?"]  # of lengths for which one program is compiled
MOST_NEW = 24
PATIENCE = 120_000  # ms that a browser waits for anything: a busy machine compiles for many seconds
BATCHED = 1e-4  # of P, together or one by one; measured: 1e-6


def sidecar_of_chance(path: Path) -> Path:
    config = SidecarConfig(d_hidden=8, features=BY_LAYER, globals=OVERALL)
    rng = np.random.default_rng(0)
    arrays = {name: (np.exp if name.endswith(("scale", "temperature")) else np.asarray)(
        0.4 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in outline(store.FAMILIES["lrd"][1], config).items()}
    store.save(store.from_arrays(config, arrays), path)
    return path


class Place(NamedTuple):
    """Where a network, its sidecar and the results of a study lie."""

    model: Path
    sidecar: Path
    study: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A network with random weights that says letters only; thresholds between what it is asked."""
    path = tmp_path_factory.mktemp("app")
    arrays = random_network(VANILLA, 0)[1]
    silent = [byte for byte in range(256) if not chr(byte).isascii() or not chr(byte).isalpha()]
    arrays["unembed.kernel"][:, silent] = 0
    store.save(store.from_arrays(VANILLA, arrays), path / "model")
    sidecar = sidecar_of_chance(path / "sidecar")
    verdicts.write(sidecar, Judge(prompt=PROMPT))
    p = np.sort([told.p for told in open_knower(path / "model", sidecar).ask(ASKED)])
    assert (np.diff(p) > 1e-4).all(), "questions that are told apart"
    # Spread over (0, 1), the first below red and the last above green.
    scores = np.log(p / (1 - p))
    slope = float(4 / (scores[-1] - scores[0]))
    verdicts.write(sidecar, Judge(
        Platt(slope, -slope * float(scores.mean())), float(p[-2:].mean()), float(p[:2].mean()), AIM,
        {"name": "tiny", "contents": contents(path / "model"), "n_layers": 5}, PROMPT))
    a_study(path)
    return Place(path / "model", sidecar, path)


def a_study(out: Path) -> dict[str, Any]:
    """results.json and the rest of a report, by the study's own functions, of made-up scores."""
    rng = np.random.default_rng(0)
    n = 240
    known = rng.integers(0, 2, n)
    part = np.array(["train", "validate", "calibrate", "test"])[np.arange(n) % 4]
    table = Table(rng.random((n, 5, 12), np.float32), rng.random((n, 10), np.float32),
                  rng.random((n, 5, 3), np.float32), None, None, known, rng.random(n) < 0.1, part,
                  np.arange(n), np.array([f"question {i}" for i in range(n)]),
                  np.array(["north", "south"])[rng.integers(0, 2, n)], rng.random(n) * 1000)
    said: dict[str | None, Methods] = {None: {}, "north": {}, "south": {}}
    for methods in said.values():
        for method, signal in (("sidecar", 2.0), ("negative entropy", 1.0), ("words", 0.1)):
            score = signal * known + rng.standard_normal((1, n))
            methods[method] = Scores(score, 1 / (1 + np.exp(-score)))
    judge, made = Judge(green=0.9, red=0.3, aim=AIM), out / "made"
    for stage in ("signals", "answers", "questions", "fit", "verdict", "evaluation"):
        (made / stage).mkdir(parents=True)
    write_result(made / "fit", {"methods": {"sidecar": {}, "negative entropy": {}, "words": {}}, "seeds": [0],
                                "run": 0, "calibrated_on": "calibrate"})
    verdicts.write(made / "verdict", judge)
    write_result(made / "evaluation", evaluate.evaluate(table, said, 0, judge, 400))
    stand_in: Any = SimpleNamespace(
        config=RecallConfig(network=NetworkConfig(path="tiny")), out=out,
        **{name: made / stage for name, stage in (
            ("signals", "signals"), ("answers", "answers"), ("build", "questions"), ("fitted", "fit"),
            ("verdict", "verdict"), ("evaluation", "evaluation"))})
    return report.write(stand_in, "a study of nothing", {"command": "python -m eval.recall"})


@pytest.fixture(scope="module")
def knower(place: Place) -> Knower:
    return open_knower(place.model, place.sidecar)


@pytest.fixture(scope="module")
def told(knower: Knower) -> list[Told]:
    """Of ASKED, one by one."""
    return [knower.ask([question])[0] for question in ASKED]


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


def test_the_charts_show_what_was_read(told: list[Told]) -> None:
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


def test_symbols_are_text_in_a_chart(told: list[Told]) -> None:
    figure = charts.writes(told[0]._replace(strongest_write="<b>%{y}&\n"))
    assert "&lt;b&gt;&#37;{y}&amp;\\n" in figure.data[2].hovertemplate


# What it is made to think.

@pytest.mark.parametrize(("p", "percent", "does"), [
    (0.0, "0%", "not guess"), (0.3949, "39%", "not guess"), (0.4, "40%", "unsure"),
    (0.695, "70%", "unsure"), (0.7, "70%", "directly"), (1.0, "100%", "directly")])
def test_a_seed_says_how_likely_and_what_to_do(p: float, percent: str, does: str) -> None:
    text = thoughts.seed(p)
    assert f" {percent} " in text and does in text and text.startswith("An inner probe gives me ")
    assert sum(word in text for word in ("not guess", "unsure", "directly")) == 1 and "\n" not in text


def test_the_bounds_of_a_seed() -> None:
    assert thoughts.seed(0.5, 0.6, 0.9) == thoughts.seed(0.5, 1, 1)
    assert thoughts.seed(0.5, 0.5, 0.5) == thoughts.seed(0.5, 0, 0)
    for low, high in ((0.7, 0.4), (-0.1, 0.4), (0.5, 1.5), (float("nan"), 0.5)):
        with pytest.raises(InputError, match="low and high: expected chances, low not above high"):
            thoughts.seed(0.5, low, high)


def chatting(symbols: Sequence[str], end: str = "") -> Any:
    """As much of a knower as is asked how to ask: a chat whose tokenizer knows some symbols."""
    def text(question: str, *, thinking: bool = False) -> str:
        return f"[{'think' if thinking else 'do not'}]{question}[you]{end}"
    tokenizer = SimpleNamespace(symbol={symbol: i for i, symbol in enumerate(symbols)}.get)
    return SimpleNamespace(
        language=SimpleNamespace(tokenizer=tokenizer),
        prompter=SimpleNamespace(config=PromptConfig(), text=text))


def test_how_a_question_is_put() -> None:
    gemma, other = chatting(["<|channel>", "<channel|>"]), chatting(["<think>", "</think>"], "<think>\n")
    mute, half = chatting([]), chatting(["<think>"])
    channel, second = thoughts.CHANNELS
    assert thoughts.asked(gemma, "q") == ("[think]q[you]", channel, False, False)
    assert thoughts.asked(gemma, "q", "t") == ("[think]q[you]<|channel>thought\nt", channel, True, False)
    assert thoughts.asked(other, "q") == ("[think]q[you]<think>\n", second, True, False)
    assert thoughts.asked(other, "q", "t") == ("[think]q[you]<think>\nt", second, True, False)
    for one in (mute, half):
        assert thoughts.asked(one, "q") == ("[think]q[you]", None, False, False)
        assert thoughts.asked(one, "q", "t") == ("[think]q[you]t\n", None, False, False)


OPEN = thoughts.Asked("…", thoughts.CHANNELS[0], True, False)
CLOSED = OPEN._replace(begun=False)


@pytest.mark.parametrize(("how", "made", "thought", "found"), [
    (OPEN, " and so.<channel|>Rome<turn|>", "and so.", "Rome"),
    (OPEN, " and so", "and so", None),
    (OPEN, "<channel|>", "", ""),
    (OPEN, "a<channel|>b<|channel>thought\nc<channel|>d", "abc", "d"),
    (OPEN, "a<channel|>b<|channel>thought\nc", "abc", None),
    (CLOSED, "Rome\nof course", "", "Rome\nof course"),
    (CLOSED, "<|channel>thought\nhm<channel|>\nRome", "hm", "Rome"),
    (CLOSED, "<|channel>thought\nhm", "hm", None),
    (CLOSED._replace(channel=thoughts.CHANNELS[1]), "<think>\nhm</think>\n\nRome<|im_end|>", "hm",
     "Rome"),
    (CLOSED._replace(channel=None), "<|turn>Rome", "", "Rome"),
    (CLOSED._replace(channel=None, first_line=True), "\n Rome \nQ: who", "", "Rome"),
])
def test_the_answer_is_what_follows_the_last_thought(how: thoughts.Asked, made: str, thought: str,
                                                     found: str | None) -> None:
    assert thoughts.split(made, how) == (thought, found)


def reciting(answer: str, **changed: Any) -> Any:
    """As much of a knower as is asked for an answer, the same after any question of two letters."""
    before = "Q: hi\nA: "
    language = Language(reciter(before.encode() + answer.encode(), **changed), Bytes())
    return SimpleNamespace(language=language, prompter=Prompter(language, PROMPT))


def test_an_answer_comes_in_pieces_and_ends_with_its_line() -> None:
    one = reciting("Grüße aus Rom\nQ: and more")
    pieces = list(thoughts.speak(one, "hi", chunk=3))
    assert pieces[-1] == ("", "Grüße aus Rom", True) and len(pieces) > 4
    assert [piece.done for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    for piece in pieces:
        assert "Grüße aus Rom".startswith(piece.answer or ""), "no half a character"
    assert list(thoughts.speak(one, "hi", most=4))[-1] == ("", "Grü", False)
    # A thought is a line before the prompt.
    assert thoughts.asked(one, "hi", "a seed").text == "a seed\nQ: hi\nA: "
    whole = b"a seed\nQ: hi\nA: Rom\nand"
    one.language = Language(reciter(whole), Bytes())
    assert list(thoughts.speak(one, "hi", "a seed"))[-1] == ("", "Rom", True)


def test_what_leaves_no_room_is_refused_at_once() -> None:
    one = reciting("Rome\n", size=32)
    with pytest.raises(InputError, match="the question is empty"):
        thoughts.speak(one, "  ")
    with pytest.raises(InputError, match="has 49 symbols with its prompt, and the network reads 32"):
        thoughts.speak(one, "h" * 42)
    with pytest.raises(InputError, match=r"34 symbols with its prompt and the thought, .* no room"):
        thoughts.speak(one, "hi", "t" * 24)
    assert list(thoughts.speak(one, "h" * 24))[-1].done is False, "room for one"


def test_the_baseline_is_the_answer_of_a_study(knower: Knower) -> None:
    """Greedy, from the same prompt, to the same ends."""
    options = AnswersConfig(max_new=MOST_NEW)
    ids = answer(knower.language, [knower.prompter(question) for question in ASKED], options)
    expected = [said(knower.language.tokenizer.decode(row.tolist())) for row in ids]
    found = [list(thoughts.speak(knower, question, most=MOST_NEW))[-1].answer for question in ASKED]
    assert found == expected and all(found) and len(set(found)) > 1


# Clicks.

def test_a_probe(knower: Knower, told: list[Told]) -> None:
    desk = app.Desk(knower)
    words = set()
    for question, one in zip(ASKED, told):
        text, gauge, first, second, table = app._probed(desk, f" {question} ")
        assert f"Calibrated P(knows) = <b>{one.p:.3f}</b> → <b>{one.verdict}</b>" in text
        assert f"layer {one.strongest_layer}, <code>" in text
        assert gauge.data[0].value == one.p
        assert [step.range[1] for step in gauge.data[0].gauge.steps] == [
            *sorted(knower.judge.thresholds), 1.0]  # type: ignore[type-var]
        assert first.data[0].name == "entropy, nats" and second.data[0].name == "peak, nats"
        best = one.read.crystallisation.best
        assert [row[:2] for row in table] == [["25%", "0"], ["50%", "1"], ["75%", "2"], ["100%", "4"]]
        assert [row[2] for row in table] == [
            repr(knower.language.tokenizer.decode([int(best[layer])])) for layer in (0, 1, 2, 4)]
        words.add(one.verdict)
    assert words == set(evaluate.WORDS)


@pytest.mark.parametrize(("question", "says"), [
    (None, "the question is empty"), ("  \n", "the question is empty"),
    ("w" * 200, "the question has 207 symbols with its prompt, and the network reads 192"),
    ("w" * 10_001, "the question has 10001 letters; expected 10000 at most")])
def test_what_cannot_be_asked_is_said_in_the_page(
        knower: Knower, question: str | None, says: str) -> None:
    desk = app.Desk(knower)
    assert app._probed(desk, question) == (f'<div class="refused">{says}</div>', None, None, None, None)
    assert list(app._generated(desk, question, "Rome"))[-1] == f"**{says}**"
    assert list(app._generated(desk, question, "Rome", (0.4, 0.7)))[-1] == f"**{says}**"


def test_a_generation_in_the_page(knower: Knower, told: list[Told]) -> None:
    desk = app.Desk(knower, MOST_NEW)
    expected = list(thoughts.speak(knower, ASKED[0], most=MOST_NEW))[-1].answer
    pieces = list(app._generated(desk, ASKED[0], f"x| {expected} "))
    assert pieces[0] == "…" and len(pieces) > 3 and pieces[-2].endswith("…")
    assert pieces[-1] == (f"**Answer**\n```text\n{expected}\n```\n\n"
                          "*Cut off: there was no room for more.*\n\n**✓ a right answer**")
    assert list(app._generated(desk, ASKED[0], "x"))[-1].endswith("**✗ none of the right answers**")
    assert list(app._generated(desk, ASKED[0], " | "))[-1].endswith("no room for more.*")
    *_, led = app._generated(desk, ASKED[0], "", (0.4, 0.7))
    thought = thoughts.seed(told[0].p)
    assert led.startswith(f"**Seed**\n```text\n{thought}\n```")
    assert list(thoughts.speak(knower, ASKED[0], thought, most=MOST_NEW))[-1].answer in led
    refused, = app._generated(desk, ASKED[0], "", (0.8, 0.2))
    assert refused.startswith("**low and high: expected")


@pytest.mark.parametrize(("spoken", "shown"), [
    (thoughts.Spoken("hm", None, True), "**The thought is unfinished: there is no answer.**"),
    (thoughts.Spoken("hm", None, False), "**The thought is unfinished: there is no answer.**"),
    (thoughts.Spoken("hm", "Well.\nIt is Rome.", True), "**✓ a right answer**"),
    (thoughts.Spoken("", "I am not sure, but Rome.", True),
     "**– it declines**, and names a right answer all the same"),
    (thoughts.Spoken("", "I do not know.", True), "**– it declines**"),
    (thoughts.Spoken("", "Paris", True), "**✗ none of the right answers**"),
    (thoughts.Spoken("", "", True), "**✗ none of the right answers**")])
def test_what_is_said_of_an_answer(spoken: thoughts.Spoken, shown: str) -> None:
    text = app._spoken(spoken, ["Rome"])
    assert text.endswith(f"\n\n{shown}")
    assert ("**Thought**\n```text\nhm\n```" in text) == bool(spoken.thought)
    assert ("**Answer**" in text) == (spoken.answer is not None)


def test_what_a_network_says_stays_inside_its_fence() -> None:
    text = app._spoken(thoughts.Spoken("", "```\n# <b>bold</b>\n````", True), [])
    assert text == "**Answer**\n`````text\n```\n# <b>bold</b>\n````\n`````"


def test_a_batch(knower: Knower, told: list[Told], tmp_path: Path) -> None:
    given, counted = tmp_path / "mine.jsonl", []
    given.write_text("".join(json.dumps({"question": question}) + "\n" for question in ASKED))
    (tmp_path / "files").mkdir()
    small = dataclasses.replace(knower, reader=SimpleNamespace(batch_size=3))
    asked: list[int] = []
    small.ask = lambda questions: asked.append(len(questions)) or knower.ask(questions)  # type: ignore
    text, table, files = app._batched(app.Desk(small), str(given), tmp_path / "files",
                                      lambda n, of: counted.append((n, of)))
    assert counted == [(3, 4), (4, 4)] and asked == [3, 1]
    assert "4 questions: " in text and all(word in text for word in evaluate.WORDS)
    assert [float(row[0]) for row in table["data"]] == pytest.approx([one.p for one in told], abs=0.001)
    lines = [json.loads(line) for line in Path(files[1]).read_text().splitlines()]
    cells = list(csv.DictReader(io.StringIO(Path(files[0]).read_text(), newline="")))
    assert [Path(file).name for file in files] == ["mine-scores.csv", "mine-scores.jsonl"]
    for one, line, row in zip(told, lines, cells, strict=True):
        assert line["question"] == row["question"] == one.question and line["verdict"] == one.verdict
        assert line["p"] == pytest.approx(one.p, abs=BATCHED) and float(row["p"]) == line["p"]


@pytest.mark.parametrize(("name", "content", "says"), [
    ("q.jsonl", '{"question": "a"}\n{"question": \n', "q.jsonl, line 2: not JSON"),
    ("q.csv", "question,id\na,1\nb\n", "q.csv, line 3: expected 2 cells, as in the head"),
    ("q.csv", "question,id\na,1\n,2\n", "q.csv, row 2: question: expected text, found &#x27;nothing"),
    ("q.jsonl", '{"question": "a"}\n{"asked": "b"}\n', "q.jsonl, row 2: question: expected text"),
    ("q.json", json.dumps([{"question": "a"}, {"question": "b" * 200}]),
     "q.json, row 2 has 207 symbols with its prompt, and the network reads 192"),
    ("q.json", json.dumps([{"question": "b" * 20_000}]), "q.json, row 1 has 20000 letters"),
    ("q.jsonl", "", "q.jsonl: expected rows"), ("q.parquet", "no", "q.parquet: cannot be read"),
    (None, "", "choose a file of questions first")])
def test_a_batch_that_cannot_be_asked(knower: Knower, name: str | None, content: str, says: str,
                                      tmp_path: Path) -> None:
    path = tmp_path / (name or "none")
    path.write_text(content)
    text, table, files = app._batched(app.Desk(knower), str(path) if name else None, tmp_path, print)
    assert text.startswith(f'<div class="refused">{says}') and (table, files) == (None, None)
    assert str(tmp_path) not in text, "nobody knows where it was put"


def test_clicks_that_come_together_wait_for_each_other(knower: Knower, told: list[Told]) -> None:
    """Each has its own answer, and the network is never asked two things at once."""
    inside, most = [], []
    lock = threading.Lock()

    def watched(questions: Sequence[str]) -> list[Told]:
        with lock:
            inside.append(1)
            most.append(len(inside))
        time.sleep(0.01)
        try:
            return knower.ask(questions)
        finally:
            inside.pop()

    counted = dataclasses.replace(knower)
    counted.ask = watched  # type: ignore[method-assign]
    desk = app.Desk(counted, MOST_NEW)
    alone = [list(desk.speak(question))[-1] for question in ASKED]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(desk.ask, [question]) for question in ASKED * 3]
        spoken = [pool.submit(lambda q: list(desk.speak(q))[-1], question) for question in ASKED]
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
    desk = app.Desk(slow)
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(desk.ask, ["first", "second", "third"])
        started.wait()
        assert desk.ask(["a click"]) == ["a click"]
        assert batch.result() == ["first", "second", "third"]
    assert heard == ["first", "a click", "second", "third"]


# What else there is to see.

def test_a_sidecar_without_thresholds(place: Place, tmp_path: Path) -> None:
    """One that was converted has no verdict.json."""
    bare = sidecar_of_chance(tmp_path / "sidecar")
    verdicts.write(bare, Judge(prompt=PROMPT))
    knower = open_knower(place.model, bare)
    text, gauge, *_ = app._probed(app.Desk(knower), ASKED[0])
    assert "no thresholds" in text and gauge.data[0].gauge.steps == ()
    told = {row["what"]: row["is"] for row in app.facts(knower, "the model", "the sidecar")}
    assert told["thresholds"] == "none: P(knows) is told, and no word" and told["learned on"] is None


def test_what_is_told_of_the_network(knower: Knower, place: Place) -> None:
    told = {row["what"]: row["is"] for row in app.facts(knower, str(place.model), str(place.sidecar))}
    green, red = knower.judge.thresholds
    assert (told["family"], told["layers"], told["width"], told["vocabulary"]) == ("vanilla", 5, 32, 256)
    assert told["middle of the depth"] == "layers 1 to 3, counted from 0"
    assert told["learned on"] == "tiny"
    assert told["asked as"] == f"`{PROMPT.template!r}`" and told["type"] == "float32"
    assert told["thresholds"] == (
        f"likely knows from {green:.3f}; likely beyond its knowledge below {red:.3f} "
        "(a precision of 85%, reached on the questions to calibrate on, and not promised)")
    promised = dataclasses.replace(knower.judge, red=None, aim=AIM | {"guarantee": True})
    assert app._thresholds(dataclasses.replace(knower, judge=promised)).endswith(
        "below – (a precision of 85%, promised for new questions of the same kind with 90% confidence)")
    assert re.fullmatch(r"\*\*Memory\*\*: \d+\.\d\d GiB at most so far.*\.", app.memory_told())


def test_the_tables_are_those_of_the_study(place: Place) -> None:
    found = report.read_results(place.study)
    shown = dict(app.tables(found))
    methods, words, _, places, slices = shown.values()
    assert [row["method"] for row in methods] == ["sidecar", "negative entropy", "words"]
    assert [row["word"] for row in words] == list(evaluate.WORDS) and len(slices) == 8
    assert methods[0]["AUROC"].point == found["methods"]["sidecar"]["auroc"]["point"]
    assert [row["where"] for row in places] == [
        "within north", "within south", "north → south", "south → north"]


def test_which_study_is_shown(place: Place, tmp_path: Path) -> None:
    assert app.find_study("", str(place.sidecar)) == place.study
    assert app.find_study(str(place.study), "elsewhere") == place.study
    lonely = app.find_study("", str(tmp_path / "sidecar"))
    assert isinstance(lonely, str) and "`python -m eval.recall --config FILE` makes one" in lonely
    with pytest.raises(InputError, match=r"--study: .*results.json: no such file"):
        app.find_study(str(tmp_path), str(place.sidecar))
    for content in ("{", "[]", '{"layers": {}}', "null"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match=r"results\.json: expected what a study of recall"):
            app.find_study(str(tmp_path), "")
        assert "expected what a study" in str(app.find_study("", str(tmp_path / "sidecar")))


@pytest.mark.parametrize(("options", "says"), [
    (["--study", "nowhere"], "--study: nowhere/results.json: no such file"),
    (["--port", "70000"], "--port: expected a number from 0 to 65535, found 70000"),
    (["--host", "not a host"], "--host, --port: not a host:0: cannot be listened at"),
    (["--max-new", "0"], "--max-new: expected 1 at least, found 0"),
    (["who?"], "--app: asks nothing itself; expected no question"),
    (["--questions", "file.jsonl"], "--app: asks nothing itself; expected no --questions"),
    (["--model", "nowhere"], "nowhere")])
def test_bad_options_are_one_line(options: list[str], says: str, place: Place,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--app", "--model", str(place.model), "--sidecar", str(place.sidecar), "--port", "0",
                 *options]) == 2
    assert_one_line(capsys.readouterr().err, says)


def test_a_port_that_is_taken(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with app.open_door("127.0.0.1", 0) as door:
        door.listen()
        taken = door.getsockname()[1]
        assert main(["--app", "--model", "nowhere", "--sidecar", "nowhere", "--port", str(taken)]) == 2
    assert_one_line(capsys.readouterr().err, f"127.0.0.1:{taken}: cannot be listened at: ")


def test_without_its_extra_the_page_says_what_is_missing(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "eval.recall.app")
    monkeypatch.delattr(eval.recall, "app")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["--app", "--model", "nowhere", "--sidecar", "nowhere"]) == 2
    assert_one_line(capsys.readouterr().err, "--app: gradio is not there: pip install -e '.[app]'")


# A network that chats and thinks.

@needs(GEMMA)
def test_a_network_that_thinks(tmp_path: Path) -> None:
    knower = open_knower(GEMMA, sidecar_of_chance(tmp_path / "sidecar"))
    question = "Who wrote it?"
    turn = "<|turn>user\nWho wrote it? Answer concisely with just the answer.<turn|>\n<|turn>model\n"
    thinking = f"<bos><|turn>system\n<|think|>\n<turn|>\n{turn}"
    assert knower.prompter.text(question) == f"<bos>{turn}", "it is probed without"
    assert thoughts.asked(knower, question) == (thinking, thoughts.CHANNELS[0], False, False)
    led = thoughts.asked(knower, question, "a seed")
    assert led == (f"{thinking}<|channel>thought\na seed", thoughts.CHANNELS[0], True, False)
    language, ends = knower.language, answer_ends(knower.language, AnswersConfig())
    assert {language.tokenizer.symbol("<turn|>"), 1} <= set(ends)
    for thought in ("", "a seed"):
        how = thoughts.asked(knower, question, thought)
        made, = generate_ids(language.model, [language.encode(how.text)], max_new=30, temperature=0,
                             end_ids=ends)
        *_, last = thoughts.speak(knower, question, thought, most=30)
        assert last[:2] == thoughts.split(language.tokenizer.decode(made.ids.tolist()), how)
        assert last.done == made.ended
    desk = app.Desk(knower, 30)
    text, gauge, *_, forming = app._probed(desk, question)
    assert "no thresholds" in text and [row[1] for row in forming] == ["2", "5", "8", "11"]
    *_, led_text = app._generated(desk, question, "Rome", (0.4, 0.7))
    assert thoughts.seed(gauge.data[0].value) in led_text and "unfinished" in led_text
    told = {row["what"]: row["is"] for row in app.facts(knower, "m", "s")}
    assert told["soft cap of the logits"] == 30 and told["asked as"].startswith("a chat, with `' Answer")


# The page itself.

class Served(NamedTuple):
    """A process that serves the page, and where."""

    process: subprocess.Popen[str]
    url: str


@pytest.fixture(scope="module")
def served(place: Place, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
           ) -> Iterator[Served]:
    room = tmp_path_factory.mktemp("room")
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.recall", "--app", "--model", str(place.model), "--sidecar",
         str(place.sidecar), "--port", "0", "--max-new", str(MOST_NEW)],
        env=environment | {"TMPDIR": str(room), "NO_PROXY": "127.0.0.1"}, stdout=subprocess.PIPE,
        text=True)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 300)[0], "it does not say where it is"
        first = process.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", first)
        yield Served(process, first.split()[0])
        process.terminate()
        assert process.wait(60) == 0
        assert not any(path.is_file() for path in room.rglob("*")), "what it made went with it"
    finally:
        process.kill()
        process.wait()


def test_two_requests_at_once(served: Served, told: list[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, as a browser asks: each gets what belongs to its question."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = pytest.importorskip("gradio_client").Client(served.url, verbose=False)
    jobs = [client.submit(question, api_name="/probe") for question in ASKED]
    stream = client.submit(ASKED[0], "", api_name="/baseline")
    for job, one in zip(jobs, told, strict=True):
        text = job.result(timeout=120)[0]
        assert float(re.findall(r"<b>(\d\.\d+)</b>", text)[0]) == pytest.approx(one.p, abs=0.001)
        assert f"<b>{one.verdict}</b>" in text
    assert "Cut off" in stream.result(timeout=120)


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(chromium() is None,
                    reason="opens the page in Chromium or Chrome, and there is none on this machine")
def test_in_a_browser(served: Served, place: Place, knower: Knower, told: list[Told],
                      tmp_path: Path) -> None:
    """A question is probed and answered, a file scored, a study looked at; and nothing leaves here."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright (extra: test) is not installed")
    kept = Path(os.environ.get("TILELLI_ARTEFACTS") or tmp_path)
    kept.mkdir(parents=True, exist_ok=True)
    complaints: list[str] = []
    elsewhere: list[str] = []
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        api.expect.set_options(timeout=PATIENCE)  # which has a time of its own
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: elsewhere.append(request.url)
                if not request.url.startswith((served.url, "data:", "blob:")) else None)
        page.goto(served.url)

        probe = page.get_by_role("button", name="Probe (no answer generated)")
        probe.click()
        api.expect(page.locator("#said")).to_have_text("the question is empty")
        page.get_by_label("Question").fill(ASKED[0])
        probe.click()
        number = page.locator("#gauge .indicatorlayer .number")
        api.expect(number).to_have_text(re.compile(r"^0\.\d{3}$"))
        assert float(number.text_content()) == pytest.approx(told[0].p, abs=0.001)
        api.expect(page.locator("#said")).to_contain_text(f"→ {told[0].verdict}")
        for chart, title in ("crystallisation", "entropy, nats"), ("writes", "peak, nats"):
            api.expect(page.locator(f"#{chart} .ytitle")).to_have_text(title)
        api.expect(page.locator("#forming")).to_contain_text("100%")
        page.screenshot(path=kept / "probe.png")

        expected = list(thoughts.speak(knower, ASKED[0], most=MOST_NEW))[-1].answer
        page.get_by_label("Right answers").fill(f"Rome|{expected}")
        page.get_by_role("button", name="Generate: baseline").click()
        page.get_by_role("button", name="Generate: thought seed").click()
        api.expect(page.locator("#baseline")).to_contain_text("✓ a right answer")
        api.expect(page.locator("#baseline")).to_contain_text(str(expected))
        api.expect(page.locator("#seeded")).to_contain_text("Cut off")
        api.expect(page.locator("#seeded")).to_contain_text(thoughts.seed(told[0].p))
        page.screenshot(path=kept / "generated.png", full_page=True)

        page.get_by_role("tab", name="Batch").click()
        given = tmp_path / "mine.jsonl"
        given.write_text("".join(json.dumps({"question": question}) + "\n" for question in ASKED))
        page.locator("#given input[type=file]").set_input_files(given)
        api.expect(page.locator("#given")).to_contain_text("mine")
        page.get_by_role("button", name="Probe them all").click()
        api.expect(page.locator("#told")).to_contain_text("4 questions")
        with page.expect_download() as download:
            page.locator("#made a").nth(1).click()
        lines = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
        assert [line["p"] for line in lines] == pytest.approx([one.p for one in told], abs=BATCHED)
        page.screenshot(path=kept / "batch.png")

        page.get_by_role("tab", name="Evaluation").click()
        study = report.read_results(place.study)
        area = study["methods"]["sidecar"]["auroc"]
        shown = page.get_by_role("tabpanel").filter(has_text="a study of nothing")
        api.expect(shown).to_contain_text(f"{area['point']:.3f} [{area['low']:.3f}, {area['high']:.3f}]")
        figures = list((place.study / "figures").iterdir())
        api.expect(shown.locator(".figures img")).to_have_count(len(figures))
        page.screenshot(path=kept / "evaluation.png", full_page=True)
        page.get_by_role("tab", name="Info").click()
        api.expect(page.get_by_text("layers 1 to 3, counted from 0")).to_be_visible()
        api.expect(page.locator("#memory")).to_contain_text("GiB")
        page.screenshot(path=kept / "info.png")
        browser.close()
    assert complaints == [] and elsewhere == []
