"""Mahalanobis familiarity compared with scikit-learn's distance and a closed form."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from tilelli_jax.eval.familiarity import Familiarity
from tilelli_jax.eval.metrics import auroc


def test_the_distance_equals_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((80, 5)) @ rng.standard_normal((5, 5))
    known = rng.random(80) < 0.5
    familiarity = Familiarity.fit(values, known)
    expected = LedoitWolf().fit(values[known]).mahalanobis(values)
    np.testing.assert_allclose(familiarity.distance(values)**2, expected, rtol=1e-9)
    assert familiarity.distance(values[known].mean(axis=0)[None])[0] == pytest.approx(0, abs=1e-6)


def test_known_questions_are_nearer_with_more_dimensions_than_questions() -> None:
    rng = np.random.default_rng(1)
    values, known = rng.standard_normal((60, 200)), np.arange(60) < 40
    values[~known] += 1.5
    fit = np.arange(60) % 2 == 0
    familiarity = Familiarity.fit(values[fit], known[fit])
    assert 0 < familiarity.shrinkage <= 1
    assert auroc(known[~fit], -familiarity.distance(values[~fit])) > 0.9


@pytest.mark.parametrize(("values", "known", "message"), [
    (np.ones((3, 2)), [1, 0, 0], "expected at least two questions, found 1"),
    (np.array([[1, 2], [np.nan, 1], [1, 1.0]]), [1, 1, 1], r"values: .* \(the first: row 1\)"),
    (np.full((3, 2), 0.1), [1, 1, 0], "expected known questions that differ")])
def test_invalid_input_is_rejected(values: np.ndarray, known: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Familiarity.fit(values, known)
