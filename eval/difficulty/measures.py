"""What a study makes of features and scores: a tree of JSON for each stage, and tables beside it.

Nothing here asks a network. Rows of the tables of scores are the held-out items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from eval import calibration, cascade, probes, selective
from eval.difficulty import causal, ladder
from eval.difficulty.config import CascadeConfig
from eval.difficulty.items import Items
from eval.folds import Folds
from eval.metrics import Floats, auprc, auroc
from eval.probes import ProbeOptions

Tree = dict[str, Any]
Table = dict[str, np.ndarray]  # column → [rows]
ABOUT = ("item", "hard", "error", "group")  # columns of scores that are no rung's


class Drawn(NamedTuple):
    """Of the bootstrap: how many sets are drawn, and from which seed."""

    replicates: int
    seed: int


def rung_names(scores: Mapping[str, Any]) -> list[str]:
    """The columns of a table of scores that are rungs'."""
    return [name for name in scores if name not in ABOUT]


def probe(items: Items, blocks: Mapping[str, probes.Block], folds: Folds, options: ProbeOptions, drawn: Drawn,
          tell: ladder.Told) -> tuple[Tree, Table]:
    """The ladder: every rung's areas, in all and in each domain, its comparisons, and its scores.

    Args:
        blocks: `[items, features]`, of all items.
        folds: of the items to learn from.
    """
    train, test = items.train, items.test
    climbed = probes.climb(
        {name: block[train] for name, block in blocks.items()}, items.hard[train],
        {name: block[test] for name, block in blocks.items()}, items.hard[test], folds,
        rungs=ladder.rungs(blocks), comparisons=ladder.COMPARISONS, options=options,
        replicates=drawn.replicates, seed=drawn.seed, groups=items.groups[test], tell=tell)
    hard, domain = items.hard[test], items.domain[test]

    def told(rung: probes.RungResult) -> Tree:
        return {"auroc": rung.auroc, "auprc": auprc(hard, rung.probabilities), "C": rung.probe.strength,
                "constant": rung.is_constant,
                "cross_validated": rung.probe.cross_validated[rung.probe.strength],
                "domains": {name: auroc(hard[domain == name], rung.probabilities[domain == name])
                            for name in sorted(set(domain.tolist()) - {""})}}
    scores = {"item": test, "hard": hard, "error": items.error[test], "group": items.groups[test],
              **{name: rung.probabilities for name, rung in climbed.rungs.items()}}
    return {
        "test": len(test), "train": len(train), "purged": int((items.split == "purge").sum()),
        "hard": float(hard.mean()), "hard_train": float(items.hard[train].mean()),
        "groups": len(np.unique(items.groups[test])), "constant": items.constant,
        "constant_inner": {name: len(probes.constant_columns(blocks[name][train]))
                           for name in ("raw", "sae") if name in blocks},
        "rungs": {name: told(rung) for name, rung in climbed.rungs.items()},
        "comparisons": [{"a": c.a, "b": c.b, "difference": c.difference, "p": c.p, "p_holm": c.p_holm}
                        for c in climbed.comparisons]}, scores


def abstain(scores: Mapping[str, np.ndarray], drawn: Drawn) -> Tree:
    """Risk and coverage of every rung."""
    errors, groups = scores["error"].astype(float), scores["group"].astype(str)

    def told(name: str) -> Tree:
        found = selective.risk_coverage(errors, scores[name], replicates=drawn.replicates, seed=drawn.seed,
                                        groups=groups)
        return {"risks": found.risks, "low": found.low, "high": found.high, "aurc": found.aurc,
                "fraction_of_oracle": found.fraction_of_oracle}
    return {"mean_error": float(errors.mean()), "coverages": selective.GRID,
            "oracle": selective.Order(errors, errors).risks(selective.GRID),
            "rungs": {name: told(name) for name in rung_names(scores)}}


def calibrate(items: Items, blocks: Mapping[str, probes.Block], folds: Folds, options: ProbeOptions,
              strengths: Mapping[str, float], tell: ladder.Told) -> tuple[Tree, Table]:
    """Every rung, fitted anew with its C, as it is and recalibrated out of fold; and its probabilities."""
    train, test = items.train, items.test
    by_name = {rung.name: rung for rung in ladder.rungs(blocks)}
    found: Tree = {}
    table: Table = {"hard": items.hard[test]}
    for name, strength in strengths.items():
        tell(name)
        features = probes.columns(blocks, by_name[name].blocks)
        fitted = probes.make_probe(strength, not isinstance(features, np.ndarray), options).fit(
            features[train], items.hard[train])
        variants = calibration.recalibrate(fitted, features[train], items.hard[train], features[test],
                                           items.hard[test], folds)
        found[name] = {kind: {"ece": v.ece, "brier": v.brier, "log_loss": v.log_loss, "auroc": v.auroc}
                       for kind, v in variants.items()}
        table |= {f"{name}.{kind}": v.probabilities for kind, v in variants.items()}
    return {"rungs": found}, table


def hand_on(scores: Mapping[str, np.ndarray], dear: Floats, options: CascadeConfig) -> tuple[Tree, Table]:
    """Cost and error where hard items go to a dearer network.

    Args:
        dear: its error on each held-out item.
    """
    cheap, costs = scores["error"].astype(float), cascade.Costs(options.cheap, options.dear, options.sunk)
    ends = float(cheap.mean()), float(dear.mean())

    def told(name: str) -> Tree:
        points = cascade.frontier(cheap, dear, scores[name], costs)
        better = np.flatnonzero(points.dominating(*ends, costs))
        best = min(better, key=lambda i: points.errors[i], default=None)
        return {"dominating": len(better), "points": len(points.costs), "best": None if best is None else {
            "cost": points.costs[best], "error": points.errors[best], "handed_on": points.handed_on[best]}}
    return {"always_cheap": ends[0], "always_dear": ends[1], "dear_better": float((dear < cheap).mean()),
            "rungs": {name: told(name) for name in rung_names(scores)}}, {
                "item": scores["item"], "cheap": cheap, "dear": dear}


def effects(losses: Floats, chosen: list[int], controls: list[int], groups: np.ndarray, drawn: Drawn) -> Tree:
    """What patching did: losses `[items, 2 + chosen + controls]`."""
    found = causal.effects(losses, chosen, controls, groups=groups, replicates=drawn.replicates,
                           seed=drawn.seed)

    def told(effect: causal.Effect) -> Tree:
        return {"change": effect.change, "p": effect.p, "p_holm": effect.p_holm, "sure": effect.is_sure,
                "items_changed": effect.items_changed}
    return {"natural": found.natural, "reconstructed": found.reconstructed,
            "reconstruction": found.reconstruction,
            "chosen": {latent: told(effect) | {"beyond_controls": found.beyond_controls(latent)}
                       for latent, effect in found.chosen.items()},
            "controls": {latent: told(effect) for latent, effect in found.controls.items()}}
