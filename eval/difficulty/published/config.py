"""What a configuration of fm-difficulty-probe says, as far as tables are made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tilelli_jax import config as config_lib
from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError

from ...probes import LADDER

# What their configurations also say, and nothing here depends on.
OTHER_KEYS = ("default", "dataset", "layer_modules", "causal")
RUNGS = tuple(rung.name for rung in LADDER)


@dataclasses.dataclass(frozen=True)
class ByLayer(Section):
    """A file for each layer."""

    mid: str | None = setting(None, "of the layer in the middle")
    late: str | None = setting(None, "of the late one")


@dataclasses.dataclass(frozen=True)
class KitCascade(Section):
    """The expensive model's errors, and what calls cost."""

    cheap_metadata: str | None = setting(None, "of the cheap model; by default metadata")
    expensive_metadata: str = setting("", "of the expensive one")
    cost_cheap: float = setting(1.0, "of a call of the cheap one", above=0)
    cost_expensive: float | None = setting(None, "of the other; by default 5, with tsfm 4", above=0)
    score_cols: tuple[str, ...] = setting((), "rungs; by default P3_cheap_sae and P1_cheap")
    n_random_trials: int = setting(500, "for each point of the random curve", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.score_cols if name not in RUNGS]:
            raise InputError(f"score_cols: expected some of {', '.join(RUNGS)}, found {', '.join(unknown)}")


@dataclasses.dataclass(frozen=True)
class KitConfig(Section):
    """A configuration of theirs, as far as tables are made of it."""

    modality: Literal["llm", "tsfm"] = setting("llm", "questions to a language model, or windows of a series")
    experiment: str = setting("", "what it is called")
    seed: int = setting(42, "of all that is drawn", min=0, max=2**32 - 1)
    n_boot: int = setting(2000, "replicates of the bootstrap", min=1)
    k: int = setting(32, "of the autoencoder", min=1)
    layer: Literal["mid", "late"] = setting("mid", "which one")
    metadata: str = setting("", "parquet file, a row for each item")
    activations: ByLayer = setting(ByLayer(), "safetensors files; without one, P1_cheap alone is made")
    sae_ckpt: ByLayer = setting(ByLayer(), "model directories; without one, there is no P3_cheap_sae and no "
                                "P5_sae_only")
    cascade: KitCascade | None = setting(None, "a cheap model before an expensive one")
    out_dir: str = setting("", "where their results are; the causal_ablation_*.parquet in it are summarised, "
                           "and nothing is written there")
    causal_model: str = setting("", "what the summaries call the network")
    hard_quantile: float = setting(0.75, "of tsfm: hard from this quantile of crps_norm on", above=0, below=1)
    label_threshold_split: Literal["all", "train"] = setting("all", "of tsfm: of which rows")
    context_length: int = setting(512, "of tsfm: values that are read", min=25)
    series_csv: str = setting("", "of tsfm: the series, a local CSV or parquet file")
    target_col: str = setting("OT", "of tsfm: its column")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cascade is not None and not self.costs[0] < self.costs[1]:
            raise InputError("cascade.cost_expensive: expected more than cost_cheap {:g}, found {:g}"
                             .format(*self.costs))

    @property
    def costs(self) -> tuple[float, float]:
        """Of a call of the cheap model, and of the expensive one."""
        section = self.cascade or KitCascade()
        return section.cost_cheap, section.cost_expensive or (5.0 if self.modality == "llm" else 4.0)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> KitConfig:
    """Their YAML file, with dotted overrides.

    Raises:
        InputError: it cannot be read, or says what is not understood.
    """
    tree = config_lib.parse_overrides(overrides, config_lib.read_yaml(path))
    return config_lib.from_dict(KitConfig, {key: value for key, value in tree.items()
                                            if key not in OTHER_KEYS}, str(path))
