"""Answer matching: Recall's stored cases, and where the strict rule differs from Recall's."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.references import STORED, needs
from tilelli_jax.data.synthetic import village
from tilelli_jax.eval.matching import is_match, is_refusal, recall_words, words

CASES = STORED / "recall_cases" / "match_cases.json"


@needs(CASES)
def test_recalls_stored_cases() -> None:
    cases = json.loads(CASES.read_text())
    assert len(cases) >= 20
    for case in cases:
        assert " ".join(recall_words(case["prediction"])) == case["norm_prediction"]
        assert [" ".join(recall_words(gold)) for gold in case["golds"]] == case["norm_golds"]
        assert is_match(case["prediction"], case["golds"], "published") == case["match"], case


@pytest.mark.parametrize(("answer", "gold", "strict", "recall"), [
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
    # Signs change the answer.
    ("-5", "5", False, True), ("5", "-5", False, True), ("−5", "-5", True, False),
    ("-5 degrees", "–5", True, False), ("from 3-5", "5", True, True), ("1914-1918", "1918", True, True),
    ("$5", "5", False, True), ("it costs $5", "$5", True, True), ("€5", "$5", False, False),
    ("5%", "5", False, True), ("5 percent", "5%", True, True), ("C", "C++", False, True),
    ("C++", "C", False, True), ("it is C++.", "C++", True, True), ("C#", "C++", False, True),
    ("C#", "C", False, True), ("A+", "A", False, False), ("Disney+", "Disney", False, True),
    (".NET", "net", False, True), ("the .NET framework", ".NET", True, True),
    ("The end. Paris", "Paris", True, True), ("@", "@", True, False), ("@", "#", False, False),
    # Scripts without spaces.
    ("答案是北京。", "北京", True, False), ("上海", "北京", False, False),
    ("がくせい", "かくせい", False, False),
    ("คำตอบคือกรุงเทพ", "กรุงเทพ", True, False)])
def test_both_rules(answer: str, gold: str, strict: bool, recall: bool) -> None:
    assert (is_match(answer, [gold]), is_match(answer, [gold], "published")) == (strict, recall)


@pytest.mark.parametrize(("first", "second"), [
    ("twenty-one", "20"), ("twenty-first", "20"), ("one hundred", "1"), ("one hundred and five", "5"),
    ("5 million", "5"), ("1/2 million", "1,000,000"), ("$5 million", "$5"),
    ("−.5", ".5"), (".5", "5"), ("10²", "102"), ("10²", "10"), ("3²", "32"), ("10⁻³", "10³"), ("x²", "x2"),
    ("10₂", "102"), ("5①", "51"), ("1½", "11/2"), ("2½", "21/2"), ("½", "1 2"), ("1½", "1"), ("1/2", "2"),
    ("√2", "2"), ("√ 2", "2"), ("2√3", "2"), ("2+2", "2"), ("±5", "5"), ("+/-5", "5"), ("minus 5", "5"),
    ("minus seven", "7"), ("negative 5", "5"), ("➖5", "5"), ("˗5", "5"), ("x<5", "x>5"), ("x < 5", "x > 5"),
    ("x<y", "x>y"), ("x≠5", "x=5"), ("≤5", "5"), (">= 5", "5"),
    ("5$", "5"), ("5 €", "5"), ("€ 5", "5"), ("5¢", "5"), ("₩5", "5"), ("US$5", "$5"), ("−5 €", "5 €"),
    ("5‰", "5"), ("5 ‰", "5"), ("5٪", "5"),
    ("B♭", "B"), ("C♯", "C"), ("F♯ minor", "F minor"), ("F♯m", "F"), ("A*", "A"), ("O-", "O"), ("AB-", "AB"),
    ("A–", "A"), ("O−", "O"), ("H⁻", "H"), ("H⁺", "H"), ("NO₃⁻", "NO₃"),
    ("ดู", "ดุ"), ("ป่า", "ป้า"), ("ดู", "ด"), ("क्", "क")])
def test_signs_and_marks_change_the_answer(first: str, second: str) -> None:
    assert not is_match(first, [second]) and not is_match(second, [first])
    assert is_match(first, [first]) and is_match(second, [second])


@pytest.mark.parametrize(("answer", "gold"), [
    ("twenty-one", "21"), ("Twenty–one", "21"), ("twenty one", "21"), ("two hundred and five", "205"),
    ("two hundred and three hundred", "300"), ("two hundred and three hundred", "200"),
    ("one hundred twenty thousand", "120,000"), ("a hundred", "100"), ("1.5 million", "1,500,000"),
    ("$5 million", "$5,000,000"), ("1,5 million", "1,500,000"), ("9,99 €", "€9,99"),
    ("5 hundred thousand", "500,000"), ("twenty, one", "20"), ("one and two", "2"),
    ("one second", "1 second"),
    ("٥", "5"), ("٣٫٥", "3.5"), ("−.5", "-0.5"), ("10²", "10^2"), ("10⁻³", "10^-3"), ("H₂O", "H2O"),
    ("½", "1/2"), ("1½", "1 1/2"), ("2 ½", "2½"), ("1984/85", "1984"), ("12/25/1990", "1990"),
    ("minus seven", "-7"), ("10 minus 3", "3"), ("2-5", "5"), ("x ≤ 5", "x <= 5"), ("London -> 5", "5"),
    ("$1", "1$"), ("5 €", "€5"), ("-5 €", "€-5"), ("five percent", "5٪"), ("%5", "5%"), ("5$.", "$5"),
    ("C♯", "C#"), ("B♭", "Bb"), ("A–", "A-"), ("H⁻", "H-"), ("A—", "A"), ("Paris–", "Paris"), ("**A**", "A"),
    ("The answer is *5*", "5"), ("<b>5</b>", "5"), ("5️⃣", "5"),
    ("Ὀδύσσεια", "οδυσσεια"), ("ёлка", "елка"), ("مُحَمَّد", "محمد"), ("𝐀bc", "abc")])
def test_spellings_of_one_answer_match(answer: str, gold: str) -> None:
    assert is_match(answer, [gold])


@pytest.mark.parametrize(("arguments", "message"), [
    ((None, ["a"]), "answer: expected text, found None"), (("a", [5]), "golds: expected text, found 5"),
    (("a", "a"), "golds: expected a list of texts, found 'a'"),
    (("a", None), "golds: expected a list of texts, found None"),
    (("a", ["a"], "nope"), "rule: expected strict or published, found 'nope'"),
    (("a", ["a"], []), "rule: expected strict or published, found []")])
def test_invalid_arguments_are_rejected_in_one_line(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        is_match(*arguments)
    with pytest.raises(ValueError, match=r"^answer: expected text, found None$"):
        is_refusal(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("piece", [
    "a ", "*a", "<", "1.", "one ", "million ", "1/", "-", "=", "$", "1,", "²", "½", "a.", "minus ", "ก", "^2",
    "+", "é", "5 €"])
def test_time_is_linear_in_the_text_length(piece: str) -> None:
    """Linear time takes a few seconds; quadratic time would take more than a minute."""
    text = piece * (400_000 // len(piece))
    start = time.process_time()
    is_match(text, ["b", f"{text[:100_000]}c"])
    assert time.process_time() - start < 15


@pytest.mark.parametrize(("answer", "refuses"), [
    ("I don't know.", True), ("I do not have information about that", True), ("Sorry, I'm not sure", True),
    ("Please provide more context about who you mean", True), ("I need more information", True),
    ("It is unknown.", True), ("I'm unable to tell", True), ("I cannot determine which film", True),
    ("Insufficient information", True), ("i do not know that", True), ("Well, I DON’T  KNOW", True),
    ("I'm not sure", True), ("Not sure.", True), ("No idea!", True), ("We have no idea", True),
    ("I can't help you", True), ("I cannot answer", True), ("I can not tell.", True), ("idk lol", True),
    ("It is unknown to me", True), ("That's unclear", True), ("We don't have that", True), ("", True),
    (" \n ", True), ("Paris", False), ("Know Your Enemy", False), ("I", False), ("Unforgiven", False),
    ("The Unknown Soldier", False), ("Aldo lives in Elkford. I don't know more.", False),
    ("You don't know me", False), ("I know", False), ("kidknees", False), ("I can't eat", False),
    ("nuclear", False), ("They have it", False), ("I don't.", False)])
def test_refusals(answer: str, refuses: bool) -> None:
    assert is_refusal(answer) == refuses


def test_refusals_of_the_village() -> None:
    assert all(map(is_refusal, village.ABSTENTIONS))
    assert not any(is_refusal(pair.response) for pair in village.chat(village.world(), 2000, unanswerable=0))


@given(st.lists(st.sampled_from(["paris", "the", "7", "rome", "u.s.", "né", "or"]), min_size=1, max_size=5))
def test_an_answer_matches_itself(parts: list[str]) -> None:
    text = " ".join(parts)
    assert is_match(text, [text]) and words(" ".join(words(text))) == words(text)


@given(st.text(max_size=30), st.lists(st.text(max_size=10), max_size=3))
def test_any_text_is_accepted(answer: str, golds: list[str]) -> None:
    for rule in ("strict", "published"):
        assert is_match(answer, golds, rule) in (True, False)  # type: ignore[arg-type]
        assert not is_match(answer, [], rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [
    "The author of *1985* is not specified without more context.", "The title is not provided.",
    "Please provide the title of the book.", "Could you please provide more details?",
    "As an AI, I have no access to that.", "Sorry, I don't know.", "It has not been identified."])
def test_refusals_never_match(answer: str) -> None:
    assert is_refusal(answer) and not is_match(answer, ["Paris"])


@pytest.mark.parametrize("answer", [
    "Paris", "He was given the prize in 1969.", "Not specified elsewhere: Paris",
    "Paris. Please tell me if that helps.", "John Please"])
def test_answers_that_are_not_refusals(answer: str) -> None:
    assert not is_refusal(answer)


PUBLISHED = STORED / "data" / "recall_dataset.parquet"


@needs(PUBLISHED)
def test_refusals_among_the_published_answers() -> None:
    """About a quarter of the published answers (mostly PopQA's) are refusals; hardly any of them is right."""
    import pyarrow.parquet
    rows = pyarrow.parquet.read_table(PUBLISHED).to_pylist()
    refused = [row for row in rows if is_refusal(row["prediction"])]
    assert 0.22 < len(refused) / len(rows) < 0.25
    assert sum(row["label"] for row in refused) / len(refused) < 0.01
