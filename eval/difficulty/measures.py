"""What a study makes of features and scores: a tree of JSON for each stage, and tables beside it.

Nothing here asks a network. Rows of the tables of scores are the held-out items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import calibration, cascade, probes, selective
from ..checks import Floats
from ..folds import Folds
from ..metrics import auprc, auroc
from ..probes import ProbeOptions
from ..stats import holm
from . import causal, ladder
from .config import CascadeConfig
from .items import Items

Tree = dict[str, Any]
Table = dict[str, np.ndarray]  # column → [rows]
ABOUT = ("item", "hard", "error", "group")  # columns of scores that are no rung's
SHARES = (0.1, 0.25, 0.5)  # of the items that are handed on: said beforehand, not picked on the held-out ones


class Drawn(NamedTuple):
    """Of the bootstrap: how many sets are drawn, and from which seed."""

    replicates: int
    seed: int


def rung_names(scores: Mapping[str, Any]) -> list[str]:
    """The columns of a table of scores that are rungs'."""
    return [name for name in scores if name not in ABOUT]


def probe(items: Items, blocks: Mapping[str, probes.Block], folds: Folds, options: ProbeOptions, drawn: Drawn,
          notify: ladder.Notify) -> tuple[Tree, Table]:
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
        replicates=drawn.replicates, seed=drawn.seed, groups=items.groups[test], notify=notify)
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
        "folds": len(folds),
        "comparisons": [{"a": c.a, "b": c.b, "difference": c.difference, "p": c.p, "p_holm": c.p_holm,
                         "delong": c.delong.p}
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
              strengths: Mapping[str, float], notify: ladder.Notify) -> tuple[Tree, Table]:
    """Every rung, fitted anew with its C, as it is and recalibrated out of fold; and its probabilities."""
    train, test = items.train, items.test
    by_name = {rung.name: rung for rung in ladder.rungs(blocks)}
    found: Tree = {}
    table: Table = {"hard": items.hard[test]}
    for name, strength in strengths.items():
        notify(name)
        features = probes.columns(blocks, by_name[name].blocks)
        fitted = probes.make_probe(strength, not isinstance(features, np.ndarray), options).fit(
            features[train], items.hard[train])
        variants = calibration.recalibrate(fitted, features[train], items.hard[train], features[test],
                                           items.hard[test], folds)
        found[name] = {kind: {"ece": v.ece, "brier": v.brier, "log_loss": v.log_loss, "auroc": v.auroc}
                       for kind, v in variants.items()}
        table |= {f"{name}.{kind}": v.probabilities for kind, v in variants.items()}
    return {"rungs": found}, table


def cascade_metrics(scores: Mapping[str, np.ndarray], large: Floats, options: CascadeConfig,
            drawn: Drawn) -> tuple[Tree, Table]:
    """Cost and error where hard items go to a larger model.

    Args:
        dear: its error on each held-out item.
    """
    small, costs = scores["error"].astype(float), cascade.Costs(options.small, options.large, options.pay_both)
    groups = scores["group"].astype(str)

    def told(name: str) -> Tree:
        return {str(share): cascade.against_random_routing(small, large, scores[name], costs, share, groups=groups,
                                                 replicates=drawn.replicates, seed=drawn.seed)
                for share in SHARES}
    return {"always_small": float(small.mean()), "always_large": float(large.mean()),
            "large_better": float((large < small).mean()),
            "rungs": {name: told(name) for name in rung_names(scores)}}, {
                "item": scores["item"], "small": small, "large": large}


def effects(losses: Mapping[str, Floats], chosen: list[int], matched: Mapping[str, Mapping[int, list[int]]],
            groups: np.ndarray, drawn: Drawn) -> Tree:
    """What patching did, for each set of positions; p is corrected for the latents and the sets together.

    Args:
        losses: positions → `[items, 2 + chosen + controls]`.
        matched: positions → chosen latent → its controls.
    """
    found = {where: causal.effects(table, chosen, matched[where], groups=groups, replicates=drawn.replicates,
                                   seed=drawn.seed) for where, table in losses.items()}
    corrected = iter(holm([e.p for effects in found.values() for e in effects.chosen.values()]).tolist())

    def told(effect: causal.Effect) -> Tree:
        return {"change": effect.change, "p": effect.p, "items_changed": effect.items_changed}

    def one(effects: causal.Effects, latent: int) -> Tree:
        p, controls = next(corrected), effects.matched[latent]
        sure = p < 0.05
        return told(effects.chosen[latent]) | {
            "p_holm": p, "sure": sure, "controls": len(controls), "as_large": effects.as_large(latent),
            "beyond": sure and len(controls) > 0 and effects.as_large(latent) == 0}
    return {where: {"natural": effects.natural, "reconstructed": effects.reconstructed,
                    "reconstruction": effects.reconstruction,
                    "chosen": {latent: one(effects, latent) for latent in chosen},
                    "controls": {latent: told(effect) for latent, effect in effects.controls.items()},
                    "matched": effects.matched} for where, effects in found.items()}
