"""The stages of the published study, each with the tables that it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError

from ...folds import Folds, forward, number_of_folds, shuffled, stratified
from ...probes import LADDER, Climbed, climb, columns
from ..ladder import Notify, rungs
from . import protocol
from .files import Kit

RECALIBRATED = ("P1_cheap", "P3_cheap_sae")
HANDED_ON = ("P3_cheap_sae", "P1_cheap")
UNITS = {"llm": "nats", "tsfm": "CRPS"}


def tables(kit: Kit, notify: Notify = lambda line: None) -> dict[str, Any]:
    """File name → what is in it: a tree of JSON, or for parquet its columns.

    Args:
        tell: called with the name of each rung before it is fitted.

    Raises:
        InputError: the items to learn from leave a fold with one class only, or `score_cols` asks for a rung
            that is not made.
    """
    config = kit.config
    _check_rungs(kit)
    climbed = ladder(kit, notify)
    y = kit.hard[kit.test]
    scores = {name: rung.probabilities for name, rung in climbed.rungs.items()}
    made: dict[str, Any] = {
        "probe_results.json": protocol.probe_results(climbed, items=len(kit.hard),
                                                     train=int(kit.train.sum()), test_labels=y),
        "probe_scores.parquet": {"id": kit.windows[kit.test], "y_test": y,
                                 **{f"pred_{name}": found for name, found in scores.items()}},
        "selective_prediction.json": protocol.selective(kit.error[kit.test], scores,
                                                        replicates=config.n_boot, seed=config.seed),
        "recalibration_results.json": recalibration(
            kit, {name: rung.probe.strength for name, rung in climbed.rungs.items()})}
    if kit.cascade is not None:
        made["cascade_results.json"] = cascade(kit, scores)
    for positions, losses in kit.losses.items():
        about = {"metric": UNITS[config.modality], "positions": positions, "model": kit.network}
        made[f"causal_ablation_{positions}.json"] = protocol.causal_summary(
            losses, about, replicates=config.n_boot, seed=config.seed)
    return made


def ladder(kit: Kit, notify: Notify = lambda line: None) -> Climbed:
    """The rungs whose blocks there are, in their folds."""
    labels = kit.hard[kit.train]
    found = folds(kit)
    recalibration_folds(kit)  # what it would refuse is refused before the rungs are fitted
    return climb(
        {name: block[kit.train] for name, block in kit.blocks.items()}, labels,
        {name: block[kit.test] for name, block in kit.blocks.items()}, kit.hard[kit.test], found,
        rungs=[rung for rung in rungs(kit.blocks) if rung in LADDER],
        options=dataclasses.replace(protocol.PROBES, seed=kit.config.seed), replicates=kit.config.n_boot,
        seed=kit.config.seed, notify=notify)


def folds(kit: Kit) -> Folds:
    """Of the items to learn from: shuffled and stratified; of a series, rows in order, without a gap (S3).

    Raises:
        InputError: a part of one has one class only.
    """
    labels = kit.hard[kit.train]
    if min(labels.sum(), (1 - labels).sum()) < 2:
        raise InputError(f"{kit.source}: expected two hard and two easy items to learn from, found "
                         f"{labels.sum()} and {(1 - labels).sum()}")
    if kit.config.modality == "llm":
        found = stratified(labels, number_of_folds(labels), seed=kit.config.seed)
    else:
        rows = np.arange(len(labels))
        found = forward(rows, rows + 1, number_of_folds(labels, rows_for_one=3))
    for number, parts in enumerate(found):
        if any(len(np.unique(labels[part])) < 2 for part in parts):
            raise InputError(f"{kit.source}: fold {number} of {len(found)} of the {len(labels)} items to "
                             "learn from has one class only in a part")
    return found


def recalibration_folds(kit: Kit) -> Folds:
    """Likewise, of recalibration; what is held out may be of one class."""
    labels = kit.hard[kit.train]
    if len(labels) < 5:
        raise InputError(f"{kit.source}: expected five items to learn from, found {len(labels)}")
    found = shuffled(len(labels), seed=kit.config.seed)
    for number, (fit, _) in enumerate(found):
        if len(np.unique(labels[fit])) < 2:
            raise InputError(f"{kit.source}: fold {number} of recalibration has one class only to learn from")
    return found


def recalibration(kit: Kit, strengths: Mapping[str, float], *, scaled: bool = False) -> dict[str, Any]:
    """recalibration_results.json: P1 and P3 fitted anew, with the C that was chosen.

    Args:
        strengths: of each rung that there is.
        scaled: with the features scaled, as the rungs have them (W6).
    """
    found = {}
    for rung in LADDER:
        if rung.name in RECALIBRATED and rung.name in strengths:
            block = np.asarray(columns(kit.blocks, rung.blocks))
            found[rung.name] = protocol.recalibrated(
                block[kit.train], kit.hard[kit.train], block[kit.test], kit.hard[kit.test],
                strengths[rung.name], seed=kit.config.seed, scaled=scaled)
    return found


def cascade(kit: Kit, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """cascade_results.json of the rungs that `score_cols` asks for."""
    section, errors = kit.config.cascade, kit.cascade
    assert section is not None and errors is not None
    chosen = section.score_cols or [name for name in HANDED_ON if name in scores]
    return protocol.cascade(*errors, {name: scores[name] for name in chosen}, kit.config.costs,
                            trials=section.n_random_trials, seed=kit.config.seed)


def _check_rungs(kit: Kit) -> None:
    there = [rung.name for rung in LADDER if set(rung.blocks) <= kit.blocks.keys()]
    asked = kit.config.cascade.score_cols if kit.config.cascade else ()
    if missing := [name for name in asked if name not in there]:
        raise InputError(f"{kit.source}: cascade.score_cols: {missing[0]} is not made, for want of "
                         f"activations or of an autoencoder; expected some of {', '.join(there)}")
