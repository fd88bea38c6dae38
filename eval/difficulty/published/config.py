"""The keys of an fm-difficulty-probe configuration that its tables depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tilelli_jax import config as config_lib
from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError

from ...probes import LADDER

# Other keys of the published files; ignored there.
OTHER_KEYS = ("default", "dataset", "layer_modules", "causal")
RUNGS = tuple(rung.name for rung in LADDER)


@dataclasses.dataclass(frozen=True)
class ByLayer(Section):
    """One file per layer."""

    mid: str | None = setting(None, "file of the middle layer")
    late: str | None = setting(None, "file of the late layer")


@dataclasses.dataclass(frozen=True)
class ReleaseCascade(Section):
    """The errors of both models of the cascade, and the costs of their calls."""

    cheap_metadata: str | None = setting(None, "metadata of the cheap model; null: the key metadata")
    expensive_metadata: str = setting("", "metadata of the expensive model")
    cost_cheap: float = setting(1.0, "cost of one call of the cheap model", above=0)
    cost_expensive: float | None = setting(
        None, "cost of one call of the expensive model; null: 5, for tsfm 4", above=0)
    score_cols: tuple[str, ...] = setting((), "rungs that route items; empty: P3_cheap_sae and P1_cheap")
    n_random_trials: int = setting(500, "random routings for each point of the random curve", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.score_cols if name not in RUNGS]:
            raise InputError(f"score_cols: expected some of {', '.join(RUNGS)}, found {', '.join(unknown)}")


@dataclasses.dataclass(frozen=True)
class ReleaseConfig(Section):
    """An fm-difficulty-probe configuration, without the keys that no table depends on."""

    modality: Literal["llm", "tsfm"] = setting(
        "llm", "llm: questions to a language model; tsfm: windows of a series")
    experiment: str = setting("", "name of the experiment")
    seed: int = setting(42, "seed of all random numbers", min=0, max=2**32 - 1)
    n_boot: int = setting(2000, "bootstrap replicates", min=1)
    k: int = setting(32, "active latents per row of the autoencoder", min=1)
    layer: Literal["mid", "late"] = setting("mid", "the layer to use")
    metadata: str = setting("", "parquet file, one row per item")
    activations: ByLayer = setting(ByLayer(), "safetensors files; null: P1_cheap is the only rung")
    sae_ckpt: ByLayer = setting(ByLayer(), "model directories; null: no rungs P3_cheap_sae and P5_sae_only")
    cascade: ReleaseCascade | None = setting(None, "a cheap model that routes items to an expensive one")
    out_dir: str = setting(
        "", "directory of the published results: its causal_ablation_*.parquet files are summarised; no "
        "file is written to it")
    causal_model: str = setting("", "name of the network in the summaries of causal effects")
    hard_quantile: float = setting(
        0.75, "for tsfm: an item is hard if its crps_norm is at least this quantile", above=0, below=1)
    label_threshold_split: Literal["all", "train"] = setting(
        "all", "for tsfm: the rows whose quantile is used")
    context_length: int = setting(512, "for tsfm: values of a window that the network reads", min=25)
    series_csv: str = setting("", "for tsfm: the series, a local CSV or parquet file")
    target_col: str = setting("OT", "for tsfm: the column of the series")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cascade is not None and not self.costs[0] < self.costs[1]:
            raise InputError("cascade.cost_expensive: expected more than cost_cheap {:g}, found {:g}"
                             .format(*self.costs))

    @property
    def costs(self) -> tuple[float, float]:
        """The costs of one call of the cheap and of the expensive model."""
        section = self.cascade or ReleaseCascade()
        return section.cost_cheap, section.cost_expensive or (5.0 if self.modality == "llm" else 4.0)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ReleaseConfig:
    """Reads a published YAML file and applies dotted overrides.

    Raises:
        InputError: the file cannot be read, or a key or a value is invalid.
    """
    tree = {key: value for key, value in config_lib.read_yaml(path).items() if key not in OTHER_KEYS}
    return config_lib.overridden(ReleaseConfig, tree, overrides, str(path))
