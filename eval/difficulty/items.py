"""The table of items: split, labels, errors, groups and features that need no activations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.errors import InputError

from ..checks import Floats
from ..conclusions import few_groups_warning
from ..probes import constant_columns
from ..tables import read_columns, write_columns
from . import labels
from .config import DifficultyConfig
from .extract import Extraction
from .study_data import FeatureBlock, StudyData

TABLE = "items.parquet"
# Hard items, and as many easy ones, that each split needs: for two folds in train, for an AUROC in test.
NEEDED = {"train": 2, "test": 1}


@dataclasses.dataclass(frozen=True)
class Items:
    """All items, in the order of the data.

    Attributes:
        split: `[items]`, "train", "test" or "purge".
        hard: `[items]`, the label: 0 or 1.
        error: `[items]`, the cost of answering: 1 for a wrong answer and 0 for a right one, or the NLL or
            CRPS.
        groups: `[items]`, the group of each item; the bootstrap resamples whole groups.
        domain: `[items]`, the part of the data, for separate results per domain; may be empty.
        blocks: features that need no activations, without constant columns.
        constant: block → its columns that are constant over the train items, and were removed.
    """

    split: NDArray[np.str_]
    hard: NDArray[np.int64]
    error: Floats
    groups: NDArray[np.str_]
    domain: NDArray[np.str_]
    blocks: dict[str, FeatureBlock]
    constant: dict[str, list[str]]

    @property
    def train(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.split == "train")

    @property
    def test(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.split == "test")


def check_plan(data: StudyData, config: DifficultyConfig) -> list[str]:
    """Checks the split before any network runs. Returns warnings about results that cannot be significant.

    Raises:
        InputError: a split has too few items to contain the hard and easy ones that it needs.
    """
    items = {part: int((data.planned_split == part).sum()) for part in NEEDED}
    for part, n in items.items():
        if n < 2 * NEEDED[part]:
            raise InputError(f"split: expected at least {2 * NEEDED[part]} items in {part}, found {n} of "
                             f"{len(data)} items")
    if config.data.family != "hellaswag" and config.labels.quantile_over == "train":
        easy = math.ceil(config.labels.quantile * (items["train"] - 1))  # below the quantile, without ties
        if min(hard := items["train"] - easy, easy) < NEEDED["train"]:
            raise InputError(f"labels.quantile: expected at least {NEEDED['train']} hard and "
                             f"{NEEDED['train']} easy items in train, found {hard} and {easy} at "
                             f"{config.labels.quantile:g} of {items['train']} items")
    return few_groups_warning(len(np.unique(data.groups[data.planned_split == "test"])))


def make_items(path: Path, data: StudyData, extraction: Extraction, config: DifficultyConfig) -> None:
    """Writes items.parquet.

    Raises:
        InputError: a split has too few hard or easy items, train and test share a prompt, or a number is not
            finite.
    """
    numbers = extraction.numbers
    loss = numbers["loss"].astype(float)
    if not np.isfinite(loss).all():
        name = "NLL" if data.unit == "nats" else data.unit
        raise InputError(f"item {int(np.flatnonzero(~np.isfinite(loss))[0])}: its {name} is not finite")
    split = data.split(numbers)
    if "wrong" in numbers:
        hard, error = numbers["wrong"].astype(np.int64), numbers["wrong"].astype(float)
    else:
        reference = (split == "train") | (config.labels.quantile_over == "all")
        hard, error = np.zeros(len(split), np.int64), loss
        if reference.any():  # otherwise check_split raises
            hard = labels.hard_by_quantile(loss, reference, config.labels.quantile)
    check_split(split, hard, data)
    columns = {"item": extraction.items, "split": split, "group": data.groups, "hard": hard,
               "error": error, "loss": loss,
               "domain": list(data.metadata.get("domain", [""] * len(split)))}
    for name, block in data.blocks(numbers, split).items():
        bad = ~np.isfinite(block.values) & (split != "purge")[:, None]
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(f"item {row}: feature {name}.{block.names[column]} is not finite")
        columns |= {f"{name}.{column}": block.values[:, i] for i, column in enumerate(block.names)}
    write_columns(path / TABLE, columns)


def check_split(split: NDArray[np.str_], hard: NDArray[np.int64], data: StudyData) -> None:
    """Raises InputError if a split has too few hard or easy items, or train and test share a prompt."""
    counts = {(part, kind): int((hard[split == part] == label).sum())
              for part in NEEDED for kind, label in (("hard", 1), ("easy", 0))}
    if missing := [f"{NEEDED[part] - n} {kind} in {part}" for (part, kind), n in counts.items()
                   if n < NEEDED[part]]:
        expected = " and ".join(f"{n} hard and {n} easy items in {part}" for part, n in NEEDED.items())
        found = " and ".join(f"{counts[part, 'hard']} and {counts[part, 'easy']} in {part}"
                             for part in NEEDED)
        raise InputError(f"split: expected at least {expected}, found {found} ({(split == 'purge').sum()} "
                         f"items are excluded): missing are {', '.join(missing)}")
    prompts = data.metadata.get("prompt")
    if prompts is not None:
        texts = np.asarray(prompts, dtype=object)
        train = np.flatnonzero(split == "train")
        train_items = dict(zip(texts[train], train.tolist(), strict=True))
        for item in np.flatnonzero(split == "test").tolist():
            if texts[item] in train_items:
                raise InputError("split: expected different prompts in train and test, found that of test "
                                 f"item {item} in train item {train_items[texts[item]]}")


def read_items(path: Path) -> Items:
    """Reads items.parquet, and removes features that are constant over the train items."""
    table = read_columns(path / TABLE)
    split = table["split"].astype(str)
    blocks: dict[str, FeatureBlock] = {}
    constant: dict[str, list[str]] = {}
    for name in dict.fromkeys(column.partition(".")[0] for column in table if "." in column):
        columns = [column for column in table if column.startswith(f"{name}.")]
        values = np.stack([table[column] for column in columns], axis=1).astype(float)
        features = [column.partition(".")[2] for column in columns]
        removed = constant_columns(values[split == "train"])
        remaining = [i for i in range(len(columns)) if i not in removed]
        if removed:
            constant[name] = [features[i] for i in removed]
        if remaining:
            blocks[name] = FeatureBlock(tuple(features[i] for i in remaining), values[:, remaining])
    return Items(split, table["hard"].astype(np.int64), table["error"].astype(float),
                 table["group"].astype(str), table["domain"].astype(str), blocks, constant)
