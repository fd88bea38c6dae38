"""Which questions a model of knowledge learns from, and which it is compared with.

The published split draws single questions: some questions stand on both sides, word for word. `grouped`
keeps together what `same` finds to be one question, or one about the same thing.
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
SHARES: Mapping[str, float] = {"train": 0.55, "validate": 0.15, "calibrate": 0.15, "test": 0.15}
SLACK = 1e-9  # shares are added up


def published(datasets: ArrayLike, labels: ArrayLike, seed: int = 17, val: float = 0.15,
              test: float = 0.15) -> dict[str, dict[str, Indices]]:
    """Recall's: "main" (train, val, test), and "cross" (train, test) where both data sets are there.

    - main: the questions of each data set and label, in the order in which these first appear, are
      shuffled by one generator; the first round(val · n) are val, the next round(test · n) test, halves
      rounded to even.
    - cross: learned from TriviaQA, compared with PopQA; no validation.

    Args:
        datasets, labels: `[rows]`.

    Returns:
        split → part → rows, rising.
    """
    datasets, labels = np.asarray(datasets), np.asarray(labels)
    strata: dict[tuple[str, int], list[int]] = {}
    for row, key in enumerate(zip(datasets.tolist(), labels.tolist(), strict=True)):
        strata.setdefault(key, []).append(row)
    rng = np.random.default_rng(seed)
    main: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for rows in strata.values():
        rng.shuffle(rows)
        first, second = round(val * len(rows)), round(test * len(rows))
        main["val"] += rows[:first]
        main["test"] += rows[first:first + second]
        main["train"] += rows[first + second:]
    found = {"main": {part: np.sort(np.array(rows, np.intp)) for part, rows in main.items()}}
    cross = {part: np.flatnonzero(datasets == name) for part, name in (("train", "triviaqa"),
                                                                       ("test", "popqa"))}
    return found | ({"cross": cross} if all(map(len, cross.values())) else {})


def same(questions: Texts, ids: Names | None = None, entities: Names | None = None) -> NDArray[np.int64]:
    """Numbers rows so that those which belong together share one: `[rows]`, from 0 as they appear.

    Two rows belong together that have the same words (`matching.words`: case, accents, punctuation and
    articles do not matter), the same id, or the same entity that they ask about; and those that are
    linked through others (union-find, Tarjan 1975).

    Args:
        ids, entities: `[rows]`; None, for all or for a row, is like no other. Ids of different data sets
            must differ.
    """
    for name, column in (("ids", ids), ("entities", entities)):
        if column is not None and len(column) != len(questions):
            raise ValueError(f"{name}: expected {len(questions)} as questions, found {len(column)}")
    above = list(range(len(questions)))

    def top(row: int) -> int:
        while above[row] != row:
            above[row] = row = above[above[row]]
        return row
    texts = [" ".join(words(question)) or question for question in questions]  # marks alone: as they are
    for column in (texts, ids, entities):
        first: dict[str, int] = {}
        for row, value in enumerate(() if column is None else column):
            if value is not None:
                above[top(row)] = top(first.setdefault(value, row))
    _, found, group = np.unique([top(row) for row in range(len(questions))], return_index=True,
                                return_inverse=True)
    return np.argsort(np.argsort(found))[group]


def grouped(groups: ArrayLike, strata: ArrayLike, shares: Mapping[str, float] = SHARES,
            seed: int = 17) -> dict[str, Indices]:
    """Parts that split no group, with the strata's shares kept as well as whole groups allow.

    Group by group, the largest first and equals in an order drawn with the seed, each goes where it
    leaves the parts nearest to their shares: where Σ (rows there − rows wanted)² / rows wanted, over
    parts and over strata and all rows together, grows least. For single rows of one stratum that is
    Sainte-Laguë's way of sharing out seats. Single rows, which come last, even out what the large groups
    have left uneven.

    Args:
        groups, strata: `[rows]`, as of `same`, and as "popqa|1".
        shares: part → its share of the rows; above 0, together 1.

    Returns:
        part → rows, rising.

    Raises:
        ValueError: shares as they cannot be, columns of different lengths, or a part that is left empty.
    """
    wanted = np.array(list(shares.values()), float)
    if not (wanted > 0).all() or not math.isclose(wanted.sum(), 1, abs_tol=SLACK):
        raise ValueError(f"shares: expected numbers above 0 that sum to 1, found {dict(shares)}")
    _, group, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    kinds, stratum = np.unique(np.asarray(strata), return_inverse=True)
    if group.shape != stratum.shape:
        raise ValueError(f"strata: expected shape {group.shape} as groups, found {stratum.shape}")
    rows = np.zeros((len(sizes), len(kinds) + 1))  # of each group: in each stratum, and in all
    np.add.at(rows, (group, stratum), 1)
    rows[:, -1] = sizes
    quota = wanted[:, None] * rows.sum(axis=0)
    there = np.zeros_like(quota)
    part = np.empty(len(sizes), np.intp)
    order = np.random.default_rng(seed).permutation(len(sizes))
    for number in order[np.argsort(-sizes[order], kind="stable")]:
        growth = (rows[number] * (2 * (there - quota) + rows[number]) / quota).sum(axis=1)
        part[number] = growth.argmin()
        there[part[number]] += rows[number]
    for name, held in zip(shares, there[:, -1]):
        if not held:
            raise ValueError(f"{name}: {len(sizes)} groups are too few for parts of {dict(shares)}")
    return {name: np.flatnonzero(part[group] == k) for k, name in enumerate(shares)}
