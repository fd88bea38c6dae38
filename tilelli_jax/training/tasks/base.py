"""The interface of all tasks: what a run trains on, its loss, its validation, and how they are reported."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.models import weights
from tilelli_jax.parallel.sharding import Mesh, local_rows, place_rows, replicated
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.diagnose import diagnose
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.loss import NATS, Loss, LossUnit, Metrics
from tilelli_jax.training.step import Network, Training, TrainState, make_training


class Task(abc.ABC):
    """Everything of a run that depends on its data and loss. `prepare` comes before all that needs a network.

    Attributes:
        key: the configuration key that names the data.
        logged: names of the loss's metrics that are written to metrics.jsonl.
        source: name of the data, for messages.
        size: the amount of data, as text for messages.
        fingerprint: fingerprint of the data, saved in every checkpoint.
        batches: a Grain dataset of batches; see `data.reading.Batches`.
        tokens: tokens per update: bytes (with padding: an update computes it too) or activations.
        unit: what `tokens` counts, in the plural.
        flops_per_token: floating-point operations per token of an update; 0 if unknown.
        loss_unit: the unit of the loss.
    """

    key: ClassVar[str]
    logged: ClassVar[tuple[str, ...]]
    source: str
    size: str
    fingerprint: str
    batches: Any
    tokens: int
    unit: ClassVar[str] = "tokens"
    flops_per_token: float = 0.0
    loss_unit: LossUnit = NATS

    network: Network  # set by `prepare`
    loss: Loss

    def __init__(self, config: ExperimentConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.part_rows = config.train.batch_size // config.train.accumulate

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """This process's rows of a batch, part by part; computed after `check_batches`."""
        return np.concatenate([i * self.part_rows + local_rows(self.mesh, self.part_rows)
                               for i in range(self.config.train.accumulate)])

    def prepare(self, model: Any, steps: int) -> Training:
        """Returns network, optimiser and update of a run of `steps` updates.

        Args:
            model: start from its weights; None: random weights.
        """
        config = self.config
        self.loss = self.make_loss(steps)
        training = make_training(config.model, config.compute, config.optimizer, steps=steps, loss=self.loss,
                                 seed=config.seed, mesh=self.mesh, model=model)
        self.network = training.network
        return training

    def advice(self, steps: int, *, at_most: bool = False) -> str:
        """Returns what a user should know before a run of `steps` updates; empty: nothing.

        Args:
            at_most: whether the run may have fewer updates.
        """
        del steps, at_most
        return ""

    @abc.abstractmethod
    def make_loss(self, steps: int) -> Loss:
        """Returns the loss of a run of `steps` updates."""

    def to_devices(self, batch: Any) -> dict[str, jax.Array]:
        """Places a batch on the devices: arrays `[parts, rows, …]`."""
        return {name: place_rows(array.reshape(self.config.train.accumulate, -1, array.shape[-1]), self.mesh,
                                 self.part_rows, axis=1) for name, array in self.arrays(batch).items()}

    @abc.abstractmethod
    def arrays(self, batch: Any) -> dict[str, np.ndarray]:
        """Returns the loss's arrays `[rows, …]` of a batch."""

    @abc.abstractmethod
    def describe_batch(self, batch: Any) -> str:
        """Names a batch's position in the data."""

    @abc.abstractmethod
    def evaluate(self, params: Any) -> float:
        """Returns the validation loss."""

    @abc.abstractmethod
    def diagnose(self, state: TrainState, batch: Any) -> list[str]:
        """Returns sentences on what is not finite in the update from `state` on `batch`."""

    def extra_metrics(self, params: Any) -> Metrics:
        """Returns further metrics, computed when a row is logged."""
        del params
        return {}

    @abc.abstractmethod
    def summarize(self, model: Any) -> dict[str, Any]:
        """Returns further entries of the summary, from the exported model."""


class LanguageTask(Task):
    """What tasks of language models share: where numbers stop being finite, and quantised weights at 0."""

    def diagnose(self, state: TrainState, batch: Any) -> list[str]:
        arrays = {name: array.reshape(-1, *array.shape[2:]) for name, array in self.to_devices(batch).items()}
        arrays |= self.loss.extra_batch(state.loss_state, state.step)
        return diagnose(self.network, state.params, arrays,
                        jax.random.wrap_key_data(state.key), self.loss, self.mesh)

    def extra_metrics(self, params: Any) -> Metrics:
        """Returns `zero_fraction`, the fraction of quantised weights at zero, if any weight is quantised."""
        return self._zero_fraction(params)

    @functools.cached_property
    def _zero_fraction(self) -> Callable[[Any], Metrics]:
        network = self.network

        def measure(params: Any) -> Metrics:
            codes = [weight.codes() for weight in weights(network.merge(params)).values()
                     if weight.quantizer.levels]
            if not codes:
                return {}
            zeros = jnp.stack([jnp.sum(code == 0) for code in codes]).sum()
            return {"zero_fraction": zeros / sum(code.size for code in codes)}
        return compile_barrier(jax.jit(measure, out_shardings=replicated(self.mesh)))
