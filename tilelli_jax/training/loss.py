"""The interface of all losses: what an update minimises, in which unit, and what else it does."""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import jax

from tilelli_jax.training.groups import Trained, everything

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Loss(abc.ABC):
    """A loss, and what an update does besides the optimiser's step. Only `__call__` must be implemented."""

    @abc.abstractmethod
    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the scalar to minimise, and metrics to report, among them `loss`."""

    @property
    def trained(self) -> Trained:
        """Whether a parameter is trained, by dotted name; by default all are.

        The others have no gradient and no moments, are not decayed, and stay bit-identical.
        """
        return everything

    def initial_loss_state(self, params: Any) -> Any:
        """Returns arrays to carry from update to update, from its starting parameters; default: none."""
        del params
        return ()

    def extra_batch(self, loss_state: Any, step: jax.Array) -> Batch:
        """Returns arrays to add to the batch, from the loss state and the number of updates done."""
        del loss_state, step
        return {}

    def transform_grads(self, params: Any, grads: Any) -> Any:
        """Maps the gradients of the trained parameters to those that the optimiser gets."""
        del params
        return grads

    def post_update(self, params: Any, loss_state: Any, metrics: Metrics) -> tuple[Any, Any, Metrics]:
        """Returns parameters, loss state and metrics after an update.

        Projects the parameters back onto their constraints, updates the loss state, and selects the metrics
        to report.
        """
        return params, loss_state, metrics


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
