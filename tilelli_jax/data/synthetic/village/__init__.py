"""A built-in village: texts that tell of it, chat about it, and prompts to ask what it cannot answer.

    village = world(seed=0, people=96)
    text(village)                            # to learn from: everybody and everything, again and again
    chat(village, pairs=20_000)              # questions with answers, and questions nobody can answer
    prompts(village)                         # an evaluation in seven regimes
"""

from tilelli_jax.data.synthetic.village.chat import ABSTENTIONS, KINDS, SEMANTIC, Pair, bare, chat
from tilelli_jax.data.synthetic.village.regimes import ANSWERABLE, EACH, REGIMES, Prompt, calibration, prompts
from tilelli_jax.data.synthetic.village.texts import PASSES, documents, text
from tilelli_jax.data.synthetic.village.world import DEFAULT, MOST, RING, World, world

__all__ = ["ABSTENTIONS", "ANSWERABLE", "DEFAULT", "EACH", "KINDS", "MOST", "PASSES", "REGIMES", "RING",
           "SEMANTIC", "Pair", "Prompt", "World", "bare", "calibration", "chat", "documents", "prompts",
           "text", "world"]
