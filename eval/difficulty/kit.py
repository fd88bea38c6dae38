"""Makes the tables of fm-difficulty-probe again from its own files, by its own protocol and random streams.

    python -m eval.difficulty.kit --config squad.yaml --root KIT [--out DIR] [key=value …]

Reads what the configuration names and writes, all together at the end, probe_results.json,
probe_scores.parquet, selective_prediction.json, recalibration_results.json, cascade_results.json where there
is a cascade, and a causal_ablation_*.json for each table of losses in out_dir. No network is run. What is
wrong with these numbers, and what does better, is in docs/difficulty.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.difficulty import published
from eval.difficulty.kit_files import Kit, KitConfig, load_config, read_kit
from eval.difficulty.ladder import rungs
from eval.folds import Folds, forward, number_of_folds, shuffled, stratified
from eval.probes import LADDER, Climbed, climb, columns
from eval.stats import Interval
from eval.tables import as_json, shown
from tilelli_jax import config as config_lib
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.files import write_together
from tilelli_jax.tables import table

RECALIBRATED = ("P1_cheap", "P3_cheap_sae")
HANDED_ON = ("P3_cheap_sae", "P1_cheap")
UNITS = {"llm": "nats", "tsfm": "CRPS"}
Told = Callable[[str], None]


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    config = load_config(options.config, options.overrides)
    out = options.out or Path("runs", Path(options.config).stem)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out}: expected a directory, found a file")
    kit = read_kit(config, options.root, str(options.config))
    made = tables(kit, _tell)
    write(made, out)
    for block, key in (("raw", "activations"), ("sae", "sae_ckpt")):
        if block not in kit.blocks:
            _tell(f"{key}.{config.layer}: none; no rung that needs it is made")
    print(report(made))
    print(f"\nwritten to {out}: {', '.join(made)}")
    return 0


def tables(kit: Kit, tell: Told = lambda line: None) -> dict[str, Any]:
    """File name → what is in it: a tree of JSON, or for parquet its columns.

    Args:
        tell: called with the name of each rung before it is fitted.

    Raises:
        InputError: the items to learn from leave a fold with one class only, or `score_cols` asks for a rung
            that is not made.
    """
    config = kit.config
    _check_rungs(kit)
    climbed = ladder(kit, tell)
    y = kit.hard[kit.test]
    scores = {name: rung.probabilities for name, rung in climbed.rungs.items()}
    made: dict[str, Any] = {
        "probe_results.json": published.probe_results(climbed, items=len(kit.hard),
                                                      train=int(kit.train.sum()), test_labels=y),
        "probe_scores.parquet": {"id": kit.windows[kit.test], "y_test": y,
                                 **{f"pred_{name}": found for name, found in scores.items()}},
        "selective_prediction.json": published.selective(kit.error[kit.test], scores,
                                                         replicates=config.n_boot, seed=config.seed),
        "recalibration_results.json": recalibration(
            kit, {name: rung.probe.strength for name, rung in climbed.rungs.items()})}
    if kit.cascade is not None:
        made["cascade_results.json"] = cascade(kit, scores)
    for positions, losses in kit.losses.items():
        about = {"metric": UNITS[config.modality], "positions": positions, "model": kit.network}
        made[f"causal_ablation_{positions}.json"] = published.causal_summary(
            losses, about, replicates=config.n_boot, seed=config.seed)
    return made


def ladder(kit: Kit, tell: Told = lambda line: None) -> Climbed:
    """The rungs whose blocks there are, in their folds."""
    labels = kit.hard[kit.train]
    found = folds(kit)
    recalibration_folds(kit)  # what it would refuse is refused before the rungs are fitted
    return climb(
        {name: block[kit.train] for name, block in kit.blocks.items()}, labels,
        {name: block[kit.test] for name, block in kit.blocks.items()}, kit.hard[kit.test], found,
        rungs=[rung for rung in rungs(kit.blocks) if rung in LADDER],
        options=dataclasses.replace(published.PROBES, seed=kit.config.seed), replicates=kit.config.n_boot,
        seed=kit.config.seed, tell=tell)


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
            found[rung.name] = published.recalibrated(
                block[kit.train], kit.hard[kit.train], block[kit.test], kit.hard[kit.test],
                strengths[rung.name], seed=kit.config.seed, scaled=scaled)
    return found


def cascade(kit: Kit, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """cascade_results.json of the rungs that `score_cols` asks for."""
    section, errors = kit.config.cascade, kit.cascade
    assert section is not None and errors is not None
    chosen = section.score_cols or [name for name in HANDED_ON if name in scores]
    return published.cascade(*errors, {name: scores[name] for name in chosen}, kit.config.costs,
                             trials=section.n_random_trials, seed=kit.config.seed)


def _check_rungs(kit: Kit) -> None:
    there = [rung.name for rung in LADDER if set(rung.blocks) <= kit.blocks.keys()]
    asked = kit.config.cascade.score_cols if kit.config.cascade else ()
    if missing := [name for name in asked if name not in there]:
        raise InputError(f"{kit.source}: cascade.score_cols: {missing[0]} is not made, for want of "
                         f"activations or of an autoencoder; expected some of {', '.join(there)}")


def write(made: Mapping[str, Any], out: Path) -> None:
    """All files or none.

    Raises:
        InputError: the directory cannot be written.
    """
    contents = {out / name: _parquet(tree) if name.endswith(".parquet") else as_json(tree)
                for name, tree in made.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_together(contents)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def report(made: Mapping[str, Any]) -> str:
    """What a terminal shows."""
    results, kept = made["probe_results.json"], made["selective_prediction.json"]["probes"]
    refitted = made["recalibration_results.json"]
    handed = made.get("cascade_results.json", {"probes": {}})["probes"]
    rows = [["rung", "AUROC", "C", "of the oracle", "ECE refitted", "better thresholds"]]
    for name, rung in results["probes"].items():
        rows.append([name, shown(Interval(rung["auroc"], rung["ci_low"], rung["ci_high"])),
                     f"{rung['best_C']:g}", f"{kept[name]['fraction_of_oracle_aurc']:.1%}",
                     shown(refitted[name]["raw"]["ece"]) if name in refitted else "–",
                     f"{handed[name]['n_dominating_points']} of {len(published.THRESHOLDS)}"
                     if name in handed else "–"])
    lines = [f"{results['n_train']} items to learn from, {results['n_test']} test items, "
             f"{results['hard_fraction']:.1%} of them hard", "", table(rows, right=(2, 3, 4, 5))]
    for name, gap in results["deltas"].items():
        a, b = name.split("-")
        lines.append(f"{a} − {b}: {shown(Interval(gap['point'], gap['ci_low'], gap['ci_high']))}")
    for name, tree in made.items():
        if name.startswith("causal"):
            sure = [effect["significant"] for effect in tree["per_feature_ablation_delta"].values()]
            change = Interval(tree["delta_sae_recon"]["point"], *tree["delta_sae_recon"]["ci95"])
            lines.append(f"causal, {tree['positions']}: reconstruction {shown(change)} {tree['metric']}, "
                         f"{sum(sure)} of {len(sure)} latents exclude 0")
    return "\n".join(lines)


def _parquet(found: Mapping[str, np.ndarray]) -> bytes:
    import pyarrow
    import pyarrow.parquet
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(found)), content)
    return content.getvalue()


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m eval.difficulty.kit", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"keys, with their defaults:\n{config_lib.describe(KitConfig)}")
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of the kit")
    parser.add_argument("--root", type=Path, default=Path(), metavar="KIT",
                        help="what the paths in it are relative to [the current directory]")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where the tables go [runs/ and the name of the file]")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="settings that take precedence over the file's, e.g. layer=late")
    return parser.parse_intermixed_args(argv)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
