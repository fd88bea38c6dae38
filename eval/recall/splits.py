"""Splits of questions for training and evaluation.

The published split assigns single questions: some test questions are, word for word, training questions.
`grouped_splits` keeps each group of `group_ids` in one split: the same question, or questions about the same
entity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..folds import Indices
from ..matching import words

Texts: TypeAlias = Sequence[str] | NDArray[np.object_]
Names: TypeAlias = Sequence[str | None] | NDArray[np.object_]
FRACTIONS: Mapping[str, float] = {"train": 0.55, "validate": 0.15, "calibrate": 0.15, "test": 0.15}
TOLERANCE = 1e-9  # of the sum of fractions


def published_splits(datasets: ArrayLike, labels: ArrayLike, seed: int = 17, val: float = 0.15,
                     test: float = 0.15) -> dict[str, dict[str, Indices]]:
    """Returns Recall's splits: "main" (train, val, test), and "cross" (train, test) if both data sets occur.

    - main: questions of each data set and label, in order of first appearance, are shuffled by one
      generator. The first round(val · n) are val, the next round(test · n) test; halves round to even.
    - cross: trained on TriviaQA, tested on PopQA, no validation.

    Args:
        datasets, labels: `[rows]`.

    Returns:
        split → part → row numbers in increasing order.
    """
    datasets, labels = np.asarray(datasets), np.asarray(labels)
    strata: dict[tuple[str, int], list[int]] = {}
    for row, key in enumerate(zip(datasets.tolist(), labels.tolist(), strict=True)):
        strata.setdefault(key, []).append(row)
    rng = np.random.default_rng(seed)
    main: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for rows in strata.values():
        rng.shuffle(rows)
        n_val, n_test = round(val * len(rows)), round(test * len(rows))
        main["val"] += rows[:n_val]
        main["test"] += rows[n_val:n_val + n_test]
        main["train"] += rows[n_val + n_test:]
    splits = {"main": {part: np.sort(np.array(rows, np.intp)) for part, rows in main.items()}}
    cross = {part: np.flatnonzero(datasets == name) for part, name in (("train", "triviaqa"),
                                                                       ("test", "popqa"))}
    return splits | ({"cross": cross} if all(map(len, cross.values())) else {})


def group_ids(questions: Texts, ids: Names | None = None, entities: Names | None = None
              ) -> NDArray[np.int64]:
    """Numbers the groups of related questions: `[rows]`, from 0 in order of appearance.

    Two rows are related if they have the same words (`matching.words`: case, accents, punctuation and
    articles are ignored), the same id or the same entity, or are linked through other rows (union-find,
    Tarjan 1975).

    Args:
        ids, entities: `[rows]`; None, for all rows or one, matches nothing. Ids of different data sets must
            differ.
    """
    for name, column in (("ids", ids), ("entities", entities)):
        if column is not None and len(column) != len(questions):
            raise ValueError(f"{name}: expected {len(questions)} as questions, found {len(column)}")
    parent = list(range(len(questions)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row
    texts = [" ".join(words(question)) or question for question in questions]  # punctuation only: unchanged
    for column in (texts, ids, entities):
        first: dict[str, int] = {}
        for row, value in enumerate(() if column is None else column):
            if value is not None:
                parent[root(row)] = root(first.setdefault(value, row))
    _, first_rows, group = np.unique([root(row) for row in range(len(questions))], return_index=True,
                                     return_inverse=True)
    return np.argsort(np.argsort(first_rows))[group]


def grouped_splits(groups: ArrayLike, strata: ArrayLike, fractions: Mapping[str, float] = FRACTIONS,
                   seed: int = 17) -> dict[str, Indices]:
    """Splits rows without dividing a group, with each stratum's fractions as close as whole groups allow.

    Groups are placed largest first, equal sizes in an order drawn with the seed. Each goes to the split
    where Σ (rows placed − rows wanted)² / rows wanted, summed over splits and over the strata and all rows,
    grows least. For single rows of one stratum this is Sainte-Laguë apportionment. Single rows come last
    and even out what the large groups left uneven.

    Args:
        groups, strata: `[rows]`; groups as from `group_ids`, strata such as "popqa|1".
        fractions: split → its fraction of the rows, above 0; they sum to 1.

    Returns:
        split → row numbers in increasing order.

    Raises:
        ValueError: invalid fractions, columns of different lengths, or an empty split.
    """
    wanted = np.array(list(fractions.values()), float)
    if not (wanted > 0).all() or not math.isclose(wanted.sum(), 1, abs_tol=TOLERANCE):
        raise ValueError(f"fractions: expected numbers above 0 that sum to 1, found {dict(fractions)}")
    _, group, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    kinds, stratum = np.unique(np.asarray(strata), return_inverse=True)
    if group.shape != stratum.shape:
        raise ValueError(f"strata: expected shape {group.shape} as groups, found {stratum.shape}")
    rows = np.zeros((len(sizes), len(kinds) + 1))  # of each group: in each stratum, and in all
    np.add.at(rows, (group, stratum), 1)
    rows[:, -1] = sizes
    quota = wanted[:, None] * rows.sum(axis=0)
    placed = np.zeros_like(quota)
    split = np.empty(len(sizes), np.intp)
    order = np.random.default_rng(seed).permutation(len(sizes))
    for number in order[np.argsort(-sizes[order], kind="stable")]:
        growth = (rows[number] * (2 * (placed - quota) + rows[number]) / quota).sum(axis=1)
        split[number] = growth.argmin()
        placed[split[number]] += rows[number]
    for name, count in zip(fractions, placed[:, -1]):
        if not count:
            raise ValueError(f"{name}: expected enough groups for the splits {dict(fractions)}, found "
                             f"{len(sizes)}")
    return {name: np.flatnonzero(split[group] == k) for k, name in enumerate(fractions)}
