"""What one run is: every key of a configuration file."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tilelli_jax.config import Section, setting
from tilelli_jax.data.config import DataConfig
from tilelli_jax.errors import InputError
from tilelli_jax.models import ModelConfig, RoutedConfig
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.sharding import MeshConfig
from tilelli_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """Length, batches, and what happens how often."""

    steps: int = setting(1000, "number of updates", least=1)
    batch_size: int = setting(32, "sequences in an update, over all devices", least=1)
    seq_len: int = setting(256, "bytes of context in a training sequence", least=1)
    accumulate: int = setting(1, "parts that an update's batch is computed in, one after the other", least=1)
    load_balance: float = setting(0.01, "weight of the load-balance loss (routed networks)", least=0)
    init_from: str = setting("", "model directory to start from; empty: random weights")
    log_every: int = setting(10, "updates between rows of metrics.jsonl", least=1)
    eval_every: int = setting(500, "updates between validations; there is always one at the end", least=1)
    eval_batch_size: int = setting(32, "sequences in a validation batch", least=1)
    eval_bytes: int = setting(1_000_000, "most bytes of the validation part to use; 0 for all", least=0)
    checkpoint_every: int = setting(
        500, "updates between checkpoints; there is always one at the end", least=1)
    keep: int = setting(2, "newest checkpoints to keep; the best one is kept besides", least=1)
    export: Literal["best", "last"] = setting(
        "best", "which weights go into model/: those of the lowest validation loss, or the last")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate: expected a divisor of batch_size {self.batch_size}, "
                             f"found {self.accumulate}")

    def check_shared(self, n_devices: int) -> None:
        """Raises InputError unless every batch can be shared among so many devices."""
        for key, size in (("train.batch_size / train.accumulate", self.batch_size // self.accumulate),
                          ("train.eval_batch_size", self.eval_batch_size)):
            if size % n_devices:
                raise InputError(f"{key}: expected a multiple of the {n_devices} devices that share a "
                                 f"batch (mesh.data × mesh.fsdp), found {size}")


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = setting(False, "also write TensorBoard events (extra: tensorboard)")
    wandb_project: str = setting("", "also log to this Weights & Biases project (extra: wandb)")


@dataclasses.dataclass(frozen=True)
class ReportConfig(Section):
    """What the end of the run shows."""

    trigram: bool = setting(False, "compare with a byte-trigram baseline fitted to the training part")
    reference: float | None = setting(None, "a known validation loss to compare with, in nats per byte")
    reference_name: str = setting("", "what that loss is of, and how it was made")
    prompts: tuple[str, ...] = setting((), "prompts to continue at the end")
    sample_bytes: int = setting(200, "length of those continuations", least=0)
    temperature: float = setting(0.8, "sampling temperature of those continuations", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.prompts:
            raise InputError("prompts: expected text in every prompt, found an empty one")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Section):
    """A training run."""

    run_dir: str = setting("", "run directory; by default runs/ and the name of the config file")
    seed: int = setting(
        0, "seed of the weights and of everything drawn while training", least=0, most=2**32 - 1)
    model: ModelConfig = setting(RoutedConfig(), "the network")
    data: DataConfig = setting(DataConfig(), "the text")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "the optimiser")
    train: TrainConfig = setting(TrainConfig(), "the training loop")
    mesh: MeshConfig = setting(MeshConfig(), "the device mesh")
    compute: ComputeConfig = setting(ComputeConfig(), "how the network is run")
    log: LogConfig = setting(LogConfig(), "further logs")
    report: ReportConfig = setting(ReportConfig(), "the closing report")

    def __post_init__(self) -> None:
        super().__post_init__()
        model = self.model
        if model.positions == "learned" and self.train.seq_len > model.max_seq_len:
            raise InputError(f"train.seq_len: expected at most model.max_seq_len {model.max_seq_len}, "
                             f"found {self.train.seq_len}")
        if model.vocab_size < 256:
            raise InputError(f"model.vocab_size: expected at least 256 (bytes), found {model.vocab_size}")
