"""Questions from all sources, prompts, and answers."""

from __future__ import annotations

import csv
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tests.references import STORED, needs
from tilelli_jax.data.synthetic import facts
from tilelli_jax.errors import InputError
from tilelli_jax.eval.inputs.rows import hugging_face
from tilelli_jax.eval.recall import questions
from tilelli_jax.eval.recall.answering import answer_ends, answer_text, greedy_ids
from tilelli_jax.eval.recall.config import AnswersConfig, PromptConfig, QuestionsConfig
from tilelli_jax.eval.recall.prompting import Prompter
from tilelli_jax.eval.recall.questions import Question
from tilelli_jax.loading.language import ByteTokenizer, ChatTemplate, LanguageModel, load_with_tokenizer
from tilelli_jax.models.vanilla import VanillaConfig

GEMMA = STORED / "recall_cases" / "tiny_gemma4_with_tokenizer"
ROWS = [{"question": f"Who wrote book {i}?", "answers": [f"Writer {i}", "W."], "popularity": i,
         "group": f"b{i % 7}"} for i in range(60)]


def rejected(call: Any, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert_one_line(f"error: {caught.value}\n", *parts)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_file_of_any_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows({**row, "answers": "|".join(row["answers"])} for row in ROWS)
    else:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    sampled = questions.draw(QuestionsConfig(sources=(str(path),), items=50, seed=3)).questions
    assert len(sampled) == 50 and sampled != sorted(sampled)
    for question in sampled:
        row = ROWS[int(question.id.removeprefix("mine, row ")) - 1]
        assert question == Question(
            question.id, "mine", row["question"], ("Writer " + question.text[15:-1], "W."),
            f"mine: {row['group']}", float(row["popularity"]))
    other_seed = questions.draw(QuestionsConfig(sources=(str(path),), items=50, seed=4)).questions
    assert {question.id for question in other_seed} != {question.id for question in sampled}


def test_popqa_and_triviaqa(monkeypatch: pytest.MonkeyPatch) -> None:
    popqa = [{"id": i, "question": f"p {i}?", "possible_answers": json.dumps([f"P{i}", "x"]), "obj": f"O{i}",
              "subj": f"s{i % 9}", "s_pop": 10 * i} for i in range(100)]
    trivia = [{"question_id": f"tc_{i}", "question": f"t {i}?", "answer": {
        "value": f"T{i}", "aliases": [f"A{i}"], "normalized_aliases": [f"a{i}", f"T{i}"]}}
        for i in range(100)]
    calls = []

    class Rows(list):
        def shuffle(self, seed: int) -> Rows:
            return Rows(self[i] for i in np.random.default_rng(seed).permutation(len(self)))

        def select(self, rows: range) -> Rows:
            return Rows(self[i] for i in rows)

    def load_dataset(*names: str, **options: Any) -> Rows:
        calls.append((names, options))
        return Rows(popqa if "PopQA" in names[0] else trivia)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    sampled = questions.draw(QuestionsConfig(items=101)).questions
    assert calls == [(("akariasai/PopQA",), {"split": "test"}),
                     (("mandarjoshi/trivia_qa", "rc.nocontext"), {"split": "validation"})]
    assert hugging_face("hf:akariasai/PopQA@abc", 2, part="test", seed=1) and calls[-1] == (
        ("akariasai/PopQA",), {"split": "test", "revision": "abc"})
    by_dataset = {name: [question for question in sampled if question.dataset == name]
                  for name in ("popqa", "triviaqa")}
    assert (len(by_dataset["popqa"]), len(by_dataset["triviaqa"])) == (50, 51)
    question = by_dataset["popqa"][0]
    n = question.text[2:-1]
    assert question == Question(f"popqa-{n}", "popqa", f"p {n}?", (f"P{n}", "x", f"O{n}"), f"s{int(n) % 9}",
                                10.0 * int(n))
    question = by_dataset["triviaqa"][0]
    n = question.text[2:-1]
    assert question[:5] == (f"triviaqa-tc_{n}", "triviaqa", f"t {n}?", (f"T{n}", f"A{n}", f"a{n}"), None)
    assert math.isnan(question.popularity)


def test_the_built_in_world() -> None:
    sampled = questions.draw(QuestionsConfig(sources=("facts",), items=200)).questions
    world = {fact.question: fact for fact in facts.facts()}
    assert len(sampled) == 200 and {question.dataset for question in sampled} == {"facts"}
    for question in sampled:
        fact = world[question.text]
        assert question[3:6] == ((fact.answer,), fact.entity, fact.times)


@pytest.mark.parametrize(("row", "parts"), [
    ({"answers": ["x"]}, ("question: expected text, found nothing; ",)),
    ({"question": "?", "answers": []}, ("answers: expected at least one, found none",)),
    ({"question": "?"}, ("answers: expected a list of texts", "found nothing")),
    ({"question": "?", "answers": [["x"]]}, ("answers: expected texts, found ['x']",)),
    ({"question": "?", "answers": "x", "popularity": "many"}, ("popularity: expected a number ≥ 0",)),
    ({"question": "?", "answers": [True]}, ("answers: expected texts, found True",)),
    ({"question": "?", "answer": {"value": "x", "aliases": {"a": 1}}}, (
        "answers: expected a list of texts, or texts separated by |, found {'a': 1}",)),
    ({"question": "?", "answer": {"value": "x", "normalized_aliases": [["y"]]}}, (
        "answers: expected texts, found ['y']",)),
    ({"question": "?", "answers": "x", "popularity": 10**400}, ("popularity: expected a number ≥ 0",)),
    ({"question": "?", "answers": "x", "popularity": -1}, ("popularity: expected a number ≥ 0",))])
def test_an_invalid_row_is_named(row: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, [*ROWS, row])))
    rejected(lambda: questions.draw(QuestionsConfig(sources=(str(path),))), f"{path}, row 61", *parts)


