"""The configuration of a difficulty study: every key of configs/difficulty-*.yaml."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig

from ..inputs.networks import NetworkConfig
from ..inputs.study import StudyConfig


@dataclasses.dataclass(frozen=True)
class SquadConfig(Section):
    """Questions about paragraphs. An item is hard if the NLL of the right answer is high."""

    family: Literal["squad"] = setting("squad", "the kind of data")
    source: str = setting(
        "hf:rajpurkar/squad", "the data: hf:NAME (its validation split), or a JSON, JSON lines or parquet "
        "file")
    items: int = setting(5000, "number of items: the first rows of the source", min=10)
    max_tokens: int = setting(
        200, "maximum length of a prompt in tokens; longer prompts are truncated on the left", min=2)


@dataclasses.dataclass(frozen=True)
class HellaSwagConfig(Section):
    """Contexts with four endings. An item is hard if a wrong ending has the lowest NLL."""

    family: Literal["hellaswag"] = setting("hellaswag", "the kind of data")
    source: str = setting(
        "hf:Rowan/hellaswag", "the data: hf:NAME (its validation split), or a JSON, JSON lines or parquet "
        "file")
    items: int = setting(5000, "number of items: the first rows of the source", min=10)
    max_tokens: int = setting(
        124, "maximum length of a prompt in tokens; longer prompts are truncated on the left", min=2)
    domain: Literal["all", "activitynet", "wikihow"] = setting(
        "all", "which of its two source data sets to use")


@dataclasses.dataclass(frozen=True)
class TextConfig(Section):
    """Pieces of a text and their continuations. An item is hard if the NLL of the continuation is high."""

    family: Literal["text"] = setting("text", "the kind of data")
    source: str = setting("stories", "stories (built in; no training run uses these stories) or a text file")
    items: int = setting(2000, "number of items: the first pieces of the text", min=10)
    prompt: int = setting(160, "length of a prompt in characters", min=2)
    ending: int = setting(16, "length of a continuation in characters", min=1)
    separator: str = setting(
        "\n\n", "text between two documents; the pieces of one document form one group; empty: 16 "
        "consecutive pieces form one group")
    max_tokens: int = setting(
        4096, "maximum length of a prompt in tokens; longer prompts are truncated on the left", min=2)


@dataclasses.dataclass(frozen=True)
class SeriesConfig(Section):
    """Windows of a time series and the values after them. An item is hard if the forecast's CRPS is high."""

    family: Literal["series"] = setting("series", "the kind of data")
    source: str = setting("ETTh1.csv", "the series: a CSV or parquet file")
    column: str = setting("OT", "the column that holds the values")
    items: int = setting(1_000_000, "maximum number of windows: the first of the series", min=10)
    context: int = setting(512, "values of a window that the network reads", min=16)
    horizon: int = setting(96, "values after a window that the network forecasts", min=1)
    stride: int = setting(24, "values between the starts of two consecutive windows", min=1)
    season: int = setting(24, "values in one season", min=1)
    samples: int = setting(100, "sampled forecasts for each window", min=2)


DataConfig = SquadConfig | HellaSwagConfig | TextConfig | SeriesConfig


