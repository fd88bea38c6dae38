"""The published split, and splits that keep groups of related questions together."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.eval.recall.splits import FRACTIONS, group_ids, grouped_splits, published_splits

# --- Published -----------------------------------------------------------------------------


def test_published_on_a_small_table() -> None:
    """Strata are shuffled one by one in order of appearance, by one generator; halves round to even."""
    datasets, labels = ["b"] * 10 + ["a"] * 30, [0] * 10 + [1] * 10 + [0] * 20
    splits = published_splits(datasets, labels, seed=3)
    assert list(splits) == ["main"]
    rng = np.random.default_rng(3)
    held = {"val": [], "test": []}
    for low, high, n in ((0, 10, 2), (10, 20, 2), (20, 40, 3)):  # of 1.5, 1.5 and 3
        rows = list(range(low, high))
        rng.shuffle(rows)
        held["val"] += rows[:n]
        held["test"] += rows[n:2 * n]
    main = {part: rows.tolist() for part, rows in splits["main"].items()}
    assert main["val"] == sorted(held["val"]) and main["test"] == sorted(held["test"])
    assert sorted(main["train"] + main["val"] + main["test"]) == list(range(40))


def test_cross_trains_on_one_data_set_and_tests_on_the_other() -> None:
    splits = published_splits(["popqa", "triviaqa", "other", "popqa"], [0, 1, 0, 1])["cross"]
    assert {part: rows.tolist() for part, rows in splits.items()} == {"train": [1], "test": [0, 3]}


# --- Groups -------------------------------------------------------------------


def test_group_ids() -> None:
    questions = ["Who wrote Emma?", "who wrote “Emma”", "Who wrote Ada?", "By whom?", "???", "!", "The"]
    assert group_ids(questions).tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert group_ids(questions, ids=["1", "2", "3", "4", "5", "3", None]).tolist() == [0, 0, 1, 2, 3, 1, 4]
    linked = group_ids(questions, ids=["1", "2", "3", "2", None, None, None],
                  entities=["Emma", None, "Ada", "Emma (film)", "Emma (film)", "Ada", None])
    assert linked.tolist() == [0, 0, 1, 0, 0, 1, 2]
    columns = np.array(["x", "y", "X?"], object), np.array(["1", None, None], object)
    assert group_ids(*columns).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="entities: expected 7"):
        group_ids(questions, entities=["Emma"])


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["1", "2", "3", "4", "5", None]),
                          st.sampled_from(["r", "s", None])), max_size=25))
def test_groups_are_connected_components(rows: list[tuple[str, str | None, str | None]]) -> None:
    """Compared with brute force: paths between rows that share a value."""
    linked = np.array([[any(x == y and x is not None for x, y in zip(one, other)) for other in rows]
                       for one in rows], float).reshape(len(rows), len(rows))
    reached = np.linalg.matrix_power(linked, max(1, len(rows))) > 0 if rows else linked > 0
    group = group_ids(*map(list, zip(*rows))) if rows else group_ids([])
    np.testing.assert_array_equal(group[:, None] == group, reached)
    firsts = list(dict.fromkeys(group.tolist()))
    assert firsts == list(range(len(firsts))), "numbered in order of appearance"


# --- Grouped splits ----------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Groups and strata: many single rows, some groups of up to 12 rows, which may differ in stratum."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 12)), min_size=12, max_size=60))
    groups = [number for number, size in enumerate(sizes) for _ in range(size)]
    strata = draw(st.lists(st.integers(0, 3), min_size=len(groups), max_size=len(groups)))
    return groups, strata


@given(tables(), st.integers(0, 2**32 - 1))
def test_groups_stay_whole_and_fractions_are_close(table: tuple[list[int], list[int]], seed: int) -> None:
    groups, strata = map(np.array, table)
    splits = grouped_splits(groups, strata, seed=seed)
    assert list(splits) == list(FRACTIONS) and all(map(len, splits.values()))
    np.testing.assert_array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(len(groups)))
    assert all((np.diff(rows) > 0).all() for rows in splits.values())
    counts = Counter(group for rows in splits.values() for group in set(groups[rows].tolist()))
    assert set(counts.values()) == {1}
    largest = max(Counter(groups.tolist()).values())
    for part, rows in splits.items():
        assert abs(len(rows) - FRACTIONS[part] * len(groups)) <= largest + 8  # summed over the strata
        for kind in set(strata.tolist()):
            wanted = FRACTIONS[part] * (strata == kind).sum()
            assert abs((strata[rows] == kind).sum() - wanted) <= largest + 1


@given(st.integers(20, 400), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_single_rows_match_the_fractions_almost_exactly(rows: int, strata: int, seed: int) -> None:
    kinds = np.random.default_rng(seed).integers(0, strata, rows)
    for part, held in grouped_splits(np.arange(rows), kinds, seed=seed).items():
        assert abs(len(held) - FRACTIONS[part] * rows) <= 4
        for kind in range(strata):
            assert abs((kinds[held] == kind).sum() - FRACTIONS[part] * (kinds == kind).sum()) <= 2


def test_the_seed() -> None:
    rows = np.arange(200)
    once, again, other = (grouped_splits(rows, rows % 2, seed=seed) for seed in (1, 1, 2))
    assert all((once[part] == again[part]).all() for part in FRACTIONS)
    assert any(once[part].tolist() != other[part].tolist() for part in FRACTIONS)
    # Large groups, which are placed first, reach every split, not only the largest one.
    groups = np.r_[np.repeat(np.arange(20), 10), 20 + np.arange(200)]
    assert all((groups[held] < 20).any() for held in grouped_splits(groups, np.zeros(400)).values())


def test_custom_splits() -> None:
    splits = grouped_splits(list("aabbccddee"), list("xyxyxyxyxy"), {"fit": 0.6, "held": 0.4})
    assert {part: len(rows) for part, rows in splits.items()} == {"fit": 6, "held": 4}


def test_invalid_inputs() -> None:
    with pytest.raises(ValueError, match=r"calibrate: expected enough groups for the splits .* found 3"):
        grouped_splits([0, 0, 1, 2], [0, 0, 0, 1])
    with pytest.raises(ValueError, match="strata"):
        grouped_splits([0, 1], [0, 1, 1])
    for fractions in ({"a": 0.5, "b": 0.4}, {"a": 1.0, "b": 0.0}, {"a": 1.5, "b": -0.5}, {}):
        with pytest.raises(ValueError, match="fractions"):
            grouped_splits([0, 1], [0, 1], fractions)
