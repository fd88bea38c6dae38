"""Welch's test and the exact permutation tests, by brute force, closed forms and SciPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from tilelli_jax.eval import stats

runs = st.lists(st.integers(-50, 50).map(lambda whole: whole / 8), min_size=1, max_size=5)
# Sums of these are exact. Means of numbers near the least of all are not: they would differ with the order.
several = st.lists(st.integers(-10_240, 10_240).map(lambda n: n / 1024), min_size=2, max_size=6)


def mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(a, axis) - np.mean(b, axis)


@pytest.mark.parametrize("sizes", [(2, 2), (5, 5), (3, 7), (10, 4)])
def test_welch_is_scipys(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(sizes))
    a, b = rng.normal(0.3, 1, sizes[0]), rng.normal(0, 2, sizes[1])
    for level in (0.95, 0.8):
        found, theirs = stats.welch(a, b, level), scipy.stats.ttest_ind(a, b, equal_var=False)
        interval = theirs.confidence_interval(level)
        np.testing.assert_allclose((*found.difference, found.freedom, found.p), (
            a.mean() - b.mean(), interval.low, interval.high, theirs.df, theirs.pvalue), rtol=1e-9)


def test_welch_by_hand() -> None:
    """Spreads alike, as many of each: Student's t of 2n − 2 degrees; of two, p is 1 − t / √(t² + 2)."""
    found = stats.welch([2.0, 4.0], [0.0, 2.0])
    assert found.difference.point == 2 and found.freedom == pytest.approx(2)
    assert found.p == pytest.approx(1 - math.sqrt(2) / 2)  # t = √2
    # Nothing to tell a spread from, and no spread.
    alone = stats.welch([1.0], [2.0, 3.0])
    assert alone.difference.point == -1.5 and math.isnan(alone.p) and math.isnan(alone.difference.low)
    for alike in (stats.welch([1.0, 1.0], [1.0, 1.0]), stats.paired_t([0.0, 0.0])):
        assert alike.p == 1 and alike.difference.point == 0 and math.isnan(alike.difference.low)
    for apart in (stats.welch([1.0, 1.0], [2.0, 2.0]), stats.paired_t([-1.0, -1.0])):
        assert math.isnan(apart.p) and apart.difference.point == -1 and math.isnan(apart.difference.high)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_paired_t_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.2, 1, n)
    found, theirs = stats.paired_t(values), scipy.stats.ttest_1samp(values, 0)
    interval = theirs.confidence_interval()
    np.testing.assert_allclose((*found.difference, found.freedom, found.p), (
        values.mean(), interval.low, interval.high, n - 1, theirs.pvalue), rtol=1e-9)
    assert math.isnan(stats.paired_t([1.0]).p)


@given(runs, runs)
def test_relabelling_is_brute_force(a: list[float], b: list[float]) -> None:
    """Eighths add up exactly, so that nothing depends on rounding; ties are the rule."""
    n, whole = len(a), np.array([*a, *b])
    every = []
    for chosen in itertools.combinations(range(len(whole)), n):
        mine = np.isin(np.arange(len(whole)), chosen)
        # Times n·m: no division.
        every.append(abs(whole[mine].sum() * len(b) - whole[~mine].sum() * n))
    found = stats.exact_relabelling(a, b)
    seen = abs(sum(a) * len(b) - sum(b) * n)
    assert found.arrangements == len(every) == math.comb(len(whole), n)
    assert found.p == np.mean([one >= seen for one in every])
    assert found.least - 1e-12 <= found.p <= 1


@given(runs)
def test_sign_flips_are_brute_force(differences: list[float]) -> None:
    every = [abs(sum(sign * one for sign, one in zip(signs, differences, strict=True)))
             for signs in itertools.product((1, -1), repeat=len(differences))]
    found = stats.exact_sign_flips(differences)
    assert found.arrangements == len(every)
    assert found.p == np.mean([one >= abs(sum(differences)) for one in every])
    assert found.least - 1e-12 <= found.p <= 1


@pytest.mark.parametrize("seed", range(3))
def test_exact_tests_are_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.8, 1, 5), rng.normal(0, 1, 5)
    theirs = scipy.stats.permutation_test((a, b), mean_difference, n_resamples=np.inf, vectorized=True)
    assert stats.exact_relabelling(a, b).p == pytest.approx(theirs.pvalue)
    theirs = scipy.stats.permutation_test((a, b), mean_difference, permutation_type="samples",
                                          n_resamples=np.inf, vectorized=True)
    assert stats.exact_sign_flips(a - b).p == pytest.approx(theirs.pvalue)


