"""The quality checks of an autoencoder."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tilelli_jax.data.activations import open_activations, write_activations
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.eval.difficulty.autoencoder import SAEEvaluation, _random_sae
from tilelli_jax.eval.difficulty.config import SAEStageConfig
from tilelli_jax.eval.difficulty.report import sae_row
from tilelli_jax.eval.tables import format_cell, json_with_nulls
from tilelli_jax.loading import store
from tilelli_jax.signals.patching import PatchedLoss

GOOD = SAEEvaluation(source_model="net", steps=1000, explained=0.8, dead=0.1, l0=16.0, rows=500,
                     explained_probed=0.7, explained_random=0.25, losses=PatchedLoss(1.0, 1.1, 2.0))


def test_a_trained_autoencoder_passes() -> None:
    assert GOOD.faults(SAEStageConfig(), "net") == []
    assert dataclasses.replace(GOOD, source_model="", steps=None).faults(SAEStageConfig(), "net") == []
    assert GOOD.losses.recovered == pytest.approx(0.9)


@pytest.mark.parametrize("zeroed", [1.0, 0.9])
def test_loss_recovered_is_undefined_where_zeros_are_no_worse(zeroed: float) -> None:
    losses = PatchedLoss(1.0, 1.1, zeroed)
    assert math.isnan(losses.recovered)
    tree = json.loads(json_with_nulls(
        {**dataclasses.asdict(GOOD), **losses._asdict(), "recovered": losses.recovered}))
    row = sae_row(tree, "nats")
    assert tree["recovered"] is None and format_cell(row["loss recovered"]) == "–"
    assert row["loss, zeros (nats)"] == zeroed


def test_the_bias_of_random_weights_is_the_mean_of_all_rows(tmp_path: Path) -> None:
    """Also where the last block has fewer rows than the others."""
    values = np.ones((8193, 2), np.float32)
    values[-1] = [8194, 1]
    write_activations(tmp_path / "rows", [values], {})
    rows = open_activations(tmp_path / "rows")
    assert [len(block) for block in rows.blocks()] == [8192, 1]
    sae = store.build(SAEConfig(d_model=2, n_latents=4, k=1), 0)
    assert np.asarray(_random_sae(sae, rows, 3.2).bias).tolist() == [2.0, 1.0]


def test_random_weights_have_the_k_of_the_autoencoder_or_its_mean_l0(tmp_path: Path) -> None:
    write_activations(tmp_path / "rows", [np.ones((3, 2), np.float32)], {})
    rows = open_activations(tmp_path / "rows")
    for config, k in ((SAEConfig(d_model=2, n_latents=4, k=2), 2),
                      (SAEConfig(d_model=2, n_latents=4, k=0, activation="jumprelu"), 3)):
        assert _random_sae(store.build(config, 0), rows, 3.2).config == dataclasses.replace(
            config, activation="topk", k=k)


def test_the_layer_replaces_its_name_in_the_path() -> None:
    for path, expected in (("runs/{layer}/a", "runs/12/a"), ("{layer}-{layer}", "12-12"),
                           ("runs/{x}", "runs/{x}"), ("a{", "a{"), ("{{layer}}", "{12}")):
        assert SAEStageConfig(path=path).model_path(12) == Path(expected)


@pytest.mark.parametrize(("change", "fault"), [
    ({"source_model": "other"}, "it was trained on activations of other, not of net"),
    ({"steps": 199}, "it was trained for 199 updates (minimum 200)"),
    ({"dead": 0.51}, "51% of its latents are never active in 500"),
    ({"explained": 0.29}, "it explains 29% of their variance"),
    ({"explained": 0.5, "explained_random": 0.45}, "minimum 55%; random weights explain 45%")])
def test_each_fault_is_reported(change: dict[str, object], fault: str) -> None:
    faults = dataclasses.replace(GOOD, **change).faults(SAEStageConfig(), "net")  # type: ignore[arg-type]
    assert len(faults) == 1 and fault in faults[0]
