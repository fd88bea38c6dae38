"""Every statistic on degenerate inputs: the right number, NaN where there is none, or one line of refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tilelli_jax.eval import calibration, cascade, metrics, selective, stats, thresholds

NAN, INF = math.nan, math.inf
LABELS, SCORES = [0, 1, 0, 1, 1, 0], [0.1, 0.4, 0.35, 0.8, 0.35, 0.2]

# name → labels and scores.
INPUTS: dict[str, tuple[Any, Any]] = {
    "empty": ([], []), "one item": ([1], [0.5]), "one class": ([1] * 6, SCORES),
    "constant": (LABELS, [0.5] * 6), "a NaN": (LABELS, [NAN, *SCORES[1:]]), "all NaN": (LABELS, [NAN] * 6),
    "an infinity": (LABELS, [*SCORES[:5], INF]), "minus infinity": (LABELS, [*SCORES[:5], -INF]),
    "tied at infinity": (LABELS, [INF] * 6), "tied at -infinity": (LABELS, [-INF] * 6),
    "both infinities": (LABELS, [INF, INF, -INF, 0.2, INF, -INF]),
    "label 2": ([2, *LABELS[1:]], SCORES), "label -1": ([-1, *LABELS[1:]], SCORES),
    "label 0.5": ([0.5, *LABELS[1:]], SCORES), "label NaN": ([NAN, *LABELS[1:]], SCORES),
    "texts as labels": (["no", "yes"] * 3, SCORES), "too few scores": (LABELS, SCORES[:5]),
    "two axes": (LABELS, [[score] for score in SCORES]), "a None": (LABELS, [None, *SCORES[1:]]),
    "texts as scores": (LABELS, ["a"] * 6), "huge": (LABELS, [1e308, -1e308, *SCORES[2:]]),
    "denormal": (LABELS, [5e-324, 0.0, *SCORES[2:]])}


def wide(labels: Any, scores: Any) -> Any:
    return stats.PairedBootstrap(labels, {"a": scores}, replicates=40).interval("a")


def halves(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda _, scores: function(scores[:len(scores) // 2], scores[len(scores) // 2:])


COSTS = cascade.Costs()
# Of each function: labels and scores → what is compared; what becomes of each input, in the order of INPUTS.
# = the number of the same scores with 9 in the place of infinity; n NaN; r refused.
TABLE: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "auroc": (metrics.auroc, "rnn= rr ===== rrrrr rrrr =="),
    "auroc_weighted": (lambda y, s: metrics.auroc_weighted(y, s, [[1, 2, 0, 1, 1, 1][:len(y)]]),
                       "rnn= rr ===== rrrrr rrrr =="),
    "auroc_relabelled": (lambda y, s: metrics.auroc_relabelled([y], s), "rnn= rr ===== rrrrr rrrr =="),
    "auprc": (metrics.auprc, "r=== rr ===== rrrrr rrrr =="),
    "PairedBootstrap": (wide, "rnn= rr ===== rrrrr rrrr =="),
    "bootstrap_of": (lambda y, s: stats.bootstrap_of(metrics.auroc, y, s, replicates=20),
                     "rnn= rr ===== rrrrr rrrr =="),
    "permute_labels": (lambda y, s: stats.permute_labels(y, s, SCORES[:len(y)], permutations=20)[:5],
                       "rrr= rr ===== rrrrr rrrr =="),
    "delong": (lambda y, s: stats.delong(y, s, SCORES[:len(y)][::-1])[:2], "rrr= rr ===== rrrrr rrrr =="),
    "precision_thresholds": (lambda y, s: thresholds.precision_thresholds(y, s, 0.7)[0] is None,
                             "r=== rr ===== rrrrr rrrr =="),
    "guaranteed_thresholds": (lambda y, s: thresholds.guaranteed_thresholds(y, s, 0.1, 0.5, [-1, 0.3, 2]),
                              "r=== rr ===== rrrrr rrrr =="),
    "aurc": (selective.aurc, "r=== rr ===== ===rr rrrr =="),
    "fraction_of_oracle": (selective.fraction_of_oracle, "rnn= rr ===== ===rr rrrr =="),
    "risk_coverage": (lambda y, s: selective.risk_coverage(y, s, replicates=20).aurc,
                      "r=== rr ===== ===rr rrrr =="),
    "frontier": (lambda y, s: cascade.frontier(y, [0] * len(y), s, COSTS).errors,
                 "r=== rr ===== ===rr rrrr =="),
    "against_coin": (lambda y, s: cascade.against_coin(y, [0] * len(y), s, COSTS, 0.5, replicates=20),
                     "r=== rr ===== ===rr rrrr =="),
    "platt": (lambda y, s: calibration.platt(s, y).slope, "rrr= rr rrrrr rrrrr rrrr r="),
    "temperature": (lambda y, s: calibration.temperature(s, y).temperature, "rrr= rr rrrrr rrrrr rrrr r="),
    "isotonic": (lambda y, s: calibration.isotonic(s, y).y, "r=== rr rrrrr rrrrr rrrr r="),
    "brier": (metrics.brier, "r=== rr rrrrr rrrrr rrrr r="),
    "log_loss": (metrics.log_loss, "r=== rr rrrrr rrrrr rrrr r="),
    "expected_calibration_error": (metrics.expected_calibration_error, "r=== rr rrrrr rrrrr rrrr r="),
    # These take no labels.
    "bootstrap_mean": (lambda _, s: stats.bootstrap_mean(s, replicates=20), "n=== rr rrrrr ===== =rrr r="),
    "bootstrap_p": (lambda _, s: stats.bootstrap_p(s, replicates=20), "nn=n rr rrrrr ===== =rrr r="),
    "paired_t": (lambda _, s: stats.paired_t(s).p, "rn=n rr rrrrr ===== =rrr r="),
    "welch": (halves(lambda a, b: stats.welch(a, b).p), "rr== rr rrrrr ===== =rrr r="),
    "exact_sign_flips": (lambda _, s: stats.exact_sign_flips(s).p, "r=== rr rrrrr ===== =rrr r="),
    "exact_relabelling": (halves(lambda a, b: stats.exact_relabelling(a, b).p),
                          "rr== rr rrrrr ===== =rrr r="),
    "conformal_threshold": (lambda _, s: thresholds.conformal_threshold(s, 0.3).measured,
                            "r=== rr ===== ===== =rrr =="),
}
# Those that draw nothing, and for which no item has a place of its own.
WITHOUT_ORDER = {"auroc", "auroc_relabelled", "auprc", "guaranteed_thresholds", "aurc", "fraction_of_oracle",
                 "frontier", "platt", "temperature", "isotonic", "brier", "log_loss",
                 "expected_calibration_error", "exact_sign_flips", "paired_t", "conformal_threshold"}


def numbers(found: Any) -> np.ndarray:
    """As an array; 7 stands for None, a threshold that there is not."""
    return np.array([7 if value is None else value for value in np.ravel(np.asarray(found, object))], float)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("error")
def test_a_degenerate_input(name: str, kind: str) -> None:
    function, outcomes = TABLE[name]
    expected = dict(zip(INPUTS, outcomes.replace(" ", ""), strict=True))[kind]
    labels, scores = INPUTS[kind]
    if expected == "r":
        with pytest.raises(ValueError, match=r"^[a-z_, ]+: expected .+, found .+") as refused:
            function(labels, scores)
        assert "\n" not in str(refused.value)
        return
    found = numbers(function(labels, scores))
    if expected == "n":
        assert np.isnan(found).any() and not np.isinf(found).any()
        return
    assert np.isfinite(found[~np.isnan(found)]).all() and not np.isnan(found).all()
    alike = np.clip(np.array(scores, float), -9, 9).tolist()
    np.testing.assert_array_equal(found, numbers(function(labels, alike)))
    if name in WITHOUT_ORDER:
        order = np.random.default_rng(0).permutation(len(scores))
        again = function([labels[i] for i in order], [scores[i] for i in order])
        np.testing.assert_allclose(numbers(again), found, rtol=1e-9, atol=0)  # sums in another order
