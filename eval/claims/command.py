"""Checks four claims about a network: architecture, cross-regime AUROC, held-out abstention, false inability.

    tilelli claims --model DIR [--expect NAME] [--prompts PATH] [--tolerance 0.05] [--out FILE]
    tilelli claims --model DIR --write-expected FILE

Exit status: 0 if every claim holds, 1 if a claim fails, 2 if the check could not run. By default the claims
are those of Tilelli about its v4. --write-expected measures this network and writes a claims
file, which later checks can use with --expect. See docs/claims.md.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.cli.tables import table
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import check_output, write_together

from ..abstention import prompts
from ..inputs.study import provenance_rows
from ..tables import json_with_nulls
from . import measurements
from .check import CROSS_REGIME, Line, check, failing
from .config import ClaimsConfig
from .measurements import Answer, Measurements

PUBLISHED = "claims-published"
TOLERANCE = 0.05  # as in Tilelli's scripts


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    claims = config_lib.load(ClaimsConfig, options.expect)
    for option, path in (("--out", options.out), ("--write-expected", options.write_expected)):
        check_output(option, path)
    selection = measurements.select(options.prompts or prompts.BUILT_IN, claims)
    measurements.check(options.model, selection, claims.answers)
    measured = measurements.measure(options.model, selection, claims)
    source = f"{options.expect}" + (f": {claims.source}" if claims.source else "")
    contents = {}
    if options.write_expected:
        prompts_name = options.prompts or "the built-in prompts"
        claims = measurements.as_claims(measured, claims, f"{options.model}, measured on {prompts_name}")
        source = f"its own measurements, written to {options.write_expected}"
        contents[options.write_expected] = config_lib.dump(claims).encode()
    lines = check(measured, claims, options.tolerance)
    if options.out:
        rows = provenance_rows(shlex.join(["tilelli", "claims", *argv]), str(options.expect), ())
        contents[options.out] = json_with_nulls(
            _tree(options, claims, lines, measured) | {"how_to_reproduce": rows})
    try:
        write_together(contents)
    except OSError as error:
        raise InputError(f"{error.filename or 'output'}: cannot be written: {error.strerror}") from None
    print(f"{options.model}, compared with {source}\n\n{table(_rows(lines))}\n")
    failed = failing(lines)
    print(f"failed: {', '.join(failed)}" if failed else "every claim holds")
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------


def _rows(lines: Sequence[Line]) -> list[list[str]]:
    """Returns the table for the terminal: intervals of fractions in per cent, of AUROC as numbers."""
    rows = [["claim", "quantity", "expected", "measured", "95 % interval", "holds"]]
    for line in lines:
        interval = line.interval
        limits = ("" if interval is None else
                  f"{interval.low:.3f} … {interval.high:.3f}" if line.claim == CROSS_REGIME else
                  f"{interval.low:.0%} … {interval.high:.0%}")
        rows.append([line.claim, line.quantity, "–" if line.expected is None else line.expected,
                     "absent" if line.measured is None else line.measured, limits,
                     {True: "yes", False: "NO", None: "–"}[line.holds]])
    return rows


def _tree(options: argparse.Namespace, claims: ClaimsConfig, lines: Sequence[Line],
          measured: Measurements) -> Any:
    """Returns the content of --out: the table, and the answer to each prompt."""
    def rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
        return [answer._asdict() for answer in answers]
    return {"model": options.model, "expect": str(options.write_expected or options.expect),
            "source": claims.source, "prompts": options.prompts or "built-in", "tolerance": options.tolerance,
            "holds": not failing(lines), "claims": [line._asdict() for line in lines],
            "answers": {"held_out": rows(measured.held_out),
                        "false_inability": rows(measured.false_inability)}}


def _options(argv: Sequence[str]) -> argparse.Namespace:
    keys = config_lib.describe(ClaimsConfig)
    parser = ArgumentParser(prog="tilelli claims", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            epilog=f"keys of --expect, with their defaults:\n{keys}")
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--expect", default=PUBLISHED, metavar="NAME",
                        help="claims to check, a name or a YAML file [%(default)s]")
    parser.add_argument("--prompts", metavar="PATH",
                        help="directory or file of prompts in seven regimes [the built-in prompts]")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="X",
                        help="allowed deviation: a fraction of the parameters and of the number of answers, "
                             "and an absolute difference in AUROC [%(default)s]")
    parser.add_argument("--write-expected", type=Path, metavar="FILE",
                        help="write the measurements of this network as a claims file for --expect")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write the table and all answers as JSON")
    options = parser.parse_args(argv)
    if not (math.isfinite(options.tolerance) and 0 <= options.tolerance < 1):
        raise InputError(f"--tolerance: expected a number ≥ 0 and < 1, found {options.tolerance}")
    outputs = [os.path.realpath(path) for path in (options.out, options.write_expected) if path]
    if len(set(outputs)) < len(outputs):
        raise InputError(f"--out: expected another file than --write-expected, found {options.out} for both")
    return options
