"""What the commands of all studies do alike: their logs, how they end, and how a report says it was made."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.training.run import provenance

from ..stages import BusyError
from .networks import TrainingStopped


def quiet_logs() -> None:
    """Of what Orbax logs, errors alone."""
    logging.getLogger("absl").setLevel(logging.ERROR)


def carry_out(work: Callable[[], int]) -> int:
    """The exit status of a study's work: its own, or that of a training that was stopped in it.

    Raises:
        InputError: another process is at it.
    """
    try:
        return work()
    except TrainingStopped as stopped:
        return stopped.status
    except BusyError as error:
        raise InputError(str(error)) from None


def how_made(said: str, seeds: Sequence[int]) -> dict[str, Any]:
    """What a report says last.

    Args:
        said: the command.
    """
    made = provenance(seeds[0])
    return {"command": said, "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
            "commit": made["git_commit"], "device": made["device"],
            "machine": f"{platform.machine()}, {made['cpus']} cores", "versions": made["versions"]}
