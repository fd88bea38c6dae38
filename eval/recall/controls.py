"""What predicts knowledge without a look into the network: scores that a probe of it has to beat.

On the published test split, of two data sets of which one is the easier, these alone have AUROCs of 0.69
to 0.77. Each control is fitted to the training rows and gives every row a score that rises with the
chance that the answer is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ..checks import Floats
from ..folds import Indices
from .splits import Texts

# With these the words have the AUROCs on the published split that are told of them: 0.770 in all, 0.743
# within PopQA and 0.643 within TriviaQA.
STRENGTH = 3.0  # C of the regression
AT_LEAST = 2  # training questions in which a word, or a pair of words, is found


def controls(questions: Texts, labels: ArrayLike, datasets: ArrayLike, train: Indices,
             popularity: ArrayLike | None = None) -> dict[str, Floats]:
    """Name → scores `[rows]`, log odds; NaN where a control does not apply to a row.

    - "words": logistic regression on the TF-IDF of the question's words and pairs of words; left out
      where none is found in `AT_LEAST` training questions;
    - "length": of the question, in characters;
    - "dataset": the share of 1s among its training rows. NaN for a data set that is not among them; left
      out where they are of one data set only;
    - "popularity": log10(popularity + 1) of what is asked about. NaN where it is not known; left out
      where it is not known for training rows of both labels.

    Args:
        questions, labels, datasets, popularity: `[rows]`; of labels only the training rows' are looked
            at; popularity is at least 0, or NaN.
        train: row numbers.

    Raises:
        ValueError: training rows of one label, or a popularity below 0.
    """
    texts = [str(question) for question in questions]
    labels, datasets = np.asarray(labels), np.asarray(datasets)
    train = np.asarray(train)
    known = labels[train]
    if len(np.unique(known)) < 2:
        raise ValueError("train: expected rows of both labels, found one")
    lengths = np.array([len(text) for text in texts], float)
    found = {"length": _rising(lengths, known, train)}
    words = _words(texts, known, train)
    if words is not None:
        found["words"] = words
    if len(np.unique(datasets[train])) > 1:
        found["dataset"] = _shares(datasets, known, train)
    if popularity is not None:
        popular = np.asarray(popularity, float)
        if (popular < 0).any():
            raise ValueError("popularity: expected at least 0, or NaN")
        told = train[~np.isnan(popular[train])]
        if len(np.unique(labels[told])) == 2:
            found["popularity"] = _rising(np.log10(popular + 1), labels[told], told)
    return found


def _words(texts: Sequence[str], known: NDArray, train: Indices) -> Floats | None:
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=AT_LEAST)
    try:
        learned = vectors.fit_transform([texts[row] for row in train])
    except ValueError:  # of texts, it can only mean that no word is left
        return None
    fitted = LogisticRegression(C=STRENGTH, max_iter=2000).fit(learned, known)
    return fitted.decision_function(vectors.transform(texts))


def _rising(values: Floats, known: NDArray, train: Indices) -> Floats:
    """Log odds by one number: what a regression of it learns is its sign, and a scale."""
    middle, spread = values[train].mean(), values[train].std() or 1.0
    standard = (values - middle) / spread
    fitted = LogisticRegression(C=np.inf).fit(standard[train, None], known)
    return fitted.coef_[0, 0] * standard + fitted.intercept_[0]


def _shares(datasets: NDArray, known: NDArray, train: Indices) -> Floats:
    scores = np.full(len(datasets), np.nan)
    for name in np.unique(datasets[train]):
        of = known[datasets[train] == name]
        # Half a row of either label more: the log odds stay finite.
        scores[datasets == name] = np.log((of.sum() + 0.5) / (len(of) - of.sum() + 0.5))
    return scores
