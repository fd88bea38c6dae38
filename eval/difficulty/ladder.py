"""The rungs that a study climbs, and what is compared.

Beside the published five stand controls: how far the answer's length, or the surprise at the prompt,
goes alone, and whether activations add to it. Without them a probe may have found no more than these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..probes import HEADLINES, LADDER, Rung

Notify = Callable[[str], None]  # is called with what is being made
CONTROLS = (Rung("C1_length", ("length",)), Rung("C2_cheap_surprise", ("cheap", "surprise")),
            Rung("C3_length_raw", ("length", "raw")), Rung("C4_length_sae", ("length", "sae")),
            Rung("C5_surprise_raw", ("cheap", "surprise", "raw")))
COMPARISONS = (*HEADLINES, ("C5_surprise_raw", "C2_cheap_surprise"), ("P4_raw_only", "C1_length"),
               ("C3_length_raw", "C1_length"), ("C4_length_sae", "C1_length"))


def rungs(blocks: Collection[str]) -> list[Rung]:
    """Those whose blocks there are."""
    return [rung for rung in (*LADDER, *CONTROLS) if set(rung.blocks) <= set(blocks)]
