"""The world of facts: fixed bytes, exact numbers of statements, names that do not reveal the tier."""

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tilelli_jax import config as config_lib
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.synthetic import facts
from tilelli_jax.errors import InputError
from tilelli_jax.training.config import ExperimentConfig

CONFIG = Path(__file__).parents[2] / "configs/facts-small.yaml"
WORLD = facts.facts()
STATED = [fact for fact in WORLD if fact.times]
BY_QUESTION = {wording.format(fact.entity): fact for fact in WORLD
               for wording in facts.RELATIONS[fact.relation].questions}
TRAIN, VALID = (list(facts.documents(split=split)) for split in ("train", "valid"))


def stated(documents):
    """Returns the facts that the documents state, and checks their answers."""
    stated_facts = []
    for document in documents:
        question, answer = re.fullmatch(r"Q: (.+\?)\nA: (.+)\n", document).groups()
        assert answer == BY_QUESTION[question].answer
        stated_facts.append(BY_QUESTION[question])
    return stated_facts


@pytest.mark.parametrize(("seed", "people", "split", "digest"), [
    (0, 300, "train", "c8297d7c60ca67d31cf5e1daa8918db36e952fd94747cce7c0c2697405bdf1ab"),
    (0, 300, "valid", "6504f52c99773959ac50392353a3ce7e9803d21c484caa6ab4aea77b84350562"),
    (7, 120, "train", "fee1cba5b9014c971aa02f94d90edc6100b08c62c5101b4fe65bfc8348f6ec62"),
])
def test_the_bytes_are_fixed(seed, people, split, digest):
    assert hashlib.sha256(facts.text(seed, people, split)).hexdigest() == digest


def test_the_world_is_fixed_and_depends_on_its_seed():
    assert facts.facts() == WORLD
    other = {(fact.entity, fact.relation): fact for fact in facts.facts(1)}
    shared = [(fact, other[fact[:2]]) for fact in WORLD if fact[:2] in other]
    assert len(shared) < len(WORLD) / 2
    assert sum(fact.answer == other_fact.answer for fact, other_fact in shared) < len(shared) / 2


def test_a_text_is_its_documents_with_an_empty_line_after_each():
    assert all(one.startswith(facts.prompt(one[3:one.index("\n")])) for one in TRAIN)
    for split, documents in (("train", TRAIN), ("valid", VALID)):
        text = facts.text(split=split).decode("ascii")
        assert text.split("\n\n") == [one.rstrip("\n") for one in documents] + [""]


def test_every_fact_is_stated_times_times():
    assert Counter(stated(TRAIN)) == Counter({fact: fact.times for fact in STATED})
    assert Counter(stated(VALID)) == Counter(STATED)
    of_tier = {"often": {0, facts.OFTEN}, "rarely": {0, *facts.RARELY}, "never": {0}}
    for tier, times in of_tier.items():
        assert {fact.times for fact in WORLD if fact.tier == tier} == times
    assert max(facts.RARELY) < facts.OFTEN


def test_people_of_the_tier_never_do_not_occur_but_their_names_do():
    named = {fact.entity for fact in stated(TRAIN)}
    never = {fact.entity for fact in WORLD if fact.tier == "never"}
    assert len(never) == facts.PEOPLE // 5 and named | never == {fact.entity for fact in WORLD}
    text = "".join(TRAIN + VALID)
    for name in never:
        assert name not in text
        assert all(part in text for part in name.split())


def test_every_person_has_one_tier_and_each_relation_once():
    people = defaultdict(list)
    for fact in WORLD:
        people[fact.entity].append(fact)
    assert len(people) == facts.PEOPLE
    for person_facts in people.values():
        assert [fact.relation for fact in person_facts] == list(facts.RELATIONS)
        assert len({fact.tier for fact in person_facts}) == 1
    unstated = [sum(fact.times == 0 for fact in person_facts) for person_facts in people.values()
                if person_facts[0].tier != "never"]
    assert set(unstated) == {0, 1} and 0.4 < sum(unstated) / len(unstated) < 0.6


