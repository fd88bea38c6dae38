"""A built-in world of facts: where some made-up people live, what they work as, keep and eat.

It is there to ask a network what it knows, since how often it was told can be counted here. Of
some people the text tells often, of some rarely, of some never. Besides, of half of those it
tells of, one relation is never told: a name that is familiar does not make a fact known.

There are as many first names as family names, and a ring of people bears each of them once. Rings
are whole and of one tier, so any two first names, and any two family names, are borne by as many
people of each tier: neither part of a name tells how often its bearer occurs.

The text is ASCII, questions with their answers, an empty line after each. Training reads `OFTEN`
passes: what is told often is stated once in each, what is told rarely in some, at even distances,
and each pass is in an order of its own. Validation states what training tells once more, in
another order: to know is to have learned by heart here, and nothing that is told is held out.

The only source of chance is `random.Random(int).random()`, as in `stories`: a seed gives the same
world and the same bytes on every platform and version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal, NamedTuple, TypeVar

from tilelli_jax.data.stories import Split, pick
from tilelli_jax.errors import InputError

Tier = Literal["often", "rarely", "never"]
T = TypeVar("T")

SEPARATOR = "\n"  # after a statement, whose last line has ended
PEOPLE = 300
OFTEN = 64  # statements of a fact about somebody who is told of often
RARELY = (4, 7, 11, 16, 22, 30)  # likewise rarely: one of these, drawn for each fact
UNTOLD = 0.5  # chance that of somebody who occurs one relation is never told
RINGS: tuple[Tier, ...] = ("often", "rarely", "never", "often", "rarely")  # tiers of the rings, in turn


class Relation(NamedTuple):
    """What can be asked about somebody, in which words, and what the answers are."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


class Fact(NamedTuple):
    """One relation of one person, told or not."""

    entity: str  # the person's whole name
    relation: str  # a key of RELATIONS
    question: str  # in one of the relation's wordings
    answer: str
    times: int  # how often the training text states it, in whichever wording
    tier: Tier  # the person's; a fact of any tier can be told 0 times


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES: tuple[str, ...] = _words(
    "Abel Alma Aron Asta Basil Berta Boris Bruno Celia Cora Cyril Dora Edda Edgar Elsa Enzo Erik Esme "
    "Flora Frida Georg Gerda Gilda Greta Hanno Hector Heidi Helga Igor Ilka Irma Jorge Jutta Karl "
    "Klara Lars Lotte Luis Magda Mira Nadia Nils Odile Olaf Otto Paula Petra Quinn Ralf Rufus Selma "
    "Silas Tessa Tilda Ulla Urs Vito Wanda Yara Zeno")

FAMILY_NAMES: tuple[str, ...] = _words(
    "Abbot Acker Baker Barlow Beck Bishop Bolt Carver Cole Crane Cross Dale Drake Ellis Falk Finch "
    "Flint Frost Garner Grove Hale Hart Hobbs Holt Irwin Jarvis Jensen Keller Kemp Lund Lowry Marsh "
    "Mercer Moss Nash Noble Orton Parr Pike Pryor Quill Reeve Rolfe Sand Shaw Stark Stone Thorne "
    "Tully Umber Usher Vance Voss Wade Webb West Wolfe Yates York Zeller")

NAMES = len(FIRST_NAMES)  # people of a ring

# The first answers of each are drawn up to three times as often as the last.
RELATIONS: dict[str, Relation] = {
    "home": Relation(
        ("Where does {} live?", "Which city is {} from?"),
        _words("Oslo Lima Cairo Paris Delhi Tunis Milan Accra Porto Sofia Hanoi Quito Riga Dakar Bern "
               "Kyoto Malmo Perth Seoul Turin Vienna Nairobi Lyon Bergen")),
    "work": Relation(
        ("What does {} work as?", "Which trade is {} in?"),
        _words("baker nurse tailor pilot farmer judge cook painter miner sailor teacher printer "
               "gardener dentist plumber clerk barber mason lawyer butcher singer welder potter "
               "fisher")),
    "pet": Relation(
        ("Which pet has {} got?", "What animal does {} keep?"),
        _words("cat dog rabbit parrot goldfish tortoise hamster canary pony goat ferret gecko duck hen "
               "snake newt mouse gerbil donkey pigeon lizard beetle llama turkey")),
    "food": Relation(
        ("What does {} like to eat?", "Which food does {} love?"),
        _words("soup pizza rice pasta bread cheese salad curry plums beans trout honey lentils waffles "
               "olives ham grapes noodles pears yogurt cabbage melon toast figs")),
}


