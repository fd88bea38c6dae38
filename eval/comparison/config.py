"""The configuration of a comparison of networks: every key of configs/lite-vs-vanilla.yaml."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError

from ..inputs.networks import NetworkConfig
from ..inputs.study import StudyConfig

MAX_SEEDS = 10  # the exact test enumerates every relabelling: C(20, 10) = 184,756


@dataclasses.dataclass(frozen=True)
class TuningConfig(Section):
    """Selection of each model's learning rate."""

    rates: tuple[float, ...] = setting(
        (), "learning rates to try for each model on each text, the same for all models; empty: no search, "
        "each model keeps the rate of its configuration")
    seed: int = setting(100, "random seed of the search runs; must differ from the seeds that are compared",
                        min=0, max=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = list(self.rates)
        if len(set(rates)) != len(rates) or not all(0 < rate < math.inf for rate in rates):
            raise InputError(f"rates: expected different finite numbers above 0, found {rates}")


@dataclasses.dataclass(frozen=True)
class ComparisonConfig(StudyConfig):
    """One comparison: models, texts and seeds."""

    models: dict[str, NetworkConfig] = setting({}, "models to compare, by name; train only")
    reference: str = setting("", "name of the model that the others are compared with; empty: the first")
    set: tuple[str, ...] = setting((), "key=value overrides for all models, e.g. [train.steps=2000]")
    texts: tuple[str, ...] = setting(("stories",), "texts to train on, each in the format of data.source")
    seeds: tuple[int, ...] = setting(
        (0, 1, 2, 3, 4), "random seeds of the weights and of the order of the training data; with the same "
        "seed all models see the same batches")
    tolerance: float = setting(0.01, "maximum difference in the number of parameters, as a fraction of the "
                               "reference's", min=0, below=1)
    tuning: TuningConfig = setting(TuningConfig(), "learning-rate search")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, model in self.models.items():
            model.require("train", "set", key=f"models.{name}", reason="the comparison trains its models")
        names = list(self.models)
        _check_names("models", names, 2)
        if self.reference and self.reference not in names:
            raise InputError(f"reference: expected one of {', '.join(names)}, found {self.reference!r}")
        _check_names("texts", self.texts, 1)
        if (not 2 <= len(self.seeds) <= MAX_SEEDS or len(set(self.seeds)) != len(self.seeds)
                or not all(0 <= seed < 2**32 for seed in self.seeds)):
            raise InputError(f"seeds: expected 2 to {MAX_SEEDS} different integers from 0 to "
                             f"2³² − 1, found {list(self.seeds)}")
        if self.tuning.rates and self.tuning.seed in self.seeds:
            raise InputError(f"tuning.seed: expected a seed other than {list(self.seeds)}, found "
                             f"{self.tuning.seed}")


def file_name(text: str) -> str:
    """Returns the file name for a model or a text: `books/*.txt` → `books`."""
    path = Path(text)
    stem = path.stem if re.search(r"\w", path.stem) else path.parent.name
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "text"


def _check_names(key: str, names: Sequence[str], minimum: int) -> None:
    """Raises InputError unless there are at least `minimum` names, and their file names all differ."""
    if len(names) < minimum:
        raise InputError(f"{key}: expected at least {minimum}, found {list(names)}")
    by_file: dict[str, str] = {}
    for name in names:
        if (file := file_name(name)) in by_file:
            raise InputError(f"{key}: expected names with different file names, found '{by_file[file]}' and "
                             f"'{name}' (both '{file}')")
        by_file[file] = name
