"""The quality checks of an autoencoder."""

from __future__ import annotations

import dataclasses

import pytest
from tilelli_jax.eval.difficulty.autoencoder import SAEEvaluation
from tilelli_jax.eval.difficulty.config import SAEStageConfig

from tilelli_jax.signals.patching import Spliced

GOOD = SAEEvaluation(of_model="net", steps=1000, explained=0.8, dead=0.1, l0=16.0, rows=500,
                     explained_probed=0.7, explained_random=0.25, losses=Spliced(1.0, 1.1, 2.0))


def test_a_trained_autoencoder_passes() -> None:
    assert GOOD.faults(SAEStageConfig(), "net") == []
    assert dataclasses.replace(GOOD, of_model="", steps=None).faults(SAEStageConfig(), "net") == []
    assert GOOD.losses.recovered == pytest.approx(0.9)


@pytest.mark.parametrize(("change", "fault"), [
    ({"of_model": "other"}, "it was trained on activations of other, not of net"),
    ({"steps": 199}, "it was trained for 199 updates (minimum 200)"),
    ({"dead": 0.51}, "51% of its latents are never active in 500"),
    ({"explained": 0.29}, "it explains 29% of their variance"),
    ({"explained": 0.5, "explained_random": 0.45}, "minimum 55%; random weights explain 45%")])
def test_each_fault_is_reported(change: dict[str, object], fault: str) -> None:
    faults = dataclasses.replace(GOOD, **change).faults(SAEStageConfig(), "net")  # type: ignore[arg-type]
    assert len(faults) == 1 and fault in faults[0]
