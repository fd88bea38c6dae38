"""Cheap features, computed without a network: statistics of a prompt, and of a time series."""

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
    """Returns the set of pairs of adjacent words, in lower case."""
    return set(pairwise(prompt.lower().split()))


def prompt_statistics(prompts: Sequence[str], known: NDArray[np.bool_],
                      groups: Sequence[str] | None = None) -> dict[str, Floats]:
    """Returns statistics of prompts, each `[prompts]`.

    `char_length`, `word_count`; `lexical_diversity`, distinct lower-case words ÷ words;
    `capitalization_ratio`, capitals ÷ letters; `bigram_novelty`, the fraction of distinct word pairs that
    occur in no train prompt (1 for a prompt of fewer than two words).

    Args:
        known: bool `[prompts]`, the train prompts.
        groups: the group of each prompt. `bigram_novelty` then compares a prompt with train prompts of other
            groups only, so that it means the same for train and test prompts. None: it compares with all
            train prompts, including the prompt itself, so that it is 0 for every train prompt, as in
            fm-difficulty-probe.
    """
    group_of: dict[tuple[str, str], str | None] = {}  # train pair → its only group; None: several groups
    for i, prompt in enumerate(prompts):
        if known[i]:
            group = None if groups is None else groups[i]
            for pair in bigrams(prompt):
                group_of[pair] = group if pair not in group_of or group_of[pair] == group else None

    def is_new(pair: tuple[str, str], i: int) -> bool:
        return pair not in group_of or (groups is not None and group_of[pair] == groups[i])

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
    """Returns the log of the number of tokens in the right answer: `[items, 1]`. A control, not a signal.

    The mean NLL of an answer falls with its length, because its first tokens predict its later ones: on
    SQuAD, length alone separates hard from easy items better than any probe on the network.
    """
    return np.log(np.asarray(tokens, float))[:, None]


SERIES_STATISTICS = ("variance", "volatility", "lag1_acf", "seasonal_acf", "adf_pvalue", "spectral_entropy",
                     "trend_slope", "range")


def series_statistics(windows: ArrayLike, season: int = 24) -> Floats:
    """Returns SERIES_STATISTICS of each window: `[windows, time]` → `[windows, 8]`, f64.

    Variance; mean absolute step; autocorrelation at lag 1 and at lag `season`; p of an augmented
    Dickey–Fuller test (lags chosen by AIC; 1 if the test is not possible); entropy of Welch's spectrum in
    nats; slope of the least-squares line; range.
    """
    return np.array([_series_row(window, season) for window in np.asarray(windows, float)])


def _series_row(x: Floats, season: int) -> tuple[float, ...]:
    time = np.arange(len(x)) - (len(x) - 1) / 2
    _, power = signal.welch(x, nperseg=min(256, len(x)))
    total = power.sum()
    density = power / total if total > 0 else power
    entropy = float(-np.sum(density[density > 0] * np.log(density[density > 0])))
    return (float(np.var(x)), float(np.abs(np.diff(x)).mean()), autocorrelation(x, 1),
            autocorrelation(x, season), _adf_p(x), entropy, float(time @ x / (time @ time)), float(np.ptp(x)))


def autocorrelation(x: ArrayLike, lag: int) -> float:
    """Returns the autocorrelation, with mean and variance of the whole series; NaN for a constant series."""
    x = np.asarray(x, float)
    centred = x - x.mean()
    power = float(centred @ centred)
    return float(centred[lag:] @ centred[:-lag]) / power if power else float("nan")


def _adf_p(x: Floats) -> float:
    from statsmodels.tsa.stattools import adfuller  # slow to import
    try:
        with warnings.catch_warnings():
            # Hides two warnings: a straight line is rank-deficient, and the result's type will change.
            warnings.simplefilter("ignore")
            return float(adfuller(x, autolag="AIC")[1])
    except (ValueError, np.linalg.LinAlgError):  # constant, or too short
        return 1.0
