"""Difficulty labels, the train/test split, and the exclusion of memorized and repeated prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

MEMORIZED_NLL = np.log(1.5)  # nats per token


def split_in_order(items: int, train: float = 0.7) -> NDArray[np.str_]:
    """Returns "train" for the first fraction of the items and "test" for the others: `[items]`."""
    return np.where(np.arange(items) < int(train * items), "train", "test")


def purged(split: NDArray[np.str_], prompts: Sequence[str], prompt_nll: ArrayLike, *,
           memorized_nll: float = MEMORIZED_NLL, max_similarity: float = 0.7) -> NDArray[np.str_]:
    """Returns the split with "purge" for memorized prompts and for test prompts too similar to a train
    prompt.

    A test prompt that is identical to a train prompt is always purged, even if the vectorizer knows none of
    its words.

    Args:
        prompt_nll: `[items]`, mean NLL per token of each prompt.
        memorized_nll: prompts with at most this mean NLL count as memorized.
        max_similarity: threshold on the cosine of TF-IDF vectors, over words and word pairs that occur in at
            least two train prompts.
    """
    # NaN (a prompt of one token, which has no NLL) fails the comparison: such a prompt is purged.
    result = np.where(np.asarray(prompt_nll) > memorized_nll, split, "purge")
    train, test = np.flatnonzero(result == "train"), np.flatnonzero(result == "test")
    if not len(train) or not len(test):
        return result
    texts = np.asarray(prompts, dtype=object)
    train_texts = set(texts[train].tolist())
    result[test[[text in train_texts for text in texts[test].tolist()]]] = "purge"
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2)
    try:
        vectorizer.fit(texts[train])
    except ValueError:  # no word occurs twice
        return result
    train_vectors = vectorizer.transform(texts[train])
    for start in range(0, len(test), 256):  # bounds the memory of the similarity matrix
        rows = test[start:start + 256]
        similarity = (vectorizer.transform(texts[rows]) @ train_vectors.T).max(axis=1).toarray().ravel()
        result[rows[similarity >= max_similarity]] = "purge"
    return result


def hard_by_quantile(values: ArrayLike, reference: NDArray[np.bool_],
                     quantile: float = 0.75) -> NDArray[np.int64]:
    """Returns 1 for values of at least the reference items' quantile, otherwise 0: int64 `[items]`.

    Args:
        reference: bool `[items]`, the items that determine the threshold: the train items.

    Raises:
        ValueError: a value is NaN.
    """
    values = np.asarray(values, float)
    if np.isnan(values).any():
        raise ValueError(f"values: item {int(np.flatnonzero(np.isnan(values))[0])} is not a number")
    return (values >= np.quantile(values[reference], quantile)).astype(np.int64)
