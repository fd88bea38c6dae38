"""The estimators that learn nothing: scores of the next token, of the answer, of judgements, of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tilelli_jax.signals.crystallisation import BY_LAYER

from ..checks import Floats
from . import likelihood, samples
from .interface import Group, Need, Score
from .likelihood import TokenStatistics
from .table import QuestionTable


@dataclasses.dataclass(frozen=True)
class NextTokenScore(Score):
    """A score of the distribution of the next token after the prompt.

    Attributes:
        statistic: (largest probability, entropy in nats, largest minus second largest logit) → score.
    """

    statistic: Callable[[Floats, Floats, Floats], Floats]
    group: Group = "prompt"
    source: str = "Hendrycks & Gimpel 2017, arXiv:1610.02136"

    def scores(self, table: QuestionTable) -> Floats:
        last = table.by_layer[:, -1].astype(float)
        return self.statistic(*(last[:, BY_LAYER.index(name)] for name in (
            "a_maxprob_final", "a_entropy_final", "a_margin_final")))


def first_token_prob(largest: Floats, entropy: Floats, margin: Floats) -> Floats:
    """The largest probability p₁."""
    return largest


def first_token_entropy(largest: Floats, entropy: Floats, margin: Floats) -> Floats:
    """Minus the entropy."""
    return -entropy


def first_token_margin(largest: Floats, entropy: Floats, margin: Floats) -> Floats:
    """p₁ − p₂ = p₁ · (1 − exp(−margin of the logits))."""
    return -largest * np.expm1(-margin)


@dataclasses.dataclass(frozen=True)
class ColumnScore(Score):
    """A measurement that is a score itself, `sign` times."""

    column: Need
    group: Group
    needs: tuple[Need, ...]
    sign: int = 1
    source: str = ""

    def scores(self, table: QuestionTable) -> Floats:
        return self.sign * np.asarray(getattr(table, self.column), float)


@dataclasses.dataclass(frozen=True)
class AnswerScore(Score):
    """A score of the tokens of the greedy answer; see `likelihood`."""

    statistic: Callable[[TokenStatistics], float]
    source: str = ""
    group: Group = "answer"
    needs: tuple[Need, ...] = ("greedy",)

    def scores(self, table: QuestionTable) -> Floats:
        assert table.greedy is not None
        return np.array([self.statistic(tokens) for tokens in table.greedy])


@dataclasses.dataclass(frozen=True)
class SampledQuestion:
    """One question with its sampled answers, at least two.

    Attributes:
        answer, tokens: the greedy answer and its statistics.
        texts, log_probs, lengths, streams, classes: of the samples; see `table.Samples`.
    """

    answer: str
    tokens: TokenStatistics
    texts: list[str]
    log_probs: Floats
    lengths: np.ndarray
    streams: np.ndarray
    classes: np.ndarray


@dataclasses.dataclass(frozen=True)
class SampleScore(Score):
    """A score of sampled answers; see `samples`. NaN for questions that were not sampled."""

    statistic: Callable[[SampledQuestion], float]
    source: str = ""
    group: Group = "samples"
    needs: tuple[Need, ...] = ("samples",)

    def scores(self, table: QuestionTable) -> Floats:
        assert table.samples is not None and table.greedy is not None
        drawn, scores = table.samples, np.full(len(table.known), np.nan)
        for i, row in enumerate(drawn.rows):
            scores[row] = self.statistic(SampledQuestion(
                str(table.answer[row]), table.greedy[row], drawn.texts[i], drawn.log_probs[i],
                drawn.lengths[i], drawn.streams[i], drawn.classes[i]))
        return scores


def predictive_entropy(question: SampledQuestion) -> float:
    return samples.predictive_entropy(question.log_probs)


def normalised_predictive_entropy(question: SampledQuestion) -> float:
    return samples.predictive_entropy(question.log_probs, question.lengths)


def semantic_entropy(question: SampledQuestion) -> float:
    return samples.semantic_entropy(question.log_probs, question.classes)


def discrete_semantic_entropy(question: SampledQuestion) -> float:
    return samples.discrete_semantic_entropy(question.classes)


def num_classes(question: SampledQuestion) -> float:
    return samples.num_classes(question.classes)


def consistency(question: SampledQuestion) -> float:
    return samples.consistency(question.answer, question.texts)


def lexical_similarity(question: SampledQuestion) -> float:
    return samples.lexical_similarity(question.texts)


def eigenscore(question: SampledQuestion) -> float:
    return samples.eigenscore(question.streams)


def cocoa_of(statistic: Callable[[TokenStatistics], float]) -> Callable[[SampledQuestion], float]:
    """CoCoA with a score of the greedy answer, and ROUGE-L as the similarity of two answers."""
    def score(question: SampledQuestion) -> float:
        return likelihood.cocoa(statistic(question.tokens), [samples.rouge_l(question.answer, text)
                                                             for text in question.texts])
    return score
