"""What losses come to, and what is said of them, on losses that are made up."""

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
def found() -> dict[str, Any]:
    """Three against a reference: a fifth lower, a tenth higher, and the same but for noise."""
    rng = np.random.default_rng(0)
    return compare({name: mean + 0.01 * rng.standard_normal(SEEDS) for name, mean in LOSSES.items()})


def test_p_is_corrected_over_all_that_are_compared(found: dict[str, Any]) -> None:
    comparisons = found["comparisons"]
    assert [one["model"] for one in comparisons] == ["better", "worse", "alike"]
    for test in TESTS:
        raw = [one["p"][test] for one in comparisons]
        np.testing.assert_allclose([one["p_holm"][test] for one in comparisons], holm(raw))
        assert comparisons[0]["p_holm"][test] > comparisons[0]["p"][test], "of three, the first counts thrice"


def test_differences_are_less_the_reference(found: dict[str, Any]) -> None:
    losses = {name: np.array(one["each"]) for name, one in found["losses"].items()}
    for one in found["comparisons"]:
        its, theirs = losses[one["model"]], losses["reference"]
        np.testing.assert_allclose(one["differences"], its - theirs)
        assert one["difference"].point == pytest.approx(its.mean() - theirs.mean())
        assert one["p"]["welch"] == pytest.approx(scipy.stats.ttest_ind(its, theirs, equal_var=False).pvalue)


def test_what_is_said_of_each(found: dict[str, Any]) -> None:
    """A lower loss has learned more; one is as good as the other, and nothing is said."""
    tree = {"texts": {"text": found | {"comparisons": [
        one | {key: one[key]._asdict() for key in ("difference", "paired_difference")}
        for one in found["comparisons"]]}}, "config": {"seeds": list(range(SEEDS))}}
    assert [is_significant(one) for one in found["comparisons"]] == [True, True, False]
    better, worse, alike = verdicts(tree)
    assert better.endswith("better has learned more.") and worse.endswith("worse has learned less.")
    assert alike.endswith("No difference that is sure.")


def test_both_tests_have_to_agree(found: dict[str, Any]) -> None:
    one = found["comparisons"][0]
    for test, sure in (("welch", False), ("unpaired", False), ("paired", True)):
        assert is_significant(one | {"p_holm": one["p_holm"] | {test: 0.9}}) is sure
