"""Welch's test and the exact permutation tests compared with brute force, closed forms and SciPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.eval import stats

runs = st.lists(st.integers(-50, 50).map(lambda n: n / 8), min_size=1, max_size=5)
# Sums of these are exact. Means of the smallest floats are not: they would depend on the order.
several = st.lists(st.integers(-10_240, 10_240).map(lambda n: n / 1024), min_size=2, max_size=6)


def mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(a, axis) - np.mean(b, axis)


@pytest.mark.parametrize("sizes", [(2, 2), (5, 5), (3, 7), (10, 4)])
def test_welch_equals_scipys(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(sizes))
    a, b = rng.normal(0.3, 1, sizes[0]), rng.normal(0, 2, sizes[1])
    for level in (0.95, 0.8):
        result, theirs = stats.welch(a, b, level), scipy.stats.ttest_ind(a, b, equal_var=False)
        interval = theirs.confidence_interval(level)
        np.testing.assert_allclose((*result.difference, result.degrees_of_freedom, result.p), (
            a.mean() - b.mean(), interval.low, interval.high, theirs.df, theirs.pvalue), rtol=1e-9)


def test_welch_by_hand() -> None:
    """Equal variances and sizes: Student's t with 2n − 2 degrees; for n = 2, p = 1 − t / √(t² + 2)."""
    result = stats.welch([2.0, 4.0], [0.0, 2.0])
    assert result.difference.point == 2 and result.degrees_of_freedom == pytest.approx(2)
    assert result.p == pytest.approx(1 - math.sqrt(2) / 2)  # t = √2
    # A single run has no variance; equal runs have a variance of 0.
    single = stats.welch([1.0], [2.0, 3.0])
    assert single.difference.point == -1.5 and math.isnan(single.p) and math.isnan(single.difference.low)
    for equal in (stats.welch([1.0, 1.0], [1.0, 1.0]), stats.paired_t([0.0, 0.0])):
        assert equal.p == 1 and equal.difference.point == 0 and math.isnan(equal.difference.low)
    for different in (stats.welch([1.0, 1.0], [2.0, 2.0]), stats.paired_t([-1.0, -1.0])):
        assert math.isnan(different.p) and different.difference.point == -1
        assert math.isnan(different.difference.high)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_paired_t_equals_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.2, 1, n)
    result, theirs = stats.paired_t(values), scipy.stats.ttest_1samp(values, 0)
    interval = theirs.confidence_interval()
    np.testing.assert_allclose((*result.difference, result.degrees_of_freedom, result.p), (
        values.mean(), interval.low, interval.high, n - 1, theirs.pvalue), rtol=1e-9)
    assert math.isnan(stats.paired_t([1.0]).p)


@given(runs, runs)
def test_relabelling_equals_brute_force(a: list[float], b: list[float]) -> None:
    """Sums of eighths are exact, so that nothing depends on rounding; most cases have ties."""
    n, pooled = len(a), np.array([*a, *b])
    null = []
    for subset in itertools.combinations(range(len(pooled)), n):
        in_a = np.isin(np.arange(len(pooled)), subset)
        # The difference of means times n·m, without division.
        null.append(abs(pooled[in_a].sum() * len(b) - pooled[~in_a].sum() * n))
    result = stats.exact_relabelling(a, b)
    observed = abs(sum(a) * len(b) - sum(b) * n)
    assert result.arrangements == len(null) == math.comb(len(pooled), n)
    assert result.p == np.mean([value >= observed for value in null])
    assert result.min_p - 1e-12 <= result.p <= 1


@given(runs)
def test_sign_flips_equal_brute_force(differences: list[float]) -> None:
    null = [abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]
    result = stats.exact_sign_flips(differences)
    assert result.arrangements == len(null)
    assert result.p == np.mean([value >= abs(sum(differences)) for value in null])
    assert result.min_p - 1e-12 <= result.p <= 1


@pytest.mark.parametrize("seed", range(3))
def test_exact_tests_equal_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.8, 1, 5), rng.normal(0, 1, 5)
    theirs = scipy.stats.permutation_test((a, b), mean_difference, n_resamples=np.inf, vectorized=True)
    assert stats.exact_relabelling(a, b).p == pytest.approx(theirs.pvalue)
    theirs = scipy.stats.permutation_test((a, b), mean_difference, permutation_type="samples",
                                          n_resamples=np.inf, vectorized=True)
    assert stats.exact_sign_flips(a - b).p == pytest.approx(theirs.pvalue)


