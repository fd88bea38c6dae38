"""When an autoencoder is not to be trusted."""

from __future__ import annotations

import dataclasses

import pytest
from tilelli_jax.eval.difficulty.autoencoder import Judged
from tilelli_jax.eval.difficulty.config import SAEStageConfig

from tilelli_jax.signals.patching import Spliced

GOOD = Judged(of_model="net", steps=1000, explained=0.8, dead=0.1, l0=16.0, rows=500, probed=0.7,
              untrained=0.25, losses=Spliced(1.0, 1.1, 2.0))


def test_one_that_has_learned() -> None:
    assert GOOD.faults(SAEStageConfig(), "net") == []
    assert dataclasses.replace(GOOD, of_model="", steps=None).faults(SAEStageConfig(), "net") == []
    assert GOOD.losses.recovered == pytest.approx(0.9)


@pytest.mark.parametrize(("change", "fault"), [
    ({"of_model": "other"}, "it says it is of other, and the network is net"),
    ({"steps": 199}, "it has seen 199 updates"),
    ({"dead": 0.51}, "51% of its latents were never active in 500"),
    ({"explained": 0.29}, "it explains 29% of their variance"),
    ({"explained": 0.5, "untrained": 0.45}, "least 55%; random weights explain 45%")])
def test_one_that_has_not(change: dict[str, object], fault: str) -> None:
    found = dataclasses.replace(GOOD, **change).faults(SAEStageConfig(), "net")  # type: ignore[arg-type]
    assert len(found) == 1 and fault in found[0]
