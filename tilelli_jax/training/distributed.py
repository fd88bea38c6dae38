"""Several processes as one run: how they find each other, and how they stop at the same step."""

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
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tilelli_jax import interrupts
from tilelli_jax.errors import INTERRUPTED, InputError

COORDINATOR = "TILELLI_COORDINATOR"
NUM_PROCESSES = "TILELLI_NUM_PROCESSES"
PROCESS_ID = "TILELLI_PROCESS_ID"
PATIENCE_MS = 3_600_000  # how long one process may take to compile after another has


def initialize() -> None:
    """Joins this process to the others of its run; to be called before JAX touches a device.

    Who the others are is read from `TILELLI_COORDINATOR` (host:port of process 0),
    `TILELLI_NUM_PROCESSES` and `TILELLI_PROCESS_ID` where these are set, and otherwise found by
    `jax.distributed.initialize` itself, which knows SLURM, Cloud TPU, GKE and Open MPI. On CPU
    the processes compute together through gloo, JAX's default there.

    Raises:
        InputError: the variables are incomplete or wrong, or there is nothing to detect.
    """
    # `should_stop` asks this service; it is on by default, but a user's environment may say no.
    jax.config.update("jax_enable_preemption_service", True)
    if any(name in os.environ for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)):
        coordinator, processes, process = _from_environment()
        # Detection would narrow each process to one device wherever a scheduler is found as well.
        jax.distributed.initialize(coordinator, processes, process,
                                   cluster_detection_method="deactivate")
        return
    try:
        jax.distributed.initialize()
    except ValueError:  # JAX's word for "nothing detected": "coordinator_address should be defined"
        raise InputError(
            f"--distributed: no cluster found; expected {COORDINATOR}, {NUM_PROCESSES} and "
            f"{PROCESS_ID} in the environment (launch/local.py sets them), or a start by SLURM's "
            f"srun, on a Cloud TPU VM, on GKE or by Open MPI's mpirun") from None


def ends_at_once(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command: one of several processes that fails ends at once.

    On its ordinary way out a process of several waits for the others for up to five minutes, and
    they may well be waiting for it in the middle of a step.
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


def together(function: Any) -> Callable[..., Any]:
    """`function` (of `jax.jit`), which no process begins to run before all of them have compiled it.

    Programs that communicate wait for each other where they first do, and not for long: gloo gives up
    after 30 seconds, which is soon spent where one process finds the program compiled and another, on a
    busy machine, does not. For what all processes call, in the same order, and with positional arrays
    alone; whatever one of them calls by itself would wait for the others in vain. With a single process
    it is `function` itself.

    Raises (when called):
        jax.errors.JaxRuntimeError: another process did not come within an hour, or has ended.
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


def signals_deferred() -> contextlib.AbstractContextManager[None]:
    """Within it SIGTERM and the first SIGINT do not end the process: `should_stop` reports them.

    To be entered in the main thread. After `initialize` JAX's preemption service listens for SIGTERM, in
    all processes; a SIGINT is passed on to it as one.
    """
    def pass_on(number: int) -> None:
        if number == signal.SIGINT and jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)
    mine = (signal.SIGINT,) if jax.distributed.is_initialized() else interrupts.SIGNALS
    return interrupts.deferred("saving and stopping", pass_on, mine)


def stop_status() -> int:
    """The exit status after `should_stop` was obeyed: 130 for this process's SIGINT, otherwise 0."""
    return INTERRUPTED if interrupts.received() == signal.SIGINT else 0


def should_stop(step: int) -> bool:
    """Whether to save and end after `step`, because this process or another one was told to.

    With several processes all of them must ask at every step, with the same steps in the same
    order: they agree on the next step that none of them has reached, and each gets True at that
    step only. Up to a second passes before the signal is noticed.
    """
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(step)
    return interrupts.received() is not None


# ---------------------------------------------------------------------------------------------

_programs = itertools.count(1)  # barriers' names must be unique


def _from_environment() -> tuple[str, int, int]:
    """Coordinator, number of processes and this process's number."""
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
        raise InputError(f"{name}: expected a whole number, found '{os.environ[name]}'")
    return int(os.environ[name])