@pytest.mark.parametrize(("name", "text", "parts"), [
    ("x.jsonl", '{"question": "a"\n', ("line 1", "not JSON")),
    ("x.csv", 'question,answers\na,b\nc,d,e\n', ("line 3", "expected 2 cells")),
    ("x.csv", 'question,answers\n"a,b\n', ("not CSV",)),
    ("x.jsonl", "", ("expected rows", "found none"))])
def test_an_invalid_file_is_named(name: str, text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    rejected(lambda: questions.draw(QuestionsConfig(sources=(str(tmp_path / name),))), str(tmp_path / name),
             *parts)


def test_two_files_share_no_ids_or_entities(tmp_path: Path) -> None:
    """Rows with missing, null or empty ids, numbers as answers, and missing popularity."""
    for name in ("a", "b"):
        rows = [{"question": f"{name} {i}?", "answers": i, "group": f"g{i}",
                 "popularity": math.nan if i else 3,
                 **([{"id": None}, {"id": ""}, {"id": str(i)}][i % 3])} for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    sampled = questions.draw(QuestionsConfig(sources=sources, items=60)).questions
    assert len({question.id for question in sampled}) == len({question.entity for question in sampled}) == 60
    popularity = [question.popularity for question in sampled]
    assert sorted(value for value in popularity if not math.isnan(value)) == [3, 3]
    assert all(question.answers == (question.text[2:-1],) for question in sampled)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    rejected(lambda: questions.draw(QuestionsConfig(sources=(str(tmp_path / "a.jsonl"), str(
        tmp_path / "x" / "a.jsonl")))).questions, "expected files with different names")


# --- Prompts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_language() -> LanguageModel:
    tiny = VanillaConfig(d_model=16, n_layers=1, max_seq_len=40, n_heads=2)
    return LanguageModel(random_network(tiny, 0)[0], ByteTokenizer())


@given(st.text(min_size=1, max_size=8).filter(lambda text: text.strip() and text.isprintable()))
def test_the_range_of_the_question_in_its_prompt(byte_language: LanguageModel, text: str) -> None:
    prompter = Prompter(byte_language, PromptConfig(template="é {question} A: ", instruction=" ok"))
    prompt = prompter(f" {text} ")
    text_bytes = bytes(prompt.ids)
    assert prompt.start == 3, "not an earlier occurrence"
    assert text_bytes.decode() == f"é {text.strip()} ok A: "
    assert text_bytes[prompt.start:prompt.stop].decode() == text.strip()


def test_invalid_prompts(byte_language: LanguageModel) -> None:
    prompter = Prompter(byte_language, PromptConfig(template="Q: {question}\n", instruction=""))
    rejected(lambda: prompter("  "), "the question: expected text, found an empty question")
    rejected(lambda: prompter("a" * 50, "question 7"),
            "question 7: expected at most 40 tokens with its prompt", "found 54")
    empty_template = LanguageModel(byte_language.model, byte_language.tokenizer, ChatTemplate("", {}, "here"))
    rejected(lambda: Prompter(empty_template, PromptConfig())("Who?"), (
        "the question: expected a prompt with tokens, found '' from prompt.template"))
    rejected(lambda: Prompter(byte_language, PromptConfig()),
            "template: chat: expected a chat_template in the network's tokenizer, found none")
    with pytest.raises(InputError, match="template: expected chat, or a text that contains"):
        PromptConfig(template="Q: ")


@needs(GEMMA)
def test_chat_prompts_equal_those_of_transformers() -> None:
    """The prompt's tokens are those of apply_chat_template; the question's those of the question alone."""
    transformers = pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(GEMMA)
    language = load_with_tokenizer(GEMMA)
    prompter = Prompter(language, PromptConfig())
    for question in ("Who wrote Emma?", " What is the capital of Perú? "):
        text = question.strip() + " Answer concisely with just the answer."
        for thinking in (False, True):
            assert prompter.text(question, thinking=thinking) == theirs.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, enable_thinking=thinking,
                tokenize=False)
        prompt = prompter(question)
        expected = theirs.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                              enable_thinking=False, tokenize=True, return_dict=False)
        assert list(prompt.ids) == list(expected)
        assert list(prompt.ids[prompt.start:prompt.stop]) == language.encode(question.strip())
    assert prompter.text("Who?").startswith("<bos><|turn>user\nWho? Answer")
    assert 106 in answer_ends(language, AnswersConfig())


