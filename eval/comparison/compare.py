"""Statistics of validation losses: mean, standard deviation, and tests of each model against a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..stats import exact_relabelling, exact_sign_flips, holm, paired_t, welch

TESTS = ("welch", "unpaired", "paired")


def compare(losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns the statistics of one text as JSON. p is two-sided; `p_holm` is corrected within each test.

    Args:
        losses: model → nats/byte `[seeds]`, in the same order of seeds; the first model is the reference.
    """
    reference, *others = losses
    reference_losses = np.asarray(losses[reference], float)
    comparisons: list[dict[str, Any]] = []
    for name in others:
        model_losses = np.asarray(losses[name], float)
        differences = model_losses - reference_losses
        welch_test, paired_test = welch(model_losses, reference_losses), paired_t(differences)
        unpaired = exact_relabelling(model_losses, reference_losses)
        paired = exact_sign_flips(differences)
        comparisons.append({
            "model": name, "difference": welch_test.difference,
            "degrees_of_freedom": welch_test.degrees_of_freedom,
            "differences": differences.tolist(), "paired_difference": paired_test.difference,
            "p": {"welch": welch_test.p, "unpaired": unpaired.p, "paired": paired.p},
            "min_p": {"unpaired": unpaired.min_p, "paired": paired.min_p},
            "arrangements": {"unpaired": unpaired.arrangements, "paired": paired.arrangements}})
    for test in TESTS:
        corrected = holm([comparison["p"][test] for comparison in comparisons])
        for comparison, p in zip(comparisons, corrected, strict=True):
            comparison.setdefault("p_holm", {})[test] = float(p)
    return {"reference": reference, "comparisons": comparisons, "losses": {
        name: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "by_seed": list(values)}
        for name, values in losses.items()}}
