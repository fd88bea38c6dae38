"""Cheap features: closed forms, and the published values for ETTh1."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.references import STORED, needs
from tilelli_jax.eval.difficulty import cheap


def test_prompt_statistics() -> None:
    prompts = ["The cat The CAT", "É é 12", "one", ""]
    found = cheap.prompt_statistics(prompts, np.array([True, False, True, False]))
    assert found["char_length"].tolist() == [15, 6, 3, 0] and found["word_count"].tolist() == [4, 3, 1, 0]
    np.testing.assert_allclose(found["lexical_diversity"], [0.5, 2 / 3, 1, 0], atol=1e-7)
    np.testing.assert_allclose(found["capitalization_ratio"], [5 / 12, 0.5, 0, 0], atol=1e-7)
    np.testing.assert_array_equal(found["bigram_novelty"], [0, 1, 1, 1])


def test_novelty_counts_distinct_pairs() -> None:
    """(a b) is known, (b a) is not; the second occurrence of (a b) does not count."""
    found = cheap.prompt_statistics(["a b", "A b a b"], np.array([True, False]))
    assert found["bigram_novelty"].tolist() == [0, 0.5]


def pairs(prompt: str) -> set[tuple[str, str]]:
    words = prompt.lower().split()
    return {(words[i], words[i + 1]) for i in range(len(words) - 1)}


PROMPTS = st.lists(st.tuples(st.text("aAb ", max_size=12), st.booleans(), st.sampled_from("xyz")), max_size=7)


@given(PROMPTS)
def test_novelty_by_brute_force(rows: list[tuple[str, bool, str]]) -> None:
    """A pair is new if no train prompt has it; with groups, if no train prompt of another group has it."""
    prompts, groups = [row[0] for row in rows], [row[2] for row in rows]
    known = np.array([row[1] for row in rows], bool)
    plain, grouped = [], []
    for prompt, _, group in rows:
        own = pairs(prompt)
        train = set().union(*(pairs(other) for other, is_known, _ in rows if is_known))
        other_groups = set().union(*(
            pairs(other) for other, is_known, other_group in rows if is_known and other_group != group))
        plain.append(len(own - train) / len(own) if own else 1.0)
        grouped.append(len(own - other_groups) / len(own) if own else 1.0)
    if not rows:
        return
    found, by_group = cheap.prompt_statistics(prompts, known), cheap.prompt_statistics(prompts, known, groups)
    np.testing.assert_array_equal(found["bigram_novelty"], plain)
    np.testing.assert_array_equal(by_group["bigram_novelty"], grouped)
    assert not found["bigram_novelty"][known & np.array([len(pairs(prompt)) > 0 for prompt in prompts])].any()
    for name in found.keys() - {"bigram_novelty"}:  # the groups change no other feature
        np.testing.assert_array_equal(found[name], by_group[name])


def test_novelty_means_the_same_for_train_and_test_prompts() -> None:
    """(a b) occurs in two groups, (b c) in one: the novelty of a train prompt is not always 0."""
    prompts = ["a b", "a b c", "a b c", "a b c d"]
    known = np.array([True, True, False, False])
    found = cheap.prompt_statistics(prompts, known, ["x", "y", "x", "z"])["bigram_novelty"]
    np.testing.assert_array_equal(found, [0, 0.5, 0, 1 / 3])
    assert cheap.prompt_statistics(prompts, known)["bigram_novelty"].tolist() == [0, 0, 0, 1 / 3]


def test_answer_length() -> None:
    np.testing.assert_allclose(cheap.answer_length([1, 4]), [[0], [math.log(4)]])


def test_series_statistics() -> None:
    time = np.arange(512)
    season = np.sin(2 * np.pi * time / 24)
    rng = np.random.default_rng(0)
    noise, walk = rng.standard_normal(512), np.cumsum(rng.standard_normal(512))
    line, found = 0.5 * time, {}
    for name, series in (("season", season), ("noise", noise), ("walk", walk), ("line", line)):
        found[name] = dict(zip(cheap.SERIES_STATISTICS, cheap.series_statistics([series])[0], strict=True))
    assert found["season"]["variance"] == pytest.approx(0.5, abs=0.01)
    assert abs(found["noise"]["lag1_acf"]) < 0.1 < 0.9 < found["walk"]["lag1_acf"]
    assert found["noise"]["adf_pvalue"] < 0.01 < 0.05 < found["walk"]["adf_pvalue"]
    assert found["season"]["spectral_entropy"] < 1 < 4 < found["noise"]["spectral_entropy"] < math.log(129)
    assert found["line"]["trend_slope"] == pytest.approx(0.5)
    assert found["line"]["volatility"] == pytest.approx(0.5) and found["line"]["range"] == 255.5


def test_a_constant_series() -> None:
    found = dict(zip(cheap.SERIES_STATISTICS, cheap.series_statistics([np.ones(100)])[0], strict=True))
    assert found["variance"] == found["spectral_entropy"] == found["trend_slope"] == 0
    assert found["adf_pvalue"] == 1 and math.isnan(found["lag1_acf"])


@needs(STORED)
@pytest.mark.parametrize("every", [70, pytest.param(7, marks=pytest.mark.exhaustive)])
def test_series_statistics_match_the_published_ones(every: int) -> None:
    stored = np.load(STORED / "difficulty" / "golden" / "ts_stats.npz")
    with (STORED / "data" / "ETTh1.csv").open() as file:
        series = np.array([float(row["OT"]) for row in csv.DictReader(file)])
    chosen = slice(0, None, every)
    found = cheap.series_statistics([series[start:start + 512] for start in stored["start"][chosen]])
    np.testing.assert_allclose(found, stored["F"][chosen], rtol=1e-9, atol=1e-12)
