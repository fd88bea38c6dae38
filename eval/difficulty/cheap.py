"""Features that cost next to nothing: statistics of a prompt, and of a time series."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import signal

from ..checks import Floats

SMALL = 1e-8


def bigrams(prompt: str) -> set[tuple[str, str]]:
    """Pairs of neighbouring words, in lower case."""
    words = prompt.lower().split()
    return set(pairwise(words))


def prompt_statistics(prompts: Sequence[str], known: NDArray[np.bool_],
                      groups: Sequence[str] | None = None) -> dict[str, Floats]:
    """Statistics of prompts that ask no network, each `[prompts]`.

    `char_length`, `word_count`; `lexical_diversity`, different words in lower case ÷ words;
    `capitalization_ratio`, capitals ÷ letters; `bigram_novelty`, the share of different word pairs that
    no known prompt has (1 where there are fewer than two words).

    Args:
        known: `[prompts]`, the training rows.
        groups: of each prompt; a prompt's pairs are looked for in known prompts of other groups, so that
            known prompts and new ones are measured alike. None: in all known prompts, the prompt's own
            among them, which makes it 0 for every known prompt, as in the published study.
    """
    of: dict[tuple[str, str], str | None] = {}  # a known pair → the one group that has it; None: several
    for i, prompt in enumerate(prompts):
        if known[i]:
            group = None if groups is None else groups[i]
            for pair in bigrams(prompt):
                of[pair] = group if pair not in of or of[pair] == group else None

    def is_new(pair: tuple[str, str], i: int) -> bool:
        return pair not in of or (groups is not None and of[pair] == groups[i])

    def row(i: int, prompt: str) -> tuple[float, ...]:
        words, pairs = prompt.lower().split(), bigrams(prompt)
        letters = sum(map(str.isalpha, prompt))
        return (len(prompt), len(words), len(set(words)) / (len(words) + SMALL),
                sum(map(str.isupper, prompt)) / (letters + SMALL),
                sum(is_new(pair, i) for pair in pairs) / len(pairs) if len(words) > 1 else 1.0)

    names = ("char_length", "word_count", "lexical_diversity", "capitalization_ratio", "bigram_novelty")
    rows = [row(i, prompt) for i, prompt in enumerate(prompts)]
    return dict(zip(names, np.array(rows, float).T, strict=True))


def answer_length(tokens: ArrayLike) -> Floats:
    """A control, no signal of difficulty: log of the number of tokens in the right answer, `[items, 1]`.

    Surprise at an answer goes down with its length, as its later tokens follow from its first: on SQuAD
    length alone tells "hard" from "easy" better than any probe on the network.
    """
    return np.log(np.asarray(tokens, float))[:, None]


SERIES_STATISTICS = ("variance", "volatility", "lag1_acf", "seasonal_acf", "adf_pvalue", "spectral_entropy",
                     "trend_slope", "range")


def series_statistics(windows: ArrayLike, season: int = 24) -> Floats:
    """SERIES_STATISTICS of each window: `[windows, time]` → `[windows, 8]`, f64.

    Variance; mean |step|; autocorrelation at lag 1 and at the season's; p of an augmented Dickey–Fuller
    test (lags by AIC; 1 where it cannot be made); entropy of Welch's spectrum in nats; slope of the
    least-squares line; range.
    """
    return np.array([_series_row(window, season) for window in np.asarray(windows, float)])


def _series_row(x: Floats, season: int) -> tuple[float, ...]:
    time = np.arange(len(x)) - (len(x) - 1) / 2
    _, power = signal.welch(x, nperseg=min(256, len(x)))
    total = power.sum()
    share = power / total if total > 0 else power
    entropy = float(-np.sum(share[share > 0] * np.log(share[share > 0])))
    return (float(np.var(x)), float(np.abs(np.diff(x)).mean()), autocorrelation(x, 1),
            autocorrelation(x, season), _adf_p(x), entropy, float(time @ x / (time @ time)), float(np.ptp(x)))


def autocorrelation(x: ArrayLike, lag: int) -> float:
    """With the mean and variance of the whole series; NaN where it is constant."""
    x = np.asarray(x, float)
    centred = x - x.mean()
    power = float(centred @ centred)
    return float(centred[lag:] @ centred[:-lag]) / power if power else float("nan")


def _adf_p(x: Floats) -> float:
    from statsmodels.tsa.stattools import adfuller  # slow to import
    try:
        with warnings.catch_warnings():
            # That a line is rank-deficient, and that the result's type will change.
            warnings.simplefilter("ignore")
            return float(adfuller(x, autolag="AIC")[1])
    except (ValueError, np.linalg.LinAlgError):  # constant, or too short
        return 1.0
