"""Splits: Recall's own, and those that keep together what belongs together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tilelli_jax.eval.recall.splits import SHARES, grouped, published, same

# --- Recall's --------------------------------------------------------------------------------


def test_published_on_a_small_table() -> None:
    """Each stratum by itself, in order of appearance, by one generator; halves are rounded to even."""
    datasets, labels = ["b"] * 10 + ["a"] * 30, [0] * 10 + [1] * 10 + [0] * 20
    found = published(datasets, labels, seed=3)
    assert list(found) == ["main"]
    rng = np.random.default_rng(3)
    held = {"val": [], "test": []}
    for low, high, n in ((0, 10, 2), (10, 20, 2), (20, 40, 3)):  # of 1.5, 1.5 and 3
        rows = list(range(low, high))
        rng.shuffle(rows)
        held["val"] += rows[:n]
        held["test"] += rows[n:2 * n]
    main = {part: rows.tolist() for part, rows in found["main"].items()}
    assert main["val"] == sorted(held["val"]) and main["test"] == sorted(held["test"])
    assert sorted(main["train"] + main["val"] + main["test"]) == list(range(40))


def test_cross_learns_from_one_data_set_and_asks_the_other() -> None:
    found = published(["popqa", "triviaqa", "other", "popqa"], [0, 1, 0, 1])["cross"]
    assert {part: rows.tolist() for part, rows in found.items()} == {"train": [1], "test": [0, 3]}


# --- What belongs together -------------------------------------------------------------------


def test_same() -> None:
    questions = ["Who wrote Emma?", "who wrote “Emma”", "Who wrote Ada?", "By whom?", "???", "!", "The"]
    assert same(questions).tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert same(questions, ids=["1", "2", "3", "4", "5", "3", None]).tolist() == [0, 0, 1, 2, 3, 1, 4]
    linked = same(questions, ids=["1", "2", "3", "2", None, None, None],
                  entities=["Emma", None, "Ada", "Emma (film)", "Emma (film)", "Ada", None])
    assert linked.tolist() == [0, 0, 1, 0, 0, 1, 2]
    columns = np.array(["x", "y", "X?"], object), np.array(["1", None, None], object)
    assert same(*columns).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="entities: expected 7"):
        same(questions, entities=["Emma"])


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["1", "2", "3", "4", "5", None]),
                          st.sampled_from(["r", "s", None])), max_size=25))
def test_same_is_what_can_be_reached(rows: list[tuple[str, str | None, str | None]]) -> None:
    """By brute force: steps between rows that share something, until nothing is added."""
    linked = np.array([[any(x == y and x is not None for x, y in zip(one, other)) for other in rows]
                       for one in rows], float).reshape(len(rows), len(rows))
    reached = np.linalg.matrix_power(linked, max(1, len(rows))) > 0 if rows else linked > 0
    found = same(*map(list, zip(*rows))) if rows else same([])
    np.testing.assert_array_equal(found[:, None] == found, reached)
    firsts = list(dict.fromkeys(found.tolist()))
    assert firsts == list(range(len(firsts))), "numbered as they appear"


# --- Whole groups ----------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Groups and strata: many single rows, some groups of up to 12, whose rows may differ in stratum."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 12)), min_size=12, max_size=60))
    groups = [number for number, size in enumerate(sizes) for _ in range(size)]
    strata = draw(st.lists(st.integers(0, 3), min_size=len(groups), max_size=len(groups)))
    return groups, strata


@given(tables(), st.integers(0, 2**32 - 1))
def test_no_group_straddles_and_shares_are_kept(table: tuple[list[int], list[int]], seed: int) -> None:
    groups, strata = map(np.array, table)
    found = grouped(groups, strata, seed=seed)
    assert list(found) == list(SHARES) and all(map(len, found.values()))
    np.testing.assert_array_equal(np.sort(np.concatenate(list(found.values()))), np.arange(len(groups)))
    assert all((np.diff(rows) > 0).all() for rows in found.values())
    where = Counter(group for rows in found.values() for group in set(groups[rows].tolist()))
    assert set(where.values()) == {1}
    largest = max(Counter(groups.tolist()).values())
    for part, rows in found.items():
        assert abs(len(rows) - SHARES[part] * len(groups)) <= largest + 8  # the strata's, added up
        for kind in set(strata.tolist()):
            wanted = SHARES[part] * (strata == kind).sum()
            assert abs((strata[rows] == kind).sum() - wanted) <= largest + 1


@given(st.integers(20, 400), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_single_rows_are_shared_almost_to_the_row(rows: int, strata: int, seed: int) -> None:
    kinds = np.random.default_rng(seed).integers(0, strata, rows)
    for part, held in grouped(np.arange(rows), kinds, seed=seed).items():
        assert abs(len(held) - SHARES[part] * rows) <= 4
        for kind in range(strata):
            assert abs((kinds[held] == kind).sum() - SHARES[part] * (kinds == kind).sum()) <= 2


def test_drawn_with_the_seed() -> None:
    rows = np.arange(200)
    once, again, other = (grouped(rows, rows % 2, seed=seed) for seed in (1, 1, 2))
    assert all((once[part] == again[part]).all() for part in SHARES)
    assert any(once[part].tolist() != other[part].tolist() for part in SHARES)
    # Large groups, which are placed first, come into every part, not only into the one with the most
    # room.
    groups = np.r_[np.repeat(np.arange(20), 10), 20 + np.arange(200)]
    assert all((groups[held] < 20).any() for held in grouped(groups, np.zeros(400)).values())


def test_parts_of_ones_own() -> None:
    found = grouped(list("aabbccddee"), list("xyxyxyxyxy"), {"fit": 0.6, "held": 0.4})
    assert {part: len(rows) for part, rows in found.items()} == {"fit": 6, "held": 4}


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate: 3 groups are too few"):
        grouped([0, 0, 1, 2], [0, 0, 0, 1])
    with pytest.raises(ValueError, match="strata"):
        grouped([0, 1], [0, 1, 1])
    for shares in ({"a": 0.5, "b": 0.4}, {"a": 1.0, "b": 0.0}, {"a": 1.5, "b": -0.5}, {}):
        with pytest.raises(ValueError, match="shares"):
            grouped([0, 1], [0, 1], shares)
