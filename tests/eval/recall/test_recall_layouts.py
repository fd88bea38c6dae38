"""The files of published data sets, questions without an answer, and examples in prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tests.references import STORED, needs
from tilelli_jax.errors import InputError
from tilelli_jax.eval.estimators.table import UNANSWERABLE, QuestionTable
from tilelli_jax.eval.recall import evaluate, labelling, questions
from tilelli_jax.eval.recall.answering import answer, answer_ends, p_true_logits, verbalise
from tilelli_jax.eval.recall.config import AnswersConfig, PromptConfig, QuestionsConfig, SplitConfig
from tilelli_jax.eval.recall.prompting import Prompter
from tilelli_jax.eval.recall.questions import Question
from tilelli_jax.eval.recall.scores import Scores
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.loading.language import ByteTokenizer, ChatTemplate, LanguageModel
from tilelli_jax.models.vanilla import VanillaConfig

QUESTIONS = STORED / "questions"


def read(path: Path, items: int = 10**6, **changed: Any) -> list[Question]:
    found = questions.draw(QuestionsConfig(sources=(str(path),), items=items, **changed)).questions
    return sorted(found, key=lambda question: question.id)


def test_squad(tmp_path: Path) -> None:
    """Version 2.0 marks questions without an answer; the article is what a question is about."""
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "Normans", "paragraphs": [{
        "context": "…", "qas": [
            {"id": "q1", "question": "Who?", "is_impossible": False,
             "answers": [{"text": "Rollo", "answer_start": 0}, {"text": "Rollo", "answer_start": 3}]},
            {"id": "q2", "question": "Why?", "is_impossible": True, "answers": [],
             "plausible_answers": [{"text": "no", "answer_start": 0}]}]}]}]}))
    first, second = read(path)
    assert first == Question("squad-q1", "squad", "Who?", ("Rollo",), "squad: Normans", first.popularity)
    assert second.answers == () and not second.answerable and second.id == "squad-q2"


def test_nq_open_simpleqa_and_popqa(tmp_path: Path) -> None:
    (tmp_path / "NQ-open.jsonl").write_text('{"question": "when?", "answer": ["1972", "December 1972"]}\n')
    assert read(tmp_path / "NQ-open.jsonl")[0].answers == ("1972", "December 1972")
    (tmp_path / "simple.csv").write_text('metadata,problem,answer\n"{}",Who got it?,"Doe, Jane"\n')
    question, = read(tmp_path / "simple.csv")
    assert (question.text, question.answers) == ("Who got it?", ("Doe, Jane",))
    (tmp_path / "popqa.tsv").write_text(
        "id\tsubj\tprop\tobj\ts_uri\ts_pop\to_pop\tquestion\tpossible_answers\n"
        '7\tGeorge\toccupation\tpolitician\thttp://x/Q1\t142\t5\tWhat is he?\t["politician", "pol"]\n')
    question, = read(tmp_path / "popqa.tsv")
    assert question == Question("popqa-7", "popqa", "What is he?", ("politician", "pol"), "http://x/Q1",
                                142.0, "occupation")


def test_selfaware(tmp_path: Path) -> None:
    path = tmp_path / "SelfAware.json"
    path.write_text(json.dumps({"example": [
        {"question_id": 1, "question": "What?", "answer": ["a song"], "answerable": True, "source": "h"},
        {"question_id": 2, "question": "Why me?", "answer": None, "answerable": False, "source": "s"}]}))
    first, second = read(path)
    assert (first.id, first.answers, first.answerable) == ("SelfAware-1", ("a song",), True)
    assert (second.answers, second.answerable) == ((), False)


@pytest.mark.parametrize(("row", "message"), [
    ({"answers": ["x"], "answerable": "maybe"}, "answerable: expected true or false, found 'maybe'"),
    ({"answers": ["x"], "answerable": False},
     "answers: expected none where answerable is false, found ['x']"),
    ({"answers": [], "answerable": True}, "answers: expected at least one"),
    ({"answers": ["x"], "paraphrases": [" "]}, "paraphrases: expected texts, found [' ']"),
    ({"answers": ["x"], "paraphrases": {"a": 1}}, "paraphrases: expected a list of texts")])
def test_invalid_rows(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Who?", **row}))
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.jsonl")
    assert_one_line(f"error: {caught.value}\n", "a.jsonl, row 1", message)


@needs(QUESTIONS)
def test_the_stored_questions() -> None:
    """The numbers of the files' description."""
    assert len(read(QUESTIONS / "nq_open.jsonl")) == 3610
    popqa = read(QUESTIONS / "popqa.jsonl")
    assert len(popqa) == 1000 and all(question.popularity >= 0 for question in popqa)
    selfaware = read(QUESTIONS / "selfaware.jsonl")
    assert [sum(question.answerable is is_answerable for question in selfaware)
            for is_answerable in (True, False)] == [2337, 1032]
    pararel = read(QUESTIONS / "pararel.jsonl")
    assert len(pararel) == 5632 and len({question.category for question in pararel}) == 20
    assert {len(question.paraphrases) for question in pararel} <= {0, 1, 2, 3}


