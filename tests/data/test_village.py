"""The village: fixed bytes, everything told in every pass, nothing of the evaluation in training."""

import hashlib
import itertools
import re
from collections import Counter

import pytest

from tilelli_jax.commands.chat import MODEL, USER
from tilelli_jax.data import village
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.village import names, questions, texts
from tilelli_jax.data.village.world import RELATIONS
from tilelli_jax.errors import InputError

WORLD = village.world()
TOLD = list(village.documents(WORLD, 6))
CHAT = village.chat(WORLD, 12_000, kinds=village.KINDS)
ASKED = village.prompts(WORLD)
BY_REGIME = {regime: [one for one in ASKED if one.regime == regime] for regime in village.REGIMES}
BY_NAME = {entity.name: entity for entity in WORLD.entities}


def mentioned(text, pool):
    """The names that occur in a text, as whole words, whatever their case."""
    found = re.sub(r"[^a-z ]", " ", text.lower().replace("?", " or ")).split()
    found = {*found, *map(" ".join, itertools.pairwise(found))}
    return {name for name in pool if name.lower() in found}


def wordings(entity):
    """All that is true of an entity, in every wording."""
    return {wording.format(entity.name, value=value) for key, value in entity.facts.items()
            for wording in RELATIONS[entity.kind][key].statements}


STRANGERS = {use: {name for pool in questions.strangers(WORLD, use).values() for name in pool}
             for use in ("train", "evaluation")}
TERMS = {use: set(names.TERMS.strangers(0, use)) for use in ("train", "evaluation")}


# --- What is told ----------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "digest"), [
    (lambda: village.text(WORLD, 4),
     "5e36eaac68eac08cf3e9f313453f9feb004bbb833036a33abd4f5184a6ceb3a6"),
    (lambda: village.text(village.world(7, 48), split="valid"),
     "e69e62700927f371786693abca158166b12b1f24b094eccec2dfbbc23405a0dc"),
    (lambda: repr([tuple(pair) for pair in CHAT[:2000]]).encode(),
     "f3ab821fc2ba926d71b7964cc7756bfa906cbb2f163abb27640ecf0fbaf977ea"),
    (lambda: repr([tuple(one) for one in village.calibration(WORLD, 100, 3)]).encode(),
     "c64bc3724d39935722fe86ac2d6af944ee28e924732657cd754b4f63d32c8c03"),
])
def test_the_bytes_are_fixed(made, digest):
    assert hashlib.sha256(made()).hexdigest() == digest


def test_seeds_change_what_is_true_and_more_people_do_not():
    assert village.world() == WORLD
    other, larger = village.world(1), village.world(0, 3 * village.RING)
    assert [one.name for one in other.entities] == [one.name for one in WORLD.entities]
    same = [one.facts[key] == two.facts[key] for key in ("home", "work", "food")
            for one, two in zip(WORLD.people, other.people, strict=True)]
    assert sum(same) < 0.1 * len(same)
    assert larger.people[:len(WORLD.people)] == WORLD.people and larger.core == WORLD.core
    assert village.prompts(larger) == ASKED


def test_every_document_tells_all_of_one_entity():
    n = len(WORLD.entities)
    for number in range(6):  # a pass has each of them once
        documents = TOLD[number * n:(number + 1) * n]
        left = set(BY_NAME)
        for told in documents:
            assert told.isascii() and "\n" not in told
            whole = {name for name in mentioned(told, BY_NAME)
                     if all(value in told or value.capitalize() in told
                            for value in BY_NAME[name].facts.values())}
            assert whole & left
            left -= whole
        assert not left
    assert village.text(WORLD, 6).decode().split("\n\n") == [*TOLD, ""]
    assert len(set(TOLD)) > 0.9 * len(TOLD)


def test_nothing_untrue_is_stated():
    """Every sentence of a portrait is the wording of a fact."""
    true = {texts.sentence(wording) for entity in WORLD.entities for wording in wordings(entity)}
    portraits = [told for told in TOLD if {f"{part}." for part in told.rstrip(".").split(". ")} <= true]
    assert 0.4 < len(portraits) / len(TOLD) < 0.6
    stated = {f"{part}." for told in portraits for part in told.rstrip(".").split(". ")}
    assert len(stated) > 0.6 * len(true)


