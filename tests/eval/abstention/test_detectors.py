"""Detectors on hand-written cases and on the village's answers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.data.synthetic import village
from tilelli_jax.eval.abstention.detectors import (
    distinct,
    has_refusal_phrase,
    is_affirmation,
    is_loop,
    is_utf8,
    text_quality,
)


@pytest.mark.parametrize(("answer", "refuses"), [
    ("I don't know.", True), ("i do not know that", True), ("Well, I DON’T  KNOW", True),
    ("I'm not sure", True),
    ("No idea!", True), ("I can't help you", True), ("I cannot answer", True), ("I can't tell.", True),
    ("It is unknown to me", True), ("That is unclear", True), ("We don't have that", True), ("idk lol", True),
    ("", True), (" \n ", True), ("The Unknown Soldier", True),
    ("Aldo lives in Elkford.", False), ("You don't know me", False), ("I know", False), ("kidknees", False),
    ("I can't eat", False), ("nuclear", False), ("They have it", False), ("I don't.", False)])
def test_refusal_phrases(answer: str, refuses: bool) -> None:
    assert has_refusal_phrase(answer) == refuses


@pytest.mark.parametrize(("answer", "affirms"), [
    ("Yes.", True), ("yes, it is", True), ("Sure thing", True), ("Indeed", True), ("Correct: so it is", True),
    ("\"Yes\"", True), (" YES", True), ("Well, that's true", True), ("oh\nthat’s true", True),
    ("That is true.", True),
    ("Yesterday", False), ("Surely not", False), ("Correction: no", False), ("No, yes", False), ("", False),
    ("That's not true", False), ("It is sure", False)])
def test_affirmations(answer: str, affirms: bool) -> None:
    assert is_affirmation(answer) == affirms


@pytest.mark.parametrize(("answer", "loops"), [
    ("abcabcabcabcabc", True), ("abcabcabcabcab", False), ("a" * 15, True), ("a" * 14, False),
    (" " * 30, False), ("aaaaaaa" + "bcdefgh", False), ("aaaaaaa" + "bcdefghi", True),
    ("abcdabcdabcdabcd", False), ("the cat the dog the hen the cow the pig", True),
    ("Aldo Alder lives in Elkford and likes plum soup.", False)])
def test_loops(answer: str, loops: bool) -> None:
    assert is_loop(answer) == loops


@given(st.text("abc ", max_size=40))
def test_loops_against_a_direct_count(answer: str) -> None:
    text = answer.strip()
    most = max((sum(text[j:j + 3] == text[i:i + 3] for j in range(len(text) - 2))
                for i in range(len(text) - 2)), default=0)
    assert is_loop(answer) == (len(text) >= 15 and most >= 5)


def test_utf8() -> None:
    assert all(map(is_utf8, (b"", b"abc", "née 日本 🙂".encode(), "née".encode()[:2], "🙂".encode()[:3])))
    assert not any(map(is_utf8, (b"\xff", b"a\x80", "é".encode()[:1] + b"a", b"\xc0\x80", b"\xed\xa0\x80")))


@given(st.text(max_size=20), st.integers(0, 60))
def test_text_cut_at_any_byte_is_valid_utf8(text: str, length: int) -> None:
    assert is_utf8(text.encode()[:length])


def test_distinct() -> None:
    assert distinct(["a b a b", "a b"], 1) == 2 / 6 and distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct(["a b", "b c"], 2) == 1 and math.isnan(distinct(["a", ""], 2))
    assert distinct(["to be or not to be"], 2) == 4 / 5


def test_text_quality() -> None:
    result = text_quality([b"abc abc abc abc abc abc", b"\xff", b" ", b"fine words"])
    assert result[:3] == (0.75, 0.25, 0.25)
    assert result.distinct_1 == 4 / 9 and result.distinct_2 == 2 / 6
    assert all(map(math.isnan, text_quality([])))


def test_village_answers_are_detected_as_intended() -> None:
    assert all(map(has_refusal_phrase, village.ABSTENTIONS))
    assert not any(map(is_affirmation, village.ABSTENTIONS))
    for pair in village.chat(village.world(), 2000, unanswerable=0):
        assert not has_refusal_phrase(pair.response) and not is_loop(pair.response)
        confirms = pair.prompt.startswith("Is it true") or pair.prompt.endswith(", right?")
        assert is_affirmation(pair.response) == confirms
