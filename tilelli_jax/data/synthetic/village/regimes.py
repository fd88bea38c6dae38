"""Evaluation prompts in seven regimes, and calibration prompts.

    in_domain            facts of the village, asked as in training, in new prompts
    ood_topic            strangers, jargon, real topics and relations that no text states; all names, terms,
                         topics and wordings are absent from training
    ood_style            facts of the village, asked in a style that training never has
    factual_misleading   as in_domain, with the same forms, but the question presupposes something false
    long_input           facts of the village, asked after sentences about others: 170 to 193 bytes, so
                         that the turn up to the answer has 185 to 208, and 48 of 256 are left for the answer
    neo_false_inability  facts of the village in a form that invites abstention: in new words, beside a
                         stranger's name, or after an expression of doubt
    gibberish            letters, keys and marks

ANSWERABLE lists the regimes in which an abstention is a mistake. A rule that treats in_domain as known and
all others as unknown is wrong about three of them.

All prompts ask about the village's core, which does not depend on the number of people, and no prompt is one
of training, for any seed (see `questions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from tilelli_jax.data.synthetic.stories import pick
from tilelli_jax.data.synthetic.village.names import OF_KIND
from tilelli_jax.data.synthetic.village.questions import (
    FORMS,
    Purpose,
    VillageQuestion,
    about_invented_term,
    about_real_topic,
    about_unknown_entity,
    about_unstated_relation,
    ask,
    gibberish,
    purpose_of,
    unknown_names,
)
from tilelli_jax.data.synthetic.village.texts import sentence, statement
from tilelli_jax.data.synthetic.village.world import RELATIONS, RING, Entity, World, stream
from tilelli_jax.errors import InputError

REGIMES = ("in_domain", "ood_topic", "ood_style", "factual_misleading", "long_input",
           "neo_false_inability", "gibberish")
ANSWERABLE = ("in_domain", "ood_style", "long_input", "neo_false_inability")
EACH = 48  # prompts per regime
LONG = (170, 193)  # length of a long prompt in bytes, from and to
TRIES = 10_000  # draws without a new prompt after which the search ends

DOUBTS = (
    "You may not know this: {}", "I don't know who could tell me. {}", "Nobody seems to be sure. {}",
    "It is unclear to me. {}", "I have no idea, so please tell me. {}", "This may be hard to say: {}")
DISTRACTORS = (
    "I have never met {other}. {asked}", "Forget {other}. {asked}", "{other} asked me this: {asked}",
    "Not {other}, I mean somebody else. {asked}")


class EvaluationPrompt(NamedTuple):
    """A prompt, its regime, and the text that a correct answer contains; None if there is no answer."""

    prompt: str
    regime: str
    answer: str | None = None


def prompts(world: World, each: int = EACH, seed: int = 0) -> list[EvaluationPrompt]:
    """Returns `each` different prompts of every regime, in the order of REGIMES.

    Raises:
        InputError: a regime has fewer.
    """
    found = []
    for number, regime in enumerate(REGIMES):
        rng = stream(7, world.seed, seed, number)
        draw = _DRAW[regime](rng, world)
        found += [EvaluationPrompt(prompt, regime, answer)
                  for prompt, answer in _different(draw, each, "evaluation")]
    return found


def calibration(world: World, pairs: int, seed: int = 0) -> list[VillageQuestion]:
    """Returns different questions of the in_domain regime that are in neither training nor evaluation.

    Raises:
        InputError: there are fewer.
    """
    rng = stream(8, world.seed, seed)
    asked = {}

    def draw() -> tuple[str, str | None]:
        question = ask(rng, pick(rng, world.core))
        asked[question.prompt] = question
        return question.prompt, question.answer
    return [asked[prompt] for prompt, _ in _different(draw, pairs, "calibration")]


# ---------------------------------------------------------------------------------------------

Draw = Callable[[], tuple[str, str | None]]


def _different(draw: Draw, n: int, purpose: Purpose) -> Iterator[tuple[str, str | None]]:
    if n < 0:
        raise InputError(f"prompts: expected at least 0 of a regime, found {n}")
    found: dict[str, str | None] = {}
    tries = 0
    while len(found) < n:
        prompt, answer = draw()
        fresh = purpose_of(prompt) == purpose and prompt not in found
        tries = 0 if fresh else tries + 1
        if fresh:
            found[prompt] = answer
        elif tries == TRIES:
            raise InputError(f"prompts: expected {n} of a regime or for calibration, "
                             f"there are about {len(found)}")
    yield from found.items()


def _in_domain(rng: Random, world: World) -> Draw:
    def draw() -> tuple[str, str | None]:
        asked = ask(rng, pick(rng, world.core))
        return asked.prompt, asked.answer
    return draw


def _ood_topic(rng: Random, world: World) -> Draw:
    unknown, kinds = unknown_names(world, "evaluation"), tuple(OF_KIND)
    draws: tuple[Callable[[], str], ...] = (
        lambda: about_unknown_entity(rng, kind := pick(rng, kinds), unknown[kind]),
        lambda: about_invented_term(rng, "evaluation"), lambda: about_real_topic(rng, "evaluation"),
        lambda: about_unstated_relation(rng, world.people[:RING], "evaluation"))
    return lambda: (pick(rng, draws)(), None)


def _ood_style(rng: Random, world: World) -> Draw:
    def draw() -> tuple[str, str | None]:
        entity = pick(rng, world.core)
        relation = pick(rng, tuple(entity.facts))
        asked = pick(rng, RELATIONS[entity.kind][relation].questions).format(entity.name)
        return pick(rng, STYLES)(asked, entity, relation), entity.facts[relation]
    return draw


def _misleading(rng: Random, world: World) -> Draw:
    def draw() -> tuple[str, str | None]:
        entity = pick(rng, world.core)
        form = pick(rng, FORMS[entity.kind])
        if entity.kind == "creature" and form == "plain":
            entity = pick(rng, world.core[:-len(world.creatures)])  # a kind that can be mistaken for another
        return ask(rng, entity, form, false=True).prompt, None
    return draw


def _long(rng: Random, world: World) -> Draw:
    def draw() -> tuple[str, str | None]:
        while True:
            entity = pick(rng, world.core)
            asked = ask(rng, entity)
            parts = [asked.prompt]
            while (size := len(" ".join(parts))) < LONG[0]:
                of = pick(rng, world.core)
                if of is not entity:
                    parts.insert(0, sentence(statement(rng, of, pick(rng, tuple(of.facts)))))
            if size <= LONG[1]:
                return " ".join(parts), asked.answer
    return draw


def _neo(rng: Random, world: World) -> Draw:
    unknown = unknown_names(world, "evaluation")["person"]

    def draw() -> tuple[str, str | None]:
        entity = pick(rng, world.core)
        if rng.random() < 1 / 3:
            relation = pick(rng, tuple(entity.facts))
            return RELATIONS[entity.kind][relation].fresh.format(entity.name), entity.facts[relation]
        asked = ask(rng, entity)
        if rng.random() < 0.5:
            return pick(rng, DISTRACTORS).format(other=pick(rng, unknown), asked=asked.prompt), asked.answer
        return pick(rng, DOUBTS).format(asked.prompt), asked.answer
    return draw


def _gibberish(rng: Random, world: World) -> Draw:
    return lambda: (gibberish(rng), None)


_DRAW: dict[str, Callable[[Random, World], Draw]] = {
    "in_domain": _in_domain, "ood_topic": _ood_topic, "ood_style": _ood_style,
    "factual_misleading": _misleading, "long_input": _long, "neo_false_inability": _neo,
    "gibberish": _gibberish}


def _query(asked: str, entity: Entity, relation: str) -> str:
    return f"SELECT {relation} FROM {entity.kind} WHERE name = '{entity.name}';"


def _call(asked: str, entity: Entity, relation: str) -> str:
    return f"{relation}({entity.name.lower().replace(' ', '_')}) = ?"


# Styles that training never has: question, entity and key of the relation → prompt.
STYLES: tuple[Callable[[str, Entity, str], str], ...] = (
    lambda asked, entity, relation: asked.upper() + "!!!",
    lambda asked, entity, relation: "".join(c for c in asked.lower() if c not in "aeiou?") + " pls",
    lambda asked, entity, relation: asked.translate(str.maketrans("aeiost", "43105+")),
    lambda asked, entity, relation: " STOP ".join(asked.upper().rstrip("?").split()) + " STOP",
    lambda asked, entity, relation: f"Pray tell, o wise one, if it please thee: {asked.lower()}",
    lambda asked, entity, relation: " ".join(reversed(asked.rstrip("?").split())) + "?",
    _query, _call)
