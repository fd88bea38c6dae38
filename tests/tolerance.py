"""How far apart two computations of the same numbers may be: one margin over float noise, for all tests.

How a sum is rounded depends on its order, and the order depends on the CPU's vectors, the compiler and the
number of threads. So a tolerance is taken from the size of what is summed, never from the result, which
cancellation can make small, nor from what one CPU happened to give. What a whole network computes is compared
in units of its largest number (`restated.comparison.distance`), which is as large as what its layers sum up:
`noise(1, steps=…)` of it, with a step or two for each layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MARGIN = 32  # times the rounding of one operation; sums of a few hundred terms stay below a quarter of it


def noise(*summed: Any, steps: float = 1, dtype: Any = np.float32) -> float:
    """The absolute tolerance of a result that is a sum of terms as large as `summed`.

    Args:
      summed: arrays or numbers; the largest magnitude among them counts. Of a product of matrices these are
        the terms that are added (a bound: largest × largest), of a difference its two sides.
      steps: how many such sums feed one another, for instance layers of a network.
      dtype: what is computed in; its machine epsilon counts.
    """
    largest = max(float(np.abs(np.asarray(part, np.float64)).max(initial=0)) for part in summed)
    return MARGIN * float(np.finfo(dtype).eps) * largest * steps