# --- Questions without an answer -------------------------------------------------------------


def some_questions(n: int = 200) -> list[Question]:
    return [Question(str(i), "x", f"question {i}?", (f"a{i}",) if i % 4 else (), f"e{i}") for i in range(n)]


def test_questions_without_an_answer_are_never_wrong_answers() -> None:
    asked = some_questions()
    given = [f"a{i}" if i % 3 == 0 else "b" for i in range(len(asked))]
    columns = labelling.label(asked, given, "strict", SplitConfig())
    answerable = np.array([question.answerable for question in asked])
    np.testing.assert_array_equal(columns["split"] == UNANSWERABLE, ~answerable)
    assert not columns["known"][~answerable].any() and columns["known"].sum() == 50
    columns = labelling.label(asked, given, "strict", SplitConfig(), "answerability")
    np.testing.assert_array_equal(columns["known"], answerable)
    assert UNANSWERABLE not in columns["split"] and columns["correct"].sum() == 50


def test_questions_without_an_answer_are_evaluated_apart() -> None:
    """They are in no comparison of correctness, and not where a fitted question shares their group."""
    rng = np.random.default_rng(0)
    n = 400
    split = np.array(["train", "validate", "calibrate", "test", UNANSWERABLE])[np.arange(n) % 5]
    known = np.where(split == UNANSWERABLE, 0, rng.integers(0, 2, n))
    group = np.arange(n)
    group[4] = group[0]  # an unanswerable question about the subject of a training question
    empty = np.full(n, "")
    table = QuestionTable(
        rng.random((n, 3, 12)), rng.random((n, 10)), rng.random((n, 3, 3)), known, rng.random(n) < 0.1, split,
        group, empty, empty, np.array(["a", "b"])[rng.integers(0, 2, n)], np.full(n, np.nan), empty, [[]] * n)
    score = known + rng.standard_normal((1, n)) + 3 * (split != UNANSWERABLE)
    methods = {name: Scores(score, 1 / (1 + np.exp(-score))) for name in ("sidecar", "first_token_prob")}
    results = evaluate.evaluate(table, {None: methods, "a": methods}, 0, VerdictRule(), 100)
    answerable = split != UNANSWERABLE
    assert (results["questions"], results["unanswerable"]) == (320, 80)
    assert results["known_all"] == known[answerable].mean()
    assert sum(summary["unanswerable"] for summary in results["datasets"].values()) == 80
    of_b = results["cross_dataset"]["a → b"]["questions"]
    assert of_b == (answerable & (table.dataset == "b") & ~np.isin(group, group[table.dataset == "a"])).sum()
    apart = results["answerability"]
    assert apart["questions"] == 80 + 79 and apart["methods"]["sidecar"]["auroc"].point > 0.95


# --- Examples in prompts ---------------------------------------------------------------------