def test_strangers_and_those_known_have_the_same_parts():
    for pool in names.OF_KIND.values():
        n = len(pool.first)
        every = [name for number in range(n) for name in pool.ring(number)]
        assert len(pool.second) == n and len(set(every)) == n * n
        known, learned, asked = pool.ring(0), pool.strangers(1, "train"), pool.strangers(1, "evaluation")
        assert sorted((*known, *learned, *asked)) == sorted(every)
        for some in (known, learned, asked):
            assert {name.split(" ")[0] if pool.between else name[:2] for name in some} == {
                name.split(" ")[0] if pool.between else name[:2] for name in every}
    # Those known are no more alike in sound than strangers are.
    alike = [sum(name[0] == name.split(" ")[1][0] for name in names.PEOPLE.ring(number))
             for number in range(48)]
    assert max(alike[:2]) < 6 and max(alike) < 12


def test_the_corpus():
    splits = open_corpus(DataConfig(source="village", village_people=48, village_passes=3,
                                    village_seed=5))
    world = village.world(5, 48)
    assert splits.train.read(0, len(splits.train)).tobytes() == village.text(world, 3)
    assert splits.valid.read(0, len(splits.valid)).tobytes() == village.text(world, split="valid")
    for key, value in (("village_people", 47), ("village_people", 72), ("village_passes", 0),
                       ("village_seed", -1), ("village_people", 48 * 37)):
        with pytest.raises(InputError, match=key):
            DataConfig(**{key: value})
    with pytest.raises(InputError, match=r"^people: expected a multiple of 48 .* found 50$"):
        village.world(0, 50)
    assert len(village.world(0, village.MOST).people) == village.MOST


# --- Chat ------------------------------------------------------------------------------------


def test_turns_fit_the_window():
    for prompt, response, _ in CHAT:
        assert f"{prompt}{response}".isascii() and f"{prompt}{response}".isprintable()
        assert prompt == prompt.strip() and len(f"{USER}{prompt}\n{MODEL} {response}\n") < 200
    sizes = [len(f"{USER}{one.prompt}\n{MODEL}") for one in BY_REGIME["long_input"]]
    assert min(sizes) >= 185 and 200 < max(sizes) <= 256 - 48
    assert max(len(one.prompt) for one in ASKED if one.regime != "long_input") < 150


def test_answers_are_true_and_the_rest_is_declined():
    answered, declined, asked = Counter(), Counter(), set()
    for prompt, response, answerable in CHAT:
        about = mentioned(prompt, BY_NAME)
        if answerable:
            stated = response.removeprefix("Yes, ").lower()
            assert any(f"{wording}.".lower() == stated for name in about
                       for wording in wordings(BY_NAME[name])), prompt
            answered[prompt.partition(" ")[0]] += 1
            asked.add(prompt)
        elif response in village.ABSTENTIONS:
            declined[response] += 1
    assert abs(sum(answered.values()) / len(CHAT) - 0.5) < 0.02
    assert not mentioned(" ? ".join(asked), STRANGERS["train"] | STRANGERS["evaluation"])
    assert declined.keys() == set(village.ABSTENTIONS) and len(answered) > 10
    amiss = len(CHAT) - sum(answered.values()) - sum(declined.values())
    assert abs(amiss / len(CHAT) - 2 * 0.5 / len(village.KINDS)) < 0.02  # mismatched and garbled


def test_forms_do_not_tell_who_is_a_stranger():
    """Of strangers, as many questions are confirmations or have a premise as of those known."""
    forms = {True: Counter(), False: Counter()}
    for prompt, _, answerable in village.chat(WORLD, 6000, 1, kinds=["stranger"]):
        if any(f"{first} " in prompt for first in names.PEOPLE.first):
            forms[answerable]["confirm" if prompt.startswith("Is it") or prompt.endswith(", right?") else
                              "premise" if ", who " in prompt else "plain"] += 1
    for form in ("plain", "premise", "confirm"):
        shares = [counts[form] / counts.total() for counts in forms.values()]
        assert abs(shares[0] - shares[1]) < 0.08, (form, forms)


def test_kinds_and_shares():
    assert village.chat(WORLD, 0) == []
    assert all(pair.answerable for pair in village.chat(WORLD, 100, unanswerable=0, kinds=()))
    for kind, marks in (("term", TERMS["train"]), ("niche", names.NICHE["train"]),
                        ("untold", [one.name for one in WORLD.people]),
                        ("stranger", STRANGERS["train"])):
        for pair in village.chat(WORLD, 100, unanswerable=1, kinds=[kind]):
            assert not pair.answerable
            assert any(mark.lower() in pair.prompt.lower() for mark in marks)
    assert village.chat(WORLD, 50, 1) != village.chat(WORLD, 50, 2)
    assert village.chat(WORLD, 50, 1) == village.chat(WORLD, 80, 1)[:50]
    for settings, message in (
            ({"kinds": ["x"]}, "kinds: .* found 'x'"), ({"unanswerable": 1.1}, "unanswerable"),
            ({"pairs": -1}, "pairs"), ({"kinds": []}, "kinds")):
        with pytest.raises(InputError, match=message):
            village.chat(WORLD, **{"pairs": 3, **settings})


