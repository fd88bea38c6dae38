"""Adds a finished recall study to the package: python -m tools.ship_study OUT NAME

OUT is the study's directory. What is written to eval/recall/shipped/NAME may have at most 4 MB; see
`tilelli_jax.eval.recall.shipped`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.errors import InputError
from tilelli_jax.eval.recall import report, shipped
from tilelli_jax.eval.recall.config import RecallConfig
from tilelli_jax.eval.recall.study import RecallStudy

MAX_BYTES = 4 * 2**20


@command
def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m tools.ship_study", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="OUT", help="directory of a finished study")
    parser.add_argument("name", metavar="NAME", help="its name in the package")
    options = parser.parse_args(argv)
    results = report.read_results(options.study)
    out = shipped.ROOT / options.name
    study = RecallStudy(config_lib.from_dict(RecallConfig, results["config"]), options.study)
    shipped.export(study, results, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        shutil.rmtree(out)
        raise InputError(f"{options.study}: expected at most {MAX_BYTES:,} bytes to ship, found {size:,}")
    print(f"{out}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
