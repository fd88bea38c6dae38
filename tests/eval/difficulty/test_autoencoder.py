"""The quality checks of an autoencoder."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from tilelli_jax.eval.difficulty.autoencoder import SAEEvaluation
from tilelli_jax.eval.difficulty.config import SAEStageConfig
from tilelli_jax.eval.difficulty.report import sae_row
from tilelli_jax.eval.tables import as_json, format_cell

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
    tree = json.loads(as_json(
        {**dataclasses.asdict(GOOD), **losses._asdict(), "recovered": losses.recovered}))
    row = sae_row(tree, "nats")
    assert tree["recovered"] is None and format_cell(row["loss recovered"]) == "–"
    assert row["loss, zeros (nats)"] == zeroed


@pytest.mark.parametrize(("change", "fault"), [
    ({"source_model": "other"}, "it was trained on activations of other, not of net"),
    ({"steps": 199}, "it was trained for 199 updates (minimum 200)"),
    ({"dead": 0.51}, "51% of its latents are never active in 500"),
    ({"explained": 0.29}, "it explains 29% of their variance"),
    ({"explained": 0.5, "explained_random": 0.45}, "minimum 55%; random weights explain 45%")])
def test_each_fault_is_reported(change: dict[str, object], fault: str) -> None:
    faults = dataclasses.replace(GOOD, **change).faults(SAEStageConfig(), "net")  # type: ignore[arg-type]
    assert len(faults) == 1 and fault in faults[0]