def test_the_smallest_possible_p() -> None:
    """Five runs of each, all of one side below all of the other: p is 2/252 and 2/32."""
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
    """The tolerance is relative to the centred runs; the expected p comes from integers without offset."""
    for a, b in (([1, 2, 3], [4, 5, 7]), ([1, 4, 2], [3, 5]), ([0, 3], [1, 2, 9, 4]), ([5, 1, 1], [1, 5, 1])):
        pooled, n, total = np.array([*a, *b]), len(a), sum(a) + sum(b)
        null = [abs(len(pooled) * sum(subset) - n * total) for subset in itertools.combinations(pooled, n)]
        expected = np.mean(np.array(null) >= abs(len(pooled) * sum(a) - n * total))
        assert stats.exact_relabelling(np.add(a, offset), np.add(b, offset)).p == expected


def test_arrangements_that_differ_by_rounding_count_as_ties() -> None:
    """Tenths far from zero, whose ties are exact only as integers."""
    for scale, offset in ((0.1, 0.0), (0.1, 100.0), (1e-7, 3.3)):
        a, b = np.array([1, 4, 2, 6]), np.array([3, 5, 2])
        expected = stats.exact_relabelling(a, b).p
        assert stats.exact_relabelling(a * scale + offset, b * scale + offset).p == expected
    assert stats.exact_sign_flips([10.3 - 10.2, 0.2, 10.4 - 10.1]).p == stats.exact_sign_flips([1, 2, 3]).p
    assert stats.exact_sign_flips([1e13 + 1, -1e13, 5]).p == 6 / 8  # sums far below their terms
    assert stats.exact_sign_flips([1e12, 1, 2, 3]).p == 2 / 16


def test_a_variance_of_rounding_errors_counts_as_zero() -> None:
    """The computed variance of equal numbers is a rounding error; it would give p of about 1e-30."""
    without_spread = (stats.paired_t([0.1] * 3), stats.welch([0.437] * 3, [0.392] * 3),
                      stats.paired_t([0.1, 0.3 - 0.2]), stats.paired_t([3.4 - 3.3, 0.1, 100.3 - 100.2]),
                      stats.welch([0.1, 0.3 - 0.2], [0.7, 0.7]),
                      stats.welch([0.1 + 0.2, 0.3, 0.3], [0.1, 0.1]))
    for result in without_spread:
        assert math.isnan(result.p) and math.isnan(result.difference.low) and result.difference.point != 0
    assert stats.welch([0.1, 0.1], [0.1, 0.3 - 0.2]).p == stats.paired_t([0.0, 0.0, 0.0]).p == 1
    small = np.array([1.0, 2, 4])
    for offset in (1e6, 1e13):  # a spread that is small relative to the numbers still counts
        result = stats.welch(small + offset, small + offset + 5)
        assert result.p == pytest.approx(stats.welch(small, small + 5).p)
    assert stats.paired_t(small * 1e-9 + 0.1).p == pytest.approx(
        scipy.stats.ttest_1samp(small * 1e-9 + 0.1, 0).pvalue, rel=1e-4)


@given(several, several, st.floats(-5, 5))
def test_p_is_invariant_to_swapping_and_shifting(a: list[float], b: list[float], shift: float) -> None:
    """Swapping a and b, or adding a constant, does not change p."""
    left, right = np.array(a), np.array(b)
    for test in (stats.welch, stats.exact_relabelling):
        p = test(left, right).p
        assert math.isnan(p) or 0 <= p <= 1
        assert test(right, left).p == pytest.approx(p, abs=1e-9, nan_ok=True)
    assert stats.welch(left, right).difference.point == -stats.welch(right, left).difference.point
    differences = left[:len(right)] - right[:len(left)]
    assert stats.exact_sign_flips(-differences).p == stats.exact_sign_flips(differences).p
    # Eighths, whose sums are exact even far from zero.
    left, right, shift = np.round(8 * left) / 8, np.round(8 * right) / 8, round(8 * shift) / 8
    assert (stats.exact_relabelling(left + shift, right + shift).p
            == pytest.approx(stats.exact_relabelling(left, right).p))
    if left.std() + right.std() > 0:
        assert stats.welch(left + shift, right + shift).p == pytest.approx(stats.welch(left, right).p)


def test_false_positive_rates_are_at_most_the_level() -> None:
    """Equal distributions: 400 draws of six runs each, within 3 standard errors.

    With five pairs, the smallest p of the sign flips would be 0.0625.
    """
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((400, 2, 6))
    for level in (0.05, 0.2):
        slack = 3 * math.sqrt(level * (1 - level) / 400)
        assert np.mean([stats.welch(a, b).p <= level for a, b in drawn]) <= level + slack
        assert np.mean([stats.exact_relabelling(a, b).p <= level for a, b in drawn]) <= level + slack
        assert np.mean([stats.exact_sign_flips(a - b).p <= level for a, b in drawn]) <= level + slack
