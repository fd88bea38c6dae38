"""A built-in world of facts: homes, jobs, pets and favourite foods of invented people.

It serves to ask a network what it knows, because the number of times that each fact occurs in training is
known. The text states facts about some people often, about some rarely, about some never. In addition, for
half of the people who occur, one relation is never stated: a familiar name does not imply a known fact.

There are as many first names as family names, and a ring of people uses each of them once. All people of a
ring are in one tier, so every first name and every family name has the same number of people in each tier:
neither part of a name predicts how often its person occurs.

The text is ASCII: questions with answers, an empty line after each. The training text has `OFTEN` passes,
each in its own order. A frequent fact is stated once per pass; a rare fact in some passes, evenly spaced. The
validation text states every fact of the training text once, in another order. Nothing is held out: to know is
to have memorised.

The only randomness is `random.Random(int).random()`, as in `stories`: a seed gives the same world and the
same bytes on every platform and Python version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal, NamedTuple, TypeVar

from tilelli_jax.data.synthetic.stories import Split, pick
from tilelli_jax.errors import InputError

Tier = Literal["often", "rarely", "never"]
T = TypeVar("T")

SEPARATOR = "\n"  # after a statement, whose last line has ended
PEOPLE = 300
OFTEN = 64  # statements of each fact about a person of the tier "often"
RARELY = (4, 7, 11, 16, 22, 30)  # tier "rarely": number of statements, drawn for each fact
UNSTATED = 0.5  # probability that one relation of a person who occurs is never stated
RINGS: tuple[Tier, ...] = ("often", "rarely", "never", "often", "rarely")  # tiers of the rings, repeated


class Relation(NamedTuple):
    """A relation that can be asked about a person: its question wordings and possible answers."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


class Fact(NamedTuple):
    """One relation of one person, stated in the training text or not."""

    entity: str  # the person's full name
    relation: str  # a key of RELATIONS
    question: str  # one of the relation's wordings
    answer: str
    times: int  # number of statements in the training text, in any wording
    tier: Tier  # the person's tier; `times` can be 0 in any tier


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

NAMES = len(FIRST_NAMES)  # people per ring

# The first answers of a relation are up to three times as likely as the last.
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
    """Returns every relation of every person, stated or not, person by person.

    Args:
        people: a multiple of NAMES, so that all rings are complete.

    Raises:
        InputError: `people` is not such a multiple, or there are too few names.
    """
    if people % NAMES or not 0 < people <= NAMES**2:
        raise InputError(f"people: expected a multiple of {NAMES} from {NAMES} to {NAMES**2}, "
                         f"found {people}")
    rng = Random(3 * seed)
    families = shuffled(rng, FAMILY_NAMES)
    shifts = shuffled(rng, range(NAMES))[:people // NAMES]
    all_facts = []
    for ring, shift in enumerate(shifts):
        tier = RINGS[ring % len(RINGS)]
        for i, first in enumerate(FIRST_NAMES):
            all_facts += _of_person(rng, f"{first} {families[(i + shift) % NAMES]}", tier)
    return all_facts


def prompt(question: str) -> str:
    """Returns the prompt for a question; its expected continuation is the answer and a line end."""
    return f"Q: {question}\nA: "


def documents(seed: int = 0, people: int = PEOPLE, split: Split = "train") -> Iterator[str]:
    """Yields the statements of a text in order, each a question line and an answer line.

    The training text states each fact exactly `Fact.times` times; the validation text states each of these
    facts once.
    """
    stated_facts = [fact for fact in facts(seed, people) if fact.times]
    rng = Random(3 * seed + (2 if split == "valid" else 1))
    for pass_facts in _passes(rng, stated_facts) if split == "train" else [stated_facts]:
        for fact in shuffled(rng, pass_facts):
            question = pick(rng, RELATIONS[fact.relation].questions).format(fact.entity)
            yield f"{prompt(question)}{fact.answer}\n"


def text(seed: int = 0, people: int = PEOPLE, split: Split = "train") -> bytes:
    """Returns all statements of `documents`, each followed by the separator."""
    return "".join(statement + SEPARATOR for statement in documents(seed, people, split)).encode("ascii")


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """Returns the items in random order, drawn with `rng.random()` only (Fisher–Yates)."""
    result = list(items)
    for i in range(len(result) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        result[i], result[j] = result[j], result[i]
    return result


# ---------------------------------------------------------------------------------------------


def _of_person(rng: Random, name: str, tier: Tier) -> list[Fact]:
    """Returns every relation of a person. The answers do not depend on how often they are stated."""
    unstated = pick(rng, tuple(RELATIONS)) if rng.random() < UNSTATED else ""
    person_facts = []
    for key, relation in RELATIONS.items():
        question = pick(rng, relation.questions).format(name)
        answer = _answer(rng, relation.answers)
        rarely = pick(rng, RARELY)
        times = 0 if key == unstated else {"often": OFTEN, "rarely": rarely, "never": 0}[tier]
        person_facts.append(Fact(name, key, question, answer, times, tier))
    return person_facts


def _answer(rng: Random, answers: Sequence[str]) -> str:
    """Draws one of the n answers; the k-th, from 0, with probability proportional to 1 / (n / 2 + k)."""
    n = len(answers)
    # fsum, because the result of sum differs between Python versions
    remaining = rng.random() * math.fsum(1 / (n / 2 + k) for k in range(n))
    for k, answer in enumerate(answers):
        remaining -= 1 / (n / 2 + k)
        if remaining < 0:
            return answer
    return answers[-1]


def _passes(rng: Random, stated_facts: Sequence[Fact]) -> list[list[Fact]]:
    """Returns the facts of each pass: frequent facts in every pass, the others evenly spaced."""
    passes: list[list[Fact]] = [[] for _ in range(OFTEN)]
    for fact in stated_facts:
        first = int(rng.random() * OFTEN / fact.times)
        for j in range(fact.times):
            passes[first + j * OFTEN // fact.times].append(fact)
    return passes
