"""Converts checkpoints to model directories, and back.

    tilelli convert SOURCE OUT                   SOURCE: a .pt file, a Hugging Face directory, a .gguf,
                                                 or the directory of an autoencoder
    tilelli convert SOURCE OUT --packed          quantised weights as packed codes; SOURCE can be a model
                                                 directory too
    tilelli convert MODEL_DIR OUT --to hf        OUT: a Hugging Face directory, which transformers loads
    tilelli convert MODEL_DIR OUT --to torch     the original layout: a .pt file for routed, vanilla, sae and
                                                 lrd, else a Hugging Face directory
    tilelli convert MODEL_DIR OUT --to saelens   for an autoencoder; also --to sparsify
    tilelli convert --inspect SOURCE             lists its tensors and what they would become
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json, new_directory
from tilelli_jax.io.json_text import read_json
from tilelli_jax.io.tensors import Tensor, write_directory
from tilelli_jax.loading import store
from tilelli_jax.loading.model_card import CARD, CardInfo, model_card
from tilelli_jax.models import pack
from tilelli_jax.models.arrays import from_tensors, n_parameters, packed_names, to_arrays
from tilelli_jax.models.packed_tensors import packed_tensors

from . import assumptions, check, inspect, source, to_torch, to_transformers
from .families import FAMILIES, OTHER_NAMES, family_of
from .output import with_progress
from .plan import Plan
from .source import AUTOENCODERS

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    if options.inspect:
        print(inspect.report(*_open_and_plan(options)))
        return 0
    if options.to:
        return _convert_back(options)
    if options.packed and _is_model_directory(options.source):
        return _pack(options, argv)
    return _convert(options, argv)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="tilelli convert", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint to convert")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT",
                        help="output path; must not exist, or be an empty directory")
    parser.add_argument("--from", dest="family", metavar="FAMILY",
                        help="family of SOURCE (by default detected): "
                        f"{', '.join([*FAMILIES, *OTHER_NAMES])}")
    parser.add_argument("--map", type=Path, metavar="FILE",
                        help="YAML file of 'name in SOURCE: known name', for tensors with unknown names")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="type of the stored weights; by default that of SOURCE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                        help="setting of the network's configuration that SOURCE does not specify")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH",
                        help="tokenizer.json, or a directory that contains it, in place of SOURCE's own")
    parser.add_argument("--to", choices=("torch", "hf", *AUTOENCODERS),
                        help="SOURCE is a model directory. hf: a Hugging Face directory, which transformers "
                             "loads; torch: the original layout, a .pt file for routed, vanilla, sae and "
                             "lrd, else the same as hf; saelens, sparsify: an autoencoder for that library")
    parser.add_argument("--packed", action="store_true", help=(
        "store quantised weights as packed codes (1.6 or 2.81 bits each) without the full-precision ones: "
        "the network computes the same and cannot be trained further"))
    parser.add_argument("--inspect", action="store_true", help="list the contents of SOURCE; convert nothing")
    parser.add_argument("--check", action="store_true",
                        help="run both networks on one input and print their largest difference; choose "
                             "settings that SOURCE does not specify by their NLL on text")
    options = parser.parse_args(argv)
    if options.inspect and (options.out or options.to or options.check):
        raise InputError("--inspect: expected SOURCE alone")
    if not options.inspect and options.out is None:
        raise InputError("expected SOURCE and OUT (or --inspect SOURCE)")
    if options.to and (options.family or options.map or options.settings or options.check
                       or options.tokenizer or options.packed):
        raise InputError("--to: expected no --from, --map, --set, --tokenizer, --packed or --check")
    if options.packed and (options.check or options.dtype or options.inspect):
        raise InputError("--packed: expected no --check, --dtype or --inspect")
    return options


def _open_and_plan(options: argparse.Namespace) -> tuple[source.Source, Plan | None, str]:
    """Returns the source, the conversion plan (None if there is none), and the error message or ""."""
    opened = source.open_source(options.source)
    if options.tokenizer:
        opened = opened.with_tokenizer(options.tokenizer)
    if options.map:
        opened = opened.renamed(source.read_map(options.map))
    try:
        plan = family_of(opened, options.family).plan(opened, options.settings)
    except InputError as error:
        return opened, None, str(error)
    try:
        plan.check(str(opened.path))
    except InputError as error:
        return opened, plan, str(error)
    return opened, plan, ""


def _convert(options: argparse.Namespace, argv: Sequence[str]) -> int:
    opened, plan, problem = _open_and_plan(options)
    if plan is None or problem:
        raise InputError(problem)
    verdict = ""
    if options.check:
        check.require_packages(opened)
        try:
            plan, verdict = assumptions.resolve(plan)
        except Exception as error:  # the program that runs the source may raise anything
            raise InputError(f"--check: {opened.path} could not be run: {error!r:.300}") from None
    arrays = _stored_as(plan.arrays(), options.dtype)
    count = sum(math.prod(array.shape) for array in arrays.values())
    if options.packed:
        arrays = _packed(arrays, plan, opened.path)
    info = CardInfo(command=f"tilelli convert {shlex.join(argv)}", made_from=(
        f"Converted from {opened.path.name}, of the family {plan.family}. Its licence and limits apply."))
    others = {store.CONFIG: as_json(config_lib.to_dict(plan.config)),
              CARD: model_card(plan.config, count, info).encode(),
              to_torch.RECORD: as_json(to_torch.record(opened, plan)),
              **source.read_companions(opened.companions), **opened.generated()}
    vanished: dict[str, int] = {}
    start = time.perf_counter()
    with new_directory(options.out) as path:
        tensors = with_progress(arrays, "converting", options.source, vanished)
        write_directory(path, tensors, others, writer=store.WRITER)
    _report(plan.family, arrays, count, time.perf_counter() - start, options.out, vanished)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    if verdict:
        print(verdict)
    if options.check:
        try:
            print(check.format_difference(check.compare(opened, plan, options.out)))
        except Exception as error:  # the program that runs the source may raise anything
            raise InputError(f"--check: {opened.path} could not be run: {error!r:.300}; {options.out} is "
                             "written") from None
    return 0


def _convert_back(options: argparse.Namespace) -> int:
    config = store.load_config(options.source)
    if options.to == "hf" and config.family in to_transformers.FAMILIES:
        if options.dtype:
            raise InputError(f"--to hf: expected no --dtype for a {config.family}")
        if note := to_transformers.write(options.source, options.out):
            print(f"note: {note}", file=sys.stderr)
        print(f"{options.out}: written for transformers; load it by AutoModelForCausalLM.from_pretrained("
              f"{str(options.out)!r}{', trust_remote_code=True' * (config.family == 'routed')}), "
              "and AutoTokenizer in the same way")
        return 0
    stored = store.read_tensors(options.source)
    if packed_names(stored):
        raise InputError(f"--to {options.to}: {options.source}: expected full-precision weights, found "
                         f"packed ones, from which {options.to} cannot be written")
    arrays = _stored_as(stored, options.dtype)
    vanished: dict[str, int] = {}
    start = time.perf_counter()
    tensors = with_progress(arrays, "converting", options.source, vanished)
    to_torch.write(config, tensors, options.source, options.out, options.to)
    count = sum(math.prod(array.shape) for array in arrays.values())
    _report(config.family, arrays, count, time.perf_counter() - start, options.out, vanished)
    if options.to == "saelens" and 0 < getattr(config, "max_active", 0) < config.n_latents:
        print(f"note: max_active={config.max_active} is not stored: SAELens keeps all latents above the "
              "threshold", file=sys.stderr)
    return 0


def _is_model_directory(path: Path) -> bool:
    return (path / store.CONFIG).is_file() and "family" in read_json(path / store.CONFIG)


def _pack(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Packs the weights of a model directory."""
    if options.family or options.map or options.settings or options.tokenizer:
        raise InputError("--packed: expected no --from, --map, --set or --tokenizer for a model directory")
    start = time.perf_counter()
    model = store.load(options.source, param_dtype="stored")
    with new_directory(options.out) as path:
        store.save(model, path, CardInfo(command=f"tilelli convert {shlex.join(argv)}", made_from=(
            f"{options.source.name} with packed weights. Its data and limits apply.")), packed=True)
    _report(model.config.family, store.read_tensors(options.out), n_parameters(model),
            time.perf_counter() - start, options.out, {})
    return 0


