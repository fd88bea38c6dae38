"""Chat about the village: questions with their answers, and questions without an answer.

In training every premise is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tilelli_jax.data.synthetic.stories import pick
from tilelli_jax.data.synthetic.village.names import OF_KIND
from tilelli_jax.data.synthetic.village.questions import (
    Purpose,
    about_invented_term,
    about_real_topic,
    about_unknown_entity,
    about_unstated_relation,
    ask,
    gibberish,
    purpose_of,
    unknown_names,
)
from tilelli_jax.data.synthetic.village.texts import documents
from tilelli_jax.data.synthetic.village.world import World, stream
from tilelli_jax.errors import InputError

ABSTENTIONS = ("I don't know.", "I don't know that.", "Sorry, I don't know.",
               "I have no idea, I don't know it.")
SEMANTIC = ("unknown_entity", "invented_term", "real_topic", "unstated_relation")
KINDS = (*SEMANTIC, "gibberish", "mismatched", "garbled")


class VillagePair(NamedTuple):
    """A user's turn and the model's correct turn, one line of ASCII each."""

    prompt: str
    response: str
    answerable: bool


def chat(world: World, pairs: int, seed: int = 0, unanswerable: float = 0.5,
         kinds: Sequence[str] = SEMANTIC, purpose: Purpose = "train") -> list[VillagePair]:
    """Draws training pairs, with repetition.

    Args:
        unanswerable: probability of a pair without an answer.
        kinds: kinds of pairs without an answer, drawn with equal probability. The response is an abstention
            for "unknown_entity" (a name that no text mentions), "invented_term" (made-up jargon),
            "real_topic" (a real topic that no text mentions), "unstated_relation" (a known name and a
            relation that no text states) and "gibberish" (no question). "mismatched" is an answerable
            question with the answer to another one; "garbled" is an answerable question with gibberish as its
            answer.
        purpose: the prompts to draw from. No prompt of "calibration" is in training, for any seed.

    Raises:
        InputError: a kind is unknown, or none is given where one is needed; a probability is outside [0, 1];
            a number is negative.
    """
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"kinds: expected some of {', '.join(KINDS)}, found {wrong[0]!r}")
    if not 0 <= unanswerable <= 1:
        raise InputError(f"unanswerable: expected a fraction from 0 to 1, found {unanswerable}")
    if pairs < 0:
        raise InputError(f"pairs: expected at least 0, found {pairs}")
    if unanswerable and not kinds:
        raise InputError("kinds: expected at least one kind of unanswerable question, found none")
    rng = stream(6, world.seed, seed)
    unknown = unknown_names(world, "train")

    def answered() -> VillagePair:
        asked = ask(rng, pick(rng, world.entities))
        return VillagePair(asked.prompt, asked.response, True)

    def unanswered() -> VillagePair:
        match pick(rng, kinds):
            case "unknown_entity":
                kind = pick(rng, tuple(OF_KIND))
                prompt = about_unknown_entity(rng, kind, unknown[kind])
            case "invented_term":
                prompt = about_invented_term(rng, "train")
            case "real_topic":
                prompt = about_real_topic(rng, "train")
            case "unstated_relation":
                prompt = about_unstated_relation(rng, world.people, "train")
            case "gibberish":
                prompt = gibberish(rng)
            case "garbled":
                return VillagePair(answered().prompt, gibberish(rng), False)
            case _:
                asked = answered()
                while (answer := answered().response) == asked.response:
                    pass
                return VillagePair(asked.prompt, answer, False)
        return VillagePair(prompt, pick(rng, ABSTENTIONS), False)

    found: list[VillagePair] = []
    while len(found) < pairs:
        # The kind is drawn before the prompt, so that rejected prompts do not change the proportions.
        draw = unanswered if rng.random() < unanswerable else answered
        while purpose_of((pair := draw()).prompt) != purpose:
            pass
        found.append(pair)
    return found


def bare(world: World, lines: int, seed: int = 0, unanswerable: float = 0.5) -> list[tuple[str, bool]]:
    """Returns text outside any turn, and whether it is about the village: pieces of its texts, or gibberish.

    The lengths of both have the distribution of gibberish's.

    Args:
        unanswerable: probability of gibberish.

    Raises:
        InputError: a probability is outside [0, 1], or a number is negative.
    """
    if not 0 <= unanswerable <= 1:
        raise InputError(f"unanswerable: expected a fraction from 0 to 1, found {unanswerable}")
    if lines < 0:
        raise InputError(f"lines: expected at least 0, found {lines}")
    rng = stream(9, world.seed, seed)
    texts = list(documents(world, passes=1))

    def piece() -> str:
        text, length = pick(rng, texts), len(gibberish(rng))
        start = int(rng.random() * max(1, len(text) - length))
        return text[start:start + length].strip()
    return [(gibberish(rng), False) if rng.random() < unanswerable else (piece(), True)
            for _ in range(lines)]
