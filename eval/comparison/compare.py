"""What losses come to: means, spreads, and what sets each model apart from the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..stats import exact_relabelling, exact_sign_flips, holm, paired_t, welch

TESTS = ("welch", "unpaired", "paired")


def compare(losses: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Of one text: a tree of JSON. p is two-sided; `p_holm` is corrected, test by test.

    Args:
        losses: model → nats/byte `[seeds]`, in one order of the seeds; the first is the reference.
    """
    reference, *others = losses
    theirs = np.asarray(losses[reference], float)
    comparisons: list[dict[str, Any]] = []
    for name in others:
        its = np.asarray(losses[name], float)
        apart, pairs = welch(its, theirs), paired_t(its - theirs)
        unpaired, paired = exact_relabelling(its, theirs), exact_sign_flips(its - theirs)
        comparisons.append({
            "model": name, "difference": apart.difference, "freedom": apart.freedom,
            "differences": (its - theirs).tolist(), "paired_difference": pairs.difference,
            "p": {"welch": apart.p, "unpaired": unpaired.p, "paired": paired.p},
            "least": {"unpaired": unpaired.least, "paired": paired.least},
            "arrangements": {"unpaired": unpaired.arrangements, "paired": paired.arrangements}})
    for test in TESTS:
        for one, p in zip(comparisons, holm([one["p"][test] for one in comparisons]), strict=True):
            one.setdefault("p_holm", {})[test] = float(p)
    return {"reference": reference, "comparisons": comparisons, "losses": {
        name: {"mean": float(np.mean(found)), "sd": float(np.std(found, ddof=1)), "each": list(found)}
        for name, found in losses.items()}}
