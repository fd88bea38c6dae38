"""Mahalanobis familiarity (signal D of Recall): distance of a prompt's activations from known questions.

The distance (Lee et al. 2018, arXiv:1807.03888) is measured to the mean activation of the questions that the
model answered correctly. The covariance is shrunk (Ledoit & Wolf 2004) because there are usually fewer
questions than dimensions.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from sklearn.covariance import LedoitWolf

from . import checks
from .checks import Floats


@dataclasses.dataclass(frozen=True)
class Familiarity:
    """Gaussian of the activations of known questions.

    Attributes:
        mean: `[d]`.
        precision: inverse covariance `[d, d]`.
        shrinkage: Ledoit–Wolf coefficient, from 0 (none) to 1 (a multiple of the identity).
    """

    mean: Floats
    precision: Floats
    shrinkage: float

    @classmethod
    def fit(cls, values: ArrayLike, known: ArrayLike) -> Familiarity:
        """Fits the mean and the covariance of the known questions.

        Args:
            values: activations `[questions, d]`.
            known: `[questions]`, 1 where the model's answer is right.

        Raises:
            ValueError: fewer than two questions are known, all known ones are equal, or a value is not
                finite.
        """
        is_known = checks.labels(known, name="known")
        values = checks.matrix(values, rows=len(is_known)).astype(float)
        if is_known.sum() < 2:
            raise ValueError(f"known: expected at least two questions, found {int(is_known.sum())}")
        if not any(checks.varies(column, checks.INPUT_TOLERANCE) for column in values[is_known].T):
            raise ValueError("values: expected known questions that differ, found all equal")
        model = LedoitWolf().fit(values[is_known])
        return cls(model.location_, model.get_precision(), float(model.shrinkage_))

    def distance(self, values: ArrayLike) -> Floats:
        """Returns distances: values `[questions, d]` → `[questions]`; the larger, the less familiar."""
        offset = checks.matrix(values, columns=len(self.mean)).astype(float) - self.mean
        return np.sqrt(np.maximum(((offset @ self.precision) * offset).sum(axis=1), 0))
