"""Which items are hard, which are learned from, and which are left out because they are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

KNOWN_BY_HEART = np.log(1.5)  # nats a token


def split_in_order(items: int, train: float = 0.7) -> NDArray[np.str_]:
    """The first share is "train", the rest "test"."""
    return np.where(np.arange(items) < int(train * items), "train", "test")


def purged(split: NDArray[np.str_], prompts: Sequence[str], nats: ArrayLike, *,
           memorized_nll: float = KNOWN_BY_HEART, max_similarity: float = 0.7) -> NDArray[np.str_]:
    """The split with "purge" where a prompt is known by heart, or a test prompt is too like a training one.

    A test prompt that is a training one to the letter always goes, also where none of its words is known.

    Args:
        nats: `[items]`, mean surprise at each prompt's tokens.
        max_similarity: cosine of TF-IDF vectors of words and word pairs that occur in two training prompts.
    """
    # NaN: a prompt of one token, which nothing can be said of.
    found = np.where(np.asarray(nats) > memorized_nll, split, "purge")
    train, test = np.flatnonzero(found == "train"), np.flatnonzero(found == "test")
    if not len(train) or not len(test):
        return found
    texts = np.asarray(prompts, dtype=object)
    repeated = set(texts[train].tolist())
    found[test[[text in repeated for text in texts[test].tolist()]]] = "purge"
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    try:
        vectors.fit(texts[train])
    except ValueError:  # no word occurs twice
        return found
    known = vectors.transform(texts[train])
    for start in range(0, len(test), 256):  # never all pairs at once
        rows = test[start:start + 256]
        alike = (vectors.transform(texts[rows]) @ known.T).max(axis=1).toarray().ravel()
        found[rows[alike >= max_similarity]] = "purge"
    return found


def hard_by_quantile(values: ArrayLike, reference: NDArray[np.bool_],
                     quantile: float = 0.75) -> NDArray[np.int64]:
    """1 where a value is at least the quantile of the reference's: int64 `[items]`.

    Args:
        reference: `[items]`, the rows that the threshold is taken from: the training rows.
    """
    values = np.asarray(values, float)
    if np.isnan(values).any():
        raise ValueError(f"values: item {int(np.flatnonzero(np.isnan(values))[0])} is not a number")
    return (values >= np.quantile(values[reference], quantile)).astype(np.int64)
