"""Computes the results of the stages from features and scores: a JSON tree per stage, and tables.

Nothing here runs a network. The rows of all tables of scores are the test items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import calibration, cascade, probes, selective
from ..checks import Floats
from ..conclusions import ALPHA
from ..folds import Folds
from ..metrics import auprc, auroc
from ..probes import ProbeOptions
from ..stats import holm
from . import causal, ladder
from .config import CascadeConfig
from .items import Items

Tree = dict[str, Any]
Table = dict[str, np.ndarray]  # column → [rows]
ITEM_COLUMNS = ("item", "hard", "error", "group")  # columns of a table of scores that are not rungs
FRACTIONS = (0.1, 0.25, 0.5)  # of items to route to the larger model; fixed, not tuned on the test items


class BootstrapOptions(NamedTuple):
    """The number of bootstrap replicates, and their seed."""

    replicates: int
    seed: int


def rung_names(scores: Mapping[str, Any]) -> list[str]:
    """Returns the columns of a table of scores that are rungs."""
    return [name for name in scores if name not in ITEM_COLUMNS]


def probe_ladder(items: Items, blocks: Mapping[str, probes.Block], folds: Folds, options: ProbeOptions,
                 bootstrap: BootstrapOptions, notify: ladder.Notify) -> tuple[Tree, Table]:
    """Fits the ladder. Returns every rung's metrics (overall and per domain), the comparisons, and the
    scores.

    Args:
        blocks: name → features of all items, `[items, features]`.
        folds: the cross-validation folds of the train items.
    """
    train, test = items.train, items.test
    ladder_result = probes.fit_ladder(
        {name: block[train] for name, block in blocks.items()}, items.hard[train],
        {name: block[test] for name, block in blocks.items()}, items.hard[test], folds,
        rungs=ladder.rungs(blocks), comparisons=ladder.COMPARISONS, options=options,
        replicates=bootstrap.replicates, seed=bootstrap.seed, groups=items.groups[test], notify=notify)
    hard, domain = items.hard[test], items.domain[test]

    def rung_results(rung: probes.RungResult) -> Tree:
        return {"auroc": rung.auroc, "auprc": auprc(hard, rung.probabilities), "C": rung.probe.c_value,
                "constant": rung.is_constant,
                "cross_validated": rung.probe.cross_validated[rung.probe.c_value],
                "domains": {name: auroc(hard[domain == name], rung.probabilities[domain == name])
                            for name in sorted(set(domain.tolist()) - {""})}}
    scores = {"item": test, "hard": hard, "error": items.error[test], "group": items.groups[test],
              **{name: rung.probabilities for name, rung in ladder_result.rungs.items()}}
    return {
        "test": len(test), "train": len(train), "purged": int((items.split == "purge").sum()),
        "hard": float(hard.mean()), "hard_train": float(items.hard[train].mean()),
        "groups": len(np.unique(items.groups[test])), "constant": items.constant,
        "constant_activations": {name: len(probes.constant_columns(blocks[name][train]))
                                 for name in ("raw", "sae") if name in blocks},
        "rungs": {name: rung_results(rung) for name, rung in ladder_result.rungs.items()},
        "folds": len(folds),
        "comparisons": [{"a": c.a, "b": c.b, "difference": c.difference, "p": c.p, "p_holm": c.p_holm,
                         "delong": c.delong.p}
                        for c in ladder_result.comparisons]}, scores


def selective_metrics(scores: Mapping[str, np.ndarray], bootstrap: BootstrapOptions) -> Tree:
    """Returns the risk–coverage curve of every rung."""
    errors, groups = scores["error"].astype(float), scores["group"].astype(str)

    def rung_results(name: str) -> Tree:
        return selective.risk_coverage(errors, scores[name], replicates=bootstrap.replicates,
                                       seed=bootstrap.seed, groups=groups).to_tree()
    return {"mean_error": float(errors.mean()), "coverages": selective.GRID,
            "oracle": selective.Ranking(errors, errors).risks(selective.GRID),
            "rungs": {name: rung_results(name) for name in rung_names(scores)}}


def calibrate(items: Items, blocks: Mapping[str, probes.Block], folds: Folds, options: ProbeOptions,
              c_values: Mapping[str, float], notify: ladder.Notify) -> tuple[Tree, Table]:
    """Refits every rung with its C and recalibrates it out of fold. Returns metrics and probabilities.

    Args:
        c_values: rung → its C.
    """
    train, test = items.train, items.test
    by_name = {rung.name: rung for rung in ladder.rungs(blocks)}
    results: Tree = {}
    table: Table = {"hard": items.hard[test]}
    for name, c_value in c_values.items():
        notify(name)
        features = probes.concatenate_blocks(blocks, by_name[name].blocks)
        fitted = probes.make_probe(c_value, not isinstance(features, np.ndarray), options).fit(
            features[train], items.hard[train])
        variants = calibration.recalibrate(fitted, features[train], items.hard[train], features[test],
                                           items.hard[test], folds)
        results[name] = {kind: {"ece": v.ece, "brier": v.brier, "log_loss": v.log_loss, "auroc": v.auroc}
                         for kind, v in variants.items()}
        table |= {f"{name}.{kind}": v.probabilities for kind, v in variants.items()}
    return {"rungs": results}, table


def cascade_metrics(scores: Mapping[str, np.ndarray], large: Floats, options: CascadeConfig,
                    bootstrap: BootstrapOptions) -> tuple[Tree, Table]:
    """Returns cost and error of routing hard items to a larger model.

    Args:
        large: `[test items]`, the larger model's errors.
    """
    costs = cascade.Costs(options.small, options.large, options.routed_pays_both)
    small = scores["error"].astype(float)
    groups = scores["group"].astype(str)

    def rung_results(name: str) -> Tree:
        return {str(fraction): cascade.against_random_routing(
            small, large, scores[name], costs, fraction, groups=groups, replicates=bootstrap.replicates,
            seed=bootstrap.seed) for fraction in FRACTIONS}
    return {"always_small": float(small.mean()), "always_large": float(large.mean()),
            "large_better": float((large < small).mean()),
            "rungs": {name: rung_results(name) for name in rung_names(scores)}}, {
                "item": scores["item"], "small": small, "large": large}


def effects(losses: Mapping[str, Floats], chosen: list[int], matched: Mapping[str, Mapping[int, list[int]]],
            groups: np.ndarray, bootstrap: BootstrapOptions) -> Tree:
    """Returns the effects of patching per set of positions; Holm corrects over all latents and sets together.

    Args:
        losses: positions → `[items, 2 + chosen + controls]`.
        matched: positions → chosen latent → its controls.
    """
    results = {positions: causal.effects(table, chosen, matched[positions], groups=groups,
                                         replicates=bootstrap.replicates, seed=bootstrap.seed)
               for positions, table in losses.items()}
    corrected = iter(holm([e.p for effects in results.values() for e in effects.chosen.values()]).tolist())

    def effect_results(effect: causal.Effect) -> Tree:
        return {"change": effect.change, "p": effect.p, "items_changed": effect.items_changed}

    def latent_results(effects: causal.Effects, latent: int) -> Tree:
        p, controls = next(corrected), effects.matched[latent]
        significant, as_large = p < ALPHA, effects.controls_as_large(latent)
        return effect_results(effects.chosen[latent]) | {
            "p_holm": p, "significant": significant, "controls": len(controls), "controls_as_large": as_large,
            "exceeds_controls": significant and len(controls) > 0 and as_large == 0}
    return {positions: {
        "natural": effects.natural, "reconstructed": effects.reconstructed,
        "reconstruction": effects.reconstruction,
        "chosen": {latent: latent_results(effects, latent) for latent in chosen},
        "controls": {latent: effect_results(effect) for latent, effect in effects.controls.items()},
        "matched": effects.matched} for positions, effects in results.items()}