def facts(seed: int = 0, people: int = PEOPLE) -> list[Fact]:
    """All that can be asked: every relation of every person, told or not, person by person.

    Args:
        people: a multiple of NAMES, so that all rings are whole.

    Raises:
        InputError: it is none, or there are not so many names.
    """
    if people % NAMES or not 0 < people <= NAMES**2:
        raise InputError(f"people: expected a multiple of {NAMES} from {NAMES} to {NAMES**2}, "
                         f"found {people}")
    rng = Random(3 * seed)
    families = shuffled(rng, FAMILY_NAMES)
    shifts = shuffled(rng, range(NAMES))[:people // NAMES]
    found = []
    for ring, shift in enumerate(shifts):
        tier = RINGS[ring % len(RINGS)]
        for i, first in enumerate(FIRST_NAMES):
            found += _of_person(rng, f"{first} {families[(i + shift) % NAMES]}", tier)
    return found


def prompt(question: str) -> str:
    """What a network is to continue by the answer and a line end."""
    return f"Q: {question}\nA: "


def documents(seed: int = 0, people: int = PEOPLE, split: Split = "train") -> Iterator[str]:
    """The statements of a text in their order, each a question and its answer on lines of their own.

    Those of training state each fact exactly `Fact.times` times; those of validation state each
    that training states once more.
    """
    told = [fact for fact in facts(seed, people) if fact.times]
    rng = Random(3 * seed + (2 if split == "valid" else 1))
    for stated in _passes(rng, told) if split == "train" else [told]:
        for fact in shuffled(rng, stated):
            question = pick(rng, RELATIONS[fact.relation].questions).format(fact.entity)
            yield f"{prompt(question)}{fact.answer}\n"


def text(seed: int = 0, people: int = PEOPLE, split: Split = "train") -> bytes:
    """All statements of `documents`, each with the separator after it."""
    return "".join(stated + SEPARATOR for stated in documents(seed, people, split)).encode("ascii")


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """The items in an order drawn by `rng.random()` alone (Fisher and Yates)."""
    left = list(items)
    for i in range(len(left) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        left[i], left[j] = left[j], left[i]
    return left


# ---------------------------------------------------------------------------------------------


def _of_person(rng: Random, name: str, tier: Tier) -> list[Fact]:
    """Every relation of a person. What is true of somebody does not depend on how often it is told."""
    untold = pick(rng, tuple(RELATIONS)) if rng.random() < UNTOLD else ""
    found = []
    for key, relation in RELATIONS.items():
        question = pick(rng, relation.questions).format(name)
        answer = _answer(rng, relation.answers)
        rarely = pick(rng, RARELY)
        times = 0 if key == untold else {"often": OFTEN, "rarely": rarely, "never": 0}[tier]
        found.append(Fact(name, key, question, answer, times, tier))
    return found


def _answer(rng: Random, answers: Sequence[str]) -> str:
    """One of the answers; the k-th of n, from 0, as likely as 1 / (n / 2 + k)."""
    n = len(answers)
    # fsum, since what sum makes of floats differs between versions of Python
    left = rng.random() * math.fsum(1 / (n / 2 + k) for k in range(n))
    for k, answer in enumerate(answers):
        left -= 1 / (n / 2 + k)
        if left < 0:
            return answer
    return answers[-1]


def _passes(rng: Random, told: Sequence[Fact]) -> list[list[Fact]]:
    """The facts of each pass: those told often in every one, the others at even distances."""
    passes: list[list[Fact]] = [[] for _ in range(OFTEN)]
    for fact in told:
        first = int(rng.random() * OFTEN / fact.times)
        for j in range(fact.times):
            passes[first + j * OFTEN // fact.times].append(fact)
    return passes
