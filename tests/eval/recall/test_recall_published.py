"""The parts of Recall's published study that need no network: split, counts, controls."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from tests.references import STORED, needs
from tilelli_jax.eval.estimators.controls import controls
from tilelli_jax.eval.metrics import auroc
from tilelli_jax.eval.recall.splits import FRACTIONS, group_ids, grouped_splits, published_splits

TABLE = STORED / "data" / "recall_dataset.parquet"
SPLITS = STORED / "data" / "recall_splits.json"
COUNTS = STORED / "recall_cases" / "dataset_stats.json"
Columns = dict[str, np.ndarray]
Splits = dict[str, dict[str, np.ndarray]]

pytestmark = needs(TABLE)


@pytest.fixture(scope="module")
def table() -> Columns:
    data = pyarrow.parquet.read_table(TABLE)
    return {name: data[name].to_numpy(zero_copy_only=False) for name in data.column_names}


@pytest.fixture(scope="module")
def split(table: Columns) -> Splits:
    return published_splits(table["dataset"], table["label"])


@pytest.fixture(scope="module")
def groups(table: Columns) -> np.ndarray:
    return group_ids(table["question"], table["id"])


def strata(table: Columns) -> np.ndarray:
    return np.array([f"{name}|{label}" for name, label in zip(table["dataset"], table["label"])])


@needs(SPLITS)
def test_the_published_split(split: Splits) -> None:
    ours = {name: {part: rows.tolist() for part, rows in parts.items()} for name, parts in split.items()}
    assert ours == json.loads(SPLITS.read_text())


@needs(COUNTS)
def test_the_published_counts(table: Columns, split: Splits) -> None:
    theirs: dict[str, Any] = json.loads(COUNTS.read_text())
    label, dataset = table["label"], table["dataset"]

    def counts(rows: np.ndarray) -> dict[str, Any]:
        return {"n": len(rows), "label_sum": label[rows].sum(),
                "label_rate": pytest.approx(label[rows].mean())}
    assert {key: theirs[key] for key in ("n", "label_sum", "label_rate")} == counts(np.arange(3000))
    assert theirs["by_dataset"] == {name: counts(np.flatnonzero(dataset == name)) for name in set(dataset)}
    assert theirs["splits"] == {name: {part: counts(rows) | {"popqa": (dataset[rows] == "popqa").sum()}
                                       for part, rows in parts.items()} for name, parts in split.items()}
    assert theirs["strata_counts"] == dict(zip(*np.unique(strata(table), return_counts=True)))
    overlap = {part: np.isin(split["cross"]["test"], rows).sum() for part, rows in split["main"].items()}
    assert theirs["cross_leak"] == {"cross_test_in_main_train": overlap["train"], "in_val": overlap["val"],
                                    "in_test": overlap["test"]}


@needs(COUNTS)
def test_the_published_quartiles_of_popularity(table: Columns, split: Splits) -> None:
    theirs = json.loads(COUNTS.read_text())
    popqa = table["dataset"] == "popqa"

    def quartiles(rows: np.ndarray) -> tuple[np.ndarray, list[int], list[float]]:
        popular = np.log10(table["popularity"][rows] + 1)
        edges = np.quantile(popular, (0.25, 0.5, 0.75))
        which = np.digitize(popular, edges)
        return (edges, np.bincount(which).tolist(),
                [float(table["label"][rows][which == k].mean()) for k in range(4)])
    edges, n, rates = quartiles(split["main"]["test"][popqa[split["main"]["test"]]])
    published = theirs["popularity_test"]
    np.testing.assert_allclose(edges, published["quantiles_log10p1"])
    assert [published["buckets"][f"bucket_{k}"] for k in range(4)] == [
        {"n": count, "label_rate": pytest.approx(rate)} for count, rate in zip(n, rates)]
    edges, n, rates = quartiles(np.flatnonzero(popqa))
    published = theirs["popularity_all_popqa"]
    np.testing.assert_allclose(edges, published["quantiles_log10p1"])
    assert published["n"] == n and published["label_rate"] == pytest.approx(rates)


@needs(COUNTS)
def test_questions_in_two_splits(table: Columns, split: Splits, groups: np.ndarray) -> None:
    """In the published split 16 test and 14 validation questions are also in train; grouped, none is."""
    theirs = json.loads(COUNTS.read_text())["dup"]
    assert theirs["dup_ids"] == 3000 - len(set(table["id"]))
    assert theirs["dup_questions"] == 3000 - len(set(table["question"])) == 68
    assert len(set(groups.tolist())) == 2930  # two more differ only in punctuation

    def on_both(column: np.ndarray, held: np.ndarray, train: np.ndarray) -> int:
        return int(np.isin(column[held], column[train]).sum())
    for column in (table["question"], groups):
        for part, n in (("test", 16), ("val", 14)):
            assert on_both(column, split["main"][part], split["main"]["train"]) == n
            assert n == theirs[f"{part}_questions_also_in_train"]
    parts = grouped_splits(groups, strata(table))
    for part, rows in parts.items():
        others = np.concatenate([other for name, other in parts.items() if name != part])
        for column in (table["question"], table["id"], groups):
            assert on_both(column, rows, others) == 0


def test_the_grouped_split_keeps_its_fractions(table: Columns, groups: np.ndarray) -> None:
    kinds = strata(table)
    for part, rows in grouped_splits(groups, kinds).items():
        assert abs(len(rows) - FRACTIONS[part] * 3000) <= 1
        for kind in np.unique(kinds):
            assert abs((kinds[rows] == kind).sum() - FRACTIONS[part] * (kinds == kind).sum()) <= 2


def test_the_published_controls(table: Columns, split: Splits) -> None:
    """AUROCs to three digits on the test split, fitted to the train split."""
    label, test = table["label"], split["main"]["test"]
    scores = controls(table["question"], label, table["dataset"], split["main"]["train"],
                     table["popularity"])
    rows_of = {name: test[table["dataset"][test] == name] for name in ("popqa", "triviaqa")}

    def area(name: str, rows: np.ndarray) -> float:
        return auroc(label[rows], scores[name][rows])
    assert area("dataset", test) == pytest.approx(0.6899766360545005, abs=1e-12)
    assert area("length", test) == pytest.approx(0.6930301418029563, abs=1e-12)
    assert area("words", test) == pytest.approx(0.770, abs=0.001)
    assert area("words", rows_of["popqa"]) == pytest.approx(0.743, abs=0.001)
    assert area("words", rows_of["triviaqa"]) == pytest.approx(0.643, abs=0.001)
    assert area("popularity", rows_of["popqa"]) == pytest.approx(0.775, abs=0.0005)
    assert np.isnan(scores["popularity"][rows_of["triviaqa"]]).all()
