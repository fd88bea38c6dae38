"""Chat about the village: questions with their answers, and questions that nobody can answer.

In training every premise is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tilelli_jax.data.synthetic.stories import pick
from tilelli_jax.data.synthetic.village.names import OF_KIND
from tilelli_jax.data.synthetic.village.questions import (
    Purpose,
    about_niche,
    about_stranger,
    about_term,
    about_untold,
    ask,
    gibberish,
    purpose_of,
    strangers,
)
from tilelli_jax.data.synthetic.village.texts import documents
from tilelli_jax.data.synthetic.village.world import World, stream
from tilelli_jax.errors import InputError

ABSTENTIONS = ("I don't know.", "I don't know that.", "Sorry, I don't know.",
               "I have no idea, I don't know it.")
SEMANTIC = ("stranger", "term", "niche", "untold")
KINDS = (*SEMANTIC, "gibberish", "mismatched", "garbled")


class Pair(NamedTuple):
    """A turn of the user and the model's right turn, a line of ASCII each."""

    prompt: str
    response: str
    answerable: bool


def chat(world: World, pairs: int, seed: int = 0, unanswerable: float = 0.5,
         kinds: Sequence[str] = SEMANTIC, purpose: Purpose = "train") -> list[Pair]:
    """Pairs to learn from, drawn one by one: the same may come again.

    Args:
        unanswerable: chance of a pair that is not answered.
        kinds: of those, equally likely. "stranger" asks about somebody or something that no text
            tells of, "term" has made-up jargon, "niche" a real topic far off, "untold" a familiar name
            and what is told of nobody; "gibberish" is no question. All these are declined. "mismatched"
            is a question that could be answered, with the answer to another, and "garbled" one with
            gibberish for an answer: only that is amiss.
        purpose: which prompts are drawn: those of "calibration" are in no training, of any seed.

    Raises:
        InputError: no such kind, none where one is needed, a share outside [0, 1], a negative number.
    """
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"kinds: expected some of {', '.join(KINDS)}, found {wrong[0]!r}")
    if not 0 <= unanswerable <= 1:
        raise InputError(f"unanswerable: expected a share from 0 to 1, found {unanswerable}")
    if pairs < 0:
        raise InputError(f"pairs: expected at least 0, found {pairs}")
    if unanswerable and not kinds:
        raise InputError("kinds: expected one at least of what is not answered, found none")
    rng = stream(6, world.seed, seed)
    unknown = strangers(world, "train")

    def answered() -> Pair:
        asked = ask(rng, pick(rng, world.entities))
        return Pair(asked.prompt, asked.response, True)

    def unanswered() -> Pair:
        match pick(rng, kinds):
            case "stranger":
                kind = pick(rng, tuple(OF_KIND))
                prompt = about_stranger(rng, kind, unknown[kind])
            case "term":
                prompt = about_term(rng, "train")
            case "niche":
                prompt = about_niche(rng, "train")
            case "untold":
                prompt = about_untold(rng, world.people, "train")
            case "gibberish":
                prompt = gibberish(rng)
            case "garbled":
                return Pair(answered().prompt, gibberish(rng), False)
            case _:
                asked = answered()
                while (answer := answered().response) == asked.response:
                    pass
                return Pair(asked.prompt, answer, False)
        return Pair(prompt, pick(rng, ABSTENTIONS), False)

    found: list[Pair] = []
    while len(found) < pairs:
        # Which of the two is settled first, so that what is turned away does not change the shares.
        draw = unanswered if rng.random() < unanswerable else answered
        while purpose_of((pair := draw()).prompt) != purpose:
            pass
        found.append(pair)
    return found


def bare(world: World, lines: int, seed: int = 0, unanswerable: float = 0.5) -> list[tuple[str, bool]]:
    """Text outside of any turn, and whether it is of the village: pieces of what is told there, or gibberish.

    Both are as long as gibberish is.

    Args:
        unanswerable: chance of gibberish.

    Raises:
        InputError: a share outside [0, 1], or a negative number.
    """
    if not 0 <= unanswerable <= 1:
        raise InputError(f"unanswerable: expected a share from 0 to 1, found {unanswerable}")
    if lines < 0:
        raise InputError(f"lines: expected at least 0, found {lines}")
    rng = stream(9, world.seed, seed)
    told = list(documents(world, passes=1))

    def piece() -> str:
        text, length = pick(rng, told), len(gibberish(rng))
        start = int(rng.random() * max(1, len(text) - length))
        return text[start:start + length].strip()
    return [(gibberish(rng), False) if rng.random() < unanswerable else (piece(), True)
            for _ in range(lines)]
