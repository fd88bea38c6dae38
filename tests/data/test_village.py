"""The village: fixed bytes, every fact in every pass, no evaluation prompt in training."""

import hashlib
import itertools
import re
from collections import Counter

import pytest

from tilelli_jax.commands.chat import MODEL, USER
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.synthetic import village
from tilelli_jax.data.synthetic.village import names, questions, texts
from tilelli_jax.data.synthetic.village.world import RELATIONS
from tilelli_jax.errors import InputError

WORLD = village.world()
DOCUMENTS = list(village.documents(WORLD, 6))
CHAT = village.chat(WORLD, 12_000, kinds=village.KINDS)
PROMPTS = village.prompts(WORLD)
BY_REGIME = {regime: [prompt for prompt in PROMPTS if prompt.regime == regime] for regime in village.REGIMES}
BY_NAME = {entity.name: entity for entity in WORLD.entities}


def mentioned(text, pool):
    """Returns the names that occur in a text as whole words, ignoring case."""
    words = re.sub(r"[^a-z ]", " ", text.lower().replace("?", " or ")).split()
    words = {*words, *map(" ".join, itertools.pairwise(words))}
    return {name for name in pool if name.lower() in words}


def wordings(entity):
    """Returns every fact of an entity in every wording."""
    return {wording.format(entity.name, value=value) for key, value in entity.facts.items()
            for wording in RELATIONS[entity.kind][key].statements}


STRANGERS = {use: {name for pool in questions.unknown_names(WORLD, use).values() for name in pool}
             for use in ("train", "evaluation")}
TERMS = {use: set(names.TERMS.unknown_names(0, use)) for use in ("train", "evaluation")}


# --- Training text ----------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "digest"), [
    (lambda: village.text(WORLD, 4),
     "5e36eaac68eac08cf3e9f313453f9feb004bbb833036a33abd4f5184a6ceb3a6"),
    (lambda: village.text(village.world(7, 48), split="valid"),
     "e69e62700927f371786693abca158166b12b1f24b094eccec2dfbbc23405a0dc"),
    (lambda: repr([tuple(pair) for pair in CHAT[:2000]]).encode(),
     "f3ab821fc2ba926d71b7964cc7756bfa906cbb2f163abb27640ecf0fbaf977ea"),
    (lambda: repr([tuple(one) for one in village.calibration(WORLD, 100, 3)]).encode(),
     "c64bc3724d39935722fe86ac2d6af944ee28e924732657cd754b4f63d32c8c03"),
])
def test_the_bytes_are_fixed(make, digest):
    assert hashlib.sha256(make()).hexdigest() == digest


def test_seeds_change_the_facts_and_more_people_do_not():
    assert village.world() == WORLD
    other, larger = village.world(1), village.world(0, 3 * village.RING)
    assert [one.name for one in other.entities] == [one.name for one in WORLD.entities]
    same = [one.facts[key] == two.facts[key] for key in ("home", "work", "food")
            for one, two in zip(WORLD.people, other.people, strict=True)]
    assert sum(same) < 0.1 * len(same)
    assert larger.people[:len(WORLD.people)] == WORLD.people and larger.core == WORLD.core
    assert village.prompts(larger) == PROMPTS


def test_every_document_states_all_facts_of_one_entity():
    n = len(WORLD.entities)
    for number in range(6):  # a pass has each entity once
        documents = DOCUMENTS[number * n:(number + 1) * n]
        remaining = set(BY_NAME)
        for document in documents:
            assert document.isascii() and "\n" not in document
            described = {name for name in mentioned(document, BY_NAME)
                         if all(value in document or value.capitalize() in document
                            for value in BY_NAME[name].facts.values())}
            assert described & remaining
            remaining -= described
        assert not remaining
    assert village.text(WORLD, 6).decode().split("\n\n") == [*DOCUMENTS, ""]
    assert len(set(DOCUMENTS)) > 0.9 * len(DOCUMENTS)


def test_only_true_facts_are_stated():
    """Every sentence of a portrait is the wording of a fact."""
    true = {texts.sentence(wording) for entity in WORLD.entities for wording in wordings(entity)}
    portraits = [text for text in DOCUMENTS if {f"{part}." for part in text.rstrip(".").split(". ")} <= true]
    assert 0.4 < len(portraits) / len(DOCUMENTS) < 0.6
    stated = {f"{part}." for document in portraits for part in document.rstrip(".").split(". ")}
    assert len(stated) > 0.6 * len(true)


