"""What a study of difficulty is: every key of configs/difficulty-*.yaml."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.sharding import MeshConfig

from ..inputs.networks import NetworkConfig


@dataclasses.dataclass(frozen=True)
class SquadConfig(Section):
    """Questions about paragraphs; hard is an answer that surprises."""

    family: Literal["squad"] = setting("squad", "which kind of data")
    source: str = setting("hf:rajpurkar/squad", "hf:NAME (its validation part), or a file: JSON, JSON lines "
                          "or parquet")
    items: int = setting(5000, "the first of them", min=10)
    max_tokens: int = setting(200, "of a prompt, cut at its head", min=2)


@dataclasses.dataclass(frozen=True)
class HellaSwagConfig(Section):
    """Beginnings with four endings; hard is where another than the right one surprises least."""

    family: Literal["hellaswag"] = setting("hellaswag", "which kind of data")
    source: str = setting("hf:Rowan/hellaswag", "as for squad")
    items: int = setting(5000, "the first of them", min=10)
    max_tokens: int = setting(124, "of a prompt, cut at its head", min=2)
    domain: Literal["all", "activitynet", "wikihow"] = setting("all", "which of its two sources")


@dataclasses.dataclass(frozen=True)
class TextConfig(Section):
    """Pieces of a text and how it goes on; hard is what surprises."""

    family: Literal["text"] = setting("text", "which kind of data")
    source: str = setting("stories", "stories (built in, none of those that are trained on) or a text file")
    items: int = setting(2000, "the first pieces", min=10)
    prompt: int = setting(160, "characters of a piece", min=2)
    ending: int = setting(16, "characters of how it goes on", min=1)
    separator: str = setting("\n\n", "between documents, which keep their pieces together; empty: blocks of "
                             "16 pieces")
    max_tokens: int = setting(4096, "of a prompt, cut at its head", min=2)


@dataclasses.dataclass(frozen=True)
class SeriesConfig(Section):
    """Windows of a time series and what comes after; hard is what is forecast badly."""

    family: Literal["series"] = setting("series", "which kind of data")
    source: str = setting("ETTh1.csv", "a CSV or parquet file")
    column: str = setting("OT", "the values")
    items: int = setting(1_000_000, "the first windows", min=10)
    context: int = setting(512, "values that are read", min=16)
    horizon: int = setting(96, "values that are forecast", min=1)
    stride: int = setting(24, "values between the starts of two windows", min=1)
    season: int = setting(24, "values of a season", min=1)
    samples: int = setting(100, "futures drawn of each window", min=2)


DataConfig = SquadConfig | HellaSwagConfig | TextConfig | SeriesConfig


@dataclasses.dataclass(frozen=True)
class ExtractConfig(Section):
    """What is kept of the network's activations."""

    place: str = setting("resid_post", "where, as its taps name it (Chronos: encoder.resid_post)")
    layers: tuple[int, ...] = setting((), "at which layers; each is a study of its own")
    positions: Literal["boundary", "all"] = setting(
        "boundary", "the last of the prompt (of several endings, the first of each), or all of the prompt; "
        "of a series always all")
    skip: int = setting(1, "first positions of a text that are never looked at: without a token for the "
                        "beginning, networks keep an enormous value there", min=0)
    dtype: Literal["float16", "float32"] = setting("float16", "type on disk")
    batch_size: int = setting(16, "texts (windows) at once", min=1)
    shard_items: int = setting(512, "items in a file; after each of them one may stop and go on later",
                               min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise InputError("layers: expected different layers, one at least, counted from 0")


@dataclasses.dataclass(frozen=True)
class SplitConfig(Section):
    """What is learned from and what is held out. Series are always split in time."""

    by: Literal["group", "topic", "order"] = setting(
        "group", "whole paragraphs (documents), whole topics, or the first rows, as published")
    train: float = setting(0.7, "share that is learned from", above=0, below=1)
    max_similarity: float = setting(0.7, "test prompts whose cosine of TF-IDF with one to learn from is as large are "
                           "left out", above=0)
    memorized_nll: float = setting(0.4055, "prompts that surprise no more for each token are known by heart, "
                                "and left out", min=0)


@dataclasses.dataclass(frozen=True)
class LabelConfig(Section):
    """What is hard, where the data themselves do not say what is wrong."""

    quantile: float = setting(0.75, "from this quantile of the surprise (CRPS) on", above=0, below=1)
    of: Literal["train", "all"] = setting("train", "whose quantile; all looks at the test rows")


@dataclasses.dataclass(frozen=True)
class SAEStageConfig(Section):
    """The autoencoder: one that there is, or one that is trained on the items to learn from."""

    path: str = setting("", "model directory; {layer} stands for the layer")
    train: str = setting("", "in place of path: its training configuration")
    min_steps: int = setting(200, "refused after fewer updates", min=0)
    max_dead: float = setting(0.5, "refused with a larger share of latents never active on held-out items",
                               min=0, max=1)
    min_explained: float = setting(0.3, "refused when less of the variance is explained there", max=1)
    min_gain_over_random: float = setting(0.1, "and when it is not so much more than one with random weights "
                                      "explains", min=0, max=1)
    held_out: int = setting(200, "test items that this is measured on", min=1)
    force: bool = setting(False, "go on with one that is refused; the report says so")


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Section):
    """Ladder, intervals and tests."""

    folds: int = setting(5, "of cross-validation, at most", min=2)
    replicates: int = setting(2000, "of the bootstrap; its least p is 2 / (replicates + 1), before "
                              "correction", min=400)
    jobs: int = setting(-1, "fits side by side; -1 takes every core", min=-1)


