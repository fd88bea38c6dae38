"""Controls: predictors of correct answers that do not use the network. A probe has to beat them.

On the published test split, which mixes an easier and a harder data set, these controls alone have AUROCs
of 0.69 to 0.77. Each control is fitted to the training rows and gives every row a score that rises with the
probability of a correct answer.
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

# With these two values "words" has the published AUROCs on the published split: 0.770 in all, 0.743 within
# PopQA and 0.643 within TriviaQA.
STRENGTH = 3.0  # C of the regression
MIN_COUNT = 2  # training questions that must contain a word or a pair of words


def controls(questions: Texts, labels: ArrayLike, datasets: ArrayLike, train: Indices,
             popularity: ArrayLike | None = None) -> dict[str, Floats]:
    """Returns name → scores `[rows]`, log odds; NaN where a control does not apply to a row.

    - "words": logistic regression on TF-IDF of the question's words and pairs of words. Omitted if no word
      occurs in MIN_COUNT training questions.
    - "length": logistic regression on the number of characters of the question.
    - "dataset": fraction of 1s among the training rows of the row's data set. NaN for a data set without
      training rows; omitted if all training rows are from one data set.
    - "popularity": logistic regression on log10(popularity + 1) of the question's subject. NaN where the
      popularity is unknown; omitted unless it is known for training rows of both labels.

    Args:
        questions, labels, datasets, popularity: `[rows]`. Only labels of training rows are used. Popularity
            is at least 0, or NaN.
        train: row numbers.

    Raises:
        ValueError: the training rows have a single label, or a popularity is below 0.
    """
    texts = [str(question) for question in questions]
    labels, datasets = np.asarray(labels), np.asarray(datasets)
    train = np.asarray(train)
    train_labels = labels[train]
    if len(np.unique(train_labels)) < 2:
        raise ValueError("train: expected rows of both labels, found one")
    lengths = np.array([len(text) for text in texts], float)
    scores = {"length": _one_feature(lengths, train_labels, train)}
    words = _words(texts, train_labels, train)
    if words is not None:
        scores["words"] = words
    if len(np.unique(datasets[train])) > 1:
        scores["dataset"] = _dataset_log_odds(datasets, train_labels, train)
    if popularity is not None:
        values = np.asarray(popularity, float)
        if (values < 0).any():
            raise ValueError("popularity: expected at least 0, or NaN")
        rows = train[~np.isnan(values[train])]
        if len(np.unique(labels[rows])) == 2:
            scores["popularity"] = _one_feature(np.log10(values + 1), labels[rows], rows)
    return scores


def _words(texts: Sequence[str], train_labels: NDArray, train: Indices) -> Floats | None:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=MIN_COUNT)
    try:
        features = vectorizer.fit_transform([texts[row] for row in train])
    except ValueError:  # for a list of texts this only means that no word is left
        return None
    model = LogisticRegression(C=STRENGTH, max_iter=2000).fit(features, train_labels)
    return model.decision_function(vectorizer.transform(texts))


def _one_feature(values: Floats, train_labels: NDArray, train: Indices) -> Floats:
    """Returns log odds of a regression on one standardised feature, which learns a sign and a scale."""
    mean, spread = values[train].mean(), values[train].std() or 1.0
    standardised = (values - mean) / spread
    model = LogisticRegression(C=np.inf).fit(standardised[train, None], train_labels)
    return model.coef_[0, 0] * standardised + model.intercept_[0]


def _dataset_log_odds(datasets: NDArray, train_labels: NDArray, train: Indices) -> Floats:
    scores = np.full(len(datasets), np.nan)
    for name in np.unique(datasets[train]):
        labels = train_labels[datasets[train] == name]
        # Half a row is added to each label so that the log odds are finite.
        scores[datasets == name] = np.log((labels.sum() + 0.5) / (len(labels) - labels.sum() + 0.5))
    return scores
