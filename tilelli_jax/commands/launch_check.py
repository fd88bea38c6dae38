"""Compiles a run's training step for a TPU slice without using one, and reports what it needs.

    tilelli launch-check --topology v5e:2x4 --config FILE [key=value …]

Prints memory per device, a step's collectives and floating-point operations. Needs the extra `tpu` (the TPU
compiler); runs on any Linux x86 CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from tilelli_jax import config as config_lib
from tilelli_jax import extras
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.parallel.collectives import Collectives, read_collectives
from tilelli_jax.parallel.sharding import batch_devices, batch_spec, make_mesh
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.flops import peak_flops, train_flops_per_token
from tilelli_jax.training.step import make_training
from tilelli_jax.training.tasks.text_loss import NextByteLoss

GIB = 2**30
UNITS = ("B", "KiB", "MiB", "GiB")
# Memory of one JAX device, by `device_kind`.
HBM = {"TPU v4": 32 * GIB, "TPU v5 lite": 16 * GIB, "TPU v5": 95 * GIB, "TPU v6 lite": 32 * GIB,
       "TPU7x": 96 * GIB}


@dataclasses.dataclass(frozen=True)
class Report:
    """Resources of a compiled step: bytes per device, and operations of the whole slice."""

    config: str
    topology: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    arguments: int
    outputs: int
    aliased: int  # bytes of outputs that reuse donated arguments
    temporary: int
    program: int
    hbm: int | None
    collectives: list[Collectives]
    step_flops: float
    peak_seconds: float | None  # time of step_flops at the devices' peak FLOP/s; None if unknown
    compile_seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary + self.program


@command
def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="tilelli launch-check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, action="append", metavar="KIND:SHAPE",
                        help="TPU slice, e.g. v5e:2x4, v5p:2x2x2, v6e:4x4; may be repeated")
    parser.add_argument("--config", required=True, action="append", metavar="FILE",
                        help="YAML file of settings, or the name of a shipped one; may be repeated")
    parser.add_argument("--markdown", action="store_true",
                        help="print a Markdown table with a row per topology and config")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="settings that override the file's, as for tilelli train")
    options = parser.parse_intermixed_args(argv)
    configs = {path: config_lib.load(ExperimentConfig, path, options.overrides)
               for path in options.config}
    if options.markdown:
        print(markdown_head(), flush=True)
    for topology in options.topology:
        devices = topology_devices(topology)
        for path, config in configs.items():
            report = check(config, Path(path).stem, topology, devices)
            print(markdown_row(report) if options.markdown else text(report), flush=True)
    return 0


def topology_devices(name: str) -> list[jax.Device]:
    """Returns the devices of a TPU slice, which can be compiled for but not run on.

    Raises:
        InputError: the TPU compiler is not installed, or the slice is unknown to it.
    """
    from jax.experimental import topologies

    # Do not look for a TPU, nor wait for a metadata server that would describe one.
    jax.config.update("jax_platforms", "cpu")
    # Without a TPU, several processes may load its compiler at the same time.
    for key, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
                       ("TPU_ACCELERATOR_TYPE", "v5litepod-8"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(key, value)
    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise InputError(f"--topology {name}: expected KIND:SHAPE such as v5e:2x4, v5p:2x2x2 or "
                         f"v6e:4x4: {error}") from None
    except RuntimeError as error:
        needed = extras.missing("libtpu", "tilelli launch-check")
        raise InputError(f"{needed}, in an environment separate from that for CPU or GPU: {error}") from None


def check(config: ExperimentConfig, name: str, topology: str, devices: list[jax.Device]) -> Report:
    """Compiles the training step of `config` for these devices and reports its resources.

    Raises:
        InputError: the mesh or the batch does not fit the slice, or the step does not fit its memory.
    """
    if isinstance(config.model, SAEConfig):
        raise InputError(f"{name}: model.family: expected a network for text, found sae")
    if config.chat is not None:
        raise InputError(f"{name}: chat: expected a run that trains on text, found a section chat")
    try:
        mesh = make_mesh(config.mesh, devices)
        config.train.check_shared(batch_devices(mesh))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    parts, rows = config.train.accumulate, config.train.batch_size // config.train.accumulate
    batch = jax.ShapeDtypeStruct((parts, rows, config.train.seq_len + 1), np.uint8,
                                 sharding=NamedSharding(mesh, batch_spec(3, axis=1)))
    started = time.monotonic()
    training = make_training(config.model, config.compute, config.optimizer, steps=config.train.steps,
                             loss=NextByteLoss(config.train.load_balance_weight), seed=config.seed, mesh=mesh)
    step: Any = training.update
    with jax.set_mesh(mesh):
        try:
            compiled = step.lower(training.abstract_state, {"bytes": batch}, np.int32(0)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(f"{name} does not fit {topology}: {str(error).splitlines()[0]}") from None
    memory = compiled.memory_analysis()
    tokens = config.train.batch_size * config.train.seq_len
    step_flops = tokens * train_flops_per_token(config.model, config.train.seq_len)
    peak = peak_flops(devices[0])
    return Report(
        config=name, topology=topology, devices=len(devices), device_kind=devices[0].device_kind,
        mesh=dict(mesh.shape), arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes, aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes, program=memory.generated_code_size_in_bytes,
        hbm=HBM.get(devices[0].device_kind), collectives=read_collectives(compiled.as_text()),
        step_flops=step_flops, peak_seconds=step_flops / peak / len(devices) if peak else None,
        compile_seconds=time.monotonic() - started)


# ---------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """Formats a report for the terminal."""
    mesh = " · ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    hbm = f" of {_size(report.hbm)}" if report.hbm else ""
    peak = (f", at least {1e3 * report.peak_seconds:.3g} ms at these devices' peak FLOP/s"
            if report.peak_seconds else "")
    lines = [
        f"{report.config} on {report.topology}: {report.devices} × {report.device_kind}, mesh {mesh} "
        f"(compiled in {report.compile_seconds:.0f} s)",
        f"  memory per device     {_size(report.total)}{hbm}: arguments {_size(report.arguments)}, "
        f"outputs {_size(report.outputs)} ({_size(report.aliased)} of them in donated arguments), "
        f"temporary {_size(report.temporary)}, program {_size(report.program)}",
        f"  collectives per step  {_collectives(report) or 'none'}",
        f"  operations per step   {report.step_flops:.3g} FLOPs by formula{peak}"]
    return "\n".join(lines)


def markdown_head() -> str:
    return ("| config | slice | mesh d·f·t | arguments | outputs | temporary | total per device "
            "| collectives per step: count, bytes | FLOPs per step | time at peak |\n"
            "|---|---|---|---|---|---|---|---|---|---|")


def markdown_row(report: Report) -> str:
    fraction = f" ({report.total / report.hbm:.1%})" if report.hbm else ""
    peak = f"{1e3 * report.peak_seconds:.3g} ms" if report.peak_seconds else "unknown"
    cells = (report.config, report.topology, "·".join(map(str, report.mesh.values())),
             _size(report.arguments), _size(report.outputs), _size(report.temporary),
             _size(report.total) + fraction, _collectives(report) or "none",
             f"{report.step_flops:.3g}", peak)
    return f"| {' | '.join(cells)} |"


def _collectives(report: Report) -> str:
    return ", ".join(f"{c.kind} {c.count}× {_size(c.bytes)}" for c in report.collectives)


def _size(n_bytes: int) -> str:
    power = min(int(math.log2(n_bytes) / 10), 3) if n_bytes else 0
    value = n_bytes / 2**(10 * power)
    return f"{value:.0f} {UNITS[power]}" if value >= 100 else f"{value:.3g} {UNITS[power]}"
