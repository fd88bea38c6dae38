"""Resampling compared with plain loops; tests compared with closed forms and their false-positive rates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bench.resampling import looped_bootstrap, looped_permutation
from tests.eval.running import draws
from tilelli_jax.eval import stats
from tilelli_jax.eval.metrics import auroc, expected_calibration_error


@pytest.fixture
def scored() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    labels = (rng.random(120) < 0.3).astype(int)
    return labels, {"good": rng.standard_normal(120) + labels, "poor": rng.standard_normal(120),
                    "coarse": np.round(rng.standard_normal(120) + labels)}


def test_the_bootstrap_equals_a_loop(scored: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores = scored
    expected = looped_bootstrap(labels, scores, 100, 42)
    for block in (stats.resampling.BLOCK, 1, 500):  # whatever the block size
        monkeypatch.setattr(stats.resampling, "BLOCK", block)
        bootstrap = stats.PairedBootstrap(labels, scores, replicates=100)
        for name, values in expected.items():
            np.testing.assert_allclose(bootstrap.replicates[name], values, atol=1e-12)
            low, high = np.percentile(values, [2.5, 97.5])
            np.testing.assert_allclose(bootstrap.interval(name), (auroc(labels, scores[name]), low, high),
                                       atol=1e-12)
        gaps = expected["good"] - expected["poor"]
        np.testing.assert_allclose(bootstrap.difference("good", "poor")[1:], np.percentile(gaps, [2.5, 97.5]),
                                   atol=1e-12)


def test_replicates_with_one_class_are_dropped() -> None:
    labels = np.array([1, 0, 0, 0, 0, 0])
    bootstrap = stats.PairedBootstrap(labels, {"a": np.arange(6.0)}, replicates=200)
    expected = looped_bootstrap(labels, {"a": np.arange(6.0)}, 200, 42)["a"]
    assert 0 < len(expected) < 200
    np.testing.assert_allclose(bootstrap.replicates["a"], expected, atol=1e-12)


def test_runs_are_resampled_with_the_items() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1], 25)
    scores = {"a": rng.standard_normal((3, 50)) + np.outer([0, 1, 2], labels), "b": rng.standard_normal(50),
              "c": rng.standard_normal((3, 50))}
    bootstrap = stats.PairedBootstrap(labels, scores, replicates=80, draw_runs=True)
    fixed_runs = stats.PairedBootstrap(labels, scores, replicates=80)
    assert bootstrap.points == fixed_runs.points
    np.testing.assert_array_equal(bootstrap.replicates["b"], fixed_runs.replicates["b"])
    (counts,) = stats.resampled_counts(50, 80, 42)
    run_weights = np.random.default_rng([42, 1]).multinomial(3, [1 / 3] * 3, 80)
    for name in "ac":  # the same runs are drawn for both
        expected = [np.average([auroc(np.repeat(labels, row), np.repeat(run, row)) for run in scores[name]],
                               weights=weights) for row, weights in zip(counts, run_weights, strict=True)]
        np.testing.assert_allclose(bootstrap.replicates[name], expected, atol=1e-12)
    with pytest.raises(ValueError, match=r"equally many runs of each, found \[2, 3\]"):
        stats.PairedBootstrap(labels, {**scores, "d": scores["c"][:2]}, draw_runs=True)


def test_whole_groups_are_drawn() -> None:
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    for counts in stats.resampled_counts(6, 50, 0, groups):
        assert (counts[:, groups == "b"] == counts[:, [0]]).all() and (counts[:, 1] == counts[:, 4]).all()
        np.testing.assert_array_equal(counts[:, 0] + counts[:, 1] + counts[:, 3], 3)


def test_grouped_items_widen_the_interval() -> None:
    """Each item occurs ten times; drawing single items treats the copies as ten times as much evidence."""
    rng = np.random.default_rng(0)
    values, groups = np.repeat(rng.standard_normal(40), 10), np.repeat(np.arange(40), 10)
    by_item, by_group = stats.bootstrap_mean(values), stats.bootstrap_mean(values, groups=groups)
    assert 2.5 < (by_group.high - by_group.low) / (by_item.high - by_item.low) < 4  # √10


@draws(100, 400)
@pytest.mark.parametrize("grouped", [False, True])
def test_intervals_have_nominal_coverage(grouped: bool, n: int) -> None:
    """The AUROC of N(1, 1) and N(0, 1) is Φ(1/√2); 95 % of intervals cover it, within 3 standard errors."""
    truth, rng, hits = scipy.stats.norm.cdf(1 / math.sqrt(2)), np.random.default_rng(0), 0
    for _ in range(n):
        labels = np.repeat([0, 1], 60)
        score = rng.standard_normal(120) + labels
        groups = np.arange(120) if grouped else None
        interval = stats.PairedBootstrap(labels, {"s": score}, replicates=300, groups=groups).interval("s")
        hits += interval.low <= truth <= interval.high
    assert abs(hits / n - 0.95) < 3 * math.sqrt(0.95 * 0.05 / n)


def test_the_bootstrap_of_a_mean() -> None:
    values = np.random.default_rng(2).exponential(size=50)
    rng = np.random.default_rng(7)
    expected = np.percentile([values[rng.choice(50, 50)].mean() for _ in range(400)], [2.5, 97.5])
    interval = stats.bootstrap_mean(values, replicates=400, seed=7)
    np.testing.assert_allclose(interval, (values.mean(), *expected), atol=1e-12)
    assert all(map(math.isnan, stats.bootstrap_mean([])))
    assert not stats.bootstrap_mean([-1.0, 1.0, 2.0]).excludes_zero
    assert stats.bootstrap_mean([1.0, 1.5, 2.0]).excludes_zero


def test_permutations_equal_a_loop(scored: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores = scored
    expected = looped_permutation(labels, scores["good"], scores["coarse"], 150, 42)
    observed = auroc(labels, scores["good"]) - auroc(labels, scores["coarse"])
    for block in (stats.significance.BLOCK, 1000):
        monkeypatch.setattr(stats.significance, "BLOCK", block)
        result = stats.permute_labels(labels, scores["good"], scores["coarse"], permutations=150)
        np.testing.assert_allclose(result.null, expected, atol=1e-12)
    extreme = int((expected <= observed).sum() if observed < 0 else (expected >= observed).sum())
    assert result.p_one_sided == (extreme + 1) / 151
    uncounted = stats.permute_labels(labels, scores["good"], scores["coarse"], permutations=150,
                                     count_observed=False)
    assert uncounted.p_one_sided == extreme / 150
    assert uncounted.p_two_sided == (np.abs(expected) >= abs(observed)).mean()
    with pytest.raises(ValueError, match="both classes"):
        stats.permute_labels(np.ones(5, int), np.arange(5.0), np.arange(5.0))


@pytest.mark.parametrize("seed", range(25))
def test_permutations_converge_to_all_labellings(seed: int) -> None:
    """Six items, exact gains as integers (twice the pairs won); 4 standard errors of 20,000 draws."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([0, 0, 0, 1, 1, 1])
    a, b = rng.integers(0, 7, (2, 6))

    def gain(high: tuple[int, ...]) -> int:
        low = [i for i in range(6) if i not in high]
        return int(sum(np.sign(a[i] - a[j]) - np.sign(b[i] - b[j]) for i in high for j in low))
    null = np.array([gain(high) for high in itertools.combinations(range(6), 3)])
    observed = gain(tuple(np.flatnonzero(labels)))
    result = stats.permute_labels(labels, a, b, permutations=20_000, seed=seed)
    assert result.difference == pytest.approx(observed / 18, abs=1e-12)
    one_sided = np.mean(null <= observed if observed < 0 else null >= observed)
    two_sided = np.mean(np.abs(null) >= abs(observed))
    for p, expected in ((result.p_one_sided, one_sided), (result.p_two_sided, two_sided)):
        assert abs(p - expected) <= 4 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-4
    # The returned null gives the same p.
    extreme = (np.abs(result.null) >= abs(result.difference)).sum() + 1
    assert result.p_two_sided == extreme / 20_001