def test_strangers_and_known_names_have_the_same_parts():
    for pool in names.OF_KIND.values():
        n = len(pool.first)
        every = [name for number in range(n) for name in pool.ring(number)]
        assert len(pool.second) == n and len(set(every)) == n * n
        known = pool.ring(0)
        trained, evaluated = pool.unknown_names(1, "train"), pool.unknown_names(1, "evaluation")
        assert sorted((*known, *trained, *evaluated)) == sorted(every)
        for some in (known, trained, evaluated):
            assert {name.split(" ")[0] if pool.between else name[:2] for name in some} == {
                name.split(" ")[0] if pool.between else name[:2] for name in every}
    # Known names alliterate no more often than strangers' names.
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
    assert len(village.world(0, village.MAX_PEOPLE).people) == village.MAX_PEOPLE


# --- Chat ------------------------------------------------------------------------------------


def test_turns_fit_the_window():
    for prompt, response, _ in CHAT:
        assert f"{prompt}{response}".isascii() and f"{prompt}{response}".isprintable()
        assert prompt == prompt.strip() and len(f"{USER}{prompt}\n{MODEL} {response}\n") < 200
    sizes = [len(f"{USER}{prompt.prompt}\n{MODEL}") for prompt in BY_REGIME["long_input"]]
    assert min(sizes) >= 185 and 200 < max(sizes) <= 256 - 48
    assert max(len(prompt.prompt) for prompt in PROMPTS if prompt.regime != "long_input") < 150


def test_answers_are_true_and_the_rest_abstains():
    answered, abstained, questions_asked = Counter(), Counter(), set()
    for prompt, response, answerable in CHAT:
        about = mentioned(prompt, BY_NAME)
        if answerable:
            stated = response.removeprefix("Yes, ").lower()
            assert any(f"{wording}.".lower() == stated for name in about
                       for wording in wordings(BY_NAME[name])), prompt
            answered[prompt.partition(" ")[0]] += 1
            questions_asked.add(prompt)
        elif response in village.ABSTENTIONS:
            abstained[response] += 1
    assert abs(sum(answered.values()) / len(CHAT) - 0.5) < 0.02
    assert not mentioned(" ? ".join(questions_asked), STRANGERS["train"] | STRANGERS["evaluation"])
    assert abstained.keys() == set(village.ABSTENTIONS) and len(answered) > 10
    n_wrong = len(CHAT) - sum(answered.values()) - sum(abstained.values())
    assert abs(n_wrong / len(CHAT) - 2 * 0.5 / len(village.KINDS)) < 0.02  # mismatched and garbled


def test_question_forms_do_not_reveal_strangers():
    """Confirmations and premises are equally frequent in questions about strangers and about known people."""
    forms = {True: Counter(), False: Counter()}
    for prompt, _, answerable in village.chat(WORLD, 6000, 1, kinds=["unknown_entity"]):
        if any(f"{first} " in prompt for first in names.PEOPLE.first):
            forms[answerable]["confirm" if prompt.startswith("Is it") or prompt.endswith(", right?") else
                              "premise" if ", who " in prompt else "plain"] += 1
    for form in ("plain", "premise", "confirm"):
        fractions = [counts[form] / counts.total() for counts in forms.values()]
        assert abs(fractions[0] - fractions[1]) < 0.08, (form, forms)


def test_kinds_and_fractions():
    assert village.chat(WORLD, 0) == []
    assert all(pair.answerable for pair in village.chat(WORLD, 100, unanswerable=0, kinds=()))
    for kind, marks in (("invented_term", TERMS["train"]), ("real_topic", names.REAL_TOPICS["train"]),
                        ("unstated_relation", [one.name for one in WORLD.people]),
                        ("unknown_entity", STRANGERS["train"])):
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


def test_in_mismatched_and_garbled_pairs_only_the_answer_is_wrong():
    truths = {wording for entity in WORLD.entities for wording in wordings(entity)}
    for kind, of_village in (("mismatched", True), ("garbled", False)):
        for prompt, response, answerable in village.chat(WORLD, 100, unanswerable=1, kinds=[kind]):
            stated = response.removeprefix("Yes, ")
            assert not answerable and mentioned(prompt, BY_NAME)
            assert any(stated.lower() == f"{truth}.".lower() for truth in truths) == of_village