@dataclasses.dataclass(frozen=True)
class ExtractConfig(Section):
    """Which activations of the network are stored."""

    hook: str = setting("resid_post", "hook name of the activations (Chronos: encoder.resid_post)")
    layers: tuple[int, ...] = setting((), "layers, counted from 0; each gets its own ladder of probes")
    positions: Literal["boundary", "all"] = setting(
        "boundary", "boundary: the last token of the prompt (with several endings, the first token of each);"
        " all: every position of the prompt; a series always stores all positions")
    skip: int = setting(
        1, "number of first positions of a text to ignore; networks without a BOS token have activations of "
        "enormous norm at the first position", min=0)
    dtype: Literal["float16", "float32"] = setting("float16", "number format on disk")
    batch_size: int = setting(16, "texts (windows) in a batch", min=1)
    shard_items: int = setting(
        512, "items in a file; an interrupted extraction continues after the last complete file", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise InputError("layers: expected different layers, at least one, counted from 0, found "
                             f"{list(self.layers)}")


@dataclasses.dataclass(frozen=True)
class SplitConfig(Section):
    """The split into train and test items. A series is always split in time."""

    by: Literal["group", "topic", "order"] = setting(
        "group", "what the split keeps together: whole paragraphs (documents), whole topics, or nothing "
        "(order: the first items train, as in fm-difficulty-probe)")
    train: float = setting(0.7, "fraction of the items in the train split", above=0, below=1)
    max_similarity: float = setting(
        0.7, "a test prompt is excluded if its TF-IDF cosine with a train prompt is at least this", above=0)
    memorized_nll: float = setting(
        0.4055, "a prompt is excluded as memorized if its mean NLL per token is at most this many nats",
        min=0)


@dataclasses.dataclass(frozen=True)
class LabelConfig(Section):
    """Which items count as hard, for data without wrong answers."""

    quantile: float = setting(
        0.75, "an item is hard if its NLL (CRPS) is at least this quantile", above=0, below=1)
    quantile_over: Literal["train", "all"] = setting(
        "train", "items whose quantile is used: the train items, or all items (all leaks test items into the"
        " labels)")


@dataclasses.dataclass(frozen=True)
class SAEStageConfig(Section):
    """The sparse autoencoder: an existing one, or one trained on the train items."""

    path: str = setting("", "model directory of an existing autoencoder; {layer} is replaced by the layer")
    train: str = setting("", "training configuration of a new autoencoder, instead of path")
    set: tuple[str, ...] = setting((), "with train: key=value overrides of that configuration")
    min_steps: int = setting(
        200, "minimum number of training updates; an autoencoder with fewer is rejected", min=0)
    max_dead: float = setting(
        0.5, "maximum fraction of latents never active on held-out items; an autoencoder with more is "
        "rejected", min=0, max=1)
    min_explained: float = setting(
        0.3, "minimum fraction of variance explained on held-out items; an autoencoder with less is rejected",
        max=1)
    min_gain_over_random: float = setting(
        0.1, "minimum gain in explained variance over an autoencoder with random weights", min=0, max=1)
    held_out: int = setting(200, "number of test items for these checks", min=1)
    force: bool = setting(False, "continue with a rejected autoencoder; the report says so")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path or self.train or self.set:
            self.network  # noqa: B018 (raises InputError for an invalid combination)

    @property
    def network(self) -> NetworkConfig:
        """The autoencoder as the section of a network."""
        return NetworkConfig(path=self.path, train=self.train, set=self.set)

    def model_path(self, layer: int) -> Path:
        """Returns the model directory of the existing autoencoder of a layer."""
        return Path(self.path.replace("{layer}", str(layer)))


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Section):
    """The ladder of probes, its intervals and its tests."""

    folds: int = setting(5, "maximum number of cross-validation folds", min=2)
    replicates: int = setting(
        2000, "bootstrap replicates; the smallest possible p is 2 / (replicates + 1), before correction",
        min=400)
    jobs: int = setting(-1, "number of parallel fits; -1 uses every core", min=-1)


@dataclasses.dataclass(frozen=True)
class CascadeConfig(Section):
    """The cost of one call of each model of the cascade."""

    small: float = setting(1.0, "cost of one call of the studied network", above=0)
    large: float = setting(5.0, "cost of one call of the larger model", above=0)
    routed_pays_both: bool = setting(True, "whether a routed item costs both calls, or only that of the "
                                     "larger model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.large <= self.small:
            raise InputError(f"large: expected more than small {self.small}, found {self.large}")


@dataclasses.dataclass(frozen=True)
class CausalConfig(Section):
    """Ablation of single latents."""

    latents: int = setting(5, "number of latents to ablate: those with the largest probe weights", min=1)
    controls: int = setting(
        10, "random control latents of similar activation frequency, for each ablated latent", min=0)
    c_value: float = setting(0.1, "C (inverse penalty) of the L1 probe that ranks the latents", above=0)
    items: int = setting(500, "number of test items, drawn at random; 0 uses all", min=0)
    positions: tuple[Literal["all", "boundary"], ...] = setting(
        ("all", "boundary"), "positions to patch: all of the prompt, or its last one")
    samples: int = setting(
        20, "for a series: sampled forecasts per patch, with the same random numbers for every patch", min=2)
    horizon: int = setting(64, "for a series: number of values to forecast", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.positions:
            raise InputError("positions: expected all, boundary or both, found none")


@dataclasses.dataclass(frozen=True)
class DifficultyConfig(StudyConfig):
    """One study: a data set and a network."""

    seed: int = setting(42, "seed of all random numbers", min=0, max=2**32 - 1)
    data: DataConfig = setting(SquadConfig(), "the items")
    network: NetworkConfig = setting(None, "the network under study")
    large_model: NetworkConfig | None = setting(None, "a larger model for the cascade; none: no cascade")
    extract: ExtractConfig = setting(None, "the activations to store")
    split: SplitConfig = setting(SplitConfig(), "the split into train and test items")
    labels: LabelConfig = setting(LabelConfig(), "which items count as hard")
    sae: SAEStageConfig = setting(SAEStageConfig(), "the sparse autoencoder; without path and train: none")
    probe: ProbeConfig = setting(ProbeConfig(), "the ladder of probes")
    cascade: CascadeConfig = setting(CascadeConfig(), "the costs of the cascade")
    causal: CausalConfig = setting(CausalConfig(), "the ablation of latents")
    other_studies: tuple[str, ...] = setting((), "output directories of other studies to include in the "
                                             "summary table")
    compute: ComputeConfig = setting(ComputeConfig(), "number format and compilation of the networks")
    mesh: MeshConfig = setting(MeshConfig(), "the devices")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network is None:
            raise InputError("network: expected a section with path or train, found none")
        if self.extract is None:
            raise InputError("extract: expected a section with layers, found none")