def _packed(arrays: Mapping[str, Tensor], plan: Plan, source: Path) -> dict[str, Tensor]:
    """The arrays of the packed network."""
    model = pack(from_tensors(store.FAMILIES[plan.config.family][1], plan.config, arrays, source=str(source),
                              param_dtype="stored"))
    return packed_tensors(to_arrays(model), plan.config)


def _stored_as(arrays: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    if dtype is None:
        return arrays
    return {name: array.astype(np.dtype(DTYPES[dtype])) for name, array in arrays.items()}


def _report(family: str, arrays: Mapping[str, Tensor], count: int, seconds: float, out: Path,
            vanished: dict[str, int]) -> None:
    size = sum(array.nbytes for array in arrays.values())
    dtypes = ", ".join(sorted({str(array.dtype) for array in arrays.values()}))
    print(f"{out}: {family}, {len(arrays)} arrays, {count:,} parameters ({dtypes}), {size / 1e9:.3g} GB "
          f"in {seconds:.3g} s")
    if lost := sum(vanished.values()):
        worst = max(vanished, key=lambda name: vanished[name])
        print(f"note: {lost:,} of the {count:,} numbers are nonzero and become 0 in {dtypes}, "
              f"{vanished[worst]:,} of them in {worst}", file=sys.stderr)