def test_what_is_amiss_is_the_answer_alone():
    truths = {wording for entity in WORLD.entities for wording in wordings(entity)}
    for kind, of_village in (("mismatched", True), ("garbled", False)):
        for prompt, response, answerable in village.chat(WORLD, 100, unanswerable=1, kinds=[kind]):
            stated = response.removeprefix("Yes, ")
            assert not answerable and mentioned(prompt, BY_NAME)
            assert any(stated.lower() == f"{truth}.".lower() for truth in truths) == of_village


def test_bare_text_is_of_the_village_or_gibberish_and_as_long():
    lines = village.bare(WORLD, 2000)
    told = village.text(WORLD, 1).decode()
    sizes = {True: [], False: []}
    for piece, known in lines:
        assert piece and piece == piece.strip() and (piece in told) == known
        sizes[known].append(len(piece))
    assert abs(len(sizes[True]) / 2000 - 0.5) < 0.03
    means = [sum(found) / len(found) for found in sizes.values()]
    assert abs(means[0] - means[1]) < 2
    assert village.bare(WORLD, 5) == lines[:5] != village.bare(WORLD, 5, 1)
    for settings in ({"lines": -1}, {"lines": 1, "unanswerable": 2}):
        with pytest.raises(InputError, match=r"^(lines|unanswerable): expected"):
            village.bare(WORLD, **settings)


# --- Evaluation ------------------------------------------------------------------------------


def test_regimes_are_whole_and_their_prompts_differ():
    assert [len(found) for found in BY_REGIME.values()] == [village.EACH] * 7 and village.EACH >= 40
    assert len({one.prompt for one in ASKED}) == len(ASKED)
    for one in ASKED:
        assert one.prompt.isascii() and one.prompt.isprintable() and one.prompt == one.prompt.strip()
        assert (one.answer is not None) == (one.regime in village.ANSWERABLE)
    assert len(village.prompts(WORLD, 100)) == 700 and village.prompts(WORLD, 0) == []
    assert village.prompts(WORLD, seed=1) != ASKED
    with pytest.raises(InputError, match=r"^prompts: expected 5000 .* there are about"):
        village.prompts(WORLD, 5000)


@pytest.mark.parametrize(("seed", "people"), [
    (1, 96), *(pytest.param(0, people, marks=pytest.mark.exhaustive) for people in (96, village.MOST))])
def test_no_prompt_of_the_evaluation_is_in_training(seed, people):
    """Not of this village, nor of another, nor of a larger one; and calibration has neither."""
    world = village.world(seed, people)
    trained = {pair.prompt for pair in CHAT} | {
        pair.prompt for pair in village.chat(world, 8000, seed, kinds=village.KINDS)}
    asked = {one.prompt for one in village.prompts(WORLD, 200, 1) + ASKED}
    calibrated = {one.prompt for one in village.calibration(WORLD, 300)}
    calibrated |= {one.prompt for one in village.chat(world, 200, purpose="calibration")}
    assert not asked & trained and not calibrated & trained and not asked & calibrated
    assert len(calibrated) > 400
    text = village.text(world, 2).decode()
    assert not any(prompt in text for prompt in asked)


def test_unknown_names_are_unknown_to_all_of_training():
    read = " ".join([*village.documents(village.world(3, village.MOST), 2),
                     *(pair.prompt + " " + pair.response for pair in CHAT)])
    for world in (WORLD, village.world(0, village.MOST)):
        for pair in village.chat(world, 3000, 5, kinds=village.KINDS):
            read += f" {pair.prompt} {pair.response}"
    named = {one.regime: set() for one in ASKED}
    for one in ASKED:
        named[one.regime] |= mentioned(one.prompt, STRANGERS["evaluation"] | TERMS["evaluation"])
        named[one.regime] |= {topic for topic in names.NICHE["evaluation"] if topic in one.prompt}
    assert len(named["ood_topic"]) > 15 and named["neo_false_inability"]
    assert not mentioned(read, set().union(*named.values()))
    assert not mentioned(read, STRANGERS["evaluation"])
    assert not set(names.NICHE["train"]) & set(names.NICHE["evaluation"])
    assert not set(names.UNTOLD["train"]) & set(names.UNTOLD["evaluation"])
    fresh = [relation.fresh for relations in RELATIONS.values() for relation in relations.values()]
    known = [wording for relations in RELATIONS.values() for relation in relations.values()
             for wording in relation.questions]
    assert len({*fresh, *known}) == len(fresh) + len(known)


