"""Every statistic on degenerate inputs: the right number, NaN where undefined, or a one-line ValueError."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from tilelli_jax.eval import (
    calibration,
    cascade,
    folds,
    metrics,
    probes,
    selective,
    stats,
    thresholds,
)
from tilelli_jax.eval.familiarity import Familiarity

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


def bootstrap_interval(labels: Any, scores: Any) -> Any:
    return stats.PairedBootstrap(labels, {"a": scores}, replicates=40).interval("a")


def halves(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda _, scores: function(scores[:len(scores) // 2], scores[len(scores) // 2:])


COSTS = cascade.Costs()
# Function name → (labels and scores → result; expected outcome of each input, in the order of INPUTS).
# Outcomes: = the same result as with 9 in place of infinity; n NaN; r ValueError.
TABLE: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "auroc": (metrics.auroc, "rnn= rr ===== rrrrr rrrr =="),
    "auroc_weighted": (lambda y, s: metrics.auroc_weighted(y, s, [[1, 2, 0, 1, 1, 1][:len(y)]]),
                       "rnn= rr ===== rrrrr rrrr =="),
    "auroc_within": (lambda y, s: metrics.auroc_within(y, s, [[1, 2, 0, 1, 1, 1][:len(y)]], ["a"] * len(y)),
                     "rnn= rr ===== rrrrr rrrr =="),
    "auprc": (metrics.auprc, "r=== rr ===== rrrrr rrrr =="),
    "PairedBootstrap": (bootstrap_interval, "rnn= rr ===== rrrrr rrrr =="),
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
    "prr": (selective.prr, "rnn= rr ===== ===rr rrrr =="),
    "risk_coverage": (lambda y, s: selective.risk_coverage(y, s, replicates=20).aurc,
                      "r=== rr ===== ===rr rrrr =="),
    "frontier": (lambda y, s: cascade.frontier(y, [0] * len(y), s, COSTS).errors,
                 "r=== rr ===== ===rr rrrr =="),
    "against_random_routing": (lambda y, s: cascade.against_random_routing(y, [0] * len(y), s, COSTS, 0.5,
                                                                           replicates=20),
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
# Functions whose result does not depend on the order of the items.
WITHOUT_ORDER = {"auroc", "auprc", "guaranteed_thresholds", "aurc", "prr",
                 "frontier", "platt", "temperature", "isotonic", "brier", "log_loss",
                 "expected_calibration_error", "exact_sign_flips", "paired_t", "conformal_threshold"}


def numbers(result: Any) -> np.ndarray:
    """Returns a result as an array; 7 stands for None, an undefined threshold."""
    return np.array([7 if value is None else value for value in np.ravel(np.asarray(result, object))], float)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("error")
def test_degenerate_inputs(name: str, kind: str) -> None:
    function, outcomes = TABLE[name]
    expected = dict(zip(INPUTS, outcomes.replace(" ", ""), strict=True))[kind]
    labels, scores = INPUTS[kind]
    if expected == "r":
        with pytest.raises(ValueError, match=r"^[a-z_, ]+: expected .+, found .+") as rejected:
            function(labels, scores)
        assert "\n" not in str(rejected.value)
        return
    result = numbers(function(labels, scores))
    if expected == "n":
        assert np.isnan(result).any() and not np.isinf(result).any()
        return
    assert np.isfinite(result[~np.isnan(result)]).all() and not np.isnan(result).all()
    clipped = np.clip(np.array(scores, float), -9, 9).tolist()
    np.testing.assert_array_equal(result, numbers(function(labels, clipped)))
    if name in WITHOUT_ORDER:
        order = np.random.default_rng(0).permutation(len(scores))
        permuted = function([labels[i] for i in order], [scores[i] for i in order])
        np.testing.assert_allclose(numbers(permuted), result, rtol=1e-9, atol=0)  # sums in another order


# --- Other arguments -------------------------------------------------------------------------

ROWS, RAGGED, MASKED = np.arange(40.0), [[0, 1], [1]], np.ma.masked_array(SCORES, [1, 0, 0, 0, 0, 0])
X, Y = np.stack([ROWS, ROWS % 7], axis=1), (ROWS % 3 == 0).astype(int)
FOLDS = folds.stratified(Y, 2)
ORDER = selective.Ranking(LABELS, SCORES)
QUICK = probes.ProbeOptions(c_values=(0.1,), jobs=1)
BOOTSTRAP = stats.PairedBootstrap(LABELS, {"a": SCORES, "b": SCORES[::-1]}, replicates=20)
FRONTIER = cascade.frontier(LABELS, SCORES, SCORES, COSTS)
FITTED = probes.fit_probe(X, Y, FOLDS, QUICK)
FAMILIARITY = Familiarity.fit(X, Y)
NOT_COUNTS = (0, -1, 2.5, True, "7", None, NAN)
NOT_FRACTIONS = (0, 1, -0.5, NAN, "0.5", None, True, [0.5])
COUNT_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "bins": lambda n: metrics.reliability(LABELS, SCORES, n),
    "bins of the ECE": lambda n: metrics.expected_calibration_error(LABELS, SCORES, n),
    "bins of the calibrated error": lambda n: metrics.expected_ece_if_calibrated(SCORES, bins=n),
    "draws": lambda n: metrics.expected_ece_if_calibrated(SCORES, draws=n),
    "replicates": lambda n: stats.bootstrap_mean(SCORES, replicates=n),
    "replicates of p": lambda n: stats.bootstrap_p(SCORES, replicates=n),
    "replicates of runs and items": lambda n: stats.bootstrap_two_way([SCORES], replicates=n),
    "replicates of any statistic": lambda n: stats.bootstrap_of(metrics.auroc, LABELS, SCORES, replicates=n),
    "replicates of areas": lambda n: stats.PairedBootstrap(LABELS, {"a": SCORES}, replicates=n),
    "replicates of counts": lambda n: stats.resampled_counts(6, n, 0),
    "replicates of risks": lambda n: selective.risk_coverage(LABELS, SCORES, replicates=n),
    "replicates of a cascade": lambda n: cascade.against_random_routing(
        LABELS, SCORES, SCORES, COSTS, 0.5, replicates=n),
    "items": lambda n: stats.resampled_counts(n, 5, 0),
    "permutations": lambda n: stats.permute_labels(LABELS, SCORES, SCORES, permutations=n),
    "n": lambda n: stats.exact_fraction(0, n), "k": lambda k: folds.shuffled(40, k),
    "k of strata": lambda k: folds.stratified(Y, k), "k forward": lambda k: folds.forward(ROWS, ROWS + 1, k),
    "rows": lambda n: folds.shuffled(n), "max_folds": lambda n: folds.number_of_folds(Y, n),
    "min_rows_per_fold": lambda n: folds.number_of_folds(Y, min_rows_per_fold=n),
    "max_iter": lambda n: probes.ProbeOptions(max_iter=n)}
SEED_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda seed: stats.bootstrap_mean(SCORES, seed=seed),
    "p": lambda seed: stats.bootstrap_p(SCORES, seed=seed),
    "runs and items": lambda seed: stats.bootstrap_two_way([SCORES], seed=seed),
    "areas": lambda seed: stats.PairedBootstrap(LABELS, {"a": SCORES}, seed=seed),
    "labels": lambda seed: stats.permute_labels(LABELS, SCORES, SCORES, seed=seed),
    "calibrated error": lambda seed: metrics.expected_ece_if_calibrated(SCORES, seed=seed),
    "strata": lambda seed: folds.stratified(Y, seed=seed), "folds": lambda seed: folds.shuffled(9, seed=seed),
    "probe": lambda seed: probes.ProbeOptions(seed=seed)}
FRACTION_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "floor": lambda x: metrics.log_loss(LABELS, SCORES, x),
    "level of percentiles": lambda x: stats.percentiles(np.array(SCORES), x),
    "level of a mean": lambda x: stats.bootstrap_mean(SCORES, level=x),
    "level of areas": lambda x: stats.PairedBootstrap(LABELS, {"a": SCORES}, level=x),
    "level of delong": lambda x: stats.delong(LABELS, SCORES, SCORES, x),
    "level of welch": lambda x: stats.welch([1, 2], [1, 2], x),
    "level of t": lambda x: stats.paired_t([1, 2], x),
    "level of a fraction": lambda x: stats.exact_fraction(1, 3, x),
    "level of a threshold": lambda x: thresholds.conformal_threshold(SCORES, 0.5, x),
    "target": lambda x: thresholds.precision_thresholds(LABELS, SCORES, x),
    "target with a guarantee": lambda x: thresholds.guaranteed_thresholds(LABELS, SCORES, x, 0.9),
    "confidence": lambda x: thresholds.guaranteed_thresholds(LABELS, SCORES, 0.9, x),
    "target_fpr": lambda x: thresholds.conformal_threshold(SCORES, x),
    "target_fpr of the minimum": lambda x: thresholds.conformal_min_items(x)}
ARRAY_ARGUMENTS: dict[str, Callable[[Any], Any]] = {  # called with ragged rows and with masked arrays
    "labels": lambda x: metrics.auroc(x, SCORES), "scores": lambda x: metrics.auroc(LABELS, x),
    "scores to rank": metrics.midranks,
    "weights": lambda x: metrics.auroc_weighted(LABELS, SCORES, x),
    "probabilities": lambda x: metrics.brier(LABELS, x),
    "weights of risks": lambda x: ORDER.risks(None, x),
    "coverages": lambda x: ORDER.risks(x), "errors": lambda x: selective.aurc(x, SCORES),
    "values": stats.bootstrap_mean, "values of p": stats.bootstrap_p,
    "values of runs and items": stats.bootstrap_two_way,
    "groups": lambda x: stats.bootstrap_mean(SCORES, groups=x),
    "replicates": stats.percentiles, "a": lambda x: stats.PairedBootstrap(LABELS, {"a": x}),
    "a of labels": lambda x: stats.permute_labels(LABELS, x, SCORES),
    "b": lambda x: stats.delong(LABELS, SCORES, x), "a of welch": lambda x: stats.welch(x, SCORES),
    "scores of a covariance": lambda x: stats.delong_covariance(LABELS, x),
    "b of all": lambda x: stats.exact_relabelling(SCORES, x), "differences": stats.exact_sign_flips,
    "differences of t": stats.paired_t, "p": stats.holm,
    "small": lambda x: cascade.frontier(x, SCORES, SCORES, COSTS),
    "large": lambda x: cascade.against_random_routing(SCORES, x, SCORES, COSTS, 0.5),
    "thresholds": lambda x: cascade.frontier(SCORES, SCORES, SCORES, COSTS, x),
    "fraction": COSTS.mean, "grid": lambda x: thresholds.guaranteed_thresholds(LABELS, SCORES, 0.9, 0.9, x),
    "scores of prompts": lambda x: thresholds.conformal_threshold(x, 0.5),
    "scores of platt": lambda x: calibration.platt(x, LABELS),
    "scores of isotonic": lambda x: calibration.isotonic(x, LABELS),
    "scores to calibrate": calibration.Temperature(1.0), "labels of folds": folds.stratified,
    "labels to count": folds.number_of_folds, "starts": lambda x: folds.forward(x, SCORES),
    "ends": lambda x: folds.forward(SCORES, x),
    "groups of folds": lambda x: folds.stratified(LABELS, 2, groups=x),
    "labels of usable": lambda x: folds.usable([], x),
    "features": lambda x: probes.fit_probe(x, LABELS, FOLDS, QUICK),
    "labels of a probe": lambda x: probes.fit_probe(X[:6], x, FOLDS, QUICK),
    "features to predict": FITTED.probabilities, "values to fit": lambda x: Familiarity.fit(x, LABELS),
    "known": lambda x: Familiarity.fit(X[:6], x), "values to compare": FAMILIARITY.distance}
REJECTED: list[tuple[str, Callable[[], Any]]] = [
    *((name, lambda make=make, n=n: make(n)) for name, make in COUNT_ARGUMENTS.items() for n in NOT_COUNTS),
    *(("seed", lambda make=make, n=n: make(n)) for make in SEED_ARGUMENTS.values()
      for n in (-1, 0.5, True, None, "1")),
    *((name, lambda make=make, x=x: make(x)) for name, make in FRACTION_ARGUMENTS.items()
      for x in NOT_FRACTIONS),
    *((name, lambda make=make, x=x: make(x)) for name, make in ARRAY_ARGUMENTS.items()
      for x in (RAGGED, MASKED, [MASKED, MASKED])),
    *(("coverages", lambda x=x: ORDER.risks(x)) for x in ([0], [2], [-1], [NAN], 0.5, ["a"], [[0.5]])),
    *(("weights", lambda x=x: ORDER.risks(None, x))
      for x in ([[1] * 6], [0] * 6, [0.5] * 6, [-1] * 6, [NAN] * 6, [1e200] * 6, [1] * 5, 1)),
    *(("successes", lambda x=x: stats.exact_fraction(x, 3)) for x in (1.5, "1", -1, 4, None, True)),
    *((name, lambda x=x, name=name: cascade.Costs(**{name: x}))
      for name in ("small", "large") for x in (NAN, INF, -5, "1", None)),
    *(("large", lambda x=x: cascade.against_random_routing(LABELS, SCORES, SCORES, x, 0.5))
      for x in (cascade.Costs(2, 2), cascade.Costs(5, 1))),
    ("large", lambda: FRONTIER.dominating(0.5, 0.4, cascade.Costs(2, 2))),
    ("always_small", lambda: FRONTIER.dominating(NAN, 0.4, COSTS)),
    ("always_large", lambda: FRONTIER.dominating(0.5, None, COSTS)),
    *(("fraction", lambda x=x: cascade.against_random_routing(LABELS, SCORES, SCORES, COSTS, x))
      for x in (0, 1.1, NAN, "0.5", None)),
    *(("fraction", lambda x=x: COSTS.mean(x)) for x in (-0.1, [0.5, NAN], 2)),
    *(("score", lambda x=x: thresholds.verdict(x, 0.8, 0.3)) for x in (None, "1", NAN, [1.0])),
    ("knows_from", lambda: thresholds.verdict(0.5, NAN, 0.3)),
    ("unknown_below", lambda: thresholds.verdict(0.5, 0.8, NAN)),
    ("p", lambda: stats.holm(["a"])), ("p", lambda: stats.holm([1.5])),
    ("p", lambda: stats.holm([[0.5], [2]])),
    ("name", lambda: BOOTSTRAP.interval("z")), ("a", lambda: BOOTSTRAP.difference("z", "a")),
    ("b", lambda: BOOTSTRAP.p("a", "z")), ("replicates", lambda: stats.percentiles(np.array([NAN, 1.0]))),
    ("probabilities", lambda: metrics.expected_ece_if_calibrated([])),
    ("values", lambda: stats.bootstrap_two_way([["a"]])), ("values", lambda: stats.bootstrap_mean(
        np.array([0.5, "0.7"], object))),
    ("labels", lambda: folds.number_of_folds([])), ("labels", lambda: folds.number_of_folds([0, 1, 2])),
    ("labels", lambda: folds.stratified([0, 1, 0], 3)),
    ("groups", lambda: folds.stratified(Y, 3, groups=Y)),
    ("groups", lambda: folds.stratified(Y, 3, groups=[1])),
    ("rows", lambda: folds.shuffled(3)),
    ("starts", lambda: folds.forward([0, NAN, 2], [1, 2, 3], 2)),
    ("starts", lambda: folds.forward([0, 1], [1, 2], 2)),
    ("ends", lambda: folds.forward(ROWS, ROWS - 1)), ("ends", lambda: folds.forward(ROWS, [NAN] * 40)),
    ("ends", lambda: folds.forward(ROWS, ROWS[1:])),
    *(("folds", lambda x=x: probes.fit_probe(X, Y, x, QUICK))
      for x in ([], [FOLDS[0][0]], [([0, 1, 2],)], [([0, 1], [39, 40])], [([0, 1], [-1, 2])],
                [([0.0, 1.0], [2, 3])], [(Y == 0, Y == 1)], [([0, 1], [0, 3])], [([], [0, 1])])),
    ("folds", lambda: folds.usable([([0, 1], [39, 40])], Y)),
    *(("folds", lambda x=x: calibration.out_of_fold(FITTED.pipeline, X, Y, x))
      for x in ([], [([0, 3], [1])], [([0, 1], [40])])),
    ("features", lambda: calibration.out_of_fold(FITTED.pipeline, X[:30], Y, FOLDS)),
    ("features", lambda: calibration.recalibrate(FITTED.pipeline, X, Y, X[:, :1], Y, FOLDS)),
    *(("features", lambda x=x: probes.fit_probe(x, Y, FOLDS, QUICK))
      for x in (X[:30], ROWS, np.where(X == 3, NAN, X), np.where(X == 3, INF, X), X.astype(str),
                scipy.sparse.csr_array(X[:30]), scipy.sparse.csr_array(np.where(X == 3, NAN, X)))),
    *(("labels", lambda x=x: probes.fit_probe(X, x, FOLDS, QUICK))
      for x in (ROWS % 3, np.zeros(40), np.where(Y, NAN, 0))),
    ("features", lambda: probes.fit_probe(X, Y[:30], FOLDS, QUICK)),
    ("features", lambda: FITTED.probabilities(X[:, :1])),
    ("features", lambda: FITTED.probabilities(X * NAN)),
    ("features", lambda: FITTED.probabilities(scipy.sparse.csr_array(X[:, :1]))),
    *(("c_values", lambda x=x: probes.ProbeOptions(c_values=x))
      for x in ((), (0,), (NAN,), ("1",), (INF,))),
    ("intercept_scaling", lambda: probes.ProbeOptions(intercept_scaling=0)),
    *(("jobs", lambda x=x: probes.ProbeOptions(jobs=x)) for x in (0, -2, 1.5)),
    ("c_value", lambda: probes.make_probe(-1, False, QUICK)),
    ("blocks", lambda: probes.concatenate_blocks({"cheap": X}, ["raw"])),
    ("blocks", lambda: probes.concatenate_blocks({"cheap": X}, [])),
    ("blocks", lambda: probes.concatenate_blocks({"cheap": X, "raw": X[1:]}, ["small", "raw"])),
    ("test_labels", lambda: probes.fit_ladder({"cheap": X}, Y, {"cheap": X}, Y + 1, FOLDS)),
    ("values", lambda: Familiarity.fit(X[:30], Y)), ("values", lambda: Familiarity.fit(np.ones((40, 2)), Y)),
    ("values", lambda: Familiarity.fit(np.full((40, 2), 0.1), Y)),
    ("values", lambda: FAMILIARITY.distance(X[:, :1])),
    ("values", lambda: FAMILIARITY.distance(X * NAN)),
    *(("scores", lambda x=x: calibration.Platt(1.0, 0.0)(x)) for x in (NAN, [0, NAN], "a", [None])),
    ("slope", lambda: calibration.Platt("1", 0.0)),
    ("temperature", lambda: calibration.Temperature(None)),
    ("x[1]", lambda: calibration.Isotonic((0.0, "a"), (0.0, 1.0)))]


@pytest.mark.parametrize("number", range(len(REJECTED)))
@pytest.mark.filterwarnings("error")
def test_an_invalid_argument_is_rejected(number: int) -> None:
    name, call = REJECTED[number]
    with pytest.raises(ValueError) as rejected:
        call()
    message = str(rejected.value)
    assert message.startswith(f"{name.partition(' ')[0]}: expected ") and ", found " in message
    assert "\n" not in message and len(message) < 220


def test_a_wrong_number_of_items_names_the_expected_shape() -> None:
    with pytest.raises(ValueError, match=r"^ends: expected shape \(2,\), found shape \(3,\)$"):
        folds.forward([0, 1], [1, 2, 3])
    with pytest.raises(ValueError, match=r"^scores: expected shape \(2,\), found shape \(6,\)$"):
        metrics.auroc([0, 1], SCORES)


def test_numpy_numbers_are_accepted() -> None:
    """NumPy scalars work like Python's numbers."""
    assert metrics.reliability(LABELS, SCORES, np.int64(5)).counts.sum() == 6
    assert stats.exact_fraction(np.int64(1), np.int32(3)) == stats.exact_fraction(1, 3)
    assert thresholds.verdict(np.float32(0.9), np.float64(0.8), None) == "likely knows"
    assert thresholds.verdict(INF, 0.8, 0.3) == "likely knows"
    assert stats.bootstrap_mean(SCORES, level=np.float32(0.5)).low > 0
    assert cascade.Costs(np.float32(1), np.int64(5)).mean(1.0) == 6
    assert len(folds.shuffled(np.int64(10), np.int64(2), seed=np.int64(3))) == 2
