"""Templates of the built-in stories: twelve plots, and what they share.

Every plot states its {place} and its {topic} whatever lines are chosen, so that two different
premises never give the same story.
"""

from __future__ import annotations

from tilelli_jax.data.synthetic.plots import deeds, things
from tilelli_jax.data.synthetic.plots.layout import Plot
from tilelli_jax.data.synthetic.plots.phrases import ASIDES, ENDING, OPENING, PHRASES

__all__ = ["ASIDES", "ENDING", "OPENING", "PHRASES", "PLOTS", "Plot"]

PLOTS: dict[str, Plot] = things.PLOTS | deeds.PLOTS