@dataclasses.dataclass(frozen=True)
class CascadeConfig(Section):
    """What a call costs."""

    small: float = setting(1.0, "of the network", above=0)
    large: float = setting(5.0, "of the larger one", above=0)
    pay_both: bool = setting(True, "an item handed on has cost the cheap call, too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.large <= self.small:
            raise InputError(f"large: expected more than small {self.small}, found {self.large}")


@dataclasses.dataclass(frozen=True)
class CausalConfig(Section):
    """Latents that are left out, one at a time."""

    latents: int = setting(5, "those on which a probe leans most", min=1)
    controls: int = setting(10, "for each of them: as often active, drawn at random", min=0)
    strength: float = setting(0.1, "C of that probe", above=0)
    items: int = setting(500, "test items, drawn at random; 0 for all", min=0)
    positions: tuple[Literal["all", "boundary"], ...] = setting(
        ("all", "boundary"), "patched: all of the prompt, its last one")
    samples: int = setting(20, "of a series: futures drawn for each patch, with the same random numbers",
                           min=2)
    horizon: int = setting(64, "of a series: values forecast", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.positions:
            raise InputError("positions: expected some of all, boundary, found none")


@dataclasses.dataclass(frozen=True)
class StudyConfig(Section):
    """One study: a kind of data, and a network."""

    name: str = setting("", "what the report calls it; by default that of the file")
    out: str = setting("", "directory; by default runs/ and the name of the file")
    seed: int = setting(42, "of all that is drawn", min=0, max=2**32 - 1)
    data: DataConfig = setting(SquadConfig(), "what is asked")
    network: NetworkConfig = setting(None, "the network that is studied")
    large_model: NetworkConfig | None = setting(None, "a larger one that hard items could be handed to")
    extract: ExtractConfig = setting(None, "what is kept of its activations")
    split: SplitConfig = setting(SplitConfig(), "what is learned from")
    labels: LabelConfig = setting(LabelConfig(), "what is hard")
    sae: SAEStageConfig = setting(SAEStageConfig(), "the autoencoder")
    probe: ProbeConfig = setting(ProbeConfig(), "the ladder")
    cascade: CascadeConfig = setting(CascadeConfig(), "what calls cost")
    causal: CausalConfig = setting(CausalConfig(), "patching")
    also: tuple[str, ...] = setting((), "directories of other studies, for the table of all")
    compute: ComputeConfig = setting(ComputeConfig(), "how the networks are run")
    mesh: MeshConfig = setting(MeshConfig(), "the devices")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network is None:
            raise InputError("network: expected a section with path or train")
        if self.extract is None:
            raise InputError("extract: expected a section with layers")
        if self.sae.path and self.sae.train:
            raise InputError("sae.path: expected it or sae.train, not both")
