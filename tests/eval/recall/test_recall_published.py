"""What can be made again of Recall's published study without its network: split, counts, shortcuts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from tilelli_jax.eval.metrics import auroc
from tilelli_jax.eval.recall.controls import controls
from tilelli_jax.eval.recall.splits import SHARES, grouped, published, same

from tests.references import STORED, needs

TABLE = STORED / "data" / "recall_dataset.parquet"
SPLITS = STORED / "data" / "recall_splits.json"
COUNTS = STORED / "recall_cases" / "dataset_stats.json"
Columns = dict[str, np.ndarray]
Splits = dict[str, dict[str, np.ndarray]]

pytestmark = needs(TABLE)


@pytest.fixture(scope="module")
def table() -> Columns:
    found = pyarrow.parquet.read_table(TABLE)
    return {name: found[name].to_numpy(zero_copy_only=False) for name in found.column_names}


@pytest.fixture(scope="module")
def split(table: Columns) -> Splits:
    return published(table["dataset"], table["label"])


@pytest.fixture(scope="module")
def belongs(table: Columns) -> np.ndarray:
    return same(table["question"], table["id"])


def strata(table: Columns) -> np.ndarray:
    return np.array([f"{name}|{label}" for name, label in zip(table["dataset"], table["label"])])


@needs(SPLITS)
def test_the_published_split(split: Splits) -> None:
    found = {name: {part: rows.tolist() for part, rows in of.items()} for name, of in split.items()}
    assert found == json.loads(SPLITS.read_text())


@needs(COUNTS)
def test_the_published_counts(table: Columns, split: Splits) -> None:
    theirs: dict[str, Any] = json.loads(COUNTS.read_text())
    label, dataset = table["label"], table["dataset"]

    def of(rows: np.ndarray) -> dict[str, Any]:
        return {"n": len(rows), "label_sum": label[rows].sum(),
                "label_rate": pytest.approx(label[rows].mean())}
    assert {key: theirs[key] for key in ("n", "label_sum", "label_rate")} == of(np.arange(3000))
    assert theirs["by_dataset"] == {name: of(np.flatnonzero(dataset == name)) for name in set(dataset)}
    assert theirs["splits"] == {name: {part: of(rows) | {"popqa": (dataset[rows] == "popqa").sum()}
                                       for part, rows in parts.items()} for name, parts in split.items()}
    assert theirs["strata_counts"] == dict(zip(*np.unique(strata(table), return_counts=True)))
    both = {part: np.isin(split["cross"]["test"], rows).sum() for part, rows in split["main"].items()}
    assert theirs["cross_leak"] == {"cross_test_in_main_train": both["train"], "in_val": both["val"],
                                    "in_test": both["test"]}


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
    told = theirs["popularity_test"]
    np.testing.assert_allclose(edges, told["quantiles_log10p1"])
    assert [told["buckets"][f"bucket_{k}"] for k in range(4)] == [
        {"n": count, "label_rate": pytest.approx(rate)} for count, rate in zip(n, rates)]
    edges, n, rates = quartiles(np.flatnonzero(popqa))
    told = theirs["popularity_all_popqa"]
    np.testing.assert_allclose(edges, told["quantiles_log10p1"])
    assert told["n"] == n and told["label_rate"] == pytest.approx(rates)


@needs(COUNTS)
def test_questions_on_both_sides(table: Columns, split: Splits, belongs: np.ndarray) -> None:
    """Published, 16 test and 14 validation questions are in train, too; grouped, none is."""
    theirs = json.loads(COUNTS.read_text())["dup"]
    assert theirs["dup_ids"] == 3000 - len(set(table["id"]))
    assert theirs["dup_questions"] == 3000 - len(set(table["question"])) == 68
    assert len(set(belongs.tolist())) == 2930  # two more differ in their marks only

    def on_both(column: np.ndarray, held: np.ndarray, train: np.ndarray) -> int:
        return int(np.isin(column[held], column[train]).sum())
    for column in (table["question"], belongs):
        for part, n in (("test", 16), ("val", 14)):
            assert on_both(column, split["main"][part], split["main"]["train"]) == n
            assert n == theirs[f"{part}_questions_also_in_train"]
    parts = grouped(belongs, strata(table))
    for part, rows in parts.items():
        others = np.concatenate([other for name, other in parts.items() if name != part])
        for column in (table["question"], table["id"], belongs):
            assert on_both(column, rows, others) == 0


def test_the_grouped_split_keeps_its_shares(table: Columns, belongs: np.ndarray) -> None:
    kinds = strata(table)
    for part, rows in grouped(belongs, kinds).items():
        assert abs(len(rows) - SHARES[part] * 3000) <= 1
        for kind in np.unique(kinds):
            assert abs((kinds[rows] == kind).sum() - SHARES[part] * (kinds == kind).sum()) <= 2


def test_the_published_shortcuts(table: Columns, split: Splits) -> None:
    """What is told of them, to three digits: all of it on the test part, learned from the train part."""
    label, test = table["label"], split["main"]["test"]
    found = controls(table["question"], label, table["dataset"], split["main"]["train"],
                     table["popularity"])
    of = {name: test[table["dataset"][test] == name] for name in ("popqa", "triviaqa")}

    def area(name: str, rows: np.ndarray) -> float:
        return auroc(label[rows], found[name][rows])
    assert area("dataset", test) == pytest.approx(0.6899766360545005, abs=1e-12)
    assert area("length", test) == pytest.approx(0.6930301418029563, abs=1e-12)
    assert area("words", test) == pytest.approx(0.770, abs=0.001)
    assert area("words", of["popqa"]) == pytest.approx(0.743, abs=0.001)
    assert area("words", of["triviaqa"]) == pytest.approx(0.643, abs=0.001)
    assert area("popularity", of["popqa"]) == pytest.approx(0.775, abs=0.0005)
    assert np.isnan(found["popularity"][of["triviaqa"]]).all()
