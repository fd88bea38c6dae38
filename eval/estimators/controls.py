"""Controls: predictors of correct answers that read no activations. A probe has to beat them.

On the published test split, which mixes an easier and a harder data set, these controls alone have AUROCs
of 0.69 to 0.77. Each control is fitted to the training rows and gives every row a score that rises with the
probability of a correct answer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ..checks import Floats
from ..folds import Indices
from ..matching import is_match
from .interface import Estimator, Group, Method, Training
from .table import QuestionTable

Texts: TypeAlias = Sequence[str] | NDArray[np.object_]

# With these two values "words" has the published AUROCs on the published split: 0.770 in all, 0.743 within
# PopQA and 0.643 within TriviaQA.
STRENGTH = 3.0  # C of the regression
MIN_COUNT = 2  # training questions that must contain a word or a pair of words


NAMES = ("words", "length", "dataset", "popularity", "category", "answer_frequency")


@dataclasses.dataclass(frozen=True)
class Control(Estimator):
    """One of the controls of `controls`."""

    name: str
    group: Group = "control"

    def fit(self, training: Training) -> Method | None:
        table = training.table
        scores = controls(table.text.tolist(), table.known, table.dataset, training.train, table.popularity,
                          table.category, answers_of(table) if self.name == "answer_frequency" else None,
                          only=self.name)
        return Method(scores[self.name][None], {"control": True}) if self.name in scores else None


def answers_of(table: QuestionTable) -> tuple[list[str], list[list[str]]]:
    """Returns the network's answers and the correct ones."""
    return table.answer.tolist(), table.answers


def controls(questions: Texts, labels: ArrayLike, datasets: ArrayLike, train: Indices,
             popularity: ArrayLike | None = None, categories: ArrayLike | None = None,
             answers: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None, *,
             only: str | None = None) -> dict[str, Floats]:
    """Returns name → scores `[rows]`, log odds; NaN where a control does not apply to a row.

    - "words": logistic regression on TF-IDF of the question's words and pairs of words. Omitted if no word
      occurs in MIN_COUNT training questions.
    - "length": logistic regression on the number of characters of the question.
    - "dataset": fraction of 1s among the training rows of the row's data set. NaN for a data set without
      training rows; omitted if all training rows are from one data set.
    - "popularity": logistic regression on log10(popularity + 1) of the question's subject. NaN where the
      popularity is unknown; omitted unless it is known for training rows of both labels.
    - "category": fraction of 1s among the training rows of the row's category, such as a relation; NaN for a
      row without a category; omitted unless training rows have different categories.
    - "answer_frequency": logistic regression on how often the network's answer is a correct one among the
      training rows of its category. It asks the network, but only for its answer: what only repeats the most
      frequent answer of a relation has this score. Omitted like "category".

    Args:
        questions, labels, datasets, popularity, categories: `[rows]`. Only labels of training rows are used.
            Popularity is at least 0, or NaN; a category may be "".
        answers: the network's answers and the correct ones, `[rows]` each.
        train: row numbers.
        only: name of the control to compute; None computes all.

    Raises:
        ValueError: the training rows have a single label, or a popularity is below 0.
    """
    labels, datasets = np.asarray(labels), np.asarray(datasets)
    train = np.asarray(train)
    train_labels = labels[train]
    if len(np.unique(train_labels)) < 2:
        raise ValueError("train: expected rows of both labels, found one")
    kinds = np.full(len(labels), "") if categories is None else np.asarray(categories)
    has_kinds = len(set(kinds[train].tolist()) - {""}) > 1

    def length() -> Floats:
        return _one_feature(np.array([len(str(text)) for text in questions], float), train_labels, train)

    def of_words() -> Floats | None:
        return _words([str(text) for text in questions], train_labels, train)

    def dataset() -> Floats | None:
        return _log_odds_by(datasets, train_labels, train) if len(np.unique(datasets[train])) > 1 else None

    def of_popularity() -> Floats | None:
        if popularity is None:
            return None
        values = np.asarray(popularity, float)
        if (values < 0).any():
            raise ValueError("popularity: expected at least 0, or NaN")
        rows = train[~np.isnan(values[train])]
        if len(np.unique(labels[rows])) < 2:
            return None
        return _one_feature(np.log10(values + 1), labels[rows], rows)

    def category() -> Floats | None:
        if not has_kinds:
            return None
        return np.where(kinds == "", np.nan, _log_odds_by(kinds, train_labels, train))

    def answer_frequency() -> Floats | None:
        if not has_kinds or answers is None:
            return None
        frequency = _answer_frequency(kinds, *answers, train)
        rows = train[~np.isnan(frequency[train])]
        return None if len(np.unique(labels[rows])) < 2 else _one_feature(frequency, labels[rows], rows)
    by_name = dict(zip(NAMES, (of_words, length, dataset, of_popularity, category, answer_frequency),
                       strict=True))
    scores = {name: compute() for name, compute in by_name.items() if only in (None, name)}
    return {name: values for name, values in scores.items() if values is not None}


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


def _log_odds_by(kinds: NDArray, train_labels: NDArray, train: Indices) -> Floats:
    """Returns the log odds of a 1 among the training rows of the row's kind, NaN if there are none."""
    scores = np.full(len(kinds), np.nan)
    for kind in np.unique(kinds[train]):
        labels = train_labels[kinds[train] == kind]
        # Half a row is added to each label so that the log odds are finite.
        scores[kinds == kind] = np.log((labels.sum() + 0.5) / (len(labels) - labels.sum() + 0.5))
    return scores


def _answer_frequency(kinds: NDArray, answers: Sequence[str], correct: Sequence[Sequence[str]],
                      train: Indices) -> Floats:
    """Fraction of the training rows of each row's kind, itself left out, whose correct answers the row's
    answer matches."""
    result = np.full(len(kinds), np.nan)
    for kind in set(kinds.tolist()) - {""}:
        of_kind = {int(row) for row in train if kinds[row] == kind}
        lists = Counter(tuple(correct[row]) for row in of_kind)
        matched: dict[str, int] = {}
        for row in np.flatnonzero(kinds == kind).tolist():
            answer = str(answers[row])
            if answer not in matched:
                matched[answer] = sum(n for golds, n in lists.items() if is_match(answer, golds))
            inside = row in of_kind
            others = len(of_kind) - inside
            hits = matched[answer] - (inside and is_match(answer, correct[row]))
            result[row] = hits / others if others else np.nan
    return result
