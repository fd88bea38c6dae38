"""What a comparison of networks is: every key of configs/lite-vs-vanilla.yaml."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError

MAX_SEEDS = 10  # the exact tests look at every arrangement: C(20, 10) = 184,756 of them


@dataclasses.dataclass(frozen=True)
class TuningConfig(Section):
    """How each model comes by its learning rate."""

    rates: tuple[float, ...] = setting(
        (), "learning rates that each model is tried with on each text, the same for all; empty: "
        "each as its configuration has it")
    seed: int = setting(100, "of those runs: none of the seeds that are compared", min=0,
                        max=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = list(self.rates)
        if len(set(rates)) != len(rates) or not all(0 < rate < math.inf for rate in rates):
            raise InputError(f"rates: expected different finite numbers above 0, found {rates}")


@dataclasses.dataclass(frozen=True)
class ComparisonConfig(Section):
    """One comparison: models, texts and seeds."""

    name: str = setting("", "what the report calls it; by default that of the file")
    out: str = setting("", "directory; by default runs/ and the name of the file")
    models: tuple[tuple[str, ...], ...] = setting(
        (), "each a list: its name, its training configuration, and key=value settings that take "
        "precedence over that file's, as on the command line of tilelli train")
    reference: str = setting("", "the model that the others are compared with; empty: the first")
    overrides: tuple[str, ...] = setting((), "settings of all models, e.g. [train.steps=2000]")
    texts: tuple[str, ...] = setting(("stories",), "what they learn from, each as data.source has it")
    seeds: tuple[int, ...] = setting(
        (0, 1, 2, 3, 4), "each of the weights and of the order of the training windows: of one seed all "
        "models see the same batches")
    tolerance: float = setting(0.01, "by how much numbers of parameters may differ, as a share of the "
                               "reference's", min=0, below=1)
    tuning: TuningConfig = setting(TuningConfig(), "learning rates")

    def __post_init__(self) -> None:
        super().__post_init__()
        for one in self.models:
            if len(one) < 2 or not all(one):
                raise InputError("models: expected lists of a name, a training configuration and "
                                 f"key=value settings, found {list(one)}")
        names = [name for name, *_ in self.models]
        _check_names("models", names, 2)
        if self.reference and self.reference not in names:
            raise InputError(f"reference: expected one of {', '.join(names)}, found {self.reference!r}")
        _check_names("texts", self.texts, 1)
        if (not 2 <= len(self.seeds) <= MAX_SEEDS or len(set(self.seeds)) != len(self.seeds)
                or not all(0 <= seed < 2**32 for seed in self.seeds)):
            raise InputError(f"seeds: expected 2 to {MAX_SEEDS} different whole numbers from 0 to "
                             f"2³² − 1, found {list(self.seeds)}")
        if self.tuning.rates and self.tuning.seed in self.seeds:
            raise InputError(f"tuning.seed: expected none of the seeds {list(self.seeds)}, found "
                             f"{self.tuning.seed}")


def file_name(text: str) -> str:
    """What files are called that are made for a model or a text: `books/*.txt` → `books`."""
    path = Path(text)
    stem = path.stem if re.search(r"\w", path.stem) else path.parent.name
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "text"


def _check_names(key: str, names: Sequence[str], least: int) -> None:
    """Raises InputError unless there are enough, and their files can be told apart."""
    if len(names) < least or len({file_name(name) for name in names}) != len(names):
        raise InputError(f"{key}: expected {least} of different names at least, found {list(names)}")
