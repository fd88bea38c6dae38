"""The stages of fm-difficulty-probe, and the tables each of them produces."""

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
from .files import Release

RECALIBRATED = ("P1_cheap", "P3_cheap_sae")  # the rungs to recalibrate
ROUTERS = ("P3_cheap_sae", "P1_cheap")  # the default rungs of the cascade
UNITS = {"llm": "nats", "tsfm": "CRPS"}


def tables(release: Release, notify: Notify = lambda line: None) -> dict[str, Any]:
    """Computes all tables: file name → JSON tree, or the columns of a parquet file.

    Args:
        notify: receives the name of each rung before its fit.

    Raises:
        InputError: a fold of the train items has a single class, or `score_cols` names a rung that is
            skipped.
    """
    config = release.config
    _check_rungs(release)
    ladder_result = ladder(release, notify)
    y = release.hard[release.test]
    scores = {name: rung.probabilities for name, rung in ladder_result.rungs.items()}
    files: dict[str, Any] = {
        "probe_results.json": protocol.probe_results(ladder_result, items=len(release.hard),
                                                     train=int(release.train.sum()), test_labels=y),
        "probe_scores.parquet": {"id": release.windows[release.test], "y_test": y,
                                 **{f"pred_{name}": column for name, column in scores.items()}},
        "selective_prediction.json": protocol.selective(release.error[release.test], scores,
                                                        replicates=config.n_boot, seed=config.seed),
        "recalibration_results.json": recalibration(
            release, {name: rung.probe.c_value for name, rung in ladder_result.rungs.items()})}
    if release.cascade is not None:
        files["cascade_results.json"] = cascade(release, scores)
    for positions, losses in release.losses.items():
        metadata = {"metric": UNITS[config.modality], "positions": positions, "model": release.network}
        files[f"causal_ablation_{positions}.json"] = protocol.causal_summary(
            losses, metadata, replicates=config.n_boot, seed=config.seed)
    return files


def ladder(release: Release, notify: Notify = lambda line: None) -> LadderResult:
    """Fits the rungs whose feature blocks are available."""
    labels = release.hard[release.train]
    probe_folds = folds(release)
    recalibration_folds(release)  # raises its errors before the fits
    return fit_ladder(
        {name: block[release.train] for name, block in release.blocks.items()}, labels,
        {name: block[release.test] for name, block in release.blocks.items()}, release.hard[release.test],
        probe_folds,
        rungs=[rung for rung in rungs(release.blocks) if rung in LADDER],
        options=dataclasses.replace(protocol.PROBES, seed=release.config.seed),
        replicates=release.config.n_boot,
        seed=release.config.seed, notify=notify)


def folds(release: Release) -> Folds:
    """Returns folds of the train items: shuffled and stratified; for a series forward in time, without gap
    (S3).

    Raises:
        InputError: a part of a fold has a single class.
    """
    labels = release.hard[release.train]
    if min(labels.sum(), (1 - labels).sum()) < 2:
        raise InputError(f"{release.source}: expected at least two hard and two easy train items, found "
                         f"{labels.sum()} and {(1 - labels).sum()}")
    if release.config.modality == "llm":
        result = stratified(labels, number_of_folds(labels), seed=release.config.seed)
    else:
        rows = np.arange(len(labels))
        result = forward(rows, rows + 1, number_of_folds(labels, 5, 3))
    for number, parts in enumerate(result):
        if any(len(np.unique(labels[part])) < 2 for part in parts):
            raise InputError(f"{release.source}: fold {number} of {len(result)} of the {len(labels)} train "
                             "items has a single class in a part")
    return result


def recalibration_folds(release: Release) -> Folds:
    """Returns the folds of recalibration. A held-out part may have a single class.

    Raises:
        InputError: there are fewer than five train items, or a fold fits on a single class.
    """
    labels = release.hard[release.train]
    if len(labels) < 5:
        raise InputError(f"{release.source}: expected at least five train items, found {len(labels)}")
    result = shuffled(len(labels), seed=release.config.seed)
    for number, (fit, _) in enumerate(result):
        if len(np.unique(labels[fit])) < 2:
            raise InputError(f"{release.source}: fold {number} of recalibration would fit on a single class")
    return result


def recalibration(release: Release, c_values: Mapping[str, float], *, scaled: bool = False) -> dict[str, Any]:
    """Returns recalibration_results.json: P1 and P3, refitted with their C.

    Args:
        c_values: rung → its C.
        scaled: scale the features, as the rungs do (W6).
    """
    results = {}
    for rung in LADDER:
        if rung.name in RECALIBRATED and rung.name in c_values:
            block = np.asarray(concatenate_blocks(release.blocks, rung.blocks))
            results[rung.name] = protocol.recalibrated(
                block[release.train], release.hard[release.train], block[release.test],
                release.hard[release.test],
                c_values[rung.name], seed=release.config.seed, scaled=scaled)
    return results


def cascade(release: Release, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns cascade_results.json for the rungs in `score_cols`."""
    section, errors = release.config.cascade, release.cascade
    assert section is not None and errors is not None
    chosen = section.score_cols or [name for name in ROUTERS if name in scores]
    return protocol.cascade(*errors, {name: scores[name] for name in chosen}, release.config.costs,
                            trials=section.n_random_trials, seed=release.config.seed)


def _check_rungs(release: Release) -> None:
    available = [rung.name for rung in LADDER if set(rung.blocks) <= release.blocks.keys()]
    requested = release.config.cascade.score_cols if release.config.cascade else ()
    if missing := [name for name in requested if name not in available]:
        raise InputError(f"{release.source}: cascade.score_cols: expected some of {', '.join(available)}, "
                         f"found {missing[0]}, which needs activations or an autoencoder")
