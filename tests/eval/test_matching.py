"""Matching answers: Recall's stored cases, and what the strict rule does otherwise."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.matching import is_match, is_refusal, recall_words, words
from tests.references import STORED, needs

CASES = STORED / "recall_cases" / "match_cases.json"


@needs(CASES)
def test_recalls_cases() -> None:
    cases = json.loads(CASES.read_text())
    assert len(cases) >= 20
    for case in cases:
        assert " ".join(recall_words(case["prediction"])) == case["norm_prediction"]
        assert [" ".join(recall_words(gold)) for gold in case["golds"]] == case["norm_golds"]
        assert is_match(case["prediction"], case["golds"], "recall") == case["match"], case


@pytest.mark.parametrize(("said", "gold", "strict", "recall"), [
    ("Jane", "Jane Austen", False, True), ("I", "I, Claudius", False, True),
    ("Austen", "Jane Austen", False, False),
    ("the novelist Jane Austen", "Jane Austen", True, True), ("catalog", "cat", False, False),
    ("U.S.A.", "USA", True, False), ("the U.S.", "US", True, False), ("USA", "U.S.A.", True, False),
    ("Beyonce", "Beyoncé", True, False), ("Straße", "STRASSE", True, False),
    ("Paris—France", "Paris", True, False), ("O’Brien", "O'Brien", True, False),
    ("1,000", "1000", True, False), ("1 000 people", "1,000", True, True), ("seven", "7", True, False),
    ("7", "Seven", True, False), ("3.5", "3.5", True, True), ("4 2", "42", False, False),
    ("London or Paris", "Paris", False, True), ("true or false", "True or False", True, True),
    ("No. 10 Downing Street", "10 Downing Street", True, True), ("No, it is Paris", "Paris", True, True),
    ("not Paris", "Paris", False, True), ("It isn't Paris.", "Paris", False, True),
    ("Not surprisingly for a lover of art, Paris", "Paris", True, True),
    ("I don't know. Maybe Paris", "Paris", False, True), ("The The", "The The", True, False),
    ("", "x", False, False),
    ("x", "", False, False), ("日本", "日本", True, True)])
def test_both_rules(said: str, gold: str, strict: bool, recall: bool) -> None:
    assert (is_match(said, [gold]), is_match(said, [gold], "recall")) == (strict, recall)


@pytest.mark.parametrize(("said", "refuses"), [
    ("I don't know.", True), ("I do not have information about that", True), ("Sorry, I'm not sure", True),
    ("Please provide more context about who you mean", True), ("I need more information", True),
    ("It is unknown.", True), ("I'm unable to tell", True), ("I cannot determine which film", True),
    ("Insufficient information", True), ("Paris", False), ("Know Your Enemy", False), ("I", False),
    ("", False),
    ("Unforgiven", False), ("The Unknown Soldier", False)])
def test_refusals(said: str, refuses: bool) -> None:
    assert is_refusal(said) == refuses


@given(st.lists(st.sampled_from(["paris", "the", "7", "rome", "u.s.", "né", "or"]), min_size=1, max_size=5))
def test_an_answer_matches_itself(said: list[str]) -> None:
    text = " ".join(said)
    assert is_match(text, [text]) and words(" ".join(words(text))) == words(text)


@given(st.text(max_size=30), st.lists(st.text(max_size=10), max_size=3))
def test_any_text_at_all(said: str, golds: list[str]) -> None:
    for rule in ("strict", "recall"):
        assert is_match(said, golds, rule) in (True, False)  # type: ignore[arg-type]
        assert not is_match(said, [], rule)  # type: ignore[arg-type]
