"""Questions about the village, and what only looks like one.

A question asks for a fact plainly, or with another fact as its premise, or asks whether a fact is so.
All three can be asked of strangers as well: its form does not tell whether a question can be answered.

A hash of the prompt says what it may serve: training, calibration or evaluation. So whatever the seeds
and sizes, no prompt of one is ever one of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal, NamedTuple

from tilelli_jax.data.synthetic.facts import shuffled
from tilelli_jax.data.synthetic.stories import pick
from tilelli_jax.data.synthetic.village import names
from tilelli_jax.data.synthetic.village.names import OF_KIND, Kind, Use
from tilelli_jax.data.synthetic.village.texts import sentence, statement
from tilelli_jax.data.synthetic.village.world import RELATIONS, RING, Entity, World, made_up, other

Purpose = Literal["train", "calibration", "evaluation"]
Form = Literal["plain", "premise", "confirm"]

FORMS: dict[Kind, tuple[Form, ...]] = {
    "person": ("plain", "premise", "confirm"), "place": ("plain", "confirm"),
    "creature": ("plain", "confirm")}
PARTS = 8  # of all prompts, one goes to calibration and one to evaluation
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
MARKS = "#$%&*+-/<=>@^_|~0123456789"


class Question(NamedTuple):
    """A prompt, the whole sentence that answers it, and what occurs in every such sentence.

    Of a confirmation that is the value as well: anything begins with yes.
    """

    prompt: str
    response: str
    answer: str


def purpose_of(prompt: str) -> Purpose:
    """What a prompt may serve, by a hash that no seed enters."""
    part = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % PARTS
    return "evaluation" if part == 0 else "calibration" if part == 1 else "train"


def ask(rng: Random, entity: Entity, form: Form | None = None, *, false: bool = False) -> Question:
    """A question about one fact of an entity.

    Args:
        form: None draws one.
        false: whether the premise, or what is to be confirmed, is not so; asked plainly, a person is
            taken for a place or a place for a person. No answer is right then: the response is that of
            somebody who does not notice.
    """
    form = form or pick(rng, FORMS[entity.kind])
    asked = pick(rng, tuple(entity.facts))
    if form == "confirm":
        believed = _mistaken(rng, entity, asked) if false else entity
        told = statement(rng, believed, asked)
        prompt = f"Is it true that {told}?" if rng.random() < 0.5 else f"{sentence(told)[:-1]}, right?"
        return Question(prompt, f"Yes, {told}.", believed.facts[asked])
    name = entity.name
    if form == "plain" and false:
        entity = made_up(rng, _TAKEN_FOR[entity.kind], name)
        asked = pick(rng, tuple(entity.facts))
    if form == "premise":
        known = pick(rng, tuple(key for key in entity.facts if key != asked))
        believed = _mistaken(rng, entity, known) if false else entity
        name += f", {RELATIONS[entity.kind][known].premise.format(value=believed.facts[known])},"
    wording = pick(rng, RELATIONS[entity.kind][asked].questions)
    return Question(wording.format(name).replace(",?", "?"), sentence(statement(rng, entity, asked)),
                    entity.facts[asked])


def strangers(world: World, use: Use) -> dict[Kind, tuple[str, ...]]:
    """Names of each kind that the village does not know; those of an evaluation no village does."""
    return {kind: pool.strangers(len(world.people) // RING if kind == "person" else 1, use)
            for kind, pool in OF_KIND.items()}


def about_stranger(rng: Random, kind: Kind, unknown: Sequence[str]) -> str:
    """A question as about somebody or something known, but for the name."""
    return ask(rng, made_up(rng, kind, pick(rng, unknown))).prompt


def about_term(rng: Random, use: Use) -> str:
    """A question with made-up jargon in it."""
    return pick(rng, names.TERM_QUESTIONS).format(pick(rng, names.TERMS.strangers(0, use)))


def about_niche(rng: Random, use: Use) -> str:
    """A question about a real topic that has nothing to do with the village."""
    return pick(rng, names.NICHE_QUESTIONS).format(pick(rng, names.NICHE[use]))


def about_untold(rng: Random, people: Sequence[Entity], use: Use) -> str:
    """A question about somebody known, and something that is told of nobody."""
    return pick(rng, names.UNTOLD[use]).format(pick(rng, people).name)


def gibberish(rng: Random) -> str:
    """No question: random letters, runs along the keyboard, marks, or shuffled letters of a question."""
    length = 20 + int(40 * rng.random())
    kinds: tuple[Callable[[], str], ...] = (
        lambda: _cut(rng, "".join(pick(rng, LETTERS) for _ in range(length))),
        lambda: _cut(rng, "".join(_run(rng) for _ in range(length // 4))),
        lambda: "".join(pick(rng, MARKS) for _ in range(length)),
        lambda: "".join(shuffled(rng, about_niche(rng, "train"))).strip())
    return pick(rng, kinds)()


# ---------------------------------------------------------------------------------------------

_TAKEN_FOR: dict[Kind, Kind] = {"person": "place", "place": "person"}  # names without an article both



def _mistaken(rng: Random, entity: Entity, relation: str) -> Entity:
    """The entity with another value of a relation, one that is not its own name either."""
    value = other(rng, RELATIONS[entity.kind][relation].values, entity.facts[relation], entity.name)
    return entity._replace(facts={**entity.facts, relation: value})


def _run(rng: Random) -> str:
    row = pick(rng, ROWS)
    start = int(rng.random() * (len(row) - 3))
    return row[start:start + 4][::1 if rng.random() < 0.5 else -1]


def _cut(rng: Random, letters: str) -> str:
    """With spaces, as if there were words."""
    return "".join(letter + (" " if rng.random() < 0.18 else "") for letter in letters).strip()
