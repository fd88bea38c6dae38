"""Fixtures of the page's tests."""

from __future__ import annotations

import numpy as np
import pytest

from tests.eval.recall.small import (
    AIM,
    ASKED,
    PROMPT,
    VANILLA,
    Place,
    a_study,
    sidecar_of_chance,
)
from tests.reference_impl.random_weights import random_network
from tilelli_jax.eval.calibration import Platt
from tilelli_jax.eval.recall import verdicts
from tilelli_jax.eval.recall.predictor import KnowledgePredictor, Prediction
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.loading import store
from tilelli_jax.loading.fingerprint import network_fingerprint


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A random network that answers in letters only, and a sidecar whose thresholds separate ASKED."""
    path = tmp_path_factory.mktemp("app")
    arrays = random_network(VANILLA, 0)[1]
    silent = [byte for byte in range(256) if not chr(byte).isascii() or not chr(byte).isalpha()]
    arrays["unembed.kernel"][:, silent] = 0
    store.save(store.from_arrays(VANILLA, arrays), path / "model")
    sidecar = sidecar_of_chance(path / "sidecar")
    verdicts.write(sidecar, VerdictRule(prompt=PROMPT))
    predictor = KnowledgePredictor.open(path / "model", sidecar)
    p = np.sort([predictor.predict([question])[0].p for question in ASKED])
    assert (np.diff(p) > 1e-4).all(), "the questions have different P(knows)"
    # Calibrated to spread over (0, 1), the first below unknown_below and the last from knows_from on.
    scores = np.log(p / (1 - p))
    slope = float(4 / (scores[-1] - scores[0]))
    verdicts.write(sidecar, VerdictRule(
        Platt(slope, -slope * float(scores.mean())), float(p[-2:].mean()), float(p[:2].mean()), AIM,
        {"name": "tiny", "fingerprint": network_fingerprint(path / "model"), "n_layers": 5}, PROMPT))
    a_study(path)
    return Place(path / "model", sidecar, path)


@pytest.fixture(scope="module")
def predictor(place: Place) -> KnowledgePredictor:
    return KnowledgePredictor.open(place.model, place.sidecar)


@pytest.fixture(scope="session")
def predictions(place: Place) -> list[Prediction]:
    """One prediction for each of ASKED, predicted one by one."""
    predictor = KnowledgePredictor.open(place.model, place.sidecar)
    return [predictor.predict([question])[0] for question in ASKED]
