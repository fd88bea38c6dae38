"""Questions about the village, with and without an answer.

A question asks for a fact plainly, or with another fact as its premise, or asks to confirm a fact. All three
forms also ask about strangers, so the form does not reveal whether a question has an answer.

A hash assigns each prompt to training, calibration or evaluation. So these have no prompt in common, for any
seeds and sizes.
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
PARTS = 8  # one of these parts of all prompts is for calibration and one for evaluation
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
MARKS = "#$%&*+-/<=>@^_|~0123456789"


class VillageQuestion(NamedTuple):
    """A prompt, a sentence that answers it, and the text that every correct answer contains.

    For a confirmation that text is the fact's value, as "yes" alone shows no knowledge.
    """

    prompt: str
    response: str
    answer: str


def purpose_of(prompt: str) -> Purpose:
    """Returns the purpose of a prompt, by a hash that does not depend on a seed."""
    part = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % PARTS
    return "evaluation" if part == 0 else "calibration" if part == 1 else "train"


def ask(rng: Random, entity: Entity, form: Form | None = None, *, false: bool = False) -> VillageQuestion:
    """Returns a question about one fact of an entity.

    Args:
        form: the form of the question; None draws one.
        false: make the premise, or the fact to confirm, false; a plain question takes a person for a place or
            a place for a person. Then no answer is correct, and the response ignores the mistake.
    """
    form = form or pick(rng, FORMS[entity.kind])
    asked = pick(rng, tuple(entity.facts))
    if form == "confirm":
        believed = _mistaken(rng, entity, asked) if false else entity
        fact = statement(rng, believed, asked)
        prompt = f"Is it true that {fact}?" if rng.random() < 0.5 else f"{sentence(fact)[:-1]}, right?"
        return VillageQuestion(prompt, f"Yes, {fact}.", believed.facts[asked])
    name = entity.name
    if form == "plain" and false:
        entity = made_up(rng, _TAKEN_FOR[entity.kind], name)
        asked = pick(rng, tuple(entity.facts))
    if form == "premise":
        known = pick(rng, tuple(key for key in entity.facts if key != asked))
        believed = _mistaken(rng, entity, known) if false else entity
        name += f", {RELATIONS[entity.kind][known].premise.format(value=believed.facts[known])},"
    wording = pick(rng, RELATIONS[entity.kind][asked].questions)
    return VillageQuestion(wording.format(name).replace(",?", "?"), sentence(statement(rng, entity, asked)),
                    entity.facts[asked])


def unknown_names(world: World, use: Use) -> dict[Kind, tuple[str, ...]]:
    """Returns names of each kind that are unknown in the village; for the evaluation, in every village."""
    return {kind: pool.unknown_names(len(world.people) // RING if kind == "person" else 1, use)
            for kind, pool in OF_KIND.items()}


def about_unknown_entity(rng: Random, kind: Kind, unknown: Sequence[str]) -> str:
    """Returns a question of the usual kind about a name that is unknown."""
    return ask(rng, made_up(rng, kind, pick(rng, unknown))).prompt


def about_invented_term(rng: Random, use: Use) -> str:
    """Returns a question about made-up jargon."""
    return pick(rng, names.INVENTED_TERM_QUESTIONS).format(pick(rng, names.TERMS.unknown_names(0, use)))


def about_real_topic(rng: Random, use: Use) -> str:
    """Returns a question about a real topic that is unrelated to the village."""
    return pick(rng, names.REAL_TOPIC_QUESTIONS).format(pick(rng, names.REAL_TOPICS[use]))


def about_unstated_relation(rng: Random, people: Sequence[Entity], use: Use) -> str:
    """Returns a question about a known person and a relation that no text states."""
    return pick(rng, names.UNSTATED_RELATIONS[use]).format(pick(rng, people).name)


def gibberish(rng: Random) -> str:
    """Returns random letters, runs along the keyboard, marks, or the shuffled letters of a question."""
    length = 20 + int(40 * rng.random())
    kinds: tuple[Callable[[], str], ...] = (
        lambda: _cut(rng, "".join(pick(rng, LETTERS) for _ in range(length))),
        lambda: _cut(rng, "".join(_run(rng) for _ in range(length // 4))),
        lambda: "".join(pick(rng, MARKS) for _ in range(length)),
        lambda: "".join(shuffled(rng, about_real_topic(rng, "train"))).strip())
    return pick(rng, kinds)()


# ---------------------------------------------------------------------------------------------

_TAKEN_FOR: dict[Kind, Kind] = {"person": "place", "place": "person"}  # both have names without an article


def _mistaken(rng: Random, entity: Entity, relation: str) -> Entity:
    """Returns the entity with another value of a relation, which is not its own name."""
    value = other(rng, RELATIONS[entity.kind][relation].values, entity.facts[relation], entity.name)
    return entity._replace(facts={**entity.facts, relation: value})


def _run(rng: Random) -> str:
    row = pick(rng, ROWS)
    start = int(rng.random() * (len(row) - 3))
    return row[start:start + 4][::1 if rng.random() < 0.5 else -1]


def _cut(rng: Random, letters: str) -> str:
    """Returns the letters with random spaces, as if they were words."""
    return "".join(letter + (" " if rng.random() < 0.18 else "") for letter in letters).strip()
