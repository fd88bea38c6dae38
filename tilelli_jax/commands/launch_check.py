"""Compiles programs for a TPU slice without using one, and reports what they need.

    tilelli launch-check --topology v5e:2x4 --config FILE [key=value …]

The program is a run's training step; with --inference, the pass over a batch of prompts and the decoding
step of a network. Prints memory per device, collectives and floating-point operations. Needs the extra `tpu`
(the TPU compiler); runs on any Linux x86 CPU.
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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tilelli_jax import config as config_lib
from tilelli_jax import extras
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.loading import store
from tilelli_jax.models import freeze
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.gemma3 import Gemma3Config
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.parallel.collectives import Collectives, read_collectives
from tilelli_jax.parallel.sharding import (
    BATCH,
    MeshConfig,
    batch_devices,
    batch_spec,
    make_mesh,
    tree_shardings,
)
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.flops import inference_flops, peak_flops, train_flops_per_token
from tilelli_jax.training.step import make_training
from tilelli_jax.training.tasks.text_loss import NextByteLoss

GIB = 2**30
UNITS = ("B", "KiB", "MiB", "GiB")
# Memory of one JAX device, by `device_kind`.
HBM = {"TPU v4": 32 * GIB, "TPU v5 lite": 16 * GIB, "TPU v5": 95 * GIB, "TPU v6 lite": 32 * GIB,
       "TPU7x": 96 * GIB}


# Bytes per second that one JAX device reads from it, from the vendor's data sheets.
BANDWIDTH = {"TPU v4": 1228e9, "TPU v5 lite": 819e9, "TPU v5": 2765e9, "TPU v6 lite": 1640e9,
             "TPU7x": 7380e9 / 2}


@dataclasses.dataclass(frozen=True)
class InferenceConfig(Section):
    """A network and the shape of the batches that it is asked."""

    model: LlamaConfig | Gemma3Config = setting(LlamaConfig(), "the network")
    compute: ComputeConfig = setting(
        ComputeConfig(dtype="bfloat16"), "how the network is computed; weights are stored in compute.dtype")
    mesh: MeshConfig = setting(MeshConfig(), "the devices")
    batch_size: int = setting(8, "prompts in a batch, over all devices", min=1)
    prompt: int = setting(2048, "tokens of a prompt", min=1)
    context: int = setting(4096, "tokens that the caches hold: the prompt and its continuation", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < self.prompt:
            raise InputError(f"context: expected at least the {self.prompt} tokens of a prompt, "
                             f"found {self.context}")


@dataclasses.dataclass(frozen=True)
class Report:
    """Resources of a compiled program: bytes per device, and operations of the whole slice."""

    name: str
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
    flops: float
    peak_seconds: float | None  # time of flops at the devices' peak FLOP/s; None if unknown
    read_seconds: float | None  # time to read the arguments once from the devices' memory; None if unknown
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
    parser.add_argument("--inference", action="store_true",
                        help="the configurations are of inference: compile the pass over a batch of prompts "
                             "and the decoding step instead of a training step")
    parser.add_argument("--markdown", action="store_true",
                        help="print a Markdown table with a row per topology and program")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="settings that override the file's, e.g. mesh.tensor=8")
    options = parser.parse_intermixed_args(argv)
    kind: Any = InferenceConfig if options.inference else ExperimentConfig
    configs = {path: config_lib.load(kind, path, options.overrides) for path in options.config}
    if options.markdown:
        print(markdown_head(), flush=True)
    for topology in options.topology:
        devices = topology_devices(topology)
        for path, config in configs.items():
            for report in check(config, Path(path).name.removesuffix(".yaml"), topology, devices):
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


def check(config: ExperimentConfig | InferenceConfig, name: str, topology: str,
          devices: list[jax.Device]) -> list[Report]:
    """Compiles the programs of `config` for these devices and reports their resources.

    They are the training step, or the pass over the prompts and the decoding step.

    Raises:
        InputError: the mesh or the batch does not fit the slice, or a program does not fit its memory.
    """
    try:
        mesh = make_mesh(config.mesh, devices)
        if isinstance(config, InferenceConfig):
            return _check_inference(config, name, topology, mesh)
        return [_check_training(config, name, topology, mesh)]
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _check_training(config: ExperimentConfig, name: str, topology: str, mesh: Mesh) -> Report:
    if isinstance(config.model, SAEConfig):
        raise InputError("model.family: expected a network for text, found sae")
    if config.chat is not None:
        raise InputError("chat: expected a run that trains on text, found a section chat")
    config.train.check_shared(batch_devices(mesh))
    parts, rows = config.train.accumulate, config.train.batch_size // config.train.accumulate
    batch = jax.ShapeDtypeStruct((parts, rows, config.train.seq_len + 1), np.uint8,
                                 sharding=NamedSharding(mesh, batch_spec(3, axis=1)))
    training = make_training(config.model, config.compute, config.optimizer, steps=config.train.steps,
                             loss=NextByteLoss(config.train.load_balance_weight), seed=config.seed, mesh=mesh)
    tokens = config.train.batch_size * config.train.seq_len
    return _compiled(name, topology, mesh, training.update,
                     (training.abstract_state, {"bytes": batch}, np.int32(0)),
                     tokens * train_flops_per_token(config.model, config.train.seq_len))


def _check_inference(config: InferenceConfig, name: str, topology: str, mesh: Mesh) -> list[Report]:
    if config.batch_size % batch_devices(mesh):
        raise InputError(f"batch_size: expected a multiple of the {batch_devices(mesh)} devices that share a "
                         f"batch (mesh.data × mesh.fsdp), found {config.batch_size}")
    model = nnx.eval_shape(lambda: freeze(store.build(config.model, 0, config.compute)))
    graph, params = nnx.split(model)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.compute.dtype), params)
    params = _placed(params, tree_shardings(params, mesh))

    def of_batch(*shape: int) -> jax.ShapeDtypeStruct:
        """Ids or lengths of a batch."""
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, batch_spec(len(shape))))

    def prefill(params: Any, ids: jax.Array, lengths: jax.Array) -> Any:
        return nnx.merge(graph, params).prefill(ids, lengths, config.context)

    def step(params: Any, ids: jax.Array, caches: Any, position: jax.Array) -> Any:
        return nnx.merge(graph, params).step(ids, caches, position)

    ids, row = of_batch(config.batch_size, config.prompt), of_batch(config.batch_size)
    _, caches = jax.eval_shape(prefill, params, ids, row)
    # Entries `[batch, heads, slots, d_head]`: heads are split as the columns of their kernels.
    heads = "tensor" if config.model.n_kv_heads % mesh.shape["tensor"] == 0 else None
    of_caches = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(BATCH, heads, None, None)), caches)
    caches = _placed(caches, of_caches)
    def compiled(part: str, program: Any, arguments: tuple[Any, ...], new: int, context: int) -> Report:
        flops = config.batch_size * inference_flops(config.model, new, context)
        return _compiled(f"{name}: {part}", topology, mesh, program, arguments, flops)

    return [compiled("prompts", jax.jit(prefill, out_shardings=(None, of_caches)), (params, ids, row),
                     config.prompt, config.prompt),
            compiled("decoding", jax.jit(step, donate_argnums=2, out_shardings=(None, of_caches)),
                     (params, row, caches, row), 1, config.context)]


def _placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with these shardings."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree,
                        shardings)


def _compiled(name: str, topology: str, mesh: Mesh, program: Any, arguments: tuple[Any, ...],
              flops: float) -> Report:
    """Compiles a jitted program for the devices of a mesh."""
    started = time.monotonic()
    with jax.set_mesh(mesh):
        try:
            compiled = program.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(f"does not fit {topology}: {str(error).splitlines()[0]}") from None
    memory, device = compiled.memory_analysis(), mesh.devices.flat[0]
    peak, bandwidth = peak_flops(device), BANDWIDTH.get(device.device_kind)
    return Report(
        name=name, topology=topology, devices=mesh.size, device_kind=device.device_kind,
        mesh=dict(mesh.shape), arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes, aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes, program=memory.generated_code_size_in_bytes,
        hbm=HBM.get(device.device_kind), collectives=read_collectives(compiled.as_text()),
        flops=flops, peak_seconds=flops / peak / mesh.size if peak else None,
        read_seconds=memory.argument_size_in_bytes / bandwidth if bandwidth else None,
        compile_seconds=time.monotonic() - started)


# ---------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """Formats a report for the terminal."""
    mesh = " · ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    hbm = f" of {_size(report.hbm)}" if report.hbm else ""
    peak = (f", at least {1e3 * report.peak_seconds:.3g} ms at these devices' peak FLOP/s"
            if report.peak_seconds else "")
    read = f" ({1e3 * report.read_seconds:.3g} ms to read them once)" if report.read_seconds else ""
    lines = [
        f"{report.name} on {report.topology}: {report.devices} × {report.device_kind}, mesh {mesh} "
        f"(compiled in {report.compile_seconds:.0f} s)",
        f"  memory per device     {_size(report.total)}{hbm}: arguments {_size(report.arguments)}{read}, "
        f"outputs {_size(report.outputs)} ({_size(report.aliased)} of them in donated arguments), "
        f"temporary {_size(report.temporary)}, program {_size(report.program)}",
        f"  collectives           {_collectives(report) or 'none'}",
        f"  operations            {report.flops:.3g} FLOPs by formula{peak}"]
    return "\n".join(lines)


def markdown_head() -> str:
    return ("| program | slice | mesh d·f·t | arguments | outputs | temporary | total per device "
            "| collectives: count, bytes | FLOPs | least time: FLOPs / reading |\n"
            "|---|---|---|---|---|---|---|---|---|---|")


def markdown_row(report: Report) -> str:
    fraction = f" ({report.total / report.hbm:.1%})" if report.hbm else ""
    times = report.peak_seconds, report.read_seconds
    least = " / ".join(f"{1e3 * seconds:.3g} ms" if seconds else "unknown" for seconds in times)
    cells = (report.name, report.topology, "·".join(map(str, report.mesh.values())),
             _size(report.arguments), _size(report.outputs), _size(report.temporary),
             _size(report.total) + fraction, _collectives(report) or "none",
             f"{report.flops:.3g}", least)
    return f"| {' | '.join(cells)} |"


def _collectives(report: Report) -> str:
    return ", ".join(f"{c.kind} {c.count}× {_size(c.bytes)}" for c in report.collectives)


def _size(n_bytes: int) -> str:
    power = min(int(math.log2(n_bytes) / 10), 3) if n_bytes else 0
    value = n_bytes / 2**(10 * power)
    return f"{value:.0f} {UNITS[power]}" if value >= 100 else f"{value:.3g} {UNITS[power]}"