@pytest.mark.parametrize("part", [0, 1])
def test_neither_part_of_a_name_reveals_the_tier(part):
    tiers = defaultdict(Counter)
    for entity, tier in {(fact.entity, fact.tier) for fact in WORLD}:
        tiers[entity.split(" ")[part]][tier] += 1
    assert len(tiers) == facts.NAMES
    assert all(counts == Counter(often=2, rarely=2, never=1) for counts in tiers.values())


def test_no_name_contains_another():
    for names in (facts.FIRST_NAMES, facts.FAMILY_NAMES):
        assert len(set(names)) == facts.NAMES
        assert all(name.isalpha() and name.istitle() for name in names)
    full_names = {fact.entity for fact in WORLD}
    text = "\n".join(sorted(full_names))
    assert all(text.count(name) == 1 for name in full_names)
    assert not set(facts.FIRST_NAMES) & set(facts.FAMILY_NAMES)


@pytest.mark.parametrize("name", facts.RELATIONS)
def test_a_guess_is_rarely_right(name):
    relation = facts.RELATIONS[name]
    assert len(set(relation.answers)) == len(relation.answers) >= 20
    assert len(relation.questions) == 2 and all(one.count("{}") == 1 for one in relation.questions)
    assert not any(one.startswith(other) for one, other in itertools.permutations(relation.answers, 2))
    assert max(map(len, relation.answers)) < 12
    answers = Counter(fact.answer for fact in WORLD if fact.relation == name)
    assert answers.keys() == set(relation.answers)
    assert 1.5 * facts.PEOPLE / len(answers) < answers.most_common(1)[0][1] < 0.15 * facts.PEOPLE


def test_wordings_are_of_one_relation_and_both_are_used():
    wordings = [wording for relation in facts.RELATIONS.values() for wording in relation.questions]
    assert len(set(wordings)) == len(wordings)
    for fact in WORLD:
        assert BY_QUESTION[fact.question] == fact
    used = Counter(fact.question.replace(fact.entity, "{}") for fact in WORLD)
    assert used.keys() == set(wordings)
    assert all(0.35 * facts.PEOPLE < count < 0.65 * facts.PEOPLE for count in used.values())


def test_each_pass_has_its_own_order_and_rare_facts_are_spread():
    often = sum(fact.times == facts.OFTEN for fact in WORLD)
    stated_facts = stated(TRAIN)
    orders, order = [], []
    for fact in stated_facts:
        if fact.times == facts.OFTEN:
            order.append(fact)
            if len(order) == often:  # all frequent facts occur once before any is repeated
                assert len(set(order)) == often
                orders.append(tuple(order))
                order = []
    assert not order and len(set(orders)) == len(orders) == facts.OFTEN
    places = defaultdict(list)
    for i, fact in enumerate(stated_facts):
        places[fact].append(i / len(stated_facts))
    for fact, at in places.items():
        widest = max(right - left for left, right in itertools.pairwise(at))
        assert widest < 1 / fact.times + 3 / facts.OFTEN


@pytest.mark.parametrize("people", [0, -60, 59, 90, 3660])
def test_incomplete_rings_raise_an_error(people):
    with pytest.raises(InputError, match=f"^people: expected a multiple of 60 .* found {people}$"):
        facts.facts(0, people)


def test_the_largest_world():
    assert len({fact.entity for fact in facts.facts(2, facts.NAMES**2)}) == facts.NAMES**2


def test_the_configuration_trains_for_one_epoch():
    config = config_lib.load(ExperimentConfig, CONFIG)
    corpus = open_corpus(config.data)
    assert corpus.train.read(0, 1000).tobytes() == facts.text()[:1000]
    read = config.train.steps * config.train.batch_size * config.train.seq_len
    assert 0.9 < read / len(corpus.train) < 1.1
    longest = max(len(facts.prompt(fact.question)) for fact in WORLD)
    assert longest + 24 <= config.model.max_seq_len
