"""Converts checkpoints: PyTorch files and Hugging Face directories to model directories, and back.

    tilelli convert SOURCE OUT                   SOURCE: a .pt file or a Hugging Face directory
    tilelli convert MODEL_DIR OUT --to torch     OUT: a Hugging Face directory, or a .pt file
    tilelli convert MODEL_DIR OUT --to saelens   of an autoencoder; or --to sparsify
    tilelli convert --inspect SOURCE             what is in it, and what it would become
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.files import as_json, new_directory
from tilelli_jax.tensors import Tensor, write_directory

from . import assumptions, check, inspect, source, to_torch
from .families import FAMILIES, OTHER_NAMES, family_of
from .output import with_progress
from .plan import Plan
from .source import AUTOENCODERS

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    if options.inspect:
        print(inspect.report(*_planned(options)))
        return 0
    if options.to:
        return _back(options)
    return _forth(options)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="tilelli convert", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="what is converted")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="where to; must not be there yet")
    parser.add_argument("--from", dest="family", metavar="FAMILY",
                        help=f"of which family SOURCE is: {', '.join([*FAMILIES, *OTHER_NAMES])}")
    parser.add_argument("--map", type=Path, metavar="FILE",
                        help="a YAML file of 'their name: known name', for tensors with names of their own")
    parser.add_argument("--dtype", choices=DTYPES, help="what to store in; by default as SOURCE has it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                        help="a setting of the network's configuration that SOURCE does not say")
    parser.add_argument("--to", choices=("torch", *AUTOENCODERS),
                        help="the other way: SOURCE is a model directory; an autoencoder may also become the "
                             "directory that SAELens or sparsify reads")
    parser.add_argument("--inspect", action="store_true", help="tell what SOURCE holds; convert nothing")
    parser.add_argument("--check", action="store_true",
                        help="run both networks on one input and print their largest difference; of what "
                             "SOURCE leaves open, take what predicts text best")
    options = parser.parse_args(argv)
    if options.inspect and (options.out or options.to or options.check):
        raise InputError("--inspect: expected SOURCE alone")
    if not options.inspect and options.out is None:
        raise InputError("expected SOURCE and OUT (or --inspect SOURCE)")
    if options.to and (options.family or options.map or options.settings or options.check):
        raise InputError("--to: expected no --from, --map, --set or --check")
    return options


def _planned(options: argparse.Namespace) -> tuple[source.Source, Plan | None, str]:
    """The source, what becomes of it, and otherwise why nothing does."""
    given = source.open_source(options.source)
    if options.map:
        given = given.renamed(source.read_map(options.map))
    settings = config_lib.parse_overrides(options.settings)
    try:
        plan = family_of(given, options.family).plan(given, settings)
    except InputError as error:
        return given, None, str(error)
    try:
        plan.check(str(given.path))
    except InputError as error:
        return given, plan, str(error)
    return given, plan, ""


def _forth(options: argparse.Namespace) -> int:
    given, plan, problem = _planned(options)
    if plan is None or problem:
        raise InputError(problem)
    verdict = ""
    if options.check:
        check.needs(given)
        try:
            plan, verdict = assumptions.settle(plan)
        except Exception as error:  # whatever runs the source may raise anything
            raise InputError(f"--check: {given.path} could not be run: {error!r:.300}") from None
    arrays = _stored_as(plan.arrays(), options.dtype)
    others = {store.CONFIG: as_json(config_lib.to_dict(plan.config)),
              to_torch.RECORD: as_json(to_torch.record(given, plan)),
              **source.read_companions(given.companions)}
    vanished: dict[str, int] = {}
    start = time.perf_counter()
    with new_directory(options.out) as path:
        watched = with_progress(arrays, "converting", options.source, vanished)
        write_directory(path, watched, others, writer=store.WRITER)
    _tell(plan.family, arrays, time.perf_counter() - start, options.out, vanished)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    if verdict:
        print(verdict)
    if options.check:
        try:
            print(check.told(check.compare(given, plan, options.out)))
        except Exception as error:  # whatever runs the source may raise anything
            raise InputError(f"--check: {given.path} could not be run: {error!r:.300}; {options.out} is "
                             "written") from None
    return 0


def _back(options: argparse.Namespace) -> int:
    config = store.load_config(options.source)
    arrays = _stored_as(store.read_tensors(options.source), options.dtype)
    vanished: dict[str, int] = {}
    start = time.perf_counter()
    watched = with_progress(arrays, "converting", options.source, vanished)
    to_torch.write(config, watched, options.source, options.out, options.to)
    _tell(config.family, arrays, time.perf_counter() - start, options.out, vanished)
    return 0


def _stored_as(arrays: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    if dtype is None:
        return arrays
    return {name: array.astype(np.dtype(DTYPES[dtype])) for name, array in arrays.items()}


def _tell(family: str, arrays: dict[str, Tensor], seconds: float, out: Path,
          vanished: dict[str, int]) -> None:
    size = sum(array.nbytes for array in arrays.values())
    count = sum(int(np.prod(array.shape)) for array in arrays.values())
    kinds = ", ".join(sorted({str(array.dtype) for array in arrays.values()}))
    print(f"{out}: {family}, {len(arrays)} arrays, {count:,} numbers ({kinds}), {size / 1e9:.3g} GB "
          f"in {seconds:.3g} s")
    if lost := sum(vanished.values()):
        most = max(vanished, key=lambda name: vanished[name])
        print(f"note: {lost:,} of the {count:,} numbers are not 0 and become 0 in {kinds}, "
              f"{vanished[most]:,} of them in {most}", file=sys.stderr)
