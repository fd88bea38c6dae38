"""Matching answers: Recall's stored cases, and what the strict rule does otherwise."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilelli_jax.eval.matching import is_match, is_refusal, recall_words, words

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
    ("Tom & Jerry", "Tom and Jerry", True, False), ("Lodz", "Łódź", True, False),
    ("Unknown", "Unknown", True, True),
    ("I Don't Know How She Does It", "I Don't Know How She Does It", True, True),
    ("It was not until 1969", "1969", True, True),
    ("No. 10 Downing Street", "10 Downing Street", True, True), ("No, it is Paris", "Paris", True, True),
    ("not Paris", "Paris", False, True), ("It isn't Paris.", "Paris", False, True),
    ("Not surprisingly for a lover of art, Paris", "Paris", True, True),
    ("I don't know. Maybe Paris", "Paris", False, True), ("The The", "The The", True, False),
    ("", "x", False, False),
    ("x", "", False, False), ("日本", "日本", True, True),
    # Signs make another answer of it.
    ("-5", "5", False, True), ("5", "-5", False, True), ("−5", "-5", True, False),
    ("-5 degrees", "–5", True, False), ("from 3-5", "5", True, True), ("1914-1918", "1918", True, True),
    ("$5", "5", False, True), ("it costs $5", "$5", True, True), ("€5", "$5", False, False),
    ("5%", "5", False, True), ("5 percent", "5%", True, True), ("C", "C++", False, True),
    ("C++", "C", False, True), ("it is C++.", "C++", True, True), ("C#", "C++", False, True),
    ("C#", "C", False, True), ("A+", "A", False, False), ("Disney+", "Disney", False, True),
    (".NET", "net", False, True), ("the .NET framework", ".NET", True, True),
    ("The end. Paris", "Paris", True, True), ("@", "@", True, False), ("@", "#", False, False),
    # And scripts without spaces have words.
    ("答案是北京。", "北京", True, False), ("上海", "北京", False, False),
    ("がくせい", "かくせい", False, False),
    ("คำตอบคือกรุงเทพ", "กรุงเทพ", True, False)])
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


@pytest.mark.parametrize("said", [
    "The author of *1985* is not specified without more context.", "The title is not provided.",
    "Please provide the title of the book.", "Could you please provide more details?",
    "As an AI, I have no access to that.", "Sorry, I don't know.", "It has not been identified."])
def test_refusals_of_many_kinds(said: str) -> None:
    assert is_refusal(said) and not is_match(said, ["Paris"])


@pytest.mark.parametrize("said", [
    "Paris", "He was given the prize in 1969.", "Not specified elsewhere: Paris",
    "Paris. Please tell me if that helps.", "John Please"])
def test_answers_that_are_no_refusals(said: str) -> None:
    assert not is_refusal(said)


PUBLISHED = STORED / "data" / "recall_dataset.parquet"


@needs(PUBLISHED)
def test_refusals_among_the_published_answers() -> None:
    """About a quarter of all (most of them PopQA's), of which hardly any is right."""
    import pyarrow.parquet
    rows = pyarrow.parquet.read_table(PUBLISHED).to_pylist()
    refused = [row for row in rows if is_refusal(row["prediction"])]
    assert 0.22 < len(refused) / len(rows) < 0.25
    assert sum(row["label"] for row in refused) / len(refused) < 0.01
