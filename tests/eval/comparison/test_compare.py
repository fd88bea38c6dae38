"""Statistics and verdicts of a comparison, on synthetic losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from tilelli_jax.eval.comparison.compare import TESTS, compare
from tilelli_jax.eval.comparison.report import is_significant, verdicts
from tilelli_jax.eval.stats import holm

SEEDS = 6
LOSSES = {"reference": 1.0, "better": 0.8, "worse": 1.1, "alike": 1.001}


@pytest.fixture
def comparison() -> dict[str, Any]:
    """Three models against a reference: a fifth lower, a tenth higher, and equal up to noise."""
    rng = np.random.default_rng(0)
    return compare({name: mean + 0.01 * rng.standard_normal(SEEDS) for name, mean in LOSSES.items()})


def test_p_is_corrected_over_all_comparisons(comparison: dict[str, Any]) -> None:
    comparisons = comparison["comparisons"]
    assert [row["model"] for row in comparisons] == ["better", "worse", "alike"]
    for test in TESTS:
        raw = [row["p"][test] for row in comparisons]
        np.testing.assert_allclose([row["p_holm"][test] for row in comparisons], holm(raw))
        smallest = comparisons[0]  # multiplied by the number of comparisons
        assert smallest["p_holm"][test] > smallest["p"][test]


def test_differences_are_model_minus_reference(comparison: dict[str, Any]) -> None:
    losses = {name: np.array(row["by_seed"]) for name, row in comparison["losses"].items()}
    for row in comparison["comparisons"]:
        model, reference = losses[row["model"]], losses["reference"]
        np.testing.assert_allclose(row["differences"], model - reference)
        assert row["difference"].point == pytest.approx(model.mean() - reference.mean())
        welch = scipy.stats.ttest_ind(model, reference, equal_var=False)
        assert row["p"]["welch"] == pytest.approx(welch.pvalue)


def as_results(comparison: dict[str, Any]) -> dict[str, Any]:
    """The comparison as in results.json, for one text."""
    seeds = len(comparison["comparisons"][0]["differences"])
    return {"texts": {"text": comparison | {"comparisons": [
        row | {key: row[key]._asdict() for key in ("difference", "paired_difference")}
        for row in comparison["comparisons"]]}}, "config": {"seeds": list(range(seeds))}}


def test_verdicts_name_the_tests_and_the_conclusion(comparison: dict[str, Any]) -> None:
    assert [is_significant(row) for row in comparison["comparisons"]] == [True, True, False]
    better, worse, alike = verdicts(as_results(comparison))
    assert better.endswith("better has the lower loss.") and worse.endswith("worse has the higher loss.")
    for verdict in (better, worse):
        assert "The difference is significant (Welch's p < 0.001, exact p = 0.006 after Holm's" in verdict
    assert "The difference is not significant (Welch's p = " in alike


def test_verdict_with_three_seeds_is_inconclusive() -> None:
    """Welch's p is far below 0.05; the exact p cannot be."""
    losses = {"reference": [1.0, 1.01, 0.99], "better": [0.5, 0.51, 0.49]}
    verdict, = verdicts(as_results(compare(losses)))
    assert "Welch's p < 0.001, exact p = 0.100" in verdict
    assert verdict.endswith("with 3 seeds the exact p cannot be below 0.100.")
    first, second = verdicts(as_results(compare({**losses, "worse": [2.0, 2.01, 1.99]})))
    for text in (first, second):
        assert "The difference is inconclusive (" in text
        assert text.endswith("cannot be below 0.100 (0.200 after correction for 2 comparisons).")


def test_significance_requires_welch_and_the_exact_test(comparison: dict[str, Any]) -> None:
    row = comparison["comparisons"][0]
    for test, significant in (("welch", False), ("unpaired", False), ("paired", True)):
        assert is_significant(row | {"p_holm": row["p_holm"] | {test: 0.9}}) is significant
