"""What differs between runs that learn different things: data, loss, and how both are told of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tilelli_jax.training.groups import Trained, everything
from tilelli_jax.training.step import Metrics, Network, Training, TrainState


class LossUnit(NamedTuple):
    """The unit of a run's loss, and another one that people know it in, if there is one."""

    name: str
    other: str = ""
    size: float = math.nan  # of the other, in the one

    @property
    def key(self) -> str:
        """The other unit as a metric is called: `bits_per_byte`."""
        return self.other.replace("/", "_per_")

    def told(self, loss: float) -> str:
        """`0.6931 nats/byte, 1.0000 bits/byte`."""
        second = f", {loss / self.size:.4f} {self.other}" if self.other else ""
        return f"{loss:.4f} {self.name}{second}"

    def columns(self, loss: float, prefix: str = "") -> dict[str, float]:
        """The loss in the other unit, under its key."""
        return {f"{prefix}{self.key}": loss / self.size} if self.other else {}


NATS = LossUnit("nats/byte", "bits/byte", math.log(2))
UNEXPLAINED = LossUnit("of the variance unexplained")


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything of a run that depends on what it learns.

    Attributes:
        source: what it learns from, for messages, and the key that says so.
        size: how much of that there is, in words.
        fingerprint: of the data, kept in every checkpoint.
        batches: a Grain dataset; its iterators' states are one integer.
        place: a batch on the host → arrays `[parts, rows, …]` on the devices.
        whence: where the rows of a batch stand in the data, in words.
        training: network, optimiser and update, given a model to start from or None.
        evaluate: a network → the function that gives a validation loss for its parameters.
        diagnose: a network → the function that says, of a state and a batch, what is not finite.
        extra: a network → what is worth measuring of its parameters, when logging.
        logged: metrics of the loss that are written to metrics.jsonl.
        tokens: what an update learns from, in bytes or activations.
        flops_per_token: of an update, or 0 where that is not known.
        measure: the unit of the loss.
        summarize: a model, once it is trained → what the summary says besides.
        trained: of which parameters updates change the numbers, by dotted name.
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
