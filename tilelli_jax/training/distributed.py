"""Runs of several processes: how they find each other, compile together and stop at the same step."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tilelli_jax.cli import interrupts
from tilelli_jax.cli.command import INTERRUPTED
from tilelli_jax.errors import InputError

COORDINATOR = "TILELLI_COORDINATOR"
NUM_PROCESSES = "TILELLI_NUM_PROCESSES"
PROCESS_ID = "TILELLI_PROCESS_ID"
PATIENCE_MS = 3_600_000  # longest time, in ms, that one process may take to compile after another


def initialize() -> None:
    """Joins this process to the others of its run; call it before JAX uses a device.

    Reads `TILELLI_COORDINATOR` (host:port of process 0), `TILELLI_NUM_PROCESSES` and
    `TILELLI_PROCESS_ID` if any is set. Otherwise `jax.distributed.initialize` detects the cluster: SLURM,
    Cloud TPU, GKE or Open MPI. CPU processes communicate through gloo, JAX's default.

    Raises:
        InputError: the variables are incomplete or wrong, or no cluster is detected.
    """
    # `should_stop` uses this service; it is on by default, but the user's environment may disable it.
    jax.config.update("jax_enable_preemption_service", True)
    if any(name in os.environ for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)):
        coordinator, processes, process = _from_environment()
        # With detection on, a scheduler's presence would restrict each process to one device.
        jax.distributed.initialize(coordinator, processes, process,
                                   cluster_detection_method="deactivate")
        return
    try:
        jax.distributed.initialize()
    except ValueError:  # JAX's error if nothing is detected: "coordinator_address should be defined"
        raise InputError(
            f"--distributed: no cluster found; expected {COORDINATOR}, {NUM_PROCESSES} and "
            f"{PROCESS_ID} in the environment (launch/local.py sets them), or a start by SLURM's "
            f"srun, on a Cloud TPU VM, on GKE or by Open MPI's mpirun") from None


def exit_on_failure(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command so that a failing process of a distributed run exits immediately.

    On a normal exit a process waits up to five minutes for the others, which may themselves be waiting
    for it in the middle of a step.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            status = main(argv)
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            status = 1
        if status and jax.distributed.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    return run


def compile_barrier(function: Any) -> Callable[..., Any]:
    """Wraps a `jax.jit` function: no process runs it before all processes have compiled it.

    Processes wait for each other at the first communication, but gloo gives up after 30 seconds. That is too
    short if one process finds the program in the compilation cache and another, on a busy machine, compiles
    it. All processes must call the result, in the same order and with positional arrays only; a call by one
    process alone waits in vain. With a single process it returns `function` itself.

    Raises (when called):
        jax.errors.JaxRuntimeError: another process did not compile within an hour, or has ended.
    """
    if jax.process_count() == 1:
        return function
    compiled: dict[Any, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        key = jax.tree.structure(args), *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        if key not in compiled:
            compiled[key] = function.lower(*args).compile()
            ocp.multihost.get_barrier_sync_fn()(
                key=f"tilelli: program {next(_programs)}", timeout_ms=PATIENCE_MS)
        return compiled[key](*args)
    return call


def of_first_process(value: float) -> float:
    """Returns the first process's value, as float32 or int32, in all processes, which must all call it."""
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value)).item()


def signals_deferred(is_compiling: Callable[[], bool] = lambda: False
                     ) -> contextlib.AbstractContextManager[None]:
    """In this context SIGTERM and the first SIGINT do not end the process: `should_stop` reports them.

    Enter it in the main thread. After `initialize` JAX's preemption service handles SIGTERM in all
    processes; a SIGINT is forwarded to it as a SIGTERM.

    Args:
        is_compiling: whether the update is still being compiled, which no signal can stop.
    """
    def message() -> str:
        return ("stopping after this update, which is still compiling" if is_compiling() else
                "saving and stopping")

    def forward(number: int) -> None:
        if number == signal.SIGINT and jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)
    numbers = (signal.SIGINT,) if jax.distributed.is_initialized() else interrupts.SIGNALS
    return interrupts.deferred(message, forward, numbers)


def stop_status() -> int:
    """Returns the exit status after a requested stop: 130 if this process received SIGINT, otherwise 0."""
    return INTERRUPTED if interrupts.received() == signal.SIGINT else 0


def should_stop(step: int) -> bool:
    """Whether to save and end after `step`, because this or another process received a signal.

    In a distributed run all processes must call it at every step, in the same order. They agree on the next
    step that none has reached, and each gets True at that step only. It takes up to a second to notice a
    signal.
    """
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(step)
    return interrupts.received() is not None


# ---------------------------------------------------------------------------------------------

_programs = itertools.count(1)  # each barrier needs a unique name


def _from_environment() -> tuple[str, int, int]:
    """Returns the coordinator, the number of processes and this process's number."""
    missing = [n for n in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if not os.environ.get(n)]
    if missing:
        raise InputError(f"--distributed: {', '.join(missing)} not set; expected all of "
                         f"{COORDINATOR}, {NUM_PROCESSES}, {PROCESS_ID}")
    coordinator = os.environ[COORDINATOR]
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise InputError(f"{COORDINATOR}: expected host:port, found '{coordinator}'")
    processes, process = _whole_number(NUM_PROCESSES), _whole_number(PROCESS_ID)
    if process >= processes:
        raise InputError(f"{PROCESS_ID}: expected 0 to {processes - 1}, as {NUM_PROCESSES} is "
                         f"{processes}, found {process}")
    return coordinator, processes, process


def _whole_number(name: str) -> int:
    if not os.environ[name].isdecimal():
        raise InputError(f"{name}: expected an integer, found '{os.environ[name]}'")
    return int(os.environ[name])
