"""The table of items: labels that do not depend on test items, and rejected inputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.error_lines import assert_one_line
from tilelli_jax.errors import InputError
from tilelli_jax.eval.difficulty.config import DifficultyConfig, ExtractConfig, LabelConfig
from tilelli_jax.eval.difficulty.items import check_plan, check_split, make_items, read_items
from tilelli_jax.eval.difficulty.labels import hard_by_quantile
from tilelli_jax.eval.difficulty.study_data import FeatureBlock
from tilelli_jax.eval.inputs.networks import NetworkConfig
from tilelli_jax.eval.tables import read_columns

TRAIN, TEST = ["train"] * 8 + ["purge"] * 2, ["test"] * 6


def study(**labels: Any) -> DifficultyConfig:
    return DifficultyConfig(network=NetworkConfig(path="x"), extract=ExtractConfig(layers=(0,)),
                       labels=LabelConfig(**labels))


class FakeStudyData:
    """Data of sixteen items."""

    unit = "nats"

    def __init__(self, split: list[str] | None = None, **numbers: Any) -> None:
        rng = np.random.default_rng(0)
        self.parts = self.planned_split = np.array(split or TRAIN + TEST)
        self.groups = np.array([f"group {i // 2}" for i in range(16)])
        self.metadata: dict[str, Any] = {"prompt": [f"prompt {i}" for i in range(16)],
                                      "domain": ["", "wikihow"] * 8}
        loss = np.array([*range(8), 9, -9, *rng.permutation([-2, 3, 5, 6, 8, 9.0])])
        self.numbers = {"loss": loss, **numbers}
        self.features = {"cheap": FeatureBlock(("length", "dull", "novelty"), np.stack(
            [rng.standard_normal(16), np.ones(16), rng.standard_normal(16)], axis=1)),
            "nll": FeatureBlock(("prompt_nll",), rng.standard_normal((16, 1)))}

    def __len__(self) -> int:
        return 16

    def split(self, numbers: Any) -> Any:
        assert numbers is self.numbers
        return self.parts

    def blocks(self, numbers: Any, split: Any) -> dict[str, FeatureBlock]:
        assert numbers is self.numbers and split is self.parts
        return self.features


def written(path: Path, study_data: Any, config: DifficultyConfig | None = None) -> Any:
    path.mkdir(exist_ok=True)
    make_items(path, study_data, SimpleNamespace(items=np.arange(16), numbers=study_data.numbers),
               config or study())
    return read_items(path)


def rejected(path: Path, study_data: Any, *parts: str, config: DifficultyConfig | None = None) -> None:
    with pytest.raises(InputError) as caught:
        written(path, study_data, config)
    assert_one_line(f"error: {caught.value}\n", *parts)
    assert not list(path.iterdir())  # no partial file


def test_values_survive_the_round_trip(tmp_path: Path) -> None:
    study_data = FakeStudyData()
    found = written(tmp_path, study_data)
    assert found.split.tolist() == TRAIN + TEST and found.groups.tolist() == study_data.groups.tolist()
    assert found.domain.tolist() == ["", "wikihow"] * 8
    assert found.train.tolist() == list(range(8)) and found.test.tolist() == list(range(10, 16))
    np.testing.assert_array_equal(found.error, study_data.numbers["loss"])
    threshold = np.quantile(study_data.numbers["loss"][:8], 0.75)
    assert found.hard.tolist() == (study_data.numbers["loss"] >= threshold).astype(int).tolist()
    assert list(found.blocks) == ["cheap", "nll"]
    np.testing.assert_array_equal(found.blocks["nll"].values, study_data.features["nll"].values)
    table = read_columns(tmp_path / "items.parquet")
    assert table["item"].tolist() == list(range(16))
    assert {"cheap.length", "cheap.dull", "cheap.novelty", "nll.prompt_nll"} <= table.keys()


def test_constant_features_are_removed_and_listed(tmp_path: Path) -> None:
    """Constant means constant over the train items; test items do not count."""
    study_data = FakeStudyData()
    study_data.features["cheap"].values[12, 1] = 5
    study_data.features["nll"].values[:8] = 2
    found = written(tmp_path, study_data)
    assert found.constant == {"cheap": ["dull"], "nll": ["prompt_nll"]}
    assert list(found.blocks) == ["cheap"] and found.blocks["cheap"].names == ("length", "novelty")
    np.testing.assert_array_equal(found.blocks["cheap"].values,
                                  study_data.features["cheap"].values[:, [0, 2]])


def test_wrong_answers_are_hard(tmp_path: Path) -> None:
    wrong = np.array([0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1])
    found = written(tmp_path, FakeStudyData(wrong=wrong))
    assert found.hard.tolist() == wrong.tolist() == found.error.tolist()  # whatever their NLL
    assert found.hard.dtype == np.int64 and found.error.dtype == np.float64


AMOUNTS = st.lists(st.floats(-50, 50), min_size=16, max_size=16)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(amounts=AMOUNTS, others=AMOUNTS)
def test_the_threshold_depends_on_train_items_only(amounts: list[float], others: list[float],
                                                   tmp_path: Path) -> None:
    rows = np.arange(16) < 8
    loss = np.where(rows, [*range(8), *range(8)], amounts)
    other = np.where(rows, loss, others)
    found = []
    for values in (loss, other):
        values[[10, 11]] = -99, 99  # both classes among the test items
        found.append(written(tmp_path, FakeStudyData(loss=values)).hard)
        assert found[-1].tolist() == [int(value >= np.quantile(range(8), 0.75)) for value in values]
    np.testing.assert_array_equal(found[0][rows], found[1][rows])


def test_labels_of_all_depend_on_test_items(tmp_path: Path) -> None:
    loss = np.array([*range(8), 0, 0, -5, 100, 100, 100, 100, 100.0])
    train = np.arange(8)
    assert written(tmp_path, FakeStudyData(loss=loss)).hard[train].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    loss[-1] = loss[0] = 90.0
    config = study(quantile_over="all", quantile=0.5)
    assert written(tmp_path, FakeStudyData(loss=loss), config).hard.tolist() == (
        loss >= np.quantile(loss, 0.5)).astype(int).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_amounts_are_rejected(bad: float, tmp_path: Path) -> None:
    loss = np.arange(16.0)
    loss[[9, 14]] = bad
    rejected(tmp_path, FakeStudyData(loss=loss), "item 9: its NLL is not finite")


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nonfinite_features_are_rejected(bad: float, tmp_path: Path) -> None:
    study_data = FakeStudyData()
    study_data.features["cheap"].values[13, 2] = bad
    rejected(tmp_path, study_data, "item 13: feature cheap.novelty is not finite")


@pytest.mark.parametrize("reference", ["train", "all"])
def test_an_empty_split_is_rejected(reference: str, tmp_path: Path) -> None:
    for only, part, n in (("test", "train", 2), ("train", "test", 1), ("purge", "train", 2)):
        rejected(tmp_path, FakeStudyData([only] * 16), "split: expected at least 2 hard and 2 easy items in "
                "train and 1 hard and 1 easy items in test, found", f"0 and 0 in {part}",
                f"missing are {n} hard in {part}, {n} easy in {part}", config=study(quantile_over=reference))


def test_a_split_with_one_class_is_rejected(tmp_path: Path) -> None:
    loss = np.arange(16.0)
    rejected(tmp_path, FakeStudyData(loss=loss), "found 2 and 6 in train and 6 and 0 in test (2 items "
            "are excluded): missing are 1 easy in test")
    rejected(tmp_path, FakeStudyData(loss=-loss), "missing are 1 hard in test")
    rejected(tmp_path, FakeStudyData(loss=loss * 0), "missing are 2 easy in train, 1 easy in test")
    rejected(tmp_path, FakeStudyData(wrong=np.arange(16) >= 7), "found 1 and 7 in train and 6 and 0 in test",
            "missing are 1 hard in train, 1 easy in test")


def test_the_plan_is_checked_before_a_network_runs() -> None:
    study_data: Any = FakeStudyData()
    assert check_plan(study_data, study()) == [
        "The held-out items form 3 groups; at least 20 are required. With fewer, intervals are too narrow "
        "and p-values too small: all comparisons are inconclusive."]
    study_data.groups = np.arange(16).astype(str)
    assert "form 6 groups; at least 20" in check_plan(study_data, study())[0]
    for quantile, found in ((0.9, "found 1 and 7 at 0.9 of 8 items"), (0.1, "found 7 and 1 at 0.1 of 8 "
                                                                            "items")):
        with pytest.raises(InputError, match="labels.quantile: expected at least 2 hard and 2 easy items in "
                           f"train, {found}"):
            check_plan(study_data, study(quantile=quantile))
        check_plan(study_data, study(quantile=quantile, quantile_over="all"))
    with pytest.raises(InputError, match="split: expected at least 2 items in test, found 1 of 16 items"):
        check_plan(FakeStudyData(["train"] * 15 + ["test"]), study())


@settings(max_examples=50)
@given(st.integers(8, 60), st.floats(0.05, 0.95))
def test_the_planned_classes_are_those_of_the_labels(n: int, quantile: float) -> None:
    """For amounts without ties, the plan rejects just what the labels would."""
    hard = int(hard_by_quantile(np.arange(n, dtype=float), np.ones(n, bool), quantile).sum())
    study_data: Any = FakeStudyData(["train"] * n + ["test"] * 4)
    study_data.groups = np.arange(n + 4).astype(str)
    try:
        check_plan(study_data, study(quantile=quantile))
        assert min(hard, n - hard) >= 2
    except InputError as error:
        assert f"found {hard} and {n - hard} at" in str(error) and min(hard, n - hard) < 2


def test_a_prompt_in_train_and_test_is_rejected(tmp_path: Path) -> None:
    study_data = FakeStudyData()
    study_data.metadata["prompt"][8] = study_data.metadata["prompt"][12]  # item 8 is purged
    study_data.metadata["prompt"][10] = study_data.metadata["prompt"][11]  # both are test items
    written(tmp_path / "fine", study_data)
    study_data.metadata["prompt"][13] = study_data.metadata["prompt"][3]
    (tmp_path / "not").mkdir()
    rejected(tmp_path / "not", study_data, "split: expected different prompts in train and test, found "
             "that of test item 13 in train item 3")
    del study_data.metadata["prompt"]  # a series has no prompts
    check_split(study_data.parts, np.arange(16) % 2, study_data)
