"""The table of items: labels that no test row has part in, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tilelli_jax.eval.difficulty.config import ExtractConfig, LabelConfig, StudyConfig
from tilelli_jax.eval.difficulty.items import check_split, make_items, read_items
from tilelli_jax.eval.difficulty.subject import Block
from tilelli_jax.eval.inputs.networks import NetworkConfig
from tilelli_jax.eval.tables import read_columns

from tests.refusals import assert_one_line
from tilelli_jax.errors import InputError

TRAIN, TEST = ["train"] * 8 + ["purge"] * 2, ["test"] * 6


def study(**labels: Any) -> StudyConfig:
    return StudyConfig(network=NetworkConfig(path="x"), extract=ExtractConfig(layers=(0,)),
                       labels=LabelConfig(**labels))


class Made:
    """A subject of sixteen items."""

    unit = "nats"

    def __init__(self, split: list[str] | None = None, **numbers: Any) -> None:
        rng = np.random.default_rng(0)
        self.parts = np.array(split or TRAIN + TEST)
        self.groups = np.array([f"group {i // 2}" for i in range(16)])
        self.about: dict[str, Any] = {"prompt": [f"prompt {i}" for i in range(16)],
                                      "domain": ["", "wikihow"] * 8}
        amount = np.array([*range(8), 9, -9, *rng.permutation([-2, 3, 5, 6, 8, 9.0])])
        self.numbers = {"amount": amount, **numbers}
        self.features = {"cheap": Block(("length", "dull", "novelty"), np.stack(
            [rng.standard_normal(16), np.ones(16), rng.standard_normal(16)], axis=1)),
            "surprise": Block(("prompt_nats",), rng.standard_normal((16, 1)))}

    def split(self, numbers: Any) -> Any:
        assert numbers is self.numbers
        return self.parts

    def blocks(self, numbers: Any, split: Any) -> dict[str, Block]:
        assert numbers is self.numbers and split is self.parts
        return self.features


def made(path: Path, subject: Any, config: StudyConfig | None = None) -> Any:
    path.mkdir(exist_ok=True)
    make_items(path, subject, SimpleNamespace(items=np.arange(16), numbers=subject.numbers),
               config or study())
    return read_items(path)


def refused(path: Path, subject: Any, *parts: str, config: StudyConfig | None = None) -> None:
    with pytest.raises(InputError) as caught:
        made(path, subject, config)
    assert_one_line(f"error: {caught.value}\n", *parts)
    assert not list(path.iterdir())  # nothing half-written


def test_what_comes_back(tmp_path: Path) -> None:
    subject = Made()
    found = made(tmp_path, subject)
    assert found.split.tolist() == TRAIN + TEST and found.groups.tolist() == subject.groups.tolist()
    assert found.domain.tolist() == ["", "wikihow"] * 8
    assert found.train.tolist() == list(range(8)) and found.test.tolist() == list(range(10, 16))
    np.testing.assert_array_equal(found.error, subject.numbers["amount"])
    least = np.quantile(subject.numbers["amount"][:8], 0.75)
    assert found.hard.tolist() == (subject.numbers["amount"] >= least).astype(int).tolist()
    assert list(found.blocks) == ["cheap", "surprise"]
    np.testing.assert_array_equal(found.blocks["surprise"].values, subject.features["surprise"].values)
    table = read_columns(tmp_path / "items.parquet")
    assert table["item"].tolist() == list(range(16))
    assert {"cheap.length", "cheap.dull", "cheap.novelty", "surprise.prompt_nats"} <= table.keys()


def test_constant_features_are_named_and_left_out(tmp_path: Path) -> None:
    """Over the training rows: what a test row says to it does not count."""
    subject = Made()
    subject.features["cheap"].values[12, 1] = 5
    subject.features["surprise"].values[:8] = 2
    found = made(tmp_path, subject)
    assert found.constant == {"cheap": ["dull"], "surprise": ["prompt_nats"]}
    assert list(found.blocks) == ["cheap"] and found.blocks["cheap"].names == ("length", "novelty")
    np.testing.assert_array_equal(found.blocks["cheap"].values, subject.features["cheap"].values[:, [0, 2]])


def test_answers_that_are_wrong_are_hard(tmp_path: Path) -> None:
    wrong = np.array([0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1])
    found = made(tmp_path, Made(wrong=wrong))
    assert found.hard.tolist() == wrong.tolist() == found.error.tolist()  # however much they surprise
    assert found.hard.dtype == np.int64 and found.error.dtype == np.float64


AMOUNTS = st.lists(st.floats(-50, 50), min_size=16, max_size=16)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amounts=AMOUNTS, others=AMOUNTS)
def test_labels_are_learned_of_training_rows(amounts: list[float], others: list[float],
                                             tmp_path: Path) -> None:
    rows = np.arange(16) < 8
    amount = np.where(rows, [*range(8), *range(8)], amounts)
    other = np.where(rows, amount, others)
    found = []
    for values in (amount, other):
        values[[10, 11]] = -99, 99  # both kinds in the test
        found.append(made(tmp_path, Made(amount=values)).hard)
        assert found[-1].tolist() == [int(value >= np.quantile(range(8), 0.75)) for value in values]
    np.testing.assert_array_equal(found[0][rows], found[1][rows])


def test_labels_of_all_look_at_the_test(tmp_path: Path) -> None:
    amount = np.array([*range(8), 0, 0, -5, 100, 100, 100, 100, 100.0])
    train = np.arange(8)
    assert made(tmp_path, Made(amount=amount)).hard[train].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    amount[-1] = amount[0] = 90.0
    config = study(of="all", quantile=0.5)
    assert made(tmp_path, Made(amount=amount), config).hard.tolist() == (
        amount >= np.quantile(amount, 0.5)).astype(int).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_amounts_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    amount = np.arange(16.0)
    amount[[9, 14]] = bad
    refused(tmp_path, Made(amount=amount), "item 9: its nats are not finite")


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_features_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    subject = Made()
    subject.features["cheap"].values[13, 2] = bad
    refused(tmp_path, subject, "item 13: feature cheap.novelty is not finite")


@pytest.mark.parametrize("of", ["train", "all"])
def test_an_empty_part(of: str, tmp_path: Path) -> None:
    for split, part in ((["test"] * 16, "train"), (["train"] * 16, "test"), (["purge"] * 16, "train")):
        refused(tmp_path, Made(split), f"split: the {part} part is empty", config=study(of=of))


def test_a_part_of_one_class(tmp_path: Path) -> None:
    amount = np.arange(16.0)
    refused(tmp_path, Made(amount=amount), "split: all 6 items of the test part are hard; expected both")
    refused(tmp_path, Made(amount=-amount), "split: all 6 items of the test part are easy")
    refused(tmp_path, Made(amount=amount * 0), "split: all 8 items of the train part are hard")
    refused(tmp_path, Made(wrong=np.arange(16) >= 11), "split: all 8 items of the train part are easy")


def test_one_prompt_on_both_sides(tmp_path: Path) -> None:
    subject = Made()
    subject.about["prompt"][8] = subject.about["prompt"][12]  # which is purged
    subject.about["prompt"][10] = subject.about["prompt"][11]  # both of the test
    made(tmp_path / "fine", subject)
    subject.about["prompt"][13] = subject.about["prompt"][3]
    (tmp_path / "not").mkdir()
    refused(tmp_path / "not", subject, "split: item 13 of the test part is item 3 of the train part",
            "to the letter")
    del subject.about["prompt"]  # a series has none
    check_split(subject.parts, np.arange(16) % 2, subject)