def test_a_permutation_test_by_hand() -> None:
    """18 of the 20 labellings are as extreme: 1 − 2/3 ties with 2/3 − 1/3 despite binary rounding."""
    result = stats.permute_labels([0, 0, 1, 0, 1, 1], [2, 0, 1, 5, 3, 4], [0, 4, 1, 5, 3, 2])
    assert result.p_two_sided == pytest.approx(0.9, abs=0.012)


def test_delong_equals_its_definition(scored: tuple) -> None:
    """The covariance of the pairwise comparisons, as DeLong et al. (1988) define it."""
    labels, scores = scored
    areas, covariance = stats.delong_covariance(labels, np.stack(list(scores.values())))
    high, low = labels == 1, labels == 0
    won = np.stack([(s[high][:, None] > s[low]) + 0.5 * (s[high][:, None] == s[low])
                    for s in scores.values()])
    v10, v01 = won.mean(axis=2), won.mean(axis=1)
    np.testing.assert_allclose(areas, won.mean(axis=(1, 2)), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(v10) / high.sum() + np.cov(v01) / low.sum(), atol=1e-12)
    # Close to the bootstrap's interval, which assumes no normality.
    test = stats.delong(labels, scores["good"], scores["poor"])
    drawn = stats.PairedBootstrap(labels, scores).difference("good", "poor")
    np.testing.assert_allclose(test.difference, drawn, atol=0.03)


