"""Scores of answers and samples, compared with their definitions and with hand-made cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.eval.estimators import judgement, likelihood, samples

WORDS = st.lists(st.sampled_from("abcd"), max_size=7)


def distributions(tokens: int, vocab: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `[tokens, vocab]`, and a chosen token for each."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((tokens, vocab))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), rng.integers(0, vocab, tokens)


def statistics(log_probs: np.ndarray, chosen: np.ndarray) -> likelihood.TokenStatistics:
    probs, vocab = np.exp(log_probs), log_probs.shape[1]
    return likelihood.TokenStatistics(
        log_probs[np.arange(len(chosen)), chosen],
        np.array([-sum(p * math.log(p) for p in row) for row in probs]),
        np.array([sum(math.log(1 / vocab / p) / vocab for p in row) for row in probs]))


def test_scores_of_an_answer() -> None:
    log_probs, chosen = distributions(5, 7)
    tokens = statistics(log_probs, chosen)
    of_chosen = [log_probs[j, token] for j, token in enumerate(chosen)]
    assert likelihood.sequence_prob(tokens) == pytest.approx(math.fsum(of_chosen))
    assert likelihood.length_normalised(tokens) == pytest.approx(math.fsum(of_chosen) / 5)
    assert likelihood.min_token_prob(tokens) == min(of_chosen)
    entropies = [-(np.exp(row) * row).sum() for row in log_probs]
    assert likelihood.mean_token_entropy(tokens) == pytest.approx(-np.mean(entropies))
    assert likelihood.self_certainty(tokens) == pytest.approx(np.mean([-row.mean() - math.log(7)
                                                                        for row in log_probs]))


def test_a_certain_and_a_uniform_answer() -> None:
    uniform = statistics(np.full((3, 4), -math.log(4)), np.zeros(3, int))
    assert likelihood.mean_token_entropy(uniform) == pytest.approx(-math.log(4))
    assert likelihood.self_certainty(uniform) == pytest.approx(0, abs=1e-12)
    certain = likelihood.TokenStatistics(np.zeros(2), np.zeros(2), np.array([5.0, 7]))
    assert (likelihood.sequence_prob(certain), likelihood.self_certainty(certain)) == (0, 6)


@pytest.mark.parametrize("call", [
    lambda: likelihood.TokenStatistics(np.zeros(0), np.zeros(0), np.zeros(0)),
    lambda: likelihood.TokenStatistics(np.zeros(2), np.zeros(3), np.zeros(2)),
    lambda: likelihood.TokenStatistics(np.array([-np.inf]), np.zeros(1), np.zeros(1)),
    lambda: likelihood.cocoa(0.1, [0.5]), lambda: likelihood.cocoa(-1, []),
    lambda: likelihood.cocoa(-1, [1.1]),
    lambda: samples.predictive_entropy([]), lambda: samples.predictive_entropy([0.1]),
    lambda: samples.predictive_entropy([-1, -2], [1, 0]), lambda: samples.semantic_entropy([-1, -2], [0]),
    lambda: samples.discrete_semantic_entropy([]), lambda: samples.consistency("a", []),
    lambda: samples.lexical_similarity(["a"]), lambda: samples.lexical_similarity("ab"),
    lambda: samples.eigenscore([[np.nan, 1]]), lambda: judgement.p_true(math.nan, 0)])
def test_invalid_arguments(call: object) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        call()  # type: ignore[operator]


# -- samples --


def test_answers_of_equal_meaning() -> None:
    answers = ["Paris.", "the city of Paris", "London", "It is London!", "", "  ", "Rome"]
    assert samples.classes(answers).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert samples.classes([]).tolist() == []
    # The first member decides: "a b" equals both others, which differ.
    assert samples.classes(["a", "b", "a b"], lambda x, y: x in y or y in x).tolist() == [0, 1, 0]
    assert samples.consistency("Paris", answers) == 2 / 7
    assert samples.consistency("Berlin", answers) == 0


def test_semantic_entropy() -> None:
    log_probs, numbers = np.log([0.1, 0.2, 0.3, 0.05]), [0, 1, 0, 2]
    expected = (math.log(0.4) + math.log(0.2) + math.log(0.4) + math.log(0.05)) / 4
    assert samples.semantic_entropy(log_probs, numbers) == pytest.approx(expected)
    assert samples.predictive_entropy(log_probs) == pytest.approx(np.mean(log_probs))
    assert samples.predictive_entropy(log_probs, [1, 2, 3, 4]) == pytest.approx(
        np.mean(log_probs / [1, 2, 3, 4]))
    assert samples.discrete_semantic_entropy(numbers) == pytest.approx(0.5 * math.log(0.5)
                                                                      + 0.5 * math.log(0.25))
    assert samples.num_classes(numbers) == -3
    assert samples.discrete_semantic_entropy([5, 5]) == 0
    far = samples.semantic_entropy([-2000, -2001], [0, 0])
    assert far == pytest.approx(-2000 + math.log1p(math.exp(-1))), "sums of tiny probabilities"


def test_samples_of_a_known_distribution_give_its_entropy() -> None:
    """With exact probabilities and one meaning per answer, the mean converges to minus the entropy."""
    probs = np.array([0.5, 0.25, 0.125, 0.125])
    drawn = np.random.default_rng(0).choice(4, 20_000, p=probs)
    entropy = -(probs @ np.log(probs))
    spread = math.sqrt(probs @ np.log(probs) ** 2 - entropy**2) / math.sqrt(len(drawn))
    assert samples.predictive_entropy(np.log(probs[drawn])) == pytest.approx(-entropy, abs=4 * spread)
    assert samples.discrete_semantic_entropy(drawn) == pytest.approx(-entropy, abs=4 * spread)


def brute_force(x: list[str], y: list[str]) -> int:
    """The length of the longest common subsequence."""
    return next(n for n in range(len(x), -1, -1) for part in itertools.combinations(x, n)
                if n == 0 or any(part == other for other in itertools.combinations(y, n)))


@given(WORDS, WORDS)
def test_rouge_l(x: list[str], y: list[str]) -> None:
    common, total = brute_force(x, y), len(x) + len(y)
    found = samples.rouge_l(" ".join(x), " ".join(y).upper())
    assert found == pytest.approx(2 * common / total if common else 0)


def test_lexical_similarity() -> None:
    texts = ["the cat sat", "The cat, sat!", "a dog"]
    assert samples.rouge_l(texts[0], texts[1]) == 1
    assert samples.lexical_similarity(texts) == pytest.approx(1 / 3)
    assert samples.lexical_similarity(["", ""]) == 0


def test_eigenscore() -> None:
    values = np.random.default_rng(0).standard_normal((5, 30))
    d = values.shape[1]
    centre = np.eye(d) - np.ones((d, d)) / d
    determinant = np.linalg.slogdet(values @ centre @ values.T + 1e-3 * np.eye(5))[1]
    assert samples.eigenscore(values) == pytest.approx(-determinant / 5)
    equal = samples.eigenscore(np.tile(values[:1], (5, 1)))
    assert equal > samples.eigenscore(values), "equal samples: likely known"
    largest = d * values[0].var() * 5 + 1e-3
    assert equal == pytest.approx(-(math.log(largest) + 4 * math.log(1e-3)) / 5, rel=1e-6)


def test_cocoa() -> None:
    assert likelihood.cocoa(-2.0, [1, 0.5, 0]) == -1
    assert likelihood.cocoa(-2.0, [1, 1]) == 0


# -- asked --


def test_p_true() -> None:
    assert judgement.p_true(1.5, 1.5) == 0.5
    assert judgement.p_true(math.log(3), 0) == pytest.approx(0.75)
    assert (judgement.p_true(-1e4, 0), judgement.p_true(1e4, 0)) == (0, 1)


@pytest.mark.parametrize(("reply", "expected"), [
    ("85%", 0.85), ("I am 85 percent sure", 0.85), ("Confidence: 0.7", 0.7), ("8/10", 0.8), ("8 / 10", 0.8),
    ("90 out of 100", 0.9), ("7 out of 10", 0.7), ("85", 0.85), ("1", 0.01), ("1.0", 1), ("0", 0),
    ("0,5", 0.5),
    ("100 %", 1), ("1 %", 0.01), ("90/100", 0.9), ("120 %", math.nan), ("11/10", math.nan),
    ("very sure", math.nan),
    ("", math.nan), ("1984 was written by Orwell", math.nan)])
def test_verbalised(reply: str, expected: float) -> None:
    assert judgement.verbalised(reply) == pytest.approx(expected, nan_ok=True)
