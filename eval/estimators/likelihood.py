"""Scores of a greedy answer from the distributions that its tokens were chosen from.

With n tokens, ℓ_j is the log-probability of token j and H_j the entropy of its distribution, in nats.
"""

from __future__ import annotations

import dataclasses

from numpy.typing import ArrayLike

from .. import checks
from ..checks import Floats


@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the tokens of one answer, f64 `[tokens]`, at least one token.

    Attributes:
        log_probs: log-probability of each token given all before it, in nats.
        entropies: entropy of each token's distribution, in nats.
        divergences: KL(uniform ‖ distribution) of each token's distribution, in nats.

    Raises:
        ValueError: there are no tokens, the lengths differ, or a number is not finite.
    """

    log_probs: Floats
    entropies: Floats
    divergences: Floats

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = checks.finite(getattr(self, field.name), name=field.name)
            if not len(values) or len(values) != len(self.log_probs):
                raise ValueError(f"{field.name}: expected one number for each token, at least one, found "
                                 f"{len(values)}")
            object.__setattr__(self, field.name, values)


def sequence_prob(tokens: TokenStatistics) -> float:
    """Σ ℓ_j: the log-probability of the answer (maximum sequence probability)."""
    return float(tokens.log_probs.sum())


def length_normalised(tokens: TokenStatistics) -> float:
    """Mean ℓ_j, minus the log of the perplexity (Malinin & Gales 2021, arXiv:2002.07650)."""
    return float(tokens.log_probs.mean())


def min_token_prob(tokens: TokenStatistics) -> float:
    """min ℓ_j: the least probable token."""
    return float(tokens.log_probs.min())


def mean_token_entropy(tokens: TokenStatistics) -> float:
    """− mean H_j (Fomicheva et al. 2020, arXiv:2005.10608)."""
    return -float(tokens.entropies.mean())


def self_certainty(tokens: TokenStatistics) -> float:
    """Mean KL(uniform ‖ distribution) = − mean_v log p_v − log V (Kang et al. 2025, arXiv:2502.18581)."""
    return float(tokens.divergences.mean())


def cocoa(certainty: float, similarities: ArrayLike) -> float:
    """certainty · mean(1 − similarity to each sample) (Vashurin et al. 2025, arXiv:2502.04964).

    Args:
        certainty: a score of the greedy answer that is at most 0: `sequence_prob`, `length_normalised` or
            `mean_token_entropy`.
        similarities: of the greedy answer to each sample, 0 to 1, at least one.

    Raises:
        ValueError: the certainty is above 0, or a similarity is not from 0 to 1.
    """
    similarities = checks.probabilities(similarities, name="similarities")
    if not len(similarities):
        raise ValueError("similarities: expected at least one, found none")
    if not checks.number(certainty, "certainty") <= 0:
        raise ValueError(f"certainty: expected a number of at most 0, found {certainty:g}")
    return float(certainty * (1 - similarities).mean())
