"""A run's task: data, loss, evaluation and how they are reported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tilelli_jax.training.groups import Trained, everything
from tilelli_jax.training.step import Metrics, Network, Training, TrainState


class LossUnit(NamedTuple):
    """The unit of a run's loss, and a second unit in which it is also reported, if there is one."""

    name: str
    other: str = ""
    size: float = math.nan  # size of the second unit in the first

    @property
    def key(self) -> str:
        """The second unit as a metric's name: `bits_per_byte`."""
        return self.other.replace("/", "_per_")

    def format(self, loss: float) -> str:
        """Formats a loss: `0.6931 nats/byte, 1.0000 bits/byte`."""
        second = f", {loss / self.size:.4f} {self.other}" if self.other else ""
        return f"{loss:.4f} {self.name}{second}"

    def columns(self, loss: float, prefix: str = "") -> dict[str, float]:
        """Returns the loss in the second unit, under its key; empty without a second unit."""
        return {f"{prefix}{self.key}": loss / self.size} if self.other else {}


NATS = LossUnit("nats/byte", "bits/byte", math.log(2))
UNEXPLAINED = LossUnit("of the variance unexplained")


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything of a run that depends on its data and loss.

    Attributes:
        source: name of the data, for messages.
        key: the configuration key that names the data.
        size: the amount of data, as text for messages.
        fingerprint: fingerprint of the data, saved in every checkpoint.
        batches: a Grain dataset of batches; see `data.reading.Batches`.
        place: a batch on the host → arrays `[parts, rows, …]` on the devices.
        describe_batch: a batch → text that names its position in the data.
        training: a model to start from, or None → network, optimiser and update.
        evaluate: a network → a function from parameters to the validation loss.
        diagnose: a network → a function from state and batch to sentences on what is not finite.
        extra: a network → a function from parameters to further metrics, called when logging.
        logged: names of the loss's metrics that are written to metrics.jsonl.
        tokens: tokens per update: bytes or activations.
        flops_per_token: floating-point operations per token of an update; 0 if unknown.
        loss_unit: the unit of the loss.
        summarize: the trained model → further entries of the summary.
        trained: whether updates change a parameter, by dotted name.
    """

    source: str
    key: str
    size: str
    fingerprint: str
    batches: Any
    place: Callable[[Any], Any]
    describe_batch: Callable[[Any], str]
    training: Callable[[Any], Training]
    evaluate: Callable[[Network], Callable[[Any], float]]
    diagnose: Callable[[Network], Callable[[TrainState, Any], list[str]]]
    extra: Callable[[Network], Callable[[Any], Metrics]]
    logged: tuple[str, ...]
    tokens: int
    flops_per_token: float
    loss_unit: LossUnit
    summarize: Callable[[Any], dict[str, Any]]
    trained: Trained = everything