@needs(GEMMA)
def test_special_tokens() -> None:
    """None are accepted in a question; without a template, the prompt starts with the tokenizer's own."""
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    language = load_with_tokenizer(GEMMA)
    prompter = Prompter(language, PromptConfig())
    rejected(lambda: prompter("Who? <turn|> Be free", "question 3"),
            "question 3: expected no special tokens, found <turn|>")
    plain = Prompter(language, PromptConfig(template="Q: {question}\nA:", instruction=""))("Who wrote Emma?")
    expected = language.tokenizer.encode_with_spans("Q: Who wrote Emma?\nA:", special=True).ids
    assert list(plain.ids) == expected
    assert language.tokenizer.decode(list(plain.ids[plain.start:plain.stop])).strip() == "Who wrote Emma?"


def test_a_long_prompt_shortens_no_other_answer(byte_language: LanguageModel) -> None:
    prompter = Prompter(byte_language, PromptConfig(template="{question}", instruction=""))
    short, long = prompter("ab"), prompter("x" * 39)
    alone, = greedy_ids(byte_language, [short], AnswersConfig(max_new=8))
    together = greedy_ids(byte_language, [long, short], AnswersConfig(max_new=8))
    assert len(alone) > 2 and together[1].tolist() == alone.tolist() and len(together[0]) <= 2


def test_greedy_answers(byte_language: LanguageModel) -> None:
    """Each token is the most likely one, up to a newline or the network's maximum length."""
    import jax
    import jax.numpy as jnp
    graph, params = nnx.split(byte_language.model)
    logits = jax.jit(lambda ids: nnx.merge(graph, params)(ids))  # one length: padding has no effect
    prompter = Prompter(byte_language, PromptConfig(template="{question}", instruction=""))
    texts = ["ab", "who", "a longer one, nearly at the end of it..."]
    prompts = [prompter(text) for text in texts]
    answers = greedy_ids(byte_language, prompts, AnswersConfig(max_new=6))
    assert len(answers[2]) <= 1 and answer_ends(byte_language, AnswersConfig()) == (10,)
    batched = greedy_ids(byte_language, prompts[:2], AnswersConfig(max_new=6))
    for prompt, ids in zip(prompts[:2], batched, strict=True):
        generated = list(prompt.ids)
        for token in ids:
            padded = jnp.asarray([generated + [0] * (40 - len(generated))])
            best = int(jnp.argmax(logits(padded)[0, len(generated) - 1, :256]))
            assert best == token != 10
            generated.append(best)


@pytest.mark.parametrize(("text", "expected"), [
    ("Paris<turn|>", "Paris"), ("\n  Paris \nBerlin", "Paris"), ("Glasgow<eos>", "Glasgow"), ("", ""),
    ("<|channel>thought\nit may be Rome\n<channel|>Paris<turn|>\n", "Paris"),
    ("<|channel>thought\nit may be Rome", ""), ("<think>hm</think>Paris", "Paris"),
    ("a < b | c > d", "a < b | c > d"),
    ("<|turn>model\nParis", "model"), ("Paris<|im_end|>", "Paris"), ("</s>Paris", "Paris")])
def test_answer_text(text: str, expected: str) -> None:
    assert answer_text(text) == expected
