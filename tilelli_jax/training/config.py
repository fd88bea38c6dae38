"""The configuration of a training run: every key of its YAML file."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tilelli_jax.config import Section, setting
from tilelli_jax.data.activations import ActivationsConfig
from tilelli_jax.data.chat_pairs import ChatConfig
from tilelli_jax.data.config import DataConfig
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models import ModelConfig, RoutedConfig
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig
from tilelli_jax.training.log import LogConfig
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.report import ReportConfig
from tilelli_jax.training.tasks.chat_loss import FinetuneConfig
from tilelli_jax.training.tasks.sae_loss import SAELossConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """Length of the run, batch sizes, and intervals of logging, validation and checkpoints."""

    steps: int = setting(1000, "number of updates; with train.minutes, the maximum", min=1)
    minutes: float | None = setting(
        None, "time budget in minutes: the run first measures its speed, and then does as many updates as "
        "fit, with validations and report; null: no budget", above=0)
    batch_size: int = setting(32, "sequences (or activations) per update, over all devices", min=1)
    seq_len: int = setting(256, "context length of a training sequence, in bytes", min=1)
    accumulate: int = setting(
        1, "gradient accumulation: parts that an update's batch is split into and computed one after "
        "another; the load-balance loss is computed per part and averaged", min=1)
    load_balance_weight: float = setting(
        0.01, "weight of the load-balance loss (routed networks trained on text)", min=0)
    init_from: str = setting("", "model directory to start from; empty: random weights")
    log_every: int = setting(10, "updates between rows of metrics.jsonl", min=1)
    eval_every: int = setting(500, "updates between validations; the last update is always validated", min=1)
    eval_batch_size: int = setting(32, "sequences (or activations) in a validation batch", min=1)
    eval_bytes: int = setting(
        1_000_000, "maximum number of bytes (or activations) to validate on; 0: the whole validation split",
        min=0, max=2**62)
    checkpoint_every: int = setting(
        500, "updates between checkpoints; the last update is always saved", min=1)
    keep: int = setting(2, "number of newest checkpoints to keep; the best one is also kept", min=1)
    export: Literal["best", "last"] = setting(
        "best", "weights written to model/: those with the lowest validation loss, or the last")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate: expected a divisor of batch_size {self.batch_size}, "
                             f"found {self.accumulate}")

    def check_shared(self, n_devices: int) -> None:
        """Raises InputError unless the batch sizes are multiples of `n_devices`."""
        for key, size in (("train.batch_size / train.accumulate", self.batch_size // self.accumulate),
                          ("train.eval_batch_size", self.eval_batch_size)):
            if size % n_devices:
                raise InputError(f"{key}: expected a multiple of the {n_devices} devices that share a "
                                 f"batch (mesh.data × mesh.fsdp), found {size}")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Section):
    """A training run."""

    run_dir: str = setting("", "directory of the run; empty: runs/NAME, with NAME from the config file")
    seed: int = setting(
        0, "seed of the initial weights and of all randomness in training", min=0, max=2**32 - 1)
    model: ModelConfig | SAEConfig = setting(RoutedConfig(), "the network")
    data: DataConfig = setting(DataConfig(), "the training text")
    activations: ActivationsConfig | None = setting(
        None, "activations that an autoencoder trains on, in place of text")
    sae: SAELossConfig = setting(SAELossConfig(), "the loss of an autoencoder")
    chat: ChatConfig | None = setting(
        None, "pairs of a prompt and its response to fine-tune on, in place of text; without a section "
        "model, the network is that of train.init_from")
    finetune: FinetuneConfig = setting(
        FinetuneConfig(), "which parameters fine-tuning on pairs trains, and with which loss")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "the optimiser")
    train: TrainConfig = setting(TrainConfig(), "the training loop")
    mesh: MeshConfig = setting(MeshConfig(), "the device mesh")
    compute: ComputeConfig = setting(ComputeConfig(), "how the network is computed: types and memory use")
    log: LogConfig = setting(LogConfig(), "further log destinations")
    report: ReportConfig = setting(ReportConfig(), "the report at the end of the run")

    def __post_init__(self) -> None:
        super().__post_init__()
        model = self.model
        if (model.family == "sae") != (self.activations is not None):
            raise InputError("activations: expected " + (
                "a section with their source, for an autoencoder" if self.activations is None else
                f"none, for model.family {model.family}"))
        if isinstance(model, SAEConfig):
            for key in ("prompts", "trigram"):
                if getattr(self.report, key):
                    raise InputError(f"report.{key}: expected nothing for an autoencoder, as it has no text")
            if self.chat is not None:
                raise InputError("chat: expected none for an autoencoder")
            return
        if self.chat is None and self.finetune != FinetuneConfig():
            raise InputError("finetune: expected a section chat with the pairs to train on")
        if self.chat is not None:
            if self.report.trigram:
                raise InputError("report.trigram: expected false with chat, as the baseline needs plain text")
            if self.train.init_from and model == RoutedConfig():
                return  # the network is read from init_from later
        if model.positions == "learned" and self.train.seq_len > model.max_seq_len:
            raise InputError(f"train.seq_len: expected at most model.max_seq_len {model.max_seq_len}, "
                             f"found {self.train.seq_len}")
        if model.vocab_size < 256:
            raise InputError(f"model.vocab_size: expected at least 256 (bytes), found {model.vocab_size}")
