"""Signal D: how far a prompt's inner value lies from those of questions that were answered rightly.

The Mahalanobis distance (Lee et al. 2018, arXiv:1807.03888) to their mean, with the covariance shrunk as
Ledoit & Wolf (2004) have it: there are fewer questions than dimensions, as a rule.
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
    """Of the known: mean `[d]`, precision (inverse covariance) `[d, d]`, and how much it was shrunk."""

    mean: Floats
    precision: Floats
    shrinkage: float

    @classmethod
    def fit(cls, values: ArrayLike, known: ArrayLike) -> Familiarity:
        """Args: values `[questions, d]`; known `[questions]`, 1 where the answer was right.

        Raises:
            ValueError: fewer than two are known, all that are known are equal, or a value is not finite.
        """
        chosen = checks.labels(known, name="known")
        values = checks.matrix(values, rows=len(chosen)).astype(float)
        if chosen.sum() < 2:
            raise ValueError(f"known: expected two questions at least, found {int(chosen.sum())}")
        if not any(checks.varies(column, checks.READ) for column in values[chosen].T):
            raise ValueError("values: expected known questions that differ, found all equal")
        found = LedoitWolf().fit(values[chosen])
        return cls(found.location_, found.get_precision(), float(found.shrinkage_))

    def distance(self, values: ArrayLike) -> Floats:
        """values `[questions, d]` → `[questions]`: the larger, the less familiar."""
        away = checks.matrix(values, columns=len(self.mean)).astype(float) - self.mean
        return np.sqrt(np.maximum(((away @ self.precision) * away).sum(axis=1), 0))
