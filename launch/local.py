"""Starts one training run as several processes on this machine's CPU, as a cluster would.

    python launch/local.py --processes 2 --devices 4 -- --config configs/demo.yaml train.steps=20

Each process runs `python -m tilelli_jax.train --distributed …` with the arguments after `--`; they connect on
127.0.0.1. The output of process 0 is printed; the others' is stored, and its end is printed if one of them
fails first. SIGINT and SIGTERM are forwarded to all processes; a second signal kills them. If one fails, the
others are terminated. No process outlives this one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

TRAIN = (sys.executable, "-m", "tilelli_jax.train", "--distributed")
POLL_SECONDS = 0.05
CAUSE_SECONDS = 1.0  # after a failure, time to wait for a killed process that caused it
TAIL_LINES = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0], usage="%(prog)s [options] -- --config FILE …")
    parser.add_argument("--processes", type=_count, default=2, help="number of processes [2]")
    parser.add_argument("--devices", type=_count, default=1, help="CPU devices per process [1]")
    parser.add_argument("--grace", type=float, default=10.0, metavar="SECONDS",
                        help="time for the others to end after one has failed [10]")
    parser.add_argument("train", nargs="*", metavar="…", help="arguments of tilelli_jax.train")
    args = parser.parse_args(argv)
    return run([*TRAIN, *args.train], args.processes, args.devices, args.grace)


def run(command: Sequence[str], processes: int, devices: int, grace: float = 10.0) -> int:
    """Runs `command` in `processes` processes of `devices` CPU devices each, and waits for them.

    Returns:
        0 if all succeeded; otherwise the exit status of the process that failed first, or of one killed up to
        CAUSE_SECONDS later (128 + the signal's number), since the others fail because of it.
    """
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"{process}.txt") for process in range(processes)]
        try:
            coordinator = f"127.0.0.1:{_free_port()}"
            for process in range(processes):
                environment = _environment(coordinator, processes, process, devices)
                children.append(_start(command, environment, outputs[process] if process else None))
            failed, status = _wait(children, received, grace)
        finally:
            for child in children:
                _kill(child)
            for number, handler in before.items():
                signal.signal(number, handler)
        if failed:  # process 0 has already printed its error
            tail = outputs[failed].read_text(errors="replace").splitlines()[-TAIL_LINES:]
            print(f"process {failed} failed first; its last lines:", file=sys.stderr)
            print("\n".join(f"[{failed}] {line}" for line in tail), file=sys.stderr)
    return status


def _wait(children: Sequence[subprocess.Popen[bytes]], received: Sequence[int],
          grace: float) -> tuple[int, int]:
    """Returns the process that failed first and its exit status; (0, 0) if none did.

    Processes may still be running if they exceed `grace` or a second signal arrives.
    """
    # One thread per process: if two fail independently at almost the same time, the first one matters.
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for process, child in enumerate(children):
        threading.Thread(target=lambda process=process, child=child: ended.put((process, child.wait())),
                         daemon=True).start()
    running = dict(enumerate(children))
    failure: tuple[int, int] | None = None
    forwarded, ending = False, False
    cause_until = deadline = float("inf")
    while running and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            process, status = ended.get(timeout=POLL_SECONDS)
            del running[process]
            if failure is None and status:
                failure, cause_until = (process, status), time.monotonic() + CAUSE_SECONDS
            elif failure and not ending and _killed(status, received) and not _killed(failure[1], received):
                failure = process, status  # the other failed because this one was killed
        if failure and not ending and (_killed(failure[1], received) or time.monotonic() >= cause_until):
            ending, deadline = True, time.monotonic() + grace
            for child in running.values():
                child.terminate()
        if len(received) > 1:
            failure = failure or (0, -received[-1])
            break
        if received and not forwarded:
            forwarded = True
            for child in running.values():
                child.send_signal(received[0])
    process, status = failure or (0, 0)
    return process, status if status >= 0 else 128 - status


def _killed(status: int, received: Sequence[int]) -> bool:
    """Whether a process was killed by a signal that neither this launcher nor the process itself sent.

    If one process was killed and another failed, the second failed because of the first, even if its end was
    noticed earlier: on a busy machine that order is random. A process aborts itself (SIGABRT) when it notices
    that another has ended.
    """
    return status < 0 and -status not in (signal.SIGABRT, *received)


def _environment(coordinator: str, processes: int, process: int, devices: int) -> dict[str, str]:
    """Returns a child's environment: this process's, plus the child's place in the run and its devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "TILELLI_COORDINATOR": coordinator,
        "TILELLI_NUM_PROCESSES": str(processes),
        "TILELLI_PROCESS_ID": str(process),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "PYTHONUNBUFFERED": "1",  # keep the output of a process that is killed
    }


def _start(command: Sequence[str], environment: dict[str, str],
           output: Path | None) -> subprocess.Popen[bytes]:
    """Starts a child in its own session, so that it gets Ctrl-C only from this process."""
    with contextlib.ExitStack() as stack:
        file = None if output is None else stack.enter_context(output.open("wb"))
        return subprocess.Popen(
            command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=file, stderr=file if file is None else subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None)


def _die_with_parent() -> None:
    """Makes Linux kill this child if its parent is killed before it can clean up.

    Runs between fork and exec, which is safe because no threads exist yet.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kills a child and the workers that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _count(text: str) -> int:
    """Parses an integer of at least 1, for argparse."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 1, found '{text}'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
