"""Thought seeds, where prompts contain them, and the answer in generated text."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tests.eval.recall.small import (
    ASKED,
    MAX_NEW,
    PROMPT,
    answers_alone,
)
from tests.reference_impl.memorised_text import reciter
from tilelli_jax.errors import InputError
from tilelli_jax.eval.recall.answering import answer_text, greedy_ids
from tilelli_jax.eval.recall.app import thought_seeding
from tilelli_jax.eval.recall.config import AnswersConfig, PromptConfig
from tilelli_jax.eval.recall.predictor import KnowledgePredictor
from tilelli_jax.eval.recall.prompting import Prompter
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.eval.thresholds import Thresholds
from tilelli_jax.loading.language import ByteTokenizer, LanguageModel


@pytest.mark.parametrize(("p", "percent", "instruction"), [
    (0.0, "0%", "not guess"), (0.3949, "39%", "not guess"), (0.4, "40%", "unsure"),
    (0.695, "70%", "unsure"), (0.7, "70%", "directly"), (1.0, "100%", "directly")])
def test_seed_states_percentage_and_instruction(p: float, percent: str, instruction: str) -> None:
    text = thought_seeding.seed(p)
    assert f" {percent} " in text and instruction in text and text.startswith("An inner probe gives me ")
    assert sum(word in text for word in ("not guess", "unsure", "directly")) == 1 and "\n" not in text


def test_bounds_of_a_seed() -> None:
    assert thought_seeding.seed(0.5, 0.6, 0.9) == thought_seeding.seed(0.5, 1, 1)
    assert thought_seeding.seed(0.5, 0.5, 0.5) == thought_seeding.seed(0.5, 0, 0)
    for low, high in ((0.7, 0.4), (-0.1, 0.4), (0.5, 1.5), (float("nan"), 0.5)):
        with pytest.raises(InputError, match="low and high: expected probabilities with low at most high"):
            thought_seeding.seed(0.5, low, high)


@pytest.mark.parametrize(("knows_from", "unknown_below", "expected"), [
    (0.8531, 0.2149, (0.215, 0.853)), (None, None, (0.4, 0.7)), (0.9, None, (0.4, 0.9)),
    (0.2, None, (0.2, 0.2)), (None, 0.3, (0.3, 0.7)), (None, 0.8, (0.8, 0.8)),
    (0.3, 0.6, (0.3, 0.3)), (1.0, 0.0, (0.0, 1.0))])
def test_start_bounds_are_the_thresholds(knows_from: float | None, unknown_below: float | None,
                                         expected: tuple[float, float]) -> None:
    low, high = thought_seeding.start_bounds(Thresholds(knows_from, unknown_below))
    assert (low, high) == expected
    thought_seeding.seed(0.5, low, high)


def chat_stub(tokens: Sequence[str], end: str = "") -> Any:
    """The part of a predictor that builds prompts: a chat whose tokenizer has these tokens."""
    def text(question: str, *, thinking: bool = False) -> str:
        return f"[{'think' if thinking else 'do not'}]{question}[you]{end}"
    tokenizer = SimpleNamespace(token={token: i for i, token in enumerate(tokens)}.get)
    return SimpleNamespace(
        language=SimpleNamespace(tokenizer=tokenizer),
        prompter=SimpleNamespace(config=PromptConfig(), text=text))


def test_seeded_prompts() -> None:
    gemma, other = chat_stub(["<|channel>", "<channel|>"]), chat_stub(["<think>", "</think>"], "<think>\n")
    without, half = chat_stub([]), chat_stub(["<think>"])
    channel, second = thought_seeding.CHANNELS
    assert thought_seeding.seeded_prompt(gemma, "q") == ("[think]q[you]", channel, False, False)
    assert thought_seeding.seeded_prompt(gemma, "q", "t") == (
        "[think]q[you]<|channel>thought\nt", channel, True, False)
    assert thought_seeding.seeded_prompt(other, "q") == ("[think]q[you]<think>\n", second, True, False)
    assert thought_seeding.seeded_prompt(other, "q", "t") == ("[think]q[you]<think>\nt", second, True, False)
    for stub in (without, half):
        assert thought_seeding.seeded_prompt(stub, "q") == ("[think]q[you]", None, False, False)
        assert thought_seeding.seeded_prompt(stub, "q", "t") == ("[think]q[you]t\n", None, False, False)


OPEN = thought_seeding.SeededPrompt("…", thought_seeding.CHANNELS[0], True, False)
CLOSED = OPEN._replace(in_thought=False)


@pytest.mark.parametrize(("prompt", "generated", "thought", "expected"), [
    (OPEN, " and so.<channel|>Rome<turn|>", "and so.", "Rome"),
    (OPEN, " and so", "and so", None),
    (OPEN, "<channel|>", "", ""),
    (OPEN, "a<channel|>b<|channel>thought\nc<channel|>d", "abc", "d"),
    (OPEN, "a<channel|>b<|channel>thought\nc", "abc", None),
    (CLOSED, "Rome\nof course", "", "Rome\nof course"),
    (CLOSED, "<|channel>thought\nhm<channel|>\nRome", "hm", "Rome"),
    (CLOSED, "<|channel>thought\nhm", "hm", None),
    (CLOSED._replace(channel=thought_seeding.CHANNELS[1]), "<think>\nhm</think>\n\nRome<|im_end|>", "hm",
     "Rome"),
    (CLOSED._replace(channel=None), "<|turn>Rome", "", "Rome"),
    (CLOSED._replace(channel=None, first_line=True), "\n Rome \nQ: who", "", "Rome"),
])
def test_answer_follows_the_last_thought(prompt: thought_seeding.SeededPrompt, generated: str, thought: str,
                                         expected: str | None) -> None:
    assert thought_seeding.split(generated, prompt) == (thought, expected)


def reciting_stub(answer: str, **options: Any) -> Any:
    """The part of a predictor that generates: this answer after any question of two letters."""
    prompt = "Q: hi\nA: "
    language = LanguageModel(reciter(prompt.encode() + answer.encode(), **options), ByteTokenizer())
    return SimpleNamespace(language=language, prompter=Prompter(language, PROMPT), rule=VerdictRule())


def test_answer_streams_and_ends_with_its_line() -> None:
    stub = reciting_stub("Grüße aus Rom\nQ: and more")
    pieces = list(answers_alone(stub, "hi", chunk=3))
    assert pieces[-1] == ("", "Grüße aus Rom", True) and len(pieces) > 4
    assert [piece.done for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    for piece in pieces:
        assert "Grüße aus Rom".startswith(piece.answer or ""), "complete characters only"
    assert list(answers_alone(stub, "hi", max_new=4))[-1] == ("", "Grü", False)
    # A thought is a line before the prompt.
    assert thought_seeding.seeded_prompt(stub, "hi", "a seed").text == "a seed\nQ: hi\nA: "
    text = b"a seed\nQ: hi\nA: Rom\nand"
    stub.language = LanguageModel(reciter(text), ByteTokenizer())
    assert list(answers_alone(stub, "hi", "a seed"))[-1] == ("", "Rom", True)


def test_too_long_questions_are_rejected_at_the_call() -> None:
    stub = reciting_stub("Rome\n", size=32)
    with pytest.raises(InputError, match="the question: expected text, found an empty question"):
        answers_alone(stub, "  ")
    with pytest.raises(InputError, match=r"expected at most 32 tokens with its prompt, .* found 49"):
        answers_alone(stub, "h" * 42)
    with pytest.raises(InputError, match=r"than 32 tokens with its prompt and the thought.* found 34"):
        answers_alone(stub, "hi", "t" * 24)
    assert list(answers_alone(stub, "h" * 24))[-1].done is False, "room for one"


def test_baseline_equals_the_answers_of_a_study(predictor: KnowledgePredictor) -> None:
    """Greedy decoding from the same prompt with the same end tokens."""
    options = AnswersConfig(max_new=MAX_NEW)
    ids = greedy_ids(predictor.language, [predictor.prompter(question) for question in ASKED], options)
    expected = [answer_text(predictor.language.tokenizer.decode(row.tolist())) for row in ids]
    answers = [list(answers_alone(predictor, question, max_new=MAX_NEW))[-1].answer
               for question in ASKED]
    assert answers == expected and all(answers) and len(set(answers)) > 1


