"""Controls on synthetic questions whose labels depend on known features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from tilelli_jax.eval.estimators.controls import controls
from tilelli_jax.eval.metrics import auroc


class Questions(NamedTuple):
    """Columns `[rows]`."""

    text: list[str]
    labels: np.ndarray
    datasets: np.ndarray
    popularity: np.ndarray


def synthetic(n: int = 600, seed: int = 0) -> Questions:
    """Labels are 1 more often in data set "b", for popular entities in "a", and for questions about Rome."""
    rng = np.random.default_rng(seed)
    datasets = np.where(rng.random(n) < 0.5, "a", "b")
    popularity = np.where(datasets == "a", np.floor(10 ** rng.uniform(0, 5, n)), np.nan)
    rome = rng.random(n) < 0.3
    odds = 2 * rome - np.where(datasets == "a", 5.5 - 1.5 * np.log10(np.nan_to_num(popularity) + 1), 0)
    labels = (rng.random(n) < 1 / (1 + np.exp(-odds))).astype(int)
    text = [f"What is {'it in Rome' if r else 'the thing'} number {rng.integers(50)}" for r in rome]
    return Questions(text, labels, datasets, popularity)


TRAIN, TEST = np.arange(400), np.arange(400, 600)


def test_each_control_finds_its_feature() -> None:
    q = synthetic()
    scores = controls(q.text, q.labels, q.datasets, TRAIN, q.popularity)
    assert set(scores) == {"words", "length", "dataset", "popularity"}
    assert all(values.shape == (600,) for values in scores.values())
    assert auroc(q.labels[TEST], scores["words"][TEST]) > 0.6
    assert auroc(q.labels[TEST], scores["dataset"][TEST]) > 0.55
    assert len(set(scores["dataset"].tolist())) == 2
    popular = ~np.isnan(q.popularity)
    assert (np.isnan(scores["popularity"]) == ~popular).all()
    held = TEST[popular[TEST]]
    assert auroc(q.labels[held], scores["popularity"][held]) > 0.7
    order = np.argsort(q.popularity[held], kind="stable")
    assert (np.diff(scores["popularity"][held][order]) >= 0).all()


def test_held_out_labels_are_not_used() -> None:
    q = synthetic()
    scores = controls(q.text, q.labels, q.datasets, TRAIN, q.popularity)
    hidden = np.where(np.arange(600) < 400, q.labels, 1 - q.labels)
    for name, values in controls(q.text, hidden, q.datasets, TRAIN, q.popularity).items():
        np.testing.assert_array_equal(values, scores[name])


def test_scores_are_log_odds() -> None:
    """The mean probability equals the fraction of 1s of the training rows; the sign is learned."""
    labels = np.tile([1, 1, 1, 0, 0, 0], 20)
    lengths = np.tile([2, 3, 2, 4, 3, 5], 20)
    texts = ["x" * k for k in lengths]
    scores = controls(texts, labels, ["a"] * 120, np.arange(120))["length"]
    assert (1 / (1 + np.exp(-scores))).mean() == pytest.approx(labels.mean(), abs=1e-4)
    assert auroc(labels, scores) == auroc(labels, -lengths)  # short questions are known


def test_controls_that_do_not_apply_are_omitted() -> None:
    q = synthetic()
    assert set(controls(q.text, q.labels, q.datasets, TRAIN)) == {"words", "length", "dataset"}
    only_b = TRAIN[q.datasets[TRAIN] == "b"]
    assert set(controls(q.text, q.labels, q.datasets, only_b, q.popularity)) == {"words", "length"}
    third = np.where(np.arange(600) >= 400, "c", q.datasets)
    scores = controls(q.text, q.labels, third, TRAIN)["dataset"]
    assert np.isnan(scores[TEST]).all() and not np.isnan(scores[TRAIN]).any()
    distinct = [f"word{row}" for row in range(600)]
    assert "words" not in controls(distinct, q.labels, q.datasets, TRAIN)


def test_invalid_inputs() -> None:
    q = synthetic()
    with pytest.raises(ValueError, match="both labels"):
        controls(q.text, np.ones(600), q.datasets, TRAIN)
    with pytest.raises(ValueError, match="popularity"):
        controls(q.text, q.labels, q.datasets, TRAIN, np.full(600, -2.0))
