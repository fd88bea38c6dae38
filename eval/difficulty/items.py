"""The table of items: what is hard, what is learned from, what it costs to be wrong, and cheap features."""

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
    """Of all items, in order.

    Attributes:
        split: `[items]`, train, test or purge.
        hard: `[items]`, 0 or 1.
        error: `[items]`, what answering costs: 1 where the answer is wrong, or the amount.
        groups: `[items]`, what belongs together.
        domain: `[items]`, a part of the data that results are told for by itself; may be empty.
        blocks: features that need no activations, with the columns that tell something.
        constant: block → its columns that say the same of all training rows, and were left out.
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


def make_items(path: Path, subject: Subject, found: Extraction, config: StudyConfig) -> None:
    """Writes items.parquet.

    Raises:
        InputError: a split is empty or of one class, an item is on both sides, or a number is not finite.
    """
    numbers = found.numbers
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
            raise InputError("split: the train part is empty")
        hard, error = labels.hard_by_quantile(amount, reference, config.labels.quantile), amount
    check_split(split, hard, subject)
    columns = {"item": found.items, "split": split, "group": subject.groups, "hard": hard, "error": error,
               "amount": amount, "domain": list(subject.about.get("domain", [""] * len(split)))}
    for name, block in subject.blocks(numbers, split).items():
        bad = ~np.isfinite(block.values) & (split != "purge")[:, None]
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(f"item {row}: feature {name}.{block.names[column]} is not finite")
        columns |= {f"{name}.{column}": block.values[:, i] for i, column in enumerate(block.names)}
    write_columns(path / TABLE, columns)


def check_split(split: NDArray[np.str_], hard: NDArray[np.int64], subject: Subject) -> None:
    """Raises InputError where nothing could be learned, or what is learned would be known of the test."""
    for part in ("train", "test"):
        found = hard[split == part]
        if not len(found):
            raise InputError(f"split: the {part} part is empty")
        if len(np.unique(found)) < 2:
            raise InputError(f"split: all {len(found)} items of the {part} part are "
                             f"{'hard' if found[0] else 'easy'}; expected both")
    prompts = subject.about.get("prompt")
    if prompts is not None:
        texts = np.asarray(prompts, dtype=object)
        known = dict(zip(texts[split == "train"], np.flatnonzero(split == "train").tolist(), strict=True))
        for item in np.flatnonzero(split == "test").tolist():
            if texts[item] in known:
                raise InputError(f"split: item {item} of the test part is item {known[texts[item]]} of the "
                                 "train part, to the letter")


def read_items(path: Path) -> Items:
    """What `make_items` wrote, without features that are constant over the training rows."""
    table = read_columns(path / TABLE)
    split = table["split"].astype(str)
    blocks: dict[str, Block] = {}
    constant: dict[str, list[str]] = {}
    for name in dict.fromkeys(column.partition(".")[0] for column in table if "." in column):
        columns = [column for column in table if column.startswith(f"{name}.")]
        values = np.stack([table[column] for column in columns], axis=1).astype(float)
        short = [column.partition(".")[2] for column in columns]
        dead = constant_columns(values[split == "train"])
        kept = [i for i in range(len(columns)) if i not in dead]
        if dead:
            constant[name] = [short[i] for i in dead]
        if kept:
            blocks[name] = Block(tuple(short[i] for i in kept), values[:, kept])
    return Items(split, table["hard"].astype(np.int64), table["error"].astype(float),
                 table["group"].astype(str), table["domain"].astype(str), blocks, constant)
