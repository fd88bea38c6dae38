"""A built-in corpus of simple children's stories, written by a deterministic generator.

The premise of a story is a plot, a hero, a place and a topic. A hash of the premise assigns it to training or
to validation (one in ten). So no premise of a validation story occurs in training, for any seeds and sizes.
Everything else (further characters, colours, wording) is drawn at random.

The text is ASCII; stories are separated by an empty line, paragraphs by a line end. The only randomness is
`random.Random(int).random()`, whose sequence Python guarantees, so a seed gives the same bytes on every
platform and Python version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal, NamedTuple, TypeVar

from tilelli_jax.data.synthetic import plots
from tilelli_jax.data.synthetic import story_world as world

Split = Literal["train", "valid"]
T = TypeVar("T")

SEPARATOR = "\n\n"
HELD_OUT = 10  # one premise in this many is for validation
ANIMAL_HEROES = 0.25  # fraction of heroes that are animals
ASIDES = 0.25  # fraction of a plot's paragraphs that end with an aside
NUMBERS = ("three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty")


class Premise(NamedTuple):
    """What a story is about; everything else is wording."""

    plot: str
    hero: str
    place: str
    topic: str


def split_of(premise: Premise) -> Split:
    """Returns the split of a premise, by a hash that is independent of seeds."""
    digest = hashlib.sha256("|".join(premise).encode()).digest()
    return "valid" if int.from_bytes(digest[:4], "big") % HELD_OUT == 0 else "train"


def draw_premise(rng: Random, split: Split = "train") -> Premise:
    """Draws a premise of `split`, uniformly within its plot."""
    while True:
        name = pick(rng, tuple(plots.PLOTS))
        premise = Premise(name, pick(rng, world.CHILDREN).name, pick(rng, world.PLACES),
                          pick(rng, plots.PLOTS[name].topics))
        if split_of(premise) == split:
            return premise


def story(rng: Random, split: Split = "train") -> str:
    """Returns one story of `split`: a line per paragraph, without a final line end."""
    return tell(draw_premise(rng, split), rng)


def tell(premise: Premise, rng: Random) -> str:
    """Returns a story with the given premise and random wording."""
    blanks = _Blanks(_cast(premise, rng), rng)
    middle = plots.PLOTS[premise.plot].paragraphs
    paragraphs = []
    for paragraph in plots.OPENING + middle + plots.ENDING:
        beats = [pick(rng, beat) for beat in paragraph]
        if paragraph in middle and rng.random() < ASIDES:
            beats.append(blanks.unused("aside"))
        paragraphs.append(" ".join(beat.format_map(blanks) for beat in beats if beat))
    return "\n".join(paragraphs)


def stream(seed: int = 0, split: Split = "train") -> Iterator[bytes]:
    """Yields the endless corpus of `seed` and `split`: stories, each followed by the separator."""
    rng = Random(2 * seed + (split == "valid"))
    while True:
        yield (story(rng, split) + SEPARATOR).encode("ascii")


def generate(n_bytes: int, seed: int = 0, split: Split = "train") -> bytes:
    """Returns the first `n_bytes` of the corpus of `seed` and `split`; the last story is cut."""
    corpus = bytearray()
    for next_story in stream(seed, split):
        corpus += next_story
        if len(corpus) >= n_bytes:
            break
    return bytes(corpus[:n_bytes])


def pick(rng: Random, options: Sequence[T]) -> T:
    """Draws one of `options` uniformly, with a single `rng.random()`."""
    return options[int(rng.random() * len(options))]


# ---------------------------------------------------------------------------------------------


class _Blanks(dict[str, str]):
    """Fills the blanks of one story: from its cast, or with phrases drawn at each use."""

    def __init__(self, cast: dict[str, str], rng: Random) -> None:
        super().__init__(cast)
        self.rng = rng
        self.left = {"spot": list(world.SPOTS), "animal": list(world.ANIMALS),
                     "aside": list(plots.ASIDES)}

    def __missing__(self, key: str) -> str:
        if key == "spot":
            return self.unused("spot")
        if key == "an_animal":
            return _with_article(self.unused("animal"))
        if key == "An_animal":
            return _with_article(self.unused("animal")).capitalize()
        return pick(self.rng, plots.PHRASES[key])

    def unused(self, pool: str) -> str:
        """Draws a spot, animal or aside that this story has not used yet."""
        options = self.left[pool]
        return options.pop(int(self.rng.random() * len(options)))


def _cast(premise: Premise, rng: Random) -> dict[str, str]:
    """Returns the blanks that are constant throughout a story."""
    hero = next(child for child in world.CHILDREN if child.name == premise.hero)
    friend = hero
    while friend is hero:
        friend = pick(rng, world.CHILDREN)
    elder = pick(rng, world.ELDERS)
    kind = pick(rng, world.CREATURES) if rng.random() < ANIMAL_HEROES else hero.kind
    colour, paint, food = pick(rng, world.COLOURS), pick(rng, world.COLOURS), pick(rng, world.FOODS)
    weather, time = pick(rng, world.WEATHERS), pick(rng, world.TIMES)
    return {
        "hero": hero.name, "he": hero.he, "him": hero.him, "his": hero.his,
        "kind": kind, "a_kind": _with_article(kind),
        "He": hero.he.capitalize(), "His": hero.his.capitalize(),
        "friend": friend.name, "fhe": friend.he, "fhim": friend.him, "fhis": friend.his,
        "Fhe": friend.he.capitalize(), "friend_kind": friend.kind,
        "elder": elder.name, "ehe": elder.he, "ehim": elder.him, "ehis": elder.his,
        "Ehe": elder.he.capitalize(),
        "place": premise.place, "topic": premise.topic, "a_topic": _with_article(premise.topic),
        "A_topic": _with_article(premise.topic).capitalize(),
        "colour": colour, "a_colour": _with_article(colour),
        "paint": paint, "a_paint": _with_article(paint),
        "food": food, "a_food": _with_article(food),
        "weather": weather, "time": time, "One_day": f"One {weather} {time}",
        "number": pick(rng, NUMBERS),
    }


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