def test_delong_of_degenerate_scores() -> None:
    labels, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.2, 0.3])
    assert stats.delong(labels, score, np.exp(score)).p == 1.0
    assert math.isnan(stats.delong([0, 0, 1], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]).p)
    # A variance estimated as 0 is not usable: four items cannot give certainty.
    perfect, worse = np.array([0.1, 0.9, 0.2, 0.8]), np.array([0.9, 0.1, 0.8, 0.2])
    for a, b, observed in ((perfect, worse, 1.0), (perfect, perfect[[2, 3, 0, 1]], 0.0)):
        result = stats.delong(labels, a, b)
        assert result.difference.point == observed
        assert all(map(math.isnan, (result.p, result.difference.low, result.difference.high)))
    # Every item gains equally: the variances cancel up to rounding.
    n = np.arange(5)
    result = stats.delong(np.repeat([0, 1], 5), np.r_[2 * n, 2 * n + 1], np.r_[2 * n + 1, 2 * n])
    assert result.difference.point == pytest.approx(0.2) and math.isnan(result.p)
    with pytest.raises(ValueError, match="both classes"):
        stats.delong([1, 1], [0.1, 0.2], [0.1, 0.2])


def test_delong_has_the_nominal_false_positive_rate() -> None:
    """Two equally informative scores: p < 0.05 in 5 % of 1000 data sets, within 3 standard errors."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [70, 50])
    significant = [stats.delong(labels, rng.standard_normal(120) + labels,
                                rng.standard_normal(120) + labels).p < 0.05 for _ in range(1000)]
    assert abs(np.mean(significant) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 1000)


@given(hnp.arrays(float, st.integers(1, 12), elements=st.floats(0, 1)))
def test_holm_step_by_step(p: np.ndarray) -> None:
    corrected = stats.holm(p)
    order = np.argsort(p, kind="stable")
    running_max = 0.0
    for step, i in enumerate(order):
        running_max = max(running_max, min(1.0, (len(p) - step) * p[i]))
        assert corrected[i] == running_max
    assert (corrected >= p).all()


def test_holm_of_undefined_tests() -> None:
    np.testing.assert_array_equal(stats.holm([0.01, math.nan, 0.04]), [0.02, math.nan, 0.04])
    assert stats.holm([]).shape == (0,)


def test_bootstrap_p_of_a_mean() -> None:
    """It is close to the p of a t test on normal values."""
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.2, 0.5):
        values = rng.standard_normal(80) + shift
        expected = scipy.stats.ttest_1samp(values, 0).pvalue
        assert abs(stats.bootstrap_p(values, replicates=4000) - expected) < 0.03
    assert stats.bootstrap_p(np.zeros(5)) == 1.0
    assert stats.bootstrap_p(np.full(40, 2.0) + 0.01 * rng.standard_normal(40)) == 1 / 10_001
    assert math.isnan(stats.bootstrap_p([])) and math.isnan(stats.bootstrap_p([0.3]))
    assert math.isnan(stats.bootstrap_p(rng.standard_normal(50) + 9, groups=np.zeros(50)))


def test_bootstrap_p_of_a_mean_without_spread() -> None:
    """With equal group means, or values equal up to rounding, resampling shows no spread."""
    for values, groups in (([1, 2, 1, 2], [0, 0, 1, 1]), ([0.1, 0.1, 0.3 - 0.2], None), ([0.1] * 3, None),
                           ([1, 2, 3, 2], [0, 0, 0, 1]), ([0.1, 0.2, 0.3 - 0.2, 0.2], [0, 0, 1, 1])):
        assert math.isnan(stats.bootstrap_p(values, groups=groups))
    assert stats.bootstrap_p([1, -1, 2, -2], groups=[0, 0, 1, 1]) == 1
    assert stats.bootstrap_p([1, 2, 1, 2]) < 0.05


def test_bootstrap_p_counts_ties_up_to_rounding() -> None:
    """Five values with mean 1 have 3125 samples, some of which tie with the observed mean."""
    values = np.array([2, 0, 4, -2, 1])
    extreme = [abs(sum(sample)) >= 5 for sample in itertools.product(values - 1, repeat=5)]
    for scale in (1, 0.1, 7.2):
        p = stats.bootstrap_p(scale * values, replicates=20_000)
        assert p == pytest.approx(np.mean(extreme), abs=0.013)  # 4 standard errors


def test_p_of_aurocs_without_spread() -> None:
    """p is NaN with one class, or if the difference is the same in every replicate."""
    labels, perfect = [0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8]
    one_class = stats.PairedBootstrap([1] * 4, {"a": perfect, "b": perfect[::-1]}, replicates=50)
    assert math.isnan(one_class.p("a", "b")) and math.isnan(one_class.difference("a", "b").point)
    drawn = stats.PairedBootstrap(labels, {"a": perfect, "b": perfect[::-1], "c": [0.5] * 4,
                                           "d": np.exp(perfect)})
    assert math.isnan(drawn.p("a", "b")) and math.isnan(drawn.p("c", "a")) and drawn.p("a", "d") == 1


def test_aurocs_that_differ_by_rounding_count_as_equal() -> None:
    """The same three runs in another order have weighted sums that differ in the last bits."""
    rng = np.random.default_rng(2)
    labels, runs = rng.integers(0, 2, 31), rng.random((3, 31))
    drawn = stats.PairedBootstrap(labels, {"a": runs, "b": runs[[2, 0, 1]]}, replicates=300)
    assert drawn.p("a", "b") == 1 and drawn.difference("a", "b")[1:] == (0, 0)


def test_p_of_grouped_aurocs() -> None:
    """Equally good scores, each item six times: DeLong counts six times the evidence, the groups do not."""
    rng, by_item, by_group = np.random.default_rng(0), 0, 0
    for _ in range(60):
        labels = rng.integers(0, 2, 40)
        scores = {name: np.repeat(rng.standard_normal(40) + labels, 6) for name in "ab"}
        groups, repeated = np.repeat(np.arange(40), 6), np.repeat(labels, 6)
        by_item += stats.delong(repeated, scores["a"], scores["b"]).p < 0.05
        by_group += stats.PairedBootstrap(repeated, scores, replicates=200, groups=groups).p("a", "b") < 0.05
    assert by_item > 15 and by_group <= 8  # of 60; 3 are expected


def test_groups_of_another_length_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"groups: expected shape \(4,\), found \(7,\)"):
        stats.PairedBootstrap([0, 1, 0, 1], {"a": np.arange(4.0)}, groups=np.zeros(7))


@draws(60, 200)
def test_false_positives_with_groups(n: int) -> None:
    """Equally good scores on 40 groups of similar items: p of whole groups is below 0.05 in about 5 %."""
    rng = np.random.default_rng(0)
    significant = {"auroc": 0, "mean": 0, "single items": 0}
    groups = np.repeat(np.arange(40), 5)
    for _ in range(n):
        shared = rng.standard_normal((3, 40))[:, groups] + 0.3 * rng.standard_normal((3, 200))
        labels = shared[0] > 0
        drawn = stats.PairedBootstrap(labels, {"a": shared[1], "b": shared[2]}, replicates=400, groups=groups)
        significant["auroc"] += drawn.p("a", "b") < 0.05
        significant["mean"] += stats.bootstrap_p(shared[0], replicates=400, groups=groups) < 0.05
        significant["single items"] += stats.bootstrap_p(shared[0], replicates=400) < 0.05
    assert max(significant["auroc"], significant["mean"]) <= 0.1 * n, significant
    assert significant["single items"] > 0.2 * n, significant


def test_several_runs_are_averaged(scored: tuple) -> None:
    """The same items are drawn for all runs: the replicates are means over the runs' replicates."""
    labels, a, b = scored[0], scored[1]["good"], scored[1]["coarse"]
    drawn = stats.PairedBootstrap(labels, {"both": np.stack([a, b]), "a": a, "b": b}, replicates=300, seed=5)
    assert drawn.points["both"] == pytest.approx((auroc(labels, a) + auroc(labels, b)) / 2, abs=1e-12)
    np.testing.assert_allclose(drawn.replicates["both"], (drawn.replicates["a"] + drawn.replicates["b"]) / 2)
    repeated = stats.PairedBootstrap(labels, {"both": np.stack([a, a])}, replicates=300, seed=5)
    np.testing.assert_allclose(repeated.replicates["both"], drawn.replicates["a"])