def test_the_least_that_p_can_be() -> None:
    """Five runs of each, all of one below all of the other: 2 of 252, and 2 of 32."""
    a, b = [1.0, 1.1, 1.2, 1.3, 1.4], [2.0, 2.1, 2.2, 2.3, 2.9]
    assert stats.exact_relabelling(a, b)[:2] == (2 / 252, 2 / 252)
    assert stats.exact_sign_flips(np.subtract(a, b))[:2] == (2 / 32, 2 / 32)
    assert stats.exact_relabelling([0.0], [3.0, 3.0])[:2] == (1 / 3, 1 / 3)
    assert stats.exact_relabelling([1.0, 1.0], [1.0, 1.0]).p == 1
    assert stats.exact_sign_flips([0.0]).p == 1
    for test in (lambda: stats.exact_relabelling(range(20), range(20)),
                 lambda: stats.exact_sign_flips(range(30)), lambda: stats.exact_relabelling([], [1.0]),
                 lambda: stats.exact_sign_flips([])):
        with pytest.raises(ValueError, match="expected"):
            test()


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e13])
def test_a_common_offset_changes_no_exact_p(offset: float) -> None:
    """Wholes, in whole numbers: the tolerance is of what is left without the offset."""
    for a, b in (([1, 2, 3], [4, 5, 7]), ([1, 4, 2], [3, 5]), ([0, 3], [1, 2, 9, 4]), ([5, 1, 1], [1, 5, 1])):
        whole, n, total = np.array([*a, *b]), len(a), sum(a) + sum(b)
        every = [abs(len(whole) * sum(chosen) - n * total) for chosen in itertools.combinations(whole, n)]
        expected = np.mean(np.array(every) >= abs(len(whole) * sum(a) - n * total))
        assert stats.exact_relabelling(np.add(a, offset), np.add(b, offset)).p == expected


def test_what_is_equal_but_for_rounding_is_as_large() -> None:
    """Tenths far from zero: those that are equal are so in whole numbers only."""
    for scale, offset in ((0.1, 0.0), (0.1, 100.0), (1e-7, 3.3)):
        a, b = np.array([1, 4, 2, 6]), np.array([3, 5, 2])
        expected = stats.exact_relabelling(a, b).p
        assert stats.exact_relabelling(a * scale + offset, b * scale + offset).p == expected
    assert stats.exact_sign_flips([10.3 - 10.2, 0.2, 10.4 - 10.1]).p == stats.exact_sign_flips([1, 2, 3]).p
    assert stats.exact_sign_flips([1e13 + 1, -1e13, 5]).p == 6 / 8  # 6 beside −4, far below what is added
    assert stats.exact_sign_flips([1e12, 1, 2, 3]).p == 2 / 16


def test_a_spread_of_rounding_is_none() -> None:
    """The variance of equal numbers is rounding; p of it would be of the order of 1e-30."""
    without = (stats.paired_t([0.1] * 3), stats.welch([0.437] * 3, [0.392] * 3),
               stats.paired_t([0.1, 0.3 - 0.2]), stats.paired_t([3.4 - 3.3, 0.1, 100.3 - 100.2]),
               stats.welch([0.1, 0.3 - 0.2], [0.7, 0.7]), stats.welch([0.1 + 0.2, 0.3, 0.3], [0.1, 0.1]))
    for found in without:
        assert math.isnan(found.p) and math.isnan(found.difference.low) and found.difference.point != 0
    assert stats.welch([0.1, 0.1], [0.1, 0.3 - 0.2]).p == stats.paired_t([0.0, 0.0, 0.0]).p == 1
    small = np.array([1.0, 2, 4])
    for offset in (1e6, 1e13):  # a spread that is small beside the numbers is one
        found = stats.welch(small + offset, small + offset + 5)
        assert found.p == pytest.approx(stats.welch(small, small + 5).p)
    assert stats.paired_t(small * 1e-9 + 0.1).p == pytest.approx(
        scipy.stats.ttest_1samp(small * 1e-9 + 0.1, 0).pvalue, rel=1e-4)


@given(several, several, st.floats(-5, 5))
def test_what_does_not_matter(a: list[float], b: list[float], shift: float) -> None:
    """Which of the two is called a, and where zero is, changes no p."""
    left, right = np.array(a), np.array(b)
    for test in (stats.welch, stats.exact_relabelling):
        p = test(left, right).p
        assert math.isnan(p) or 0 <= p <= 1
        assert test(right, left).p == pytest.approx(p, abs=1e-9, nan_ok=True)
    assert stats.welch(left, right).difference.point == -stats.welch(right, left).difference.point
    differences = left[:len(right)] - right[:len(left)]
    assert stats.exact_sign_flips(-differences).p == stats.exact_sign_flips(differences).p
    # Of eighths, whose sums are exact however far from zero.
    left, right, shift = np.round(8 * left) / 8, np.round(8 * right) / 8, round(8 * shift) / 8
    assert (stats.exact_relabelling(left + shift, right + shift).p
            == pytest.approx(stats.exact_relabelling(left, right).p))
    if left.std() + right.std() > 0:
        assert stats.welch(left + shift, right + shift).p == pytest.approx(stats.welch(left, right).p)


def test_p_is_below_a_level_no_more_often_than_that() -> None:
    """Of equal distributions: 400 draws of six and six, within 3 standard errors.

    Of five pairs no arrangement of signs has a p below 0.0625.
    """
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((400, 2, 6))
    for level in (0.05, 0.2):
        room = 3 * math.sqrt(level * (1 - level) / 400)
        assert np.mean([stats.welch(a, b).p <= level for a, b in drawn]) <= level + room
        assert np.mean([stats.exact_relabelling(a, b).p <= level for a, b in drawn]) <= level + room
        assert np.mean([stats.exact_sign_flips(a - b).p <= level for a, b in drawn]) <= level + room
