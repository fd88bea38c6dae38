"""What one run is: every key of a configuration file."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from tilelli_jax.config import setting
from tilelli_jax.data.config import DataConfig
from tilelli_jax.errors import InputError
from tilelli_jax.models import ModelConfig, RoutedConfig
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.sharding import MeshConfig
from tilelli_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batches, and what happens how often."""

    steps: int = setting(1000, "number of updates")
    batch_size: int = setting(32, "sequences in an update, over all devices")
    seq_len: int = setting(256, "bytes of context in a training sequence")
    accumulate: int = setting(1, "parts that an update's batch is computed in, one after the other")
    load_balance: float = setting(0.01, "weight of the load-balance loss (routed networks)")
    init_from: str = setting("", "model directory to start from; empty: random weights")
    log_every: int = setting(10, "updates between rows of metrics.jsonl")
    eval_every: int = setting(500, "updates between validations; there is always one at the end")
    eval_batch_size: int = setting(32, "sequences in a validation batch")
    eval_bytes: int = setting(1_000_000, "most bytes of the validation part to use; 0 for all")
    checkpoint_every: int = setting(500, "updates between checkpoints; there is always one at the end")
    keep: int = setting(2, "newest checkpoints to keep; the best one is kept besides")
    export: Literal["best", "last"] = setting(
        "best", "which weights go into model/: those of the lowest validation loss, or the last")

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "seq_len", "accumulate", "log_every", "eval_every",
                    "eval_batch_size", "checkpoint_every", "keep"):
            if getattr(self, key) < 1:
                raise InputError(f"{key}: expected a whole number ≥ 1, found {getattr(self, key)}")
        for key in ("eval_bytes", "load_balance"):
            if not 0 <= getattr(self, key) < math.inf:
                raise InputError(f"{key}: expected a number ≥ 0, found {getattr(self, key)}")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate: expected a divisor of batch_size {self.batch_size}, "
                             f"found {self.accumulate}")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = setting(False, "also write TensorBoard events (extra: tensorboard)")
    wandb_project: str = setting("", "also log to this Weights & Biases project (extra: wandb)")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What the end of the run shows."""

    trigram: bool = setting(False, "compare with a byte-trigram baseline fitted to the training part")
    reference: float | None = setting(None, "a known validation loss to compare with, in nats per byte")
    reference_name: str = setting("", "what that loss is of, and how it was made")
    prompts: tuple[str, ...] = setting((), "prompts to continue at the end")
    sample_bytes: int = setting(200, "length of those continuations")
    temperature: float = setting(0.8, "sampling temperature of those continuations")

    def __post_init__(self) -> None:
        if "" in self.prompts:
            raise InputError("prompts: expected text in every prompt, found an empty one")
        if self.sample_bytes < 0:
            raise InputError(f"sample_bytes: expected a whole number ≥ 0, found {self.sample_bytes}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature: expected a number ≥ 0, found {self.temperature}")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A training run."""

    run_dir: str = setting("", "run directory; by default runs/ and the name of the config file")
    seed: int = setting(0, "seed of the weights and of everything drawn while training")
    model: ModelConfig = setting(RoutedConfig(), "the network")
    data: DataConfig = setting(DataConfig(), "the text")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "the optimiser")
    train: TrainConfig = setting(TrainConfig(), "the training loop")
    mesh: MeshConfig = setting(MeshConfig(), "the device mesh")
    compute: ComputeConfig = setting(ComputeConfig(), "how the network is run")
    log: LogConfig = setting(LogConfig(), "further logs")
    report: ReportConfig = setting(ReportConfig(), "the closing report")

    def __post_init__(self) -> None:
        model = self.model
        if model.positions == "learned" and self.train.seq_len > model.max_seq_len:
            raise InputError(f"train.seq_len: expected at most model.max_seq_len {model.max_seq_len}, "
                             f"found {self.train.seq_len}")
        if model.vocab_size < 256:
            raise InputError(f"model.vocab_size: expected at least 256 (bytes), found {model.vocab_size}")
