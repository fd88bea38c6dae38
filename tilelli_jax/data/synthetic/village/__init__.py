"""A built-in village: texts about it, chat about it, and prompts with and without an answer.

    village = world(seed=0, people=96)
    text(village)                            # training text: states every fact in each of its passes
    chat(village, pairs=20_000)              # questions with answers, and questions without one
    prompts(village)                         # evaluation prompts in seven regimes
"""

from tilelli_jax.data.synthetic.village.conversations import (
    ABSTENTIONS,
    KINDS,
    SEMANTIC,
    VillagePair,
    bare,
    chat,
)
from tilelli_jax.data.synthetic.village.regimes import (
    ANSWERABLE,
    EACH,
    REGIMES,
    EvaluationPrompt,
    calibration,
    prompts,
)
from tilelli_jax.data.synthetic.village.texts import PASSES, documents, text
from tilelli_jax.data.synthetic.village.world import DEFAULT, MAX_PEOPLE, RING, World, world

__all__ = ["ABSTENTIONS", "ANSWERABLE", "DEFAULT", "EACH", "KINDS", "MAX_PEOPLE", "PASSES", "REGIMES", "RING",
           "SEMANTIC", "EvaluationPrompt", "VillagePair", "World", "bare", "calibration", "chat", "documents",
           "prompts", "text", "world"]
