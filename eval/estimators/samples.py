"""Scores from N sampled answers to a question: their meanings, likelihoods, words and activations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks
from ..matching import is_match

REGULARISER = 1e-3  # added to the eigenvalues of `eigenscore`, as in INSIDE
Equal = Callable[[str, str], bool]


def equal_answers(a: str, b: str) -> bool:
    """Whether two answers have equal meaning: the strict matching rule finds one of them in the other.

    Two answers without words are equal.
    """
    return is_match(a, [b]) or is_match(b, [a]) or not (a.strip() or b.strip())


def classes(answers: Sequence[str], equal: Equal = equal_answers) -> NDArray[np.intp]:
    """Assigns answers to classes of equal meaning (Kuhn et al. 2023, arXiv:2302.09664, algorithm 1).

    An answer joins the first class whose first member it equals.

    Returns:
        The number of each answer's class, `[answers]`, counted from 0 in order of first occurrence.
    """
    first_members: list[str] = []
    numbers = []
    for answer in answers:
        number = next((n for n, member in enumerate(first_members) if equal(member, answer)),
                      len(first_members))
        if number == len(first_members):
            first_members.append(answer)
        numbers.append(number)
    return np.array(numbers, np.intp)


def predictive_entropy(log_probs: ArrayLike, lengths: ArrayLike | None = None) -> float:
    """Mean log-probability of the samples: the negative of a Monte Carlo estimate of the answers' entropy.

    Malinin & Gales 2021, arXiv:2002.07650.

    Args:
        log_probs: of each sample, in nats, `[samples]`.
        lengths: number of tokens of each sample; log-probabilities are divided by them. None: they are not.
    """
    log_probs = _log_probs(log_probs)
    if lengths is not None:
        lengths = checks.counts(lengths, len(log_probs), "lengths")
        if not lengths.all():
            raise ValueError("lengths: expected at least one token in every sample, found 0")
        log_probs = log_probs / lengths
    return float(log_probs.mean())


def semantic_entropy(log_probs: ArrayLike, numbers: ArrayLike) -> float:
    """Mean over the samples of the log-probability of their class, the sum over its members.

    Minus the semantic entropy of Kuhn et al. 2023, arXiv:2302.09664.

    Args:
        log_probs: of each sample, in nats, `[samples]`.
        numbers: class of each sample; see `classes`.
    """
    log_probs = _log_probs(log_probs)
    numbers = checks.groups(numbers, len(log_probs), "numbers")
    of_class = np.array([np.logaddexp.reduce(log_probs[numbers == number])
                         for number in range(numbers.max() + 1)])
    return float(of_class[numbers].mean())


def discrete_semantic_entropy(numbers: ArrayLike) -> float:
    """Σ_c (n_c / N) log(n_c / N): the negative of the entropy of the classes' frequencies, in nats.

    Farquhar et al. 2024, doi:10.1038/s41586-024-07421-0.
    """
    fractions = _fractions(numbers)
    return float(fractions @ np.log(fractions))


def num_classes(numbers: ArrayLike) -> float:
    """Minus the number of classes (Kuhn et al. 2023)."""
    return -float(len(_fractions(numbers)))


def consistency(answer: str, samples: Sequence[str], equal: Equal = equal_answers) -> float:
    """Fraction of the samples in the class of the greedy answer (Wang et al. 2023, arXiv:2203.11171)."""
    _check_samples(samples)
    return float(np.mean(classes([answer, *samples], equal)[1:] == 0))


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of lower-case words; 0 if one has no words."""
    x, y = (re.findall(r"[^\W_]+", text.lower()) for text in (a, b))
    common = _common_subsequence(x, y)
    return 2 * common / (len(x) + len(y)) if common else 0.0


def lexical_similarity(samples: Sequence[str], similarity: Callable[[str, str], float] = rouge_l) -> float:
    """Mean similarity of all pairs of samples (Fomicheva et al. 2020, arXiv:2005.10608).

    Raises:
        ValueError: there are fewer than two samples.
    """
    _check_samples(samples, 2)
    return float(np.mean([similarity(a, b) for a, b in itertools.combinations(samples, 2)]))


def eigenscore(activations: ArrayLike) -> float:
    """− mean log eigenvalue of E J Eᵀ + 10⁻³ I, with J = I − 11ᵀ / d (INSIDE: Chen et al. 2024,
    arXiv:2402.03744).

    Args:
        activations: E, `[samples, d]`: the residual stream of a middle layer at each sample's last token.
    """
    values = checks.matrix(activations).astype(float)
    centred = values - values.mean(axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(centred @ centred.T + REGULARISER * np.eye(len(values)))
    return -float(np.log(np.maximum(eigenvalues, REGULARISER)).mean())  # rounding can bring them below it


# ---------------------------------------------------------------------------------------------


def _log_probs(values: ArrayLike) -> NDArray[np.float64]:
    values = checks.finite(values, name="log_probs")
    if not len(values) or values.max() > 0:
        raise ValueError("log_probs: expected at least one number, none above 0, found "
                         + (f"{values.max():g}" if len(values) else "none"))
    return values


def _fractions(numbers: ArrayLike) -> NDArray[np.float64]:
    """The fraction of the samples in each class."""
    counts = np.unique(np.asarray(numbers), return_counts=True)[1]
    if not len(counts):
        raise ValueError("numbers: expected the class of at least one sample, found none")
    return counts / counts.sum()


def _check_samples(samples: Sequence[str], minimum: int = 1) -> None:
    if isinstance(samples, str) or len(samples) < minimum:
        raise ValueError(f"samples: expected at least {minimum} texts, found {len(samples)}")


def _common_subsequence(x: Sequence[str], y: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(y) + 1)
    for a in x:
        before = 0
        for j, b in enumerate(y, 1):
            row[j], before = (before + 1 if a == b else max(row[j], row[j - 1])), row[j]
    return row[-1]