def write_questions(path: Path, n: int = 60) -> Path:
    rows = [{"question": f"Who wrote book {i}?", "answers": [f"Writer {i}"], "group": f"g{i // 2}"}
            for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_examples_share_no_group_with_the_study(tmp_path: Path) -> None:
    """Equal words, or a paraphrase that is an example, too; and the study is as large as asked for."""
    rows = [{"question": f"who wrote book {i % 50}{'?' * (i >= 50)}", "answers": ["x"]} for i in range(100)]
    rows[3]["paraphrases"] = ["who wrote book 7", "who wrote book 9"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    drawn = questions.draw(QuestionsConfig(sources=(str(path),), items=80, seed=2), 5)
    words = [question.text.rstrip("?") for question in drawn.questions]
    assert len(drawn.questions) == 80 and not set(words) & {one.text.rstrip("?") for one in drawn.examples}
    texts = {one.text for one in drawn.examples}
    assert not any(texts & set(question.paraphrases) for question in drawn.questions)


def test_examples_are_outside_the_study(tmp_path: Path) -> None:
    config = QuestionsConfig(sources=(str(write_questions(tmp_path / "a.jsonl")),), items=40, seed=1)
    drawn = questions.draw(config, 3)
    assert len(drawn.examples) == 3 and len(drawn.questions) <= 40
    entities = [{question.entity for question in part} for part in drawn]
    assert not entities[0] & entities[1]
    assert questions.draw(config, 3) == drawn and questions.draw(config).examples == []
    everything = questions.draw(QuestionsConfig(sources=config.sources, items=100), 4)
    assert len(everything.examples) == 4 and 52 <= len(everything.questions) <= 56
    with pytest.raises(InputError, match=r"prompt.shots: expected at least 61 questions with.*found 60"):
        questions.draw(config, 61)


@pytest.fixture(scope="module")
def byte_language() -> LanguageModel:
    tiny = VanillaConfig(d_model=16, n_layers=2, max_seq_len=256, n_heads=2)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    return LanguageModel(random_network(tiny, 0)[0], ByteTokenizer(), ChatTemplate(template, {}, "here"))


EXAMPLES = (("Who? ", "Ann"), ("Where?", "Rome"))


def test_text_with_examples(byte_language: LanguageModel) -> None:
    config = PromptConfig(template="Q: {question}\nA:", instruction="!", system="Answer.", shots=2,
                          separator="\n--\n")
    prompter = Prompter(byte_language, config, EXAMPLES)
    text = "Answer.\n--\nQ: Who?!\nA: Ann\n--\nQ: Where?!\nA: Rome\n--\nQ: Why?!\nA:"
    assert prompter.text(" Why? ") == text
    prompt = prompter("Where?")
    assert bytes(prompt.ids[prompt.start:prompt.stop]) == b"Where?"
    assert prompt.stop == len(prompt.ids) - len("!\nA:"), "not in the example"
    assert prompter.follow_up("Why?", "It is.", "Right?") == text + " It is.\n--\nRight?\nReply:"


def test_chat_with_examples(byte_language: LanguageModel) -> None:
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    prompter = Prompter(byte_language, PromptConfig(instruction="!", system="Be brief.", shots=2), EXAMPLES)
    before = "<system>Be brief.<user>Who?!<assistant>Ann<user>Where?!<assistant>Rome"
    assert prompter.text("Why?") == before + "<user>Why?!<assistant>"
    assert prompter.follow_up("Why?", "It is.", "Right?") == (
        before + "<user>Why?!<assistant>It is.<user>Right?<assistant>")


def test_line_breaks_end_answers_that_are_not_chats(byte_language: LanguageModel) -> None:
    class Pairs(ByteTokenizer):
        def decode(self, ids: list[int], special: bool = True) -> str:
            return "".join("\n\n" if id == 200 else chr(id) for id in ids)
    language = LanguageModel(byte_language.model, Pairs())
    config, text = AnswersConfig(), PromptConfig(template="{question}")
    assert set(answer_ends(language, config, text)) == {10, 200}
    assert answer_ends(language, config, PromptConfig()) == answer_ends(language, config) == (10,)
    assert set(answer_ends(language, AnswersConfig(stop_at_line_break=True), PromptConfig())) == {10, 200}
    assert answer_ends(language, AnswersConfig(stop_at_line_break=False), text) == (10,)


def test_judgements_read_the_logits_after_their_prompt(byte_language: LanguageModel) -> None:
    language = LanguageModel(byte_language.model, ByteTokenizer())
    prompter = Prompter(language, PromptConfig(template="Q: {question}\nA:", instruction=""))
    asked, given = ["Who?", "Where is it?"], ["Ann", "Rome or so"]
    logits, lengths = p_true_logits(language, prompter, asked, given, AnswersConfig(batch_size=1))
    for question, reply, pair, n in zip(asked, given, logits, lengths, strict=True):
        text = prompter.follow_up(question, reply, "Is the answer above correct?\n(A) True\n(B) False\n"
                                  "Reply with A or B only.") + " "
        assert n == len(text.encode())
        expected = np.asarray(language.model(np.array([list(text.encode())])))[0, -1, [ord("A"), ord("B")]]
        np.testing.assert_allclose(pair, expected, rtol=0, atol=1e-4)  # sums below 30 in two layers
    replies, tokens = verbalise(language, prompter, asked, given, AnswersConfig(batch_size=2))
    assert len(replies) == 2 and all(n > 20 and 1 <= new <= 12 for n, new in tokens)
    assert answer(language, [prompter("Who?")], AnswersConfig(max_new=2))[0].samples == []
