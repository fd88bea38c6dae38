"""The built-in corpus: fixed bytes, a validation split that is really held out, consistent stories."""

import hashlib
import random
import re
import time

import pytest

from tilelli_jax.data.synthetic import plots, stories
from tilelli_jax.data.synthetic import story_world as world

SOME_STORIES = 3000


def many(split, seed=0):
    rng = random.Random(seed)
    return [stories.story(rng, split) for _ in range(SOME_STORIES)]


@pytest.mark.parametrize(("seed", "split", "digest"), [
    (0, "train", "d78824f6479a9212a00fd09fe56eda0647e3b65ae8d14d376ca64a0af60640ff"),
    (0, "valid", "c27f8be6185eac6e28d64ba1c17235953dc0d4a867ce5045c1ee28e1aabf38bc"),
    (7, "train", "29935d3f2fc2a7b1f54ba856015ec85e8381186356019ff7b742309bf9720766"),
])
def test_the_bytes_are_fixed(seed, split, digest):
    text = stories.generate(100_000, seed, split)
    assert len(text) == 100_000
    assert hashlib.sha256(text).hexdigest() == digest


def test_a_shorter_corpus_is_the_beginning_of_a_longer_one():
    long = stories.generate(20_000)
    for size in (0, 1, 999, 12_345):
        assert stories.generate(size) == long[:size]


def test_four_megabytes_take_less_than_four_seconds():
    begin = time.perf_counter()
    stories.generate(4_000_000)
    assert time.perf_counter() - begin < 4


def test_stories_are_separated_plain_text():
    text = stories.generate(200_000).decode("ascii")
    texts = text.split(stories.SEPARATOR)[:-1]
    assert 400 < sum(map(len, texts)) / len(texts) < 2000
    for text in texts:
        assert all(line and line == line.strip() for line in text.split("\n"))
        assert not re.search(r"[{}\t]|  |\b(a [aeiou]|an [^aeiou])", text), text


def test_no_validation_story_or_premise_occurs_in_training():
    train = set(many("train", 0)) | set(many("train", 1))
    assert not train & set(many("valid", 0))
    rng = random.Random(3)
    premises = {split: {stories.draw_premise(rng, split) for _ in range(SOME_STORIES)}
                for split in ("train", "valid")}
    assert not premises["train"] & premises["valid"]
    for split, drawn in premises.items():
        assert {stories.split_of(premise) for premise in drawn} == {split}


def test_one_premise_in_ten_is_held_out_and_its_parts_occur_in_training():
    rng = random.Random(4)
    drawn = [stories.draw_premise(rng, "train" if i % 2 else "valid") for i in range(20_000)]
    seen = {split: [set(column) for column in zip(
        *(premise for premise in drawn if stories.split_of(premise) == split), strict=True)]
        for split in ("train", "valid")}
    assert seen["train"] == seen["valid"]
    everything = [stories.Premise(plot, hero.name, place, topic) for plot in ("lost", "race")
                  for hero in world.CHILDREN for place in world.PLACES[:8]
                  for topic in plots.PLOTS[plot].topics]
    held_out = sum(stories.split_of(premise) == "valid" for premise in everything)
    assert held_out / len(everything) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("name", plots.PLOTS)
def test_every_story_of_a_plot_names_its_place_and_topic(name):
    """So the text reveals the premise, and stories of two premises are never equal."""
    beats = [beat for paragraph in plots.PLOTS[name].paragraphs for beat in paragraph]
    for blanks in (("{place}",), ("{topic}", "{a_topic}", "{A_topic}")):
        assert any(all(any(blank in line for blank in blanks) for line in beat) for beat in beats)
    assert all(any("{hero}" in line for line in beat) for beat in plots.OPENING[0][:1])
    rng = random.Random(5)
    for topic in plots.PLOTS[name].topics:
        premise = stories.Premise(name, "Nora", "the lake", topic)
        text = stories.tell(premise, rng)
        assert "Nora" in text and "the lake" in text and topic in text


@pytest.mark.parametrize("name", plots.PLOTS)
def test_every_blank_of_a_plot_has_a_filling(name):
    """Every line of a plot can be filled."""
    blanks = stories._Blanks(stories._cast(
        stories.Premise(name, "Tom", "the hill", plots.PLOTS[name].topics[0]), random.Random(0)),
        random.Random(0))
    for paragraph in plots.OPENING + plots.PLOTS[name].paragraphs + plots.ENDING:
        for beat in paragraph:
            for line in beat:
                blanks.left = {"spot": list(world.SPOTS), "animal": list(world.ANIMALS)}
                assert "{" not in line.format_map(blanks)


def test_pronouns_are_the_heros():
    """Templates have no literal pronoun; with people of one gender only, only its pronouns occur."""
    lines = [line for paragraphs in (plots.OPENING, plots.ENDING, ((plots.ASIDES,),),
                                     *(plot.paragraphs for plot in plots.PLOTS.values()))
             for paragraph in paragraphs for beat in paragraph for line in beat]
    for line in lines:
        assert not re.search(r"\b(s?he|him|hers?|his)\b", re.sub(r"\{\w+\}", "", line), re.I), line
    gender = {person.name: person.he for person in world.CHILDREN + world.ELDERS}
    names = re.compile(r"\b(" + "|".join(map(re.escape, gender)) + r")\b")
    forbidden = {"she": r"\b(he|him|his)\b", "he": r"\b(she|her)\b"}
    checked = 0
    for text in many("train", 6):
        named = {gender[name] for name in names.findall(text)}
        if len(named) == 1:
            checked += 1
            assert not re.search(forbidden[named.pop()], text, re.I), text
    assert checked > 500


def test_the_heros_name_stays_the_same():
    rng = random.Random(8)
    names = {child.name for child in world.CHILDREN}
    for _ in range(500):
        premise = stories.draw_premise(rng)
        text = stories.tell(premise, rng)
        names_in_text = names & set(re.findall(r"\w+", text))
        assert premise.hero in names_in_text and len(names_in_text) <= 2, text


def test_the_stories_vary():
    """No story is repeated, and every plot, child and place is about equally frequent."""
    texts = many("train", 9)
    assert len(set(texts)) == len(texts)
    rng = random.Random(10)
    drawn = [stories.draw_premise(rng) for _ in range(24_000)]
    for column, pool in ((0, len(plots.PLOTS)), (1, len(world.CHILDREN)), (2, len(world.PLACES))):
        counts = [sum(premise[column] == value for premise in drawn)
                  for value in {premise[column] for premise in drawn}]
        assert len(counts) == pool
        expected = len(drawn) / pool
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts)