def test_the_bootstrap_of_any_statistic() -> None:
    """Equals the paired bootstrap for AUROC, and the bootstrap of a mean; drops undefined replicates."""
    rng = np.random.default_rng(0)
    labels, scores, groups = rng.integers(0, 2, 60), rng.random(60), np.arange(60) // 4
    interval = stats.bootstrap_of(auroc, labels, scores, replicates=200, seed=3, groups=groups)
    paired = stats.PairedBootstrap(labels, {"x": scores}, replicates=200, seed=3, groups=groups)
    assert interval == pytest.approx(paired.interval("x"), abs=1e-12)
    mean = stats.bootstrap_of(lambda _, scores: float(scores.mean()), labels, scores, replicates=200, seed=3)
    assert mean == pytest.approx(stats.bootstrap_mean(scores, replicates=200, seed=3), abs=1e-12)
    few = stats.bootstrap_of(auroc, [0, 0, 1], [0.1, 0.2, 0.3], replicates=100)
    assert few.point == 1.0 and np.isfinite([few.low, few.high]).all()


@draws(10, 25)
def test_the_calibration_error_lies_in_its_centred_interval(n: int) -> None:
    """With calibrated probabilities uncentred intervals may lie above the point, centred ones do not."""
    above = {False: 0, True: 0}
    for seed in range(n):
        rng = np.random.default_rng(seed)
        probabilities = rng.random(200)
        labels = (rng.random(200) < probabilities).astype(int)
        for centred in above:
            interval = stats.bootstrap_of(expected_calibration_error, labels, probabilities, replicates=150,
                                          centred=centred)
            above[centred] += interval.low > interval.point
            assert 0 <= interval.low <= interval.high
    assert above[True] == 0 < above[False]


