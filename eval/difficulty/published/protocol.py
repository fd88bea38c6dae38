"""The published study's protocol (fm-difficulty-probe), where its numbers need it.

The same random streams, orders and formulas, so that its numbers come out to the printed digit; what is
wrong with them, and what stands in their place by default, is in docs/difficulty.md. The letters in the
docstrings (W5, S8, …) are those of that table. `stages.py` goes through them in order.
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
from ...probes import Climbed, ProbeOptions, make_probe
from ...stats import Interval, PermutationTest, bootstrap_mean, percentiles, permute_labels
from ..cheap import SMALL, prompt_statistics

COVERAGES = np.round(np.arange(0.10, 1.0001, 0.05), 4)
THRESHOLDS = np.linspace(0, 1, 41)
SHARES = np.linspace(0, 1, 21)

# Scaled by all training rows before cross-validation (S3), and with the intercept penalised.
PROBES = ProbeOptions(scale_once=True, intercept_scaling=1.0)


def prompt_features(columns: Mapping[str, Sequence]) -> tuple[list[str], Floats]:
    """The eight of the published study, `[prompts, 8]`, dead ones included (S4).

    Args:
        columns: `prompt, seq_len, split, activity_label` and `prompt_perplexity` or `perplexity`.
    """
    prompts = list(columns["prompt"])
    found = prompt_statistics(prompts, np.asarray(columns["split"]) == "train")
    tokens = np.asarray(columns["seq_len"], float)
    order: dict[str, int] = {}
    category = [order.setdefault(label, len(order)) for label in columns["activity_label"]]
    perplexity = columns["prompt_perplexity"] if "prompt_perplexity" in columns else columns["perplexity"]
    made = {"char_length": found["char_length"], "token_count": tokens,
            "lexical_diversity": found["lexical_diversity"], "perplexity": np.asarray(perplexity, float),
            "char_to_token": found["char_length"] / (tokens + SMALL),
            "capitalization_ratio": found["capitalization_ratio"],
            "category_id": np.asarray(category, float), "bigram_novelty": found["bigram_novelty"]}
    return list(made), np.stack(list(made.values()), axis=1)


def probe_results(climbed: Climbed, *, items: int, train: int, test_labels: ArrayLike) -> dict[str, Any]:
    """probe_results.json of a ladder climbed with PROBES; three of its keys were never filled.

    Args:
        items, train: how many there are in all, and to learn from.
    """
    labels = np.asarray(test_labels)
    empty = {"delta_vs_baseline": None, "delta_ci": None, "perm_p": None}
    probes = {name: {"name": name, "auroc": rung.auroc.point, "ci_low": rung.auroc.low,
                     "ci_high": rung.auroc.high, "n_test": len(labels), "best_C": rung.probe.strength,
                     **empty} for name, rung in climbed.rungs.items()}
    deltas = {f"{c.a}-{c.b}": {"point": c.difference.point, "ci_low": c.difference.low,
                               "ci_high": c.difference.high} for c in climbed.comparisons}
    return {"n_total": items, "n_train": train, "n_test": len(labels), "hard_fraction": float(labels.mean()),
            "probes": probes, "deltas": deltas}


def permutation(labels: ArrayLike, a: ArrayLike, b: ArrayLike, seed: int = 42) -> PermutationTest:
    """10,000 permutations of the labels; what was seen is not among them, so that p may be 0 (S8)."""
    return permute_labels(labels, a, b, permutations=10_000, seed=seed, count_observed=False)


def selective(errors: ArrayLike, scores: Mapping[str, ArrayLike], *, replicates: int = 2000,
              seed: int = 42) -> dict[str, Any]:
    """selective_prediction.json: risks at coverages 0.10 … 1.00, and the area over those alone (S8).

    Ties are broken as NumPy's unstable sort happens to leave them (W5); the random curve is the mean
    of 2000 permutations; the intervals resample the items that were kept.
    """
    errors = np.asarray(errors, float)
    kept = [max(1, round(coverage * len(errors))) for coverage in COVERAGES.tolist()]

    def risks(ordered: Floats) -> Floats:
        return np.array([ordered[:k].mean() for k in kept])

    rng = np.random.default_rng(seed)
    random = np.mean([risks(rng.permutation(errors)) for _ in range(2000)], axis=0)
    oracle = risks(np.sort(errors))
    best, worst = _area(oracle), _area(random)
    probes = {}
    for name, score in scores.items():
        ordered = errors[np.argsort(np.asarray(score, float))]
        rng, ends = np.random.default_rng(seed), []
        for k in kept:
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


def cascade(cheap: ArrayLike, dear: ArrayLike, scores: Mapping[str, ArrayLike],
            costs: tuple[float, float] = (1.0, 5.0), *, trials: int = 500, seed: int = 42) -> dict[str, Any]:
    """cascade_results.json: 41 thresholds on raw scores, the cheap call free for an item handed on (S9)."""
    cheap, dear = np.asarray(cheap, float), np.asarray(dear, float)
    n, price = len(cheap), Costs(small=costs[0], large=costs[1], pay_both=False)
    always = float(cheap.mean()), float(dear.mean())
    rng = np.random.default_rng(seed)

    def mixed(handed: NDArray[np.intp]) -> float:
        errors = cheap.copy()
        errors[handed] = dear[handed]
        return float(errors.mean())

    def cost(handed: int) -> float:
        prices = np.full(n, price.small)
        prices[:handed] = price.large
        return float(prices.mean())

    random = []
    for share in SHARES.tolist():
        k = round(share * n)
        errors = [mixed(rng.choice(n, k, replace=False)) for _ in range(trials)]
        random.append([cost(k), float(np.mean(errors)), share])
    gains = np.argsort(-(cheap - dear))
    oracle = [[cost(round(share * n)), mixed(gains[:round(share * n)]), share] for share in SHARES.tolist()]
    return {"n_windows": n, "always_cheap": {"mean_error": always[0], "cost": price.small},
            "always_expensive": {"mean_error": always[1], "cost": price.large},
            "win_rate_expensive": float((dear < cheap).mean()),
            "random_curve": random, "oracle_curve": oracle,
            "probes": {name: _frontier(cheap, dear, score, price) for name, score in scores.items()}}


def _frontier(cheap: Floats, dear: Floats, scores: ArrayLike, price: Costs) -> dict[str, Any]:
    found = frontier(cheap, dear, scores, price, THRESHOLDS.tolist())
    columns = (found.thresholds, found.errors, found.costs, found.handed_on)
    points = [{"tau": tau, "mean_error": error, "mean_cost": cost, "frac_to_exp": share}
              for tau, error, cost, share in zip(*(values.tolist() for values in columns), strict=True)]
    better = np.flatnonzero(found.dominating(float(cheap.mean()), float(dear.mean()), price))
    best = min(better, key=lambda i: found.errors[i], default=None)
    return {"frontier": points, "n_dominating_points": len(better),
            "best_dominating": None if best is None else points[best]}


def recalibrated(train: Floats, train_labels: ArrayLike, test: Floats, test_labels: ArrayLike,
                 strength: float, *, seed: int = 42, scaled: bool = False) -> dict[str, dict[str, float]]:
    """recalibration_results.json: the probe with a given C, its features as they are (W6), 5 shuffled folds.

    Platt's map is fitted to probabilities, and its slope may be negative (W7).
    """
    labels = np.asarray(train_labels)
    probe = make_probe(strength, False, dataclasses.replace(PROBES, seed=seed))
    if scaled:
        scaler = probe[0].fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
    model = probe[-1]
    held = np.empty(len(labels))
    for fit, out in shuffled(len(labels), seed=seed):
        held[out] = model.fit(train[fit], labels[fit]).predict_proba(train[out])[:, 1]
    raw = model.fit(train, labels).predict_proba(test)[:, 1]
    rising = IsotonicRegression(out_of_bounds="clip").fit(held, labels)
    sigmoid = LogisticRegression(C=1e6).fit(held[:, None], labels)
    variants = {"raw": raw, "platt": sigmoid.predict_proba(raw[:, None])[:, 1],
                "isotonic": np.clip(rising.predict(raw), 0, 1)}
    return {name: {"ece": expected_calibration_error(test_labels, found), "brier": brier(test_labels, found),
                   "auroc": auroc(test_labels, found)} for name, found in variants.items()}


def causal_summary(losses: Mapping[str, ArrayLike], about: Mapping[str, Any], *, replicates: int = 2000,
                   seed: int = 42) -> dict[str, Any]:
    """causal_ablation_*.json from the losses of each item; sure is what excludes 0, uncorrected (S6).

    Args:
        losses: `…_natural`, `…_recon` and `…_ablate_LATENT`, in this order, each `[items]`.
        about: `metric`, `positions` and `model`, as they are.
    """
    natural, reconstructed, *left_out = (np.asarray(values, float) for values in losses.values())
    latents = [name.rpartition("_")[2] for name in list(losses)[2:]]

    def mean(change: Floats) -> Interval:
        return bootstrap_mean(change, replicates=replicates, seed=seed)
    changed = mean(reconstructed - natural)
    effects = {latent: mean(values - reconstructed) for latent, values in zip(latents, left_out, strict=True)}
    return {"n": len(natural), "mean_natural": float(natural.mean()),
            "mean_sae_recon": float(reconstructed.mean()),
            "delta_sae_recon": {"point": changed.point, "ci95": [changed.low, changed.high]},
            "per_feature_ablation_delta": {
                latent: {"point": effect.point, "ci95": [effect.low, effect.high],
                         "significant": effect.excludes_zero} for latent, effect in effects.items()},
            "metric": about["metric"], "positions": about["positions"],
            "top_features": [int(latent) for latent in latents], "model": about["model"]}
