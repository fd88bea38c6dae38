"""Tolerances for comparing two computations of the same numbers: one margin for rounding errors.

The rounding of a sum depends on the order of its terms, and the order depends on the CPU's vectors, the
compiler and the number of threads. So the tolerance is derived from the magnitude of the terms, not from the
result, which cancellation can make small, nor from the error measured on one CPU. Outputs of a whole network
are compared relative to their largest number (`reference_impl.comparison.distance`), which has the magnitude
of the terms in its layers: use `noise(1, steps=…)` with one or two steps per layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MARGIN = 32  # times the rounding error of one operation; sums of a few hundred terms use less than a quarter


def noise(*summed: Any, steps: float = 1, dtype: Any = np.float32) -> float:
    """Absolute tolerance of a result that is a sum of terms of the magnitude of `summed`.

    Args:
      summed: arrays or numbers, of which the largest magnitude is used: the terms that are added. For a
      matrix
        product, largest × largest is a bound; for a difference, give both sides.
      steps: number of such sums that follow each other, such as layers of a network.
      dtype: type of the computation, whose machine epsilon is used.
    """
    largest = max(float(np.abs(np.asarray(part, np.float64)).max(initial=0)) for part in summed)
    return MARGIN * float(np.finfo(dtype).eps) * largest * steps
