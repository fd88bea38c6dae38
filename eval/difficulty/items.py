"""The table of items: split, labels, errors, groups and features that need no activations."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.errors import InputError

from ..checks import Floats
from ..probes import constant_columns
from ..tables import read_columns, write_columns
from . import labels
from .config import StudyConfig
from .extract import Extraction
from .subject import Block, Subject

TABLE = "items.parquet"


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
    blocks: dict[str, Block]
    constant: dict[str, list[str]]

    @property
    def train(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.split == "train")

    @property
    def test(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.split == "test")


def make_items(path: Path, subject: Subject, extraction: Extraction, config: StudyConfig) -> None:
    """Writes items.parquet.

    Raises:
        InputError: a split is empty or has a single class, train and test share a prompt, or a number is not
            finite.
    """
    numbers = extraction.numbers
    amount = numbers["amount"].astype(float)
    if not np.isfinite(amount).all():
        raise InputError(f"item {int(np.flatnonzero(~np.isfinite(amount))[0])}: its {subject.unit} are not "
                         "finite")
    split = subject.split(numbers)
    if "wrong" in numbers:
        hard, error = numbers["wrong"].astype(np.int64), numbers["wrong"].astype(float)
    else:
        reference = split == "train" if config.labels.of == "train" else np.ones(len(split), bool)
        if not reference.any():
            raise InputError("split: the train split is empty")
        hard, error = labels.hard_by_quantile(amount, reference, config.labels.quantile), amount
    check_split(split, hard, subject)
    columns = {"item": extraction.items, "split": split, "group": subject.groups, "hard": hard,
               "error": error, "amount": amount,
               "domain": list(subject.metadata.get("domain", [""] * len(split)))}
    for name, block in subject.blocks(numbers, split).items():
        bad = ~np.isfinite(block.values) & (split != "purge")[:, None]
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(f"item {row}: feature {name}.{block.names[column]} is not finite")
        columns |= {f"{name}.{column}": block.values[:, i] for i, column in enumerate(block.names)}
    write_columns(path / TABLE, columns)


def check_split(split: NDArray[np.str_], hard: NDArray[np.int64], subject: Subject) -> None:
    """Raises InputError if a split is empty, a split has a single class, or train and test share a prompt."""
    for part in ("train", "test"):
        labels_of_part = hard[split == part]
        if not len(labels_of_part):
            raise InputError(f"split: the {part} split is empty")
        if len(np.unique(labels_of_part)) < 2:
            raise InputError(f"split: expected hard and easy items in the {part} split, found "
                             f"{len(labels_of_part)} {'hard' if labels_of_part[0] else 'easy'} items")
    prompts = subject.metadata.get("prompt")
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
    blocks: dict[str, Block] = {}
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
            blocks[name] = Block(tuple(features[i] for i in remaining), values[:, remaining])
    return Items(split, table["hard"].astype(np.int64), table["error"].astype(float),
                 table["group"].astype(str), table["domain"].astype(str), blocks, constant)
