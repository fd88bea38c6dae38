"""Probes compared with scikit-learn's grid search, with optimality conditions, and on planted signals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.eval.running import draws
from tilelli_jax.eval import probes
from tilelli_jax.eval.folds import stratified
from tilelli_jax.eval.probes import LadderResult, ProbeOptions, fit_ladder, fit_probe

QUICK = ProbeOptions(c_values=(0.01, 0.1), jobs=1)


def problem(seed: int = 0, rows: int = 150, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((rows, width)) * rng.uniform(0.1, 10, width) + rng.normal(0, 5, width)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    odds = scaled @ np.r_[1.0, -1.0, np.zeros(width - 2)] - 1
    return features, (rng.random(rows) < expit(odds)).astype(int)


def codes(seed: int = 0, rows: int = 150, width: int = 40, active: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random((rows, width)) < active, rng.exponential(size=(rows, width)), 0)


@pytest.mark.parametrize("scale_once", [True, False])
def test_the_search_equals_scikit_learns(scale_once: bool) -> None:
    features, labels = problem()
    model = LogisticRegression(l1_ratio=1.0, solver="liblinear", class_weight="balanced", max_iter=2000,
                               random_state=42)
    splitter = StratifiedKFold(5, shuffle=True, random_state=42)
    pipeline = model if scale_once else make_pipeline(StandardScaler(), model)
    inputs = StandardScaler().fit_transform(features) if scale_once else features
    key = "C" if scale_once else "logisticregression__C"
    theirs = GridSearchCV(pipeline, {key: list(probes.C_VALUES)}, scoring="roc_auc", cv=splitter)
    theirs.fit(inputs, labels)
    ours = fit_probe(features, labels, stratified(labels),
                     ProbeOptions(intercept_scaling=1.0, scale_once=scale_once))
    assert ours.c_value == theirs.best_params_[key]
    np.testing.assert_allclose(list(ours.cross_validated.values()), theirs.cv_results_["mean_test_score"],
                               atol=1e-12)
    np.testing.assert_array_equal(ours.probabilities(features), theirs.predict_proba(inputs)[:, 1])


@pytest.mark.parametrize("sparse", [True, False])
def test_the_optimality_conditions(sparse: bool) -> None:
    """‖w‖₁ + C Σ sᵢ log(1 + exp(−yᵢ fᵢ)): |gradient| ≤ 1, −sign(w) where w ≠ 0, 0 for the intercept."""
    features, labels = (codes(), problem()[1]) if sparse else problem()
    probe = fit_probe(scipy.sparse.csr_array(features) if sparse else features, labels, stratified(labels),
                      ProbeOptions(c_values=(0.3,)))
    scale = features.std(axis=0)
    mean = 0 if sparse else features.mean(axis=0)
    inputs = (features - mean) / np.where(scale > 0, scale, 1)
    probabilities = probe.probabilities(scipy.sparse.csr_array(features) if sparse else features)
    weights = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    gradient = 0.3 * inputs.T @ (weights * (probabilities - labels))
    assert 0 < (probe.weights != 0).sum() < len(gradient)
    assert (np.abs(gradient) < 1.01).all()
    np.testing.assert_allclose(gradient[probe.weights != 0], -np.sign(probe.weights[probe.weights != 0]),
                               atol=0.01)
    assert abs(0.3 * weights @ (probabilities - labels)) < 0.05  # the intercept is almost unpenalised


def test_sparse_columns_equal_dense_ones() -> None:
    """The probabilities agree although sparse columns are not centred."""
    labels = problem()[1]
    dense = fit_probe(codes(), labels, stratified(labels), QUICK)
    sparse = fit_probe(scipy.sparse.csr_array(codes()), labels, stratified(labels), QUICK)
    assert dense.c_value == sparse.c_value
    np.testing.assert_allclose(dense.probabilities(codes(1)),
                               sparse.probabilities(scipy.sparse.csr_array(codes(1))), atol=2e-3)


def test_blocks_are_concatenated() -> None:
    blocks = {"a": np.ones((3, 2)), "b": np.zeros((3, 1)), "c": scipy.sparse.csr_array(np.eye(3))}
    np.testing.assert_array_equal(probes.concatenate_blocks(blocks, ["a", "b"]),
                                  np.c_[np.ones((3, 2)), np.zeros(3)])
    mixed = probes.concatenate_blocks(blocks, ["b", "c"])
    assert scipy.sparse.issparse(mixed)
    np.testing.assert_array_equal(mixed.toarray(), np.c_[np.zeros(3), np.eye(3)])


def test_constant_columns_are_found() -> None:
    features = np.array([[1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 3.0, 2.0], [1.0, 0.0, 0.0, -2.0]])
    for block in (features, scipy.sparse.csr_array(features)):
        assert probes.constant_columns(block) == [0, 1]


def test_ties_select_the_stronger_penalty() -> None:
    """C is so small that every probe is constant, and all mean AUROCs are ½."""
    features, labels = problem()
    probe = fit_probe(features, labels, stratified(labels),
                      ProbeOptions(c_values=(1e-5, 1e-6, 1e-7), jobs=1))
    assert probe.c_value == 1e-7 and set(probe.cross_validated.values()) == {0.5}


def planted(block: str, seed: int, rows: int, replicates: int = 200) -> LadderResult:
    """Fits a ladder to labels that depend on one column of the block, or on nothing if it is empty."""
    rng = np.random.default_rng(seed)
    blocks: dict[str, Any] = {"cheap": rng.standard_normal((rows, 3)), "raw": rng.standard_normal((rows, 8)),
                              "sae": codes(seed, rows, 20, active=0.5)}
    cause = blocks[block][:, 0] if block else None
    signal = 0 if cause is None else 2.5 * (cause - cause.mean()) / cause.std()
    labels = (rng.random(rows) < expit(signal * np.ones(rows))).astype(int)
    blocks["sae"] = scipy.sparse.csr_array(blocks["sae"])
    half = rows // 2
    return fit_ladder({name: values[:half] for name, values in blocks.items()}, labels[:half],
                 {name: values[half:] for name, values in blocks.items()}, labels[half:],
                 stratified(labels[:half], 2), rungs=probes.LADDER[:3], options=QUICK, replicates=replicates)


@pytest.mark.parametrize(("block", "signs"), [
    ("sae", {"P2_cheap_raw-P1_cheap": 0, "P3_cheap_sae-P1_cheap": 1, "P3_cheap_sae-P2_cheap_raw": 1}),
    ("raw", {"P2_cheap_raw-P1_cheap": 1, "P3_cheap_sae-P1_cheap": 0, "P3_cheap_sae-P2_cheap_raw": -1}),
    ("cheap", {"P2_cheap_raw-P1_cheap": 0, "P3_cheap_sae-P1_cheap": 0, "P3_cheap_sae-P2_cheap_raw": 0})])
def test_a_planted_signal_is_found_in_its_block(block: str, signs: dict[str, int]) -> None:
    ladder_result = planted(block, 0, rows=500)
    for comparison in ladder_result.comparisons:
        sign = signs[f"{comparison.a}-{comparison.b}"]
        assert (comparison.p_holm < 0.01) == bool(sign)
        assert comparison.difference.excludes_zero == bool(sign)
        assert sign == 0 or np.sign(comparison.difference.point) == sign
        np.testing.assert_allclose(comparison.difference, comparison.delong.difference, atol=0.06)


@draws(30, 200)
def test_false_positives_without_a_signal(n: int) -> None:
    """At most 5 % of the ladders, plus 3 standard errors, have a comparison with corrected p < 0.05."""
    significant = [min(c.p_holm for c in planted("", seed, 140, 2).comparisons) < 0.05 for seed in range(n)]
    assert np.mean(significant) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)


def test_folds_with_one_class_are_rejected() -> None:
    features, labels = problem()
    ones, zeros = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    bad = [(np.r_[ones[:9], zeros[:9]], np.r_[ones[9:], zeros[9:]]), (np.r_[ones[:9], zeros[:9]], zeros[9:])]
    with pytest.raises(ValueError, match=r"folds: expected both classes .* found one in a part of fold 1"):
        fit_probe(features, labels, bad, QUICK)


def test_parallel_fits_equal_sequential_ones() -> None:
    features, labels = problem(rows=300, width=60)
    fits = [fit_probe(features, labels, stratified(labels), ProbeOptions(jobs=jobs)) for jobs in (1, 2)]
    assert fits[0].cross_validated == fits[1].cross_validated


def test_a_constant_probe_is_reported() -> None:
    features, labels = problem()
    ladder_result = fit_ladder({"cheap": features}, labels, {"cheap": features}, labels, stratified(labels),
                    rungs=probes.LADDER[:1], options=ProbeOptions(c_values=(1e-6,), jobs=1))
    result = ladder_result.rungs["P1_cheap"]
    assert result.is_constant and tuple(result.auroc) == (0.5, 0.5, 0.5) and not ladder_result.comparisons
