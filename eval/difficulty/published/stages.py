"""The stages of the published study, and the tables each of them produces."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError

from ...folds import Folds, forward, number_of_folds, shuffled, stratified
from ...probes import LADDER, LadderResult, concatenate_blocks, fit_ladder
from ..ladder import Notify, rungs
from . import protocol
from .files import Kit

RECALIBRATED = ("P1_cheap", "P3_cheap_sae")  # the rungs to recalibrate
ROUTERS = ("P3_cheap_sae", "P1_cheap")  # the default rungs of the cascade
UNITS = {"llm": "nats", "tsfm": "CRPS"}


def tables(kit: Kit, notify: Notify = lambda line: None) -> dict[str, Any]:
    """Computes all tables: file name → JSON tree, or the columns of a parquet file.

    Args:
        notify: receives the name of each rung before its fit.

    Raises:
        InputError: a fold of the train items has a single class, or `score_cols` names a rung that is
            skipped.
    """
    config = kit.config
    _check_rungs(kit)
    climbed = ladder(kit, notify)
    y = kit.hard[kit.test]
    scores = {name: rung.probabilities for name, rung in climbed.rungs.items()}
    files: dict[str, Any] = {
        "probe_results.json": protocol.probe_results(climbed, items=len(kit.hard),
                                                     train=int(kit.train.sum()), test_labels=y),
        "probe_scores.parquet": {"id": kit.windows[kit.test], "y_test": y,
                                 **{f"pred_{name}": column for name, column in scores.items()}},
        "selective_prediction.json": protocol.selective(kit.error[kit.test], scores,
                                                        replicates=config.n_boot, seed=config.seed),
        "recalibration_results.json": recalibration(
            kit, {name: rung.probe.c_value for name, rung in climbed.rungs.items()})}
    if kit.cascade is not None:
        files["cascade_results.json"] = cascade(kit, scores)
    for positions, losses in kit.losses.items():
        metadata = {"metric": UNITS[config.modality], "positions": positions, "model": kit.network}
        files[f"causal_ablation_{positions}.json"] = protocol.causal_summary(
            losses, metadata, replicates=config.n_boot, seed=config.seed)
    return files


def ladder(kit: Kit, notify: Notify = lambda line: None) -> LadderResult:
    """Fits the rungs whose feature blocks are available."""
    labels = kit.hard[kit.train]
    probe_folds = folds(kit)
    recalibration_folds(kit)  # raises its errors before the fits
    return fit_ladder(
        {name: block[kit.train] for name, block in kit.blocks.items()}, labels,
        {name: block[kit.test] for name, block in kit.blocks.items()}, kit.hard[kit.test], probe_folds,
        rungs=[rung for rung in rungs(kit.blocks) if rung in LADDER],
        options=dataclasses.replace(protocol.PROBES, seed=kit.config.seed), replicates=kit.config.n_boot,
        seed=kit.config.seed, notify=notify)


def folds(kit: Kit) -> Folds:
    """Returns folds of the train items: shuffled and stratified; for a series forward in time, without gap
    (S3).

    Raises:
        InputError: a part of a fold has a single class.
    """
    labels = kit.hard[kit.train]
    if min(labels.sum(), (1 - labels).sum()) < 2:
        raise InputError(f"{kit.source}: expected at least two hard and two easy train items, found "
                         f"{labels.sum()} and {(1 - labels).sum()}")
    if kit.config.modality == "llm":
        result = stratified(labels, number_of_folds(labels), seed=kit.config.seed)
    else:
        rows = np.arange(len(labels))
        result = forward(rows, rows + 1, number_of_folds(labels, 5, 3))
    for number, parts in enumerate(result):
        if any(len(np.unique(labels[part])) < 2 for part in parts):
            raise InputError(f"{kit.source}: fold {number} of {len(result)} of the {len(labels)} train items "
                             "has a single class in a part")
    return result


def recalibration_folds(kit: Kit) -> Folds:
    """Returns the folds of recalibration. A held-out part may have a single class.

    Raises:
        InputError: there are fewer than five train items, or a fold fits on a single class.
    """
    labels = kit.hard[kit.train]
    if len(labels) < 5:
        raise InputError(f"{kit.source}: expected at least five train items, found {len(labels)}")
    result = shuffled(len(labels), seed=kit.config.seed)
    for number, (fit, _) in enumerate(result):
        if len(np.unique(labels[fit])) < 2:
            raise InputError(f"{kit.source}: fold {number} of recalibration would fit on a single class")
    return result


def recalibration(kit: Kit, c_values: Mapping[str, float], *, scaled: bool = False) -> dict[str, Any]:
    """Returns recalibration_results.json: P1 and P3, refitted with their C.

    Args:
        c_values: rung → its C.
        scaled: scale the features, as the rungs do (W6).
    """
    results = {}
    for rung in LADDER:
        if rung.name in RECALIBRATED and rung.name in c_values:
            block = np.asarray(concatenate_blocks(kit.blocks, rung.blocks))
            results[rung.name] = protocol.recalibrated(
                block[kit.train], kit.hard[kit.train], block[kit.test], kit.hard[kit.test],
                c_values[rung.name], seed=kit.config.seed, scaled=scaled)
    return results


def cascade(kit: Kit, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns cascade_results.json for the rungs in `score_cols`."""
    section, errors = kit.config.cascade, kit.cascade
    assert section is not None and errors is not None
    chosen = section.score_cols or [name for name in ROUTERS if name in scores]
    return protocol.cascade(*errors, {name: scores[name] for name in chosen}, kit.config.costs,
                            trials=section.n_random_trials, seed=kit.config.seed)


def _check_rungs(kit: Kit) -> None:
    available = [rung.name for rung in LADDER if set(rung.blocks) <= kit.blocks.keys()]
    requested = kit.config.cascade.score_cols if kit.config.cascade else ()
    if missing := [name for name in requested if name not in available]:
        raise InputError(f"{kit.source}: cascade.score_cols: expected some of {', '.join(available)}, found "
                         f"{missing[0]}, which needs activations or an autoencoder")
