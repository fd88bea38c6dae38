"""What the commands of all studies share: log levels, exit status, and the last section of a report."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tilelli_jax.cli.command import INTERRUPTED
from tilelli_jax.errors import InputError
from tilelli_jax.training.run import provenance

from ..stages import BusyError
from .networks import TrainingStopped


def quiet_logs() -> None:
    """Silences Orbax except for errors."""
    logging.getLogger("absl").setLevel(logging.ERROR)


def run_study(work: Callable[[], int], command_line: str) -> int:
    """Runs a study and returns its exit status, or that of a training run that stopped within it.

    After Ctrl-C it prints on stderr that finished stages are kept and which command continues.

    Args:
        work: runs the study; returns the exit status.
        command_line: the command as the user typed it.

    Raises:
        InputError: another process is working on the same stage.
        KeyboardInterrupt: after the line is printed; the command itself then prints "interrupted".
    """
    try:
        return work()
    except KeyboardInterrupt:
        _print_continuation(command_line)
        raise
    except TrainingStopped as stopped:
        if stopped.status == INTERRUPTED:
            _print_continuation(command_line)
        return stopped.status
    except BusyError as error:
        raise InputError(str(error)) from None


def provenance_rows(command_line: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Returns the rows of a report's last section: command, seeds, commit, device, machine, versions."""
    run = provenance(seeds[0])
    return {"command": command_line, "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
            "commit": run["git_commit"], "device": run["device"],
            "machine": f"{platform.machine()}, {run['cpus']} cores", "versions": run["versions"]}


def _print_continuation(command_line: str) -> None:
    print(f"finished stages are kept; to continue: {command_line}", file=sys.stderr)
