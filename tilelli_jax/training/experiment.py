"""The configuration of a training run: every key of its YAML file."""

from __future__ import annotations

import dataclasses

from tilelli_jax.config import Section, setting
from tilelli_jax.data.activations import ActivationsConfig
from tilelli_jax.data.chat_pairs import ChatConfig
from tilelli_jax.data.config import DataConfig
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models import ModelConfig, RoutedConfig
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig
from tilelli_jax.training.log import LogConfig
from tilelli_jax.training.loop import TrainConfig
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.report import ReportConfig
from tilelli_jax.training.tasks.chat_loss import FinetuneConfig
from tilelli_jax.training.tasks.sae_loss import ObjectiveConfig


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
    sae: ObjectiveConfig = setting(ObjectiveConfig(), "the loss of an autoencoder")
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
