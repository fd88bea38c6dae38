"""The page's charts and request handlers."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.eval.recall.small import (
    AIM,
    ASKED,
    BATCHED,
    GEMMA,
    MAX_NEW,
    PROMPT,
    Place,
    a_study,
    answers_alone,
    sidecar_of_chance,
)
from tests.references import needs
from tilelli_jax.eval import figures
from tilelli_jax.eval.recall import evaluate, report, report_rows, verdicts
from tilelli_jax.eval.recall.answering import answer_ends
from tilelli_jax.eval.recall.app import info, thought_seeding
from tilelli_jax.eval.recall.config import AnswersConfig
from tilelli_jax.eval.recall.predictor import KnowledgePredictor, Prediction
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.eval.thresholds import Thresholds
from tilelli_jax.generation.decoding import generate_ids
from tilelli_jax.signals.crystallisation import BY_LAYER, band

pytest.importorskip("plotly", reason="plotly (extra: app) is not installed")
from tilelli_jax.eval.recall.app import charts, handlers
from tilelli_jax.eval.recall.app.request_queue import RequestQueue

# Charts.

def test_gauge_colours_match_the_verdicts() -> None:
    def steps(knows_from: float | None, unknown_below: float | None) -> list[tuple[Any, str]]:
        figure = charts.gauge(0.4, Thresholds(knows_from, unknown_below))
        indicator = figure.data[0]
        assert indicator.value == 0.4 and tuple(indicator.gauge.axis.range) == (0, 1)
        return [(step.range, step.color) for step in indicator.gauge.steps]

    red, amber, green = charts.RED, charts.AMBER, charts.GREEN
    assert steps(0.7, 0.3) == [((0, 0.3), red), ((0.3, 0.7), amber), ((0.7, 1), green)]
    assert steps(None, 0.3) == [((0, 0.3), red), ((0.3, 1), amber)]
    assert steps(0.7, None) == [((0, 0.7), amber), ((0.7, 1), green)]
    assert steps(0.3, 0.7) == [((0, 0.3), red), ((0.3, 1), green)], "knows_from takes precedence"
    assert steps(None, None) == []


def test_charts_show_the_signals(predictions: list[Prediction]) -> None:
    low, high = band(5)
    for prediction in predictions:
        features = prediction.outputs.crystallisation.by_layer
        for figure, left, right in ((charts.crystallisation(prediction), "a_entropy_final", "a_margin_final"),
                                    (charts.writes(prediction), "b_cmax_peak", "b_cmax_rel_norm")):
            for trace, name, axis in zip(figure.data, (left, right), ("y", "y2")):
                assert trace.yaxis == axis and list(trace.x) == [0, 1, 2, 3, 4]
                np.testing.assert_array_equal(np.float32(trace.y), features[:, BY_LAYER.index(name)])
            shaded = [shape for shape in figure.layout.shapes if shape.type == "rect"]
            assert [(shape.x0, shape.x1) for shape in shaded] == [(low - 0.5, high + 0.5)]
            json.loads(figure.to_json())
        star, line = charts.writes(prediction).data[2], charts.writes(prediction).layout.shapes[-1]
        peak = features[low:high + 1, BY_LAYER.index("b_cmax_peak")]
        assert star.x == (prediction.strongest_layer,) and low <= star.x[0] <= high
        assert star.y[0] == peak.max()
        assert line.type == "line" and line.x0 == line.x1 == prediction.strongest_layer


def test_tokens_are_escaped_in_charts(predictions: list[Prediction]) -> None:
    figure = charts.writes(predictions[0]._replace(strongest_write="<b>%{y}&\n"))
    assert "&lt;b&gt;&#37;{y}&amp;\\n" in figure.data[2].hovertemplate


# Handlers.

@pytest.fixture(scope="module")
def queue(predictor: KnowledgePredictor) -> Iterator[RequestQueue]:
    with RequestQueue(predictor, MAX_NEW) as running:
        yield running


def test_a_probe(queue: RequestQueue, predictor: KnowledgePredictor, predictions: list[Prediction]) -> None:
    verdicts_given = set()
    for question, prediction in zip(ASKED, predictions):
        text, gauge, first, second, table = handlers.probed(queue, f" {question} ")
        assert f"Calibrated P(knows) = <b>{prediction.p:.3f}</b> → <b>{prediction.verdict}</b>" in text
        assert f"layer {prediction.strongest_layer}, <code>" in text
        assert gauge.data[0].value == prediction.p
        assert [step.range[1] for step in gauge.data[0].gauge.steps] == [
            *sorted(predictor.rule.thresholds), 1.0]  # type: ignore[type-var]
        assert first.data[0].name == "entropy, nats" and second.data[0].name == "peak, nats"
        best = prediction.outputs.crystallisation.best
        assert [row[:2] for row in table] == [["25%", "0"], ["50%", "1"], ["75%", "2"], ["100%", "4"]]
        assert [row[2] for row in table] == [
            repr(predictor.language.tokenizer.decode([int(best[layer])])) for layer in (0, 1, 2, 4)]
        verdicts_given.add(prediction.verdict)
    assert verdicts_given == set(evaluate.VERDICTS)


@pytest.mark.parametrize(("question", "message"), [
    (None, "the question: expected text, found an empty question"),
    ("  \n", "the question: expected text, found an empty question"),
    ("w" * 200,
     "the question: expected at most 192 tokens with its prompt, the network's maximum, found 207"),
    ("w" * 10_001, "the question: expected at most 10000 characters, found 10001")])
def test_errors_appear_in_the_page(queue: RequestQueue, question: str | None, message: str) -> None:
    message = html.escape(message)
    error = f'<div class="input-error">{message}</div>'
    assert handlers.probed(queue, question) == (error, None, None, None, None)
    assert list(handlers.generated(queue, question, "Rome"))[-1] == f"**{message}**"
    assert list(handlers.generated(queue, question, "Rome", (0.4, 0.7)))[-1] == f"**{message}**"


def test_a_generation(queue: RequestQueue, predictor: KnowledgePredictor, predictions: list[Prediction]
                      ) -> None:
    expected = list(answers_alone(predictor, ASKED[0], max_new=MAX_NEW))[-1].answer
    pieces = list(handlers.generated(queue, ASKED[0], f"x| {expected} "))
    assert pieces[0] == "…" and len(pieces) > 3 and pieces[-2].endswith("…")
    assert pieces[-1] == (f"**Answer**\n```text\n{expected}\n```\n\n"
                          "*Cut off at the maximum length.*\n\n**✓ correct**")
    assert list(handlers.generated(queue, ASKED[0], "x"))[-1].endswith("**✗ not correct**")
    assert list(handlers.generated(queue, ASKED[0], " | "))[-1].endswith("maximum length.*")
    *_, seeded = handlers.generated(queue, ASKED[0], "", (0.4, 0.7))
    thought = thought_seeding.seed(predictions[0].p)
    assert seeded.startswith(f"**Seed**\n```text\n{thought}\n```")
    *_, last = answers_alone(predictor, ASKED[0], thought, max_new=MAX_NEW)
    assert last.answer in seeded
    rejected, = handlers.generated(queue, ASKED[0], "", (0.8, 0.2))
    assert rejected.startswith("**low and high: expected")
    for bad in (None, "0.5", True):
        rejected, = handlers.generated(queue, ASKED[0], "", (0.4, bad))  # type: ignore[arg-type]
        assert rejected == f"**low and high: expected numbers, found {html.escape(repr(bad))}**"


@pytest.mark.parametrize(("state", "expected"), [
    (thought_seeding.SeededAnswer("hm", None, True), "**The thought is unfinished: there is no answer.**"),
    (thought_seeding.SeededAnswer("hm", None, False), "**The thought is unfinished: there is no answer.**"),
    (thought_seeding.SeededAnswer("hm", "Well.\nIt is Rome.", True), "**✓ correct**"),
    (thought_seeding.SeededAnswer("", "I am not sure, but Rome.", True),
     "**– it abstains**, but mentions a correct answer"),
    (thought_seeding.SeededAnswer("", "I do not know.", True), "**– it abstains**"),
    (thought_seeding.SeededAnswer("", "Paris", True), "**✗ not correct**"),
    (thought_seeding.SeededAnswer("", "", True), "**✗ not correct**")])
def test_grades_of_answers(state: thought_seeding.SeededAnswer, expected: str) -> None:
    text = handlers._answer_markdown(state, ["Rome"])
    assert text.endswith(f"\n\n{expected}")
    assert ("**Thought**\n```text\nhm\n```" in text) == bool(state.thought)
    assert ("**Answer**" in text) == (state.answer is not None)


def test_generated_text_stays_inside_its_fence() -> None:
    text = handlers._answer_markdown(thought_seeding.SeededAnswer("", "```\n# <b>bold</b>\n````", True), [])
    assert text == "**Answer**\n`````text\n```\n# <b>bold</b>\n````\n`````"


def test_a_batch(predictor: KnowledgePredictor, predictions: list[Prediction], tmp_path: Path) -> None:
    upload, progress = tmp_path / "mine.jsonl", []
    upload.write_text("".join(json.dumps({"question": question}) + "\n" for question in ASKED))
    (tmp_path / "files").mkdir()
    small = dataclasses.replace(predictor, reader=SimpleNamespace(batch_size=3))
    batch_sizes: list[int] = []
    small.predict = lambda questions: batch_sizes.append(len(questions)) or predictor.predict(questions)  # type: ignore
    with RequestQueue(small) as queue:
        text, table, files = handlers.batched(queue, str(upload), tmp_path / "files",
                                              lambda n, total: progress.append((n, total)))
    assert progress == [(3, 4), (4, 4)] and batch_sizes == [3, 1]
    assert "4 questions: " in text and all(verdict in text for verdict in evaluate.VERDICTS)
    assert [float(row[0]) for row in table["data"]] == pytest.approx(
        [prediction.p for prediction in predictions], abs=0.001)
    lines = [json.loads(line) for line in Path(files[1]).read_text().splitlines()]
    cells = list(csv.DictReader(io.StringIO(Path(files[0]).read_text("utf-8-sig"), newline="")))
    assert [Path(file).name for file in files] == ["mine-scores.csv", "mine-scores.jsonl"]
    for prediction, line, row in zip(predictions, lines, cells, strict=True):
        assert line["question"] == row["question"] == prediction.question
        assert line["verdict"] == prediction.verdict
        assert line["p"] == pytest.approx(prediction.p, abs=BATCHED) and float(row["p"]) == line["p"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("q.jsonl", '{"question": "a"}\n{"question": \n', "q.jsonl, line 2: not JSON"),
    ("q.csv", "question,id\na,1\nb\n", "q.csv, line 3: expected 2 cells, as in the header"),
    ("q.csv", "question,id\na,1\n,2\n", "q.csv, row 2: question: expected text, found nothing; the "
     "columns here are id<"),
    ("q.jsonl", '{"question": "a"}\n{"asked": "b"}\n', "q.jsonl, row 2: question: expected text, found "
     "nothing; the columns here are asked<"),
    ("q.csv", "Question, question \na,b\n", "q.csv, row 1: question: expected text, found nothing; the "
     "columns here are Question, &#x27; question &#x27;<"),
    ("q.jsonl", '{"question": 5}\n', "q.jsonl, row 1: question: expected text, found a number, 5; the "),
    ("q.json", json.dumps([{"question": "a"}, {"question": "b" * 200}]),
     "q.json, row 2: expected at most 192 tokens with its prompt"),
    ("q.json", json.dumps([{"question": "b" * 20_000}]),
     "q.json, row 1: expected at most 10000 characters, found 20000"),
    ("q.jsonl", "", "q.jsonl: expected rows"), ("q.parquet", "no", "q.parquet: cannot be read"),
    (None, "", "choose a file of questions first")])
def test_an_invalid_batch(queue: RequestQueue, name: str | None, content: str, message: str, tmp_path: Path
                          ) -> None:
    path = tmp_path / (name or "none")
    path.write_text(content)
    text, table, files = handlers.batched(queue, str(path) if name else None, tmp_path, print)
    assert text.startswith(f'<div class="input-error">{message}') and (table, files) == (None, None)
    assert str(tmp_path) not in text, "the upload directory is not revealed"


def test_concurrent_requests_share_the_network(predictor: KnowledgePredictor, predictions: list[Prediction]
                                               ) -> None:
    """Each request gets its own result: answers in one batch, predictions one at a time."""
    active, counts = [], []
    lock = threading.Lock()

    def watched(questions: Sequence[str]) -> list[Prediction]:
        with lock:
            active.append(1)
            counts.append(len(active))
        time.sleep(0.01)
        try:
            return predictor.predict(questions)
        finally:
            active.pop()

    counted = dataclasses.replace(predictor)
    counted.predict = watched  # type: ignore[method-assign]
    alone = [list(answers_alone(predictor, question))[-1] for question in ASKED]
    with RequestQueue(counted, MAX_NEW) as queue, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(queue.predict, [question]) for question in ASKED * 3]
        answers = [pool.submit(lambda q: list(queue.answer_seeded(q))[-1], question) for question in ASKED]
        for prediction, future in zip(predictions * 3, asked, strict=True):
            assert future.result()[0].p == prediction.p
        assert [future.result() for future in answers] == alone
    assert max(counts) == 1 and len(counts) == 12


def test_an_answer_nobody_reads_frees_its_slot(predictor: KnowledgePredictor) -> None:
    with RequestQueue(predictor, 150) as queue:
        states = queue.answer_seeded(ASKED[0])
        next(states)
        assert queue._engine.load.active == 1
        states.close()  # type: ignore[attr-defined]
        queue.predict(ASKED[:1])  # runs between two steps
        deadline = time.monotonic() + 60
        while queue._engine.load.active and time.monotonic() < deadline:
            time.sleep(0.01)
        assert queue._engine.load.active == 0
        assert len(list(queue.answer_seeded(ASKED[1]))) > 1


def test_a_closing_or_full_page(predictor: KnowledgePredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    with RequestQueue(predictor) as queue:
        monkeypatch.setattr(queue._engine, "max_waiting", -queue._engine.slots)
        *_, full = handlers.generated(queue, ASKED[0], "")
        assert full == "**expected room in the queue, found it full: try again later**"
    assert "try again later" in handlers.probed(queue, ASKED[0])[0]


def test_a_request_runs_between_the_pieces_of_a_batch(predictor: KnowledgePredictor) -> None:
    order: list[str] = []
    started = threading.Event()

    def predict(questions: Sequence[str]) -> list[Any]:
        order.extend(questions)
        started.set()
        time.sleep(0.1)
        return list(questions)

    slow: Any = dataclasses.replace(predictor, reader=SimpleNamespace(batch_size=1))  # type: ignore[arg-type]
    slow.predict = predict
    with RequestQueue(slow) as queue, ThreadPoolExecutor(1) as pool:
        batch = pool.submit(queue.predict, ["first", "second", "third"])
        started.wait()
        assert queue.predict(["a click"]) == ["a click"]
        assert batch.result() == ["first", "second", "third"]
    assert order == ["first", "a click", "second", "third"]


# Info and study.

def test_a_sidecar_without_thresholds(place: Place, tmp_path: Path) -> None:
    """As a converted one."""
    bare = sidecar_of_chance(tmp_path / "sidecar")
    verdicts.write(bare, VerdictRule(prompt=PROMPT))
    predictor = KnowledgePredictor.open(place.model, bare)
    with RequestQueue(predictor) as queue:
        text, gauge, *_ = handlers.probed(queue, ASKED[0])
    assert "no thresholds" in text and gauge.data[0].gauge.steps == ()
    facts = {row["property"]: row["value"] for row in info.facts(predictor, "the model", "the sidecar")}
    assert facts["thresholds"] == "none: only P(knows) is reported, no verdict"
    assert facts["trained on"] is None


def test_info_table(predictor: KnowledgePredictor, place: Place) -> None:
    facts = {row["property"]: row["value"] for row in info.facts(
        predictor, str(place.model), str(place.sidecar))}
    knows_from, unknown_below = predictor.rule.thresholds
    assert (facts["family"], facts["layers"], facts["width"], facts["vocabulary"]) == ("vanilla", 5, 32, 256)
    assert facts["middle layers"] == "layers 1 to 3, counted from 0"
    assert facts["trained on"] == "tiny"
    assert facts["prompt"] == f"`{PROMPT.template!r}`" and facts["data type"] == "float32"
    assert facts["thresholds"] == (
        f"likely knows from {knows_from:.3f}; likely beyond its knowledge below {unknown_below:.3f} "
        "(precision 85%, reached on the calibration questions, not guaranteed for new ones)")
    guaranteed = dataclasses.replace(predictor.rule, unknown_below=None, aim=AIM | {"guarantee": True})
    assert info._thresholds(dataclasses.replace(predictor, rule=guaranteed)).endswith(
        "below – (precision 85%, guaranteed for new questions of the same kind with 90% confidence)")
    assert re.fullmatch(r"\*\*Memory\*\*: peak \d+\.\d\d GiB.*\.", info.memory_text())


def test_tables_of_the_study(place: Place) -> None:
    results = report.read_results(place.study)
    titles = dict(info.tables(results))
    methods, verdict_table, _, transfer, bins = titles.values()
    reason = "–: fewer than 10 known or fewer than 10 unknown questions"
    assert list(titles)[-1] == f"By popularity ({reason})" and f"\n{reason}.\n" in (
        place.study / "report.md").read_text()
    evaluated = ["methods" in one for of_dataset in results["by_popularity"].values() for one in of_dataset]
    short = [row for row, has_methods in zip(bins, evaluated, strict=True) if not has_methods]
    assert short and all(row["sidecar"] is None for row in short), "a dash, because the bin is too small"
    assert [row["method"] for row in methods] == ["sidecar", "first_token_entropy", "words"]
    assert [row["verdict"] for row in verdict_table] == list(evaluate.VERDICTS) and len(bins) == 8
    area = results["methods"]["sidecar"]["auroc"]
    assert methods[0]["AUROC"] == f"{area['point']:.3f} [{area['low']:.3f}, {area['high']:.3f}]"
    assert list(methods[0]) == ["method", "AUROC", report_rows.DELTA, "p (Holm)"], "it fits a small window"
    assert re.fullmatch(r"\+0\.\d{3} \[[−+]0\.\d{3}, \+0\.\d{3}\]", methods[2][report_rows.DELTA])
    assert info.example_question(place.study) == results["examples"][0]["question"]
    assert info.example_question("no study") == "Who wrote Emma?"
    folded = info.metrics_markdown(place.study)
    assert "| AUPRC" in folded and "ECE if calibrated" in folded
    assert "| first_<wbr>token_<wbr>entropy" in folded, "a narrow window may break the name there"
    assert f"{area['point']:.3f} [{area['low']:.3f},\u00a0{area['high']:.3f}]" in folded
    assert [row["questions from"] for row in transfer] == [
        "within north", "within south", "north → south", "south → north"]


def test_figures_have_the_captions_of_the_report(place: Place, tmp_path: Path) -> None:
    page = info.study_figures(place.study)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    report_text = (place.study / "report.md").read_text()
    assert {path.stem for path in (place.study / "figures").glob("transfer-*.png")} == {
        "transfer-sidecar", "transfer-first_token_entropy"}, "layer_probe is not part of this study"
    assert len(captions) == len(list((place.study / "figures").glob("*.png"))) > 3
    assert captions[0].startswith("AUROC of each method")
    assert all(caption.endswith(".") for caption in captions)
    assert all(f"![{html.unescape(caption)}](figures/" in report_text for caption in captions)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a<b.png").write_bytes(b"")
    assert "<figcaption>The figure a&lt;b of this study.</figcaption>" in info.study_figures(tmp_path)


def test_each_method_of_the_figures_has_its_own_colour(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_style_numbers", {})
    a_study(tmp_path)  # writes a report, whose first figure shows all methods
    for styles in zip(*map(figures.style_of, evaluate.IN_FIGURES)):
        assert len(set(styles)) == len(evaluate.IN_FIGURES)


# A chat network with thoughts.

@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> KnowledgePredictor:
    return KnowledgePredictor.open(GEMMA, sidecar_of_chance(tmp_path_factory.mktemp("thinker") / "sidecar"))


@needs(GEMMA)
def test_prompts_of_a_network_with_thoughts(thinker: KnowledgePredictor) -> None:
    predictor = thinker
    question = "Who wrote it?"
    turn = "<|turn>user\nWho wrote it? Answer concisely with just the answer.<turn|>\n<|turn>model\n"
    thinking = f"<bos><|turn>system\n<|think|>\n<turn|>\n{turn}"
    assert predictor.prompter.text(question) == f"<bos>{turn}", "P(knows) is predicted without a thought"
    assert thought_seeding.seeded_prompt(predictor, question) == (
        thinking, thought_seeding.CHANNELS[0], False, False)
    seeded = thought_seeding.seeded_prompt(predictor, question, "a seed")
    assert seeded == (f"{thinking}<|channel>thought\na seed", thought_seeding.CHANNELS[0], True, False)
    facts = {row["property"]: row["value"] for row in info.facts(predictor, "m", "s")}
    assert facts["logit soft cap"] == 30
    assert facts["prompt"].startswith("chat template, question followed by `' Answer")
    ends = answer_ends(predictor.language, AnswersConfig())
    assert {predictor.language.tokenizer.token("<turn|>"), 1} <= set(ends)


@pytest.mark.exhaustive
@needs(GEMMA)
def test_a_network_with_thoughts(thinker: KnowledgePredictor) -> None:
    predictor, question = thinker, "Who wrote it?"
    language, ends = predictor.language, answer_ends(predictor.language, AnswersConfig())
    for thought in ("", "a seed"):
        prompt = thought_seeding.seeded_prompt(predictor, question, thought)
        generated, = generate_ids(language.model, [language.encode(prompt.text)], max_new=30, temperature=0,
                             end_ids=ends)
        *_, last = answers_alone(predictor, question, thought, max_new=30)
        assert last[:2] == thought_seeding.split(language.tokenizer.decode(generated.ids.tolist()), prompt)
        assert last.done == generated.ended
    with RequestQueue(predictor, 30) as queue:
        text, gauge, *_, tokens = handlers.probed(queue, question)
        assert "no thresholds" in text and [row[1] for row in tokens] == ["2", "5", "8", "11"]
        *_, seeded_text = handlers.generated(queue, question, "Rome", (0.4, 0.7))
    assert thought_seeding.seed(gauge.data[0].value) in seeded_text and "unfinished" in seeded_text
