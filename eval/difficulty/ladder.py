"""The rungs of a study's ladder of probes, and the comparisons between them.

P1 to P5 are the rungs of fm-difficulty-probe. C1 to C5 are controls: they show how well the answer's length
or the prompt's NLL predicts difficulty alone, and whether activations add to it. A probe on activations that
does not beat its control may have learned no more than the control.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..probes import LADDER, PUBLISHED_COMPARISONS, Rung

Notify = Callable[[str], None]  # receives one progress line
CONTROLS = (Rung("C1_length", ("length",)), Rung("C2_cheap_nll", ("cheap", "nll")),
            Rung("C3_length_raw", ("length", "raw")), Rung("C4_length_sae", ("length", "sae")),
            Rung("C5_nll_raw", ("cheap", "nll", "raw")))
COMPARISONS = (*PUBLISHED_COMPARISONS, ("C5_nll_raw", "C2_cheap_nll"), ("P4_raw_only", "C1_length"),
               ("C3_length_raw", "C1_length"), ("C4_length_sae", "C1_length"))


def rungs(blocks: Collection[str]) -> list[Rung]:
    """Returns the rungs whose feature blocks are all available."""
    return [rung for rung in (*LADDER, *CONTROLS) if set(rung.blocks) <= set(blocks)]
