"""Texts about the village: portraits and short tales, each of which states all facts of one entity.

A portrait states the facts one after the other, in random order and wordings; a tale mentions them as it
goes. The training text has several passes; each pass has one document for every entity, in its own random
order. The validation text is one more pass: to know is to have memorised.

The text is ASCII, one document per line, with an empty line after each.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tilelli_jax.data.synthetic.facts import shuffled
from tilelli_jax.data.synthetic.stories import Split, pick
from tilelli_jax.data.synthetic.village.names import Kind, words
from tilelli_jax.data.synthetic.village.world import RELATIONS, Entity, World, stream

SEPARATOR = "\n\n"
PASSES = 64
TALES_SHARE = 0.5  # fraction of the documents that are tales
TIMES = words("one morning, one evening, at noon, one rainy day, last winter, in early spring, on a "
              "holiday, before the harvest")
TALES: dict[Kind, tuple[str, ...]] = {
    "person": (
        "{time} {name} left the house in {home} with the {pet} on a string. There was work for a "
        "{work} that day, and there would be {food} after it. At the gate stood {friend}, the best "
        "friend of {name}.",
        "{friend} knocked at a door in {home}. \"I have brought {food},\" said {friend}, \"because you "
        "like it best.\" {name} laughed. The {pet} that {name} keeps laughed as well, and the tools of "
        "the {work} stayed on the wall.",
        "A letter came to {home} {time}. \"Dear {name},\" it said, \"we need a {work}. Bring your "
        "{pet}, and your friend {friend}. There will be {food}.\" So {name} went.",
        "{name} was a {work} in {home} and was tired {time}. The {pet} was hungry, and so was {name}. "
        "Then {friend}, whom {name} trusts most, came with {food}, and all was well."),
    "place": (
        "{time} a cart full of {ware} rolled out of {name}. It passed the {landmark} in the middle of "
        "{name}, where {mayor}, the mayor, waved at it.",
        "\"Meet me at the {landmark},\" wrote {mayor}, who leads {name}. So all of {name} stood there "
        "{time}, each with some {ware} to sell."),
    "creature": (
        "{time} a {name} came out from where it sleeps, {den}. Its coat was {coat}. It looked for "
        "{feed}, since that is what a {name} eats.",
        "\"What is {coat} and sleeps {den}?\" asked the child {time}. \"A {name},\" said the others, "
        "and left some {feed} for it to eat.")}


def documents(world: World, passes: int = PASSES, split: Split = "train") -> Iterator[str]:
    """Yields the documents of a text in order, each with all facts of one entity."""
    rng = stream(5 if split == "valid" else 4, world.seed)
    for _ in range(1 if split == "valid" else passes):
        for entity in shuffled(rng, world.entities):
            yield _tale(rng, entity) if rng.random() < TALES_SHARE else _portrait(rng, entity)


def text(world: World, passes: int = PASSES, split: Split = "train") -> bytes:
    """Returns all of `documents`, each followed by the separator."""
    return "".join(document + SEPARATOR for document in documents(world, passes, split)).encode("ascii")


def sentence(statement: str) -> str:
    """Returns the statement with a capital letter and a full stop."""
    return statement[0].upper() + statement[1:] + "."


def statement(rng: Random, entity: Entity, relation: str) -> str:
    """Returns one fact in one of its wordings, without capital letter and full stop."""
    wording = pick(rng, RELATIONS[entity.kind][relation].statements)
    return wording.format(entity.name, value=entity.facts[relation])


# ---------------------------------------------------------------------------------------------


def _portrait(rng: Random, entity: Entity) -> str:
    return " ".join(sentence(statement(rng, entity, key)) for key in shuffled(rng, tuple(entity.facts)))


def _tale(rng: Random, entity: Entity) -> str:
    tale = pick(rng, TALES[entity.kind]).format(name=entity.name, time=pick(rng, TIMES), **entity.facts)
    return tale[0].upper() + tale[1:]