def test_plain_text_is_from_the_village_or_gibberish_of_equal_length():
    lines = village.bare(WORLD, 2000)
    text = village.text(WORLD, 1).decode()
    sizes = {True: [], False: []}
    for piece, known in lines:
        assert piece and piece == piece.strip() and (piece in text) == known
        sizes[known].append(len(piece))
    assert abs(len(sizes[True]) / 2000 - 0.5) < 0.03
    means = [sum(lengths) / len(lengths) for lengths in sizes.values()]
    assert abs(means[0] - means[1]) < 2
    assert village.bare(WORLD, 5) == lines[:5] != village.bare(WORLD, 5, 1)
    for settings in ({"lines": -1}, {"lines": 1, "unanswerable": 2}):
        with pytest.raises(InputError, match=r"^(lines|unanswerable): expected"):
            village.bare(WORLD, **settings)


# --- Evaluation ------------------------------------------------------------------------------


def test_regimes_are_complete_and_their_prompts_differ():
    assert [len(prompts) for prompts in BY_REGIME.values()] == [village.EACH] * 7 and village.EACH >= 40
    assert len({one.prompt for one in PROMPTS}) == len(PROMPTS)
    for one in PROMPTS:
        assert one.prompt.isascii() and one.prompt.isprintable() and one.prompt == one.prompt.strip()
        assert (one.answer is not None) == (one.regime in village.ANSWERABLE)
    assert len(village.prompts(WORLD, 100)) == 700 and village.prompts(WORLD, 0) == []
    assert village.prompts(WORLD, seed=1) != PROMPTS
    with pytest.raises(InputError, match=r"^prompts: expected 5000 .* there are about"):
        village.prompts(WORLD, 5000)


@pytest.mark.parametrize(("seed", "people"), [
    (1, 96), *(pytest.param(0, people, marks=pytest.mark.exhaustive) for people in (96, village.MAX_PEOPLE))])
def test_no_prompt_of_the_evaluation_is_in_training(seed, people):
    """For this village, another and a larger one; calibration shares prompts with neither."""
    world = village.world(seed, people)
    trained = {pair.prompt for pair in CHAT} | {
        pair.prompt for pair in village.chat(world, 8000, seed, kinds=village.KINDS)}
    evaluated = {item.prompt for item in village.prompts(WORLD, 200, 1) + PROMPTS}
    calibrated = {item.prompt for item in village.calibration(WORLD, 300)}
    calibrated |= {item.prompt for item in village.chat(world, 200, purpose="calibration")}
    assert not evaluated & trained and not calibrated & trained and not evaluated & calibrated
    assert len(calibrated) > 400
    text = village.text(world, 2).decode()
    assert not any(prompt in text for prompt in evaluated)


def test_unknown_names_do_not_occur_in_training():
    training_text = " ".join([*village.documents(village.world(3, village.MAX_PEOPLE), 2),
                              *(pair.prompt + " " + pair.response for pair in CHAT)])
    for world in (WORLD, village.world(0, village.MAX_PEOPLE)):
        for pair in village.chat(world, 3000, 5, kinds=village.KINDS):
            training_text += f" {pair.prompt} {pair.response}"
    named = {prompt.regime: set() for prompt in PROMPTS}
    for prompt in PROMPTS:
        named[prompt.regime] |= mentioned(prompt.prompt, STRANGERS["evaluation"] | TERMS["evaluation"])
        named[prompt.regime] |= {topic for topic in names.REAL_TOPICS["evaluation"] if topic in prompt.prompt}
    assert len(named["ood_topic"]) > 15 and named["neo_false_inability"]
    assert not mentioned(training_text, set().union(*named.values()))
    assert not mentioned(training_text, STRANGERS["evaluation"])
    assert not set(names.REAL_TOPICS["train"]) & set(names.REAL_TOPICS["evaluation"])
    assert not set(names.UNSTATED_RELATIONS["train"]) & set(names.UNSTATED_RELATIONS["evaluation"])
    fresh = [relation.fresh for relations in RELATIONS.values() for relation in relations.values()]
    known = [wording for relations in RELATIONS.values() for relation in relations.values()
             for wording in relation.questions]
    assert len({*fresh, *known}) == len(fresh) + len(known)