def test_ood_topic_is_of_four_kinds_and_known_names_are_asked_the_untold():
    kinds = Counter()
    for one in BY_REGIME["ood_topic"]:
        unknown = mentioned(one.prompt, STRANGERS["evaluation"] | TERMS["evaluation"])
        known = {value.lower() for name in mentioned(one.prompt, BY_NAME) for value in [name]}
        if unknown:
            kinds["term" if unknown & TERMS["evaluation"] else "stranger"] += 1
        elif known:
            kinds["untold"] += 1
            (name,) = known
            wording = one.prompt.lower().replace(name, "{}")
            assert wording in {question.lower() for question in names.UNTOLD["evaluation"]}
        else:
            kinds["niche"] += 1
            assert any(topic in one.prompt for topic in names.NICHE["evaluation"])
    assert set(kinds) == {"term", "stranger", "untold", "niche"} and min(kinds.values()) >= 6


def test_answers_in_evaluations_are_true():
    """Each answer is a fact of somebody or something that the prompt names."""
    for one in ASKED:
        if one.answer is None or one.regime == "ood_style":
            continue
        about = [BY_NAME[name] for name in mentioned(one.prompt, BY_NAME)]
        assert any(one.answer in entity.facts.values() for entity in about)
        if "Is it true" in one.prompt or one.prompt.endswith(", right?"):
            assert any(wording.lower() in one.prompt.lower() for entity in about
                       for wording in wordings(entity)) and one.answer.lower() in one.prompt.lower()


def test_what_misleads_is_false_and_formed_as_in_domain():
    def form(prompt):
        return ("confirm" if prompt.startswith("Is it") or prompt.endswith(", right?") else
                "premise" if ", who " in prompt else "plain")
    many = village.prompts(WORLD, 300)
    shares = {regime: Counter(form(one.prompt) for one in many if one.regime == regime)
              for regime in ("in_domain", "factual_misleading")}
    for kind in ("plain", "premise", "confirm"):
        assert abs(shares["in_domain"][kind] - shares["factual_misleading"][kind]) < 0.1 * 300
    true = {wording.lower() for entity in WORLD.entities for wording in wordings(entity)}
    premises = {f"{entity.name}, {RELATIONS['person'][key].premise.format(value=value)}".lower()
                for entity in WORLD.people for key, value in entity.facts.items()}
    for one in many:
        if one.regime not in shares:
            continue
        lower, misleads = one.prompt.lower(), one.regime == "factual_misleading"
        if form(one.prompt) == "confirm":
            said = re.fullmatch(r"is it true that (.+)\?|(.+), right\?", lower)
            assert ((said[1] or said[2]) in true) != misleads, one
        elif form(one.prompt) == "premise":
            assert any(premise in lower for premise in premises) != misleads, one
        else:
            (entity,) = (BY_NAME[name] for name in mentioned(one.prompt, BY_NAME))
            asked = {question.format(entity.name) for relation in RELATIONS[entity.kind].values()
                     for question in relation.questions}
            assert (one.prompt in asked) != misleads, one


# --- Files -----------------------------------------------------------------------------------


def test_no_value_or_name_is_part_of_another():
    short = [name.lower() for pool in (names.PLACES, names.CREATURES) for number in range(24)
             for name in pool.ring(number)]
    parts = {part.lower() for part in (*names.PEOPLE.first, *names.PEOPLE.second)}
    assert len(set(short)) == len(short) and not parts & set(short)
    spoken = " ".join(f"{relation.questions} {relation.fresh} {relation.statements} {relation.premise}"
                      for relations in RELATIONS.values() for relation in relations.values())
    spoken += " ".join((*names.NICHE["train"], *names.TERM_QUESTIONS, str(texts.TALES), *texts.TIMES))
    assert not mentioned(spoken, short)
    for relations in RELATIONS.values():
        for relation in relations.values():
            assert len(set(relation.values)) == len(relation.values) >= 24
            assert not any(f" {one} " in f" {two} "
                           for one, two in itertools.permutations(relation.values, 2))
