"""Four claims of a network: architecture, cross-regime AUROC, held-out abstention, false inability.

    tilelli claims --model DIR [--expect FILE] [--prompts PATH] [--tolerance 0.05] [--out FILE]
    tilelli claims --model DIR --write-expected FILE

Ends with 0 if all that is claimed holds, 1 if something does not, 2 if it could not be asked. By default
the claims are those published of the original's v4; --write-expected makes a file of what this network
is and does, which it and others can be compared with. See docs/claims.md.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.files import write_together
from tilelli_jax.tables import table

from ..abstention import prompts
from ..tables import as_json
from . import measurements
from .check import AREAS, Line, check, failing
from .config import ClaimsConfig
from .measurements import Answer, Found

PUBLISHED = "claims-published"
TOLERANCE = 0.05  # the original's


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    claims = config_lib.load(ClaimsConfig, options.expect)
    for option, path in (("--out", options.out), ("--write-expected", options.write_expected)):
        _check_writable(option, path)
    asked = measurements.choose(options.prompts or prompts.BUILT_IN, claims)
    measurements.check(options.model, asked, claims.answers)
    found = measurements.find(options.model, asked, claims)
    source = f"{options.expect}" + (f": {claims.of}" if claims.of else "")
    contents = {}
    if options.write_expected:
        asked_what = options.prompts or "the built-in prompts"
        claims = measurements.as_claims(found, claims, f"{options.model}, asked {asked_what}")
        source = f"what was found of it, now in {options.write_expected}"
        contents[options.write_expected] = config_lib.dump(claims).encode()
    lines = check(found, claims, options.tolerance)
    if options.out:
        contents[options.out] = as_json(_tree(options, claims, lines, found))
    try:
        write_together(contents)
    except OSError as error:
        raise InputError(f"{error.filename or 'output'}: cannot be written: {error.strerror}") from None
    print(f"{options.model} against {source}\n\n{table(_rows(lines))}\n")
    fails = failing(lines)
    print(f"does not hold: {', '.join(fails)}" if fails else "all that is claimed holds")
    return 1 if fails else 0


# ---------------------------------------------------------------------------------------------


def _rows(lines: Sequence[Line]) -> list[list[str]]:
    """What a terminal shows. Shares are in per cent, an AUROC is not."""
    rows = [["claim", "", "expected", "found", "95 % interval", "holds"]]
    for line in lines:
        area = line.interval
        within = ("" if area is None else
                  f"{area.low:.3f} … {area.high:.3f}" if line.claim == AREAS else
                  f"{area.low:.0%} … {area.high:.0%}")
        rows.append([line.claim, line.what, "–" if line.expected is None else line.expected,
                     "absent" if line.found is None else line.found, within,
                     {True: "yes", False: "NO", None: "–"}[line.holds]])
    return rows


def _tree(options: argparse.Namespace, claims: ClaimsConfig, lines: Sequence[Line], found: Found) -> Any:
    """What --out writes: the table, and what was said to each prompt."""
    def said(answers: Sequence[Answer]) -> list[dict[str, Any]]:
        return [one._asdict() for one in answers]
    return {"model": options.model, "expect": str(options.write_expected or options.expect),
            "of": claims.of, "prompts": options.prompts or "built-in", "tolerance": options.tolerance,
            "holds": not failing(lines), "claims": [line._asdict() for line in lines],
            "answers": {"held_out": said(found.held_out),
                        "false_inability": said(found.false_inability)}}


def _check_writable(option: str, path: Path | None) -> None:
    """Before a long wait, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{option}: {path} is a directory, expected a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be written: {error.strerror}") from None


def _options(argv: Sequence[str]) -> argparse.Namespace:
    keys = config_lib.describe(ClaimsConfig)
    parser = ArgumentParser(prog="tilelli claims", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            epilog=f"keys of --expect, with their defaults:\n{keys}")
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory")
    parser.add_argument("--expect", default=PUBLISHED, metavar="FILE",
                        help="YAML file of what is claimed [%(default)s]")
    parser.add_argument("--prompts", metavar="PATH",
                        help="a directory or file of prompts in seven regimes [the built-in ones]")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="SHARE",
                        help="of the parameters, of the answers asked for, and in AUROC [%(default)s]")
    parser.add_argument("--write-expected", type=Path, metavar="FILE",
                        help="write what was found of this network there, as a file for --expect")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write the table, and what was said, as JSON")
    options = parser.parse_args(argv)
    if not (math.isfinite(options.tolerance) and 0 <= options.tolerance < 1):
        raise InputError(f"--tolerance: expected a share from 0 to below 1, found {options.tolerance}")
    both = [os.path.realpath(path) for path in (options.out, options.write_expected) if path]
    if len(set(both)) < len(both):
        raise InputError(f"--out: {options.out}: expected another file than --write-expected")
    return options