def test_ood_topic_has_four_kinds_and_asks_known_names_unstated_facts():
    kinds = Counter()
    for one in BY_REGIME["ood_topic"]:
        unknown = mentioned(one.prompt, STRANGERS["evaluation"] | TERMS["evaluation"])
        known = {value.lower() for name in mentioned(one.prompt, BY_NAME) for value in [name]}
        if unknown:
            kinds["invented_term" if unknown & TERMS["evaluation"] else "unknown_entity"] += 1
        elif known:
            kinds["unstated_relation"] += 1
            (name,) = known
            wording = one.prompt.lower().replace(name, "{}")
            assert wording in {question.lower() for question in names.UNSTATED_RELATIONS["evaluation"]}
        else:
            kinds["real_topic"] += 1
            assert any(topic in one.prompt for topic in names.REAL_TOPICS["evaluation"])
    assert set(kinds) == {"invented_term", "unknown_entity", "unstated_relation", "real_topic"}
    assert min(kinds.values()) >= 6


def test_answers_in_evaluations_are_true():
    """Each answer is a fact about an entity that the prompt names."""
    for prompt in PROMPTS:
        if prompt.answer is None or prompt.regime == "ood_style":
            continue
        about = [BY_NAME[name] for name in mentioned(prompt.prompt, BY_NAME)]
        assert any(prompt.answer in entity.facts.values() for entity in about)
        if "Is it true" in prompt.prompt or prompt.prompt.endswith(", right?"):
            assert any(wording.lower() in prompt.prompt.lower() for entity in about
                       for wording in wordings(entity)) and prompt.answer.lower() in prompt.prompt.lower()


def test_misleading_prompts_are_false_and_have_the_forms_of_in_domain():
    def form(prompt):
        return ("confirm" if prompt.startswith("Is it") or prompt.endswith(", right?") else
                "premise" if ", who " in prompt else "plain")
    many = village.prompts(WORLD, 300)
    fractions = {regime: Counter(form(one.prompt) for one in many if one.regime == regime)
                 for regime in ("in_domain", "factual_misleading")}
    for kind in ("plain", "premise", "confirm"):
        assert abs(fractions["in_domain"][kind] - fractions["factual_misleading"][kind]) < 0.1 * 300
    true = {wording.lower() for entity in WORLD.entities for wording in wordings(entity)}
    premises = {f"{entity.name}, {RELATIONS['person'][key].premise.format(value=value)}".lower()
                for entity in WORLD.people for key, value in entity.facts.items()}
    for one in many:
        if one.regime not in fractions:
            continue
        lower, misleads = one.prompt.lower(), one.regime == "factual_misleading"
        if form(one.prompt) == "confirm":
            match = re.fullmatch(r"is it true that (.+)\?|(.+), right\?", lower)
            assert ((match[1] or match[2]) in true) != misleads, one
        elif form(one.prompt) == "premise":
            assert any(premise in lower for premise in premises) != misleads, one
        else:
            (entity,) = (BY_NAME[name] for name in mentioned(one.prompt, BY_NAME))
            known_questions = {question.format(entity.name) for relation in RELATIONS[entity.kind].values()
                               for question in relation.questions}
            assert (one.prompt in known_questions) != misleads, one


# --- Files -----------------------------------------------------------------------------------


def test_no_value_or_name_is_part_of_another():
    short = [name.lower() for pool in (names.PLACES, names.CREATURES) for number in range(24)
             for name in pool.ring(number)]
    parts = {part.lower() for part in (*names.PEOPLE.first, *names.PEOPLE.second)}
    assert len(set(short)) == len(short) and not parts & set(short)
    wording_text = " ".join(f"{relation.questions} {relation.fresh} {relation.statements} {relation.premise}"
                            for relations in RELATIONS.values() for relation in relations.values())
    wording_text += " ".join((*names.REAL_TOPICS["train"], *names.INVENTED_TERM_QUESTIONS, str(texts.TALES),
                              *texts.TIMES))
    assert not mentioned(wording_text, short)
    for relations in RELATIONS.values():
        for relation in relations.values():
            assert len(set(relation.values)) == len(relation.values) >= 24
            assert not any(f" {one} " in f" {two} "
                           for one, two in itertools.permutations(relation.values, 2))
