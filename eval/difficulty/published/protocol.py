"""The parts of fm-difficulty-probe's protocol that its numbers depend on.

These functions use the same random streams, orders and formulas, and reproduce the numbers to the printed
digit. docs/difficulty.md lists their problems and what this project does instead; the codes in the docstrings
(W5, S8, …) refer to its table. `stages.py` calls these functions in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from ...cascade import Costs, frontier
from ...checks import Floats
from ...folds import shuffled
from ...metrics import auroc, brier, expected_calibration_error
from ...probes import LadderResult, ProbeOptions, make_probe
from ...stats import Interval, PermutationTest, bootstrap_mean, percentiles, permute_labels
from ..cheap import SMALL, prompt_statistics

COVERAGES = np.round(np.arange(0.10, 1.0001, 0.05), 4)
THRESHOLDS = np.linspace(0, 1, 41)
FRACTIONS = np.linspace(0, 1, 21)

# Scales with all train items before cross-validation (S3), and penalises the intercept.
PROBES = ProbeOptions(scale_once=True, intercept_scaling=1.0)


def prompt_features(columns: Mapping[str, Sequence]) -> tuple[list[str], Floats]:
    """Returns names and values `[prompts, 8]` of fm-difficulty-probe's features, including constant ones
    (S4).

    Args:
        columns: `prompt, seq_len, split, activity_label` and `prompt_perplexity` or `perplexity`.
    """
    prompts = list(columns["prompt"])
    statistics = prompt_statistics(prompts, np.asarray(columns["split"]) == "train")
    tokens = np.asarray(columns["seq_len"], float)
    order: dict[str, int] = {}
    category = [order.setdefault(label, len(order)) for label in columns["activity_label"]]
    perplexity = columns["prompt_perplexity"] if "prompt_perplexity" in columns else columns["perplexity"]
    features = {"char_length": statistics["char_length"], "token_count": tokens,
                "lexical_diversity": statistics["lexical_diversity"],
                "perplexity": np.asarray(perplexity, float),
                "char_to_token": statistics["char_length"] / (tokens + SMALL),
                "capitalization_ratio": statistics["capitalization_ratio"],
                "category_id": np.asarray(category, float), "bigram_novelty": statistics["bigram_novelty"]}
    return list(features), np.stack(list(features.values()), axis=1)


def probe_results(ladder_result: LadderResult, *, items: int, train: int,
                  test_labels: ArrayLike) -> dict[str, Any]:
    """Returns probe_results.json for a ladder fitted with PROBES; the published code never fills three keys.

    Args:
        items, train: number of all items, and of train items.
    """
    labels = np.asarray(test_labels)
    empty = {"delta_vs_baseline": None, "delta_ci": None, "perm_p": None}
    probes = {name: {"name": name, "auroc": rung.auroc.point, "ci_low": rung.auroc.low,
                     "ci_high": rung.auroc.high, "n_test": len(labels), "best_C": rung.probe.c_value,
                     **empty} for name, rung in ladder_result.rungs.items()}
    deltas = {f"{c.a}-{c.b}": {"point": c.difference.point, "ci_low": c.difference.low,
                               "ci_high": c.difference.high} for c in ladder_result.comparisons}
    return {"n_total": items, "n_train": train, "n_test": len(labels), "hard_fraction": float(labels.mean()),
            "probes": probes, "deltas": deltas}


def permutation(labels: ArrayLike, a: ArrayLike, b: ArrayLike, seed: int = 42) -> PermutationTest:
    """Runs 10,000 label permutations; the observed labels do not count as one, so that p can be 0 (S8)."""
    return permute_labels(labels, a, b, permutations=10_000, seed=seed, count_observed=False)


def selective(errors: ArrayLike, scores: Mapping[str, ArrayLike], *, replicates: int = 2000,
              seed: int = 42) -> dict[str, Any]:
    """Returns selective_prediction.json: risks at coverages 0.10 … 1.00, and the area over these only (S8).

    NumPy's unstable sort breaks ties (W5). The random curve is the mean of 2000 permutations. The intervals
    resample the answered items only.
    """
    errors = np.asarray(errors, float)
    counts = [max(1, round(coverage * len(errors))) for coverage in COVERAGES.tolist()]

    def risks(ordered: Floats) -> Floats:
        return np.array([ordered[:k].mean() for k in counts])

    rng = np.random.default_rng(seed)
    random = np.mean([risks(rng.permutation(errors)) for _ in range(2000)], axis=0)
    oracle = risks(np.sort(errors))
    best, worst = _area(oracle), _area(random)
    probes = {}
    for name, score in scores.items():
        ordered = errors[np.argsort(np.asarray(score, float))]
        rng, ends = np.random.default_rng(seed), []
        for k in counts:
            ends.append(percentiles(ordered[:k][rng.integers(0, k, (replicates, k))].mean(axis=1)))
        curve = risks(ordered)
        area = _area(curve)
        gap = worst - best
        probes[name] = {"curve": curve.tolist(), "ci95_lower": [low for low, _ in ends],
                        "ci95_upper": [high for _, high in ends], "aurc": area,
                        "fraction_of_oracle_aurc": (worst - area) / (gap or 1e-12)}
    return {"n_test": len(errors), "mean_error_no_abstention": float(errors.mean()),
            "coverages": COVERAGES.tolist(), "oracle_curve": oracle.tolist(), "oracle_aurc": best,
            "random_curve": random.tolist(), "random_aurc": worst, "probes": probes}


def _area(curve: Floats) -> float:
    return float(np.trapezoid(curve, COVERAGES))


def cascade(cheap: ArrayLike, expensive: ArrayLike, scores: Mapping[str, ArrayLike],
            costs: tuple[float, float] = (1.0, 5.0), *, trials: int = 500, seed: int = 42) -> dict[str, Any]:
    """Returns cascade_results.json: 41 thresholds on raw scores; a routed item pays no cheap call (S9).

    Args:
        cheap, expensive: `[items]`, the errors of both models.
        costs: of one call of the cheap and of the expensive model.
        trials: random routings for each point of the random curve.
    """
    cheap, expensive = np.asarray(cheap, float), np.asarray(expensive, float)
    n, price = len(cheap), Costs(small=costs[0], large=costs[1], routed_pays_both=False)
    always = float(cheap.mean()), float(expensive.mean())
    rng = np.random.default_rng(seed)

    def mean_error(routed: NDArray[np.intp]) -> float:
        errors = cheap.copy()
        errors[routed] = expensive[routed]
        return float(errors.mean())

    def mean_cost(routed: int) -> float:
        item_costs = np.full(n, price.small)
        item_costs[:routed] = price.large
        return float(item_costs.mean())

    random = []
    for fraction in FRACTIONS.tolist():
        k = round(fraction * n)
        errors = [mean_error(rng.choice(n, k, replace=False)) for _ in range(trials)]
        random.append([mean_cost(k), float(np.mean(errors)), fraction])
    order = np.argsort(-(cheap - expensive))
    oracle = [[mean_cost(round(fraction * n)), mean_error(order[:round(fraction * n)]), fraction]
              for fraction in FRACTIONS.tolist()]
    return {"n_windows": n, "always_cheap": {"mean_error": always[0], "cost": price.small},
            "always_expensive": {"mean_error": always[1], "cost": price.large},
            "win_rate_expensive": float((expensive < cheap).mean()),
            "random_curve": random, "oracle_curve": oracle,
            "probes": {name: _frontier(cheap, expensive, score, price) for name, score in scores.items()}}


def _frontier(cheap: Floats, expensive: Floats, scores: ArrayLike, price: Costs) -> dict[str, Any]:
    curve = frontier(cheap, expensive, scores, price, THRESHOLDS.tolist())
    columns = (curve.thresholds, curve.errors, curve.costs, curve.routed_fraction)
    points = [{"tau": tau, "mean_error": error, "mean_cost": cost, "frac_to_exp": fraction}
              for tau, error, cost, fraction in zip(*(values.tolist() for values in columns), strict=True)]
    dominating = np.flatnonzero(curve.dominating(float(cheap.mean()), float(expensive.mean()), price))
    best = min(dominating, key=lambda i: curve.errors[i], default=None)
    return {"frontier": points, "n_dominating_points": len(dominating),
            "best_dominating": None if best is None else points[best]}


def recalibrated(train: Floats, train_labels: ArrayLike, test: Floats, test_labels: ArrayLike,
                 c_value: float, *, seed: int = 42, scaled: bool = False) -> dict[str, dict[str, float]]:
    """Returns recalibration_results.json: a probe on unscaled features (W6), recalibrated over 5 shuffled
    folds.

    Platt's map is fitted to probabilities, and its slope may be negative (W7).

    Args:
        c_value: C of the probe.
        scaled: scale the features first.
    """
    labels = np.asarray(train_labels)
    probe = make_probe(c_value, False, dataclasses.replace(PROBES, seed=seed))
    if scaled:
        scaler = probe[0].fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
    model = probe[-1]
    held_out = np.empty(len(labels))
    for fit, out in shuffled(len(labels), seed=seed):
        held_out[out] = model.fit(train[fit], labels[fit]).predict_proba(train[out])[:, 1]
    raw = model.fit(train, labels).predict_proba(test)[:, 1]
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(held_out, labels)
    sigmoid = LogisticRegression(C=1e6).fit(held_out[:, None], labels)
    variants = {"raw": raw, "platt": sigmoid.predict_proba(raw[:, None])[:, 1],
                "isotonic": np.clip(isotonic.predict(raw), 0, 1)}
    return {name: {"ece": expected_calibration_error(test_labels, probabilities),
                   "brier": brier(test_labels, probabilities), "auroc": auroc(test_labels, probabilities)}
            for name, probabilities in variants.items()}


def causal_summary(losses: Mapping[str, ArrayLike], metadata: Mapping[str, Any], *, replicates: int = 2000,
                   seed: int = 42) -> dict[str, Any]:
    """Returns causal_ablation_*.json from losses per item; significant: the uncorrected interval excludes 0
    (S6).

    Args:
        losses: `…_natural`, `…_recon` and `…_ablate_LATENT`, in this order, each `[items]`.
        metadata: `metric`, `positions` and `model`, copied to the result.
    """
    natural, reconstructed, *ablated = (np.asarray(values, float) for values in losses.values())
    latents = [name.rpartition("_")[2] for name in list(losses)[2:]]

    def mean(change: Floats) -> Interval:
        return bootstrap_mean(change, replicates=replicates, seed=seed)
    reconstruction = mean(reconstructed - natural)
    effects = {latent: mean(values - reconstructed) for latent, values in zip(latents, ablated, strict=True)}
    return {"n": len(natural), "mean_natural": float(natural.mean()),
            "mean_sae_recon": float(reconstructed.mean()),
            "delta_sae_recon": {"point": reconstruction.point,
                                "ci95": [reconstruction.low, reconstruction.high]},
            "per_feature_ablation_delta": {
                latent: {"point": effect.point, "ci95": [effect.low, effect.high],
                         "significant": effect.excludes_zero} for latent, effect in effects.items()},
            "metric": metadata["metric"], "positions": metadata["positions"],
            "top_features": [int(latent) for latent in latents], "model": metadata["model"]}
