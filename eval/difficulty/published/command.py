"""Recomputes the tables of fm-difficulty-probe from its own files, with its own protocol and random streams.

    tilelli difficulty published --config squad.yaml --root DIR [--out DIR] [key=value …]

Reads the files that the configuration names. Writes probe_results.json, probe_scores.parquet,
selective_prediction.json, recalibration_results.json, cascade_results.json if the configuration has a
cascade, one causal_ablation_*.json for each table of losses in out_dir, and how_to_reproduce.json (command,
seed, commit, machine, versions): all of them at the end, or none.
Runs no network. docs/difficulty.md lists problems of these numbers and what this project does instead.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import command
from tilelli_jax.cli.tables import table
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import write_together

from ...inputs.study import provenance_rows
from ...stages import print_to_stderr
from ...stats import Interval
from ...tables import format_cell, json_with_nulls, parquet
from .config import ReleaseConfig, load_config
from .files import read_release
from .protocol import THRESHOLDS
from .stages import tables


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    config = load_config(options.config, options.overrides)
    out = options.out or Path("runs", Path(options.config).stem)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out}: expected a directory, found a file")
    release = read_release(config, options.root, str(options.config))
    results = tables(release, print_to_stderr)
    results["how_to_reproduce.json"] = provenance_rows(
        shlex.join(["tilelli", "difficulty", "published", *argv]), str(options.config), (config.seed,))
    write(results, out)
    for block, key in (("raw", "activations"), ("sae", "sae_ckpt")):
        if block not in release.blocks:
            print_to_stderr(f"{key}.{config.layer}: none; the rungs that need it are skipped")
    print(report(results))
    print(f"\nwritten to {out}: {', '.join(results)}")
    return 0


def write(files: Mapping[str, Any], out: Path) -> None:
    """Writes all files or none.

    Args:
        files: file name → JSON tree, or columns of a parquet file.

    Raises:
        InputError: the directory cannot be written.
    """
    contents = {out / name: parquet(tree) if name.endswith(".parquet") else json_with_nulls(tree)
                for name, tree in files.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_together(contents)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def report(files: Mapping[str, Any]) -> str:
    """Returns the summary that the command prints."""
    results, selective = files["probe_results.json"], files["selective_prediction.json"]["probes"]
    recalibration = files["recalibration_results.json"]
    cascade = files.get("cascade_results.json", {"probes": {}})["probes"]
    rows = [["rung", "AUROC", "C", "fraction of oracle gain", "ECE, refitted", "dominating thresholds"]]
    for name, rung in results["probes"].items():
        rows.append([name, format_cell(Interval(rung["auroc"], rung["ci_low"], rung["ci_high"])),
                     f"{rung['best_C']:g}", f"{selective[name]['fraction_of_oracle_aurc']:.1%}",
                     format_cell(recalibration[name]["raw"]["ece"]) if name in recalibration else "–",
                     f"{cascade[name]['n_dominating_points']} of {len(THRESHOLDS)}"
                     if name in cascade else "–"])
    lines = [f"{results['n_train']} train items, {results['n_test']} test items, "
             f"{results['hard_fraction']:.1%} of them hard", "", table(rows, right=(2, 3, 4, 5))]
    for name, gap in results["deltas"].items():
        a, b = name.split("-")
        lines.append(f"{a} − {b}: {format_cell(Interval(gap['point'], gap['ci_low'], gap['ci_high']))}")
    for name, tree in files.items():
        if name.startswith("causal"):
            significant = [effect["significant"] for effect in tree["per_feature_ablation_delta"].values()]
            change = Interval(tree["delta_sae_recon"]["point"], *tree["delta_sae_recon"]["ci95"])
            lines.append(f"causal, {tree['positions']}: reconstruction {format_cell(change)} "
                         f"{tree['metric']}, {sum(significant)} of {len(significant)} intervals of latents "
                         "exclude 0")
    return "\n".join(lines)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line("tilelli difficulty published", __doc__, ReleaseConfig, "", "layer=late",
                                     config_help="YAML file of fm-difficulty-probe")
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR",
                        help="directory that the paths in the configuration are relative to [the current "
                             "directory]")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="output directory [runs/ and the name of the configuration file]")
    return parser.parse_intermixed_args(argv)