@given(st.integers(1, 60), st.data())
def test_exact_fractions(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    interval = stats.exact_fraction(successes, n)
    expected = scipy.stats.binomtest(successes, n).proportion_ci(0.95, "exact")
    assert interval == pytest.approx((successes / n, expected.low, expected.high), abs=1e-9)


# --- Runs and items --------------------------------------------------------------------------


def test_runs_and_items_are_drawn_independently() -> None:
    """Compared with a loop over replicates; with one run it equals the bootstrap over items."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 12))
    interval = stats.bootstrap_two_way(values, replicates=300, seed=5)
    run_rng, means = np.random.default_rng([5, 1]), []
    counts = np.concatenate(list(stats.resampled_counts(12, 300, 5)))
    run_weights = run_rng.multinomial(3, np.full(3, 1 / 3), len(counts)) / 3
    for items, weights in zip(counts, run_weights, strict=True):
        means.append(sum(weights[r] * values[r, i] * items[i] / 12 for r in range(3) for i in range(12)))
    assert interval == pytest.approx((values.mean(), *np.percentile(means, [2.5, 97.5])))
    assert stats.bootstrap_two_way(values[:1], replicates=300, seed=5) == pytest.approx(
        stats.bootstrap_mean(values[0], replicates=300, seed=5))


def test_two_way_intervals_reflect_the_spread_of_runs_and_of_items() -> None:
    rng = np.random.default_rng(1)
    runs, items = rng.normal(size=(6, 1)), rng.normal(size=(1, 50))
    for values, spread in ((runs + np.zeros((6, 50)), runs.std() / math.sqrt(6)),
                           (items + np.zeros((6, 50)), items.std() / math.sqrt(50))):
        interval = stats.bootstrap_two_way(values, replicates=4000)
        assert (interval.high - interval.low) / 3.92 == pytest.approx(spread, rel=0.1)
    assert stats.bootstrap_two_way(np.ones((3, 4))) == (1, 1, 1)
    assert math.isnan(stats.bootstrap_two_way(np.zeros((2, 0))).point)


def test_a_ratio_uses_the_same_runs_and_items() -> None:
    rng = np.random.default_rng(2)
    before = rng.random((4, 30)) + 0.1
    half = stats.bootstrap_two_way(np.stack([before / 2, before]), lambda means: means[0] / means[1])
    assert half == pytest.approx((0.5, 0.5, 0.5))
    by_zero = stats.bootstrap_two_way(np.stack([before, 0 * before]), lambda means: means[0] / means[1])
    assert math.isinf(by_zero.point) and math.isnan(by_zero.low)


def test_a_ratio_without_an_upper_end() -> None:
    """A third of the replicates have a zero denominator; dropping them would give a finite upper end."""
    kinds = np.array([[[1.0, 1, 1, 0]], [[1.0, 0, 0, 0]]])
    interval = stats.bootstrap_two_way(kinds, lambda means: means[0] / means[1])
    assert interval.point == 3 and interval.low == 1 and math.isnan(interval.high)
