"""How a network is led to an answer, and what of what it says is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tilelli_jax.eval.recall import thought_seeding
from tilelli_jax.eval.recall.answering import answer, said
from tilelli_jax.eval.recall.config import AnswersConfig, PromptConfig
from tilelli_jax.eval.recall.predictor import KnowledgePredictor
from tilelli_jax.eval.recall.prompting import Prompter

from tests.eval.recall.small import (
    ASKED,
    MAX_NEW,
    PROMPT,
)
from tests.restated.reciter import reciter
from tilelli_jax.errors import InputError
from tilelli_jax.language import Bytes, Language


@pytest.mark.parametrize(("p", "percent", "does"), [
    (0.0, "0%", "not guess"), (0.3949, "39%", "not guess"), (0.4, "40%", "unsure"),
    (0.695, "70%", "unsure"), (0.7, "70%", "directly"), (1.0, "100%", "directly")])
def test_a_seed_says_how_likely_and_what_to_do(p: float, percent: str, does: str) -> None:
    text = thought_seeding.seed(p)
    assert f" {percent} " in text and does in text and text.startswith("An inner probe gives me ")
    assert sum(word in text for word in ("not guess", "unsure", "directly")) == 1 and "\n" not in text


def test_the_bounds_of_a_seed() -> None:
    assert thought_seeding.seed(0.5, 0.6, 0.9) == thought_seeding.seed(0.5, 1, 1)
    assert thought_seeding.seed(0.5, 0.5, 0.5) == thought_seeding.seed(0.5, 0, 0)
    for low, high in ((0.7, 0.4), (-0.1, 0.4), (0.5, 1.5), (float("nan"), 0.5)):
        with pytest.raises(InputError, match="low and high: expected chances, low not above high"):
            thought_seeding.seed(0.5, low, high)


def chatting(tokens: Sequence[str], end: str = "") -> Any:
    """As much of a knower as is asked how to ask: a chat whose tokenizer knows some tokens."""
    def text(question: str, *, thinking: bool = False) -> str:
        return f"[{'think' if thinking else 'do not'}]{question}[you]{end}"
    tokenizer = SimpleNamespace(token={token: i for i, token in enumerate(tokens)}.get)
    return SimpleNamespace(
        language=SimpleNamespace(tokenizer=tokenizer),
        prompter=SimpleNamespace(config=PromptConfig(), text=text))


def test_how_a_question_is_put() -> None:
    gemma, other = chatting(["<|channel>", "<channel|>"]), chatting(["<think>", "</think>"], "<think>\n")
    mute, half = chatting([]), chatting(["<think>"])
    channel, second = thought_seeding.CHANNELS
    assert thought_seeding.asked(gemma, "q") == ("[think]q[you]", channel, False, False)
    assert thought_seeding.asked(gemma, "q", "t") == ("[think]q[you]<|channel>thought\nt", channel, True, False)
    assert thought_seeding.asked(other, "q") == ("[think]q[you]<think>\n", second, True, False)
    assert thought_seeding.asked(other, "q", "t") == ("[think]q[you]<think>\nt", second, True, False)
    for one in (mute, half):
        assert thought_seeding.asked(one, "q") == ("[think]q[you]", None, False, False)
        assert thought_seeding.asked(one, "q", "t") == ("[think]q[you]t\n", None, False, False)


OPEN = thought_seeding.Asked("…", thought_seeding.CHANNELS[0], True, False)
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
    (CLOSED._replace(channel=thought_seeding.CHANNELS[1]), "<think>\nhm</think>\n\nRome<|im_end|>", "hm",
     "Rome"),
    (CLOSED._replace(channel=None), "<|turn>Rome", "", "Rome"),
    (CLOSED._replace(channel=None, first_line=True), "\n Rome \nQ: who", "", "Rome"),
])
def test_the_answer_is_what_follows_the_last_thought(how: thought_seeding.Asked, made: str, thought: str,
                                                     found: str | None) -> None:
    assert thought_seeding.split(made, how) == (thought, found)


def reciting(answer: str, **changed: Any) -> Any:
    """As much of a knower as is asked for an answer, the same after any question of two letters."""
    before = "Q: hi\nA: "
    language = Language(reciter(before.encode() + answer.encode(), **changed), Bytes())
    return SimpleNamespace(language=language, prompter=Prompter(language, PROMPT))


def test_an_answer_comes_in_pieces_and_ends_with_its_line() -> None:
    one = reciting("Grüße aus Rom\nQ: and more")
    pieces = list(thought_seeding.answer_seeded(one, "hi", chunk=3))
    assert pieces[-1] == ("", "Grüße aus Rom", True) and len(pieces) > 4
    assert [piece.done for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    for piece in pieces:
        assert "Grüße aus Rom".startswith(piece.answer or ""), "no half a character"
    assert list(thought_seeding.answer_seeded(one, "hi", most=4))[-1] == ("", "Grü", False)
    # A thought is a line before the prompt.
    assert thought_seeding.asked(one, "hi", "a seed").text == "a seed\nQ: hi\nA: "
    whole = b"a seed\nQ: hi\nA: Rom\nand"
    one.language = Language(reciter(whole), Bytes())
    assert list(thought_seeding.answer_seeded(one, "hi", "a seed"))[-1] == ("", "Rom", True)


def test_what_leaves_no_room_is_refused_at_once() -> None:
    one = reciting("Rome\n", size=32)
    with pytest.raises(InputError, match="the question is empty"):
        thought_seeding.answer_seeded(one, "  ")
    with pytest.raises(InputError, match="has 49 tokens with its prompt, and the network reads 32"):
        thought_seeding.answer_seeded(one, "h" * 42)
    with pytest.raises(InputError, match=r"34 tokens with its prompt and the thought, .* no room"):
        thought_seeding.answer_seeded(one, "hi", "t" * 24)
    assert list(thought_seeding.answer_seeded(one, "h" * 24))[-1].done is False, "room for one"


def test_the_baseline_is_the_answer_of_a_study(predictor: KnowledgePredictor) -> None:
    """Greedy, from the same prompt, to the same ends."""
    options = AnswersConfig(max_new=MAX_NEW)
    ids = answer(predictor.language, [predictor.prompter(question) for question in ASKED], options)
    expected = [said(predictor.language.tokenizer.decode(row.tolist())) for row in ids]
    found = [list(thought_seeding.answer_seeded(predictor, question, most=MAX_NEW))[-1].answer for question in ASKED]
    assert found == expected and all(found) and len(set(found)) > 1


