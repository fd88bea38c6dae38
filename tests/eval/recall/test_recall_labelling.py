"""Too few questions are rejected before any answer if the number alone says so, otherwise before any fit."""

from __future__ import annotations

import numpy as np
import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.eval.recall import evaluate
from tilelli_jax.eval.recall.config import SplitConfig
from tilelli_jax.eval.recall.labelling import (
    assign_splits,
    check_labels,
    check_number,
    few_questions_warning,
    fractions,
    missing_groups,
    small_splits_warning,
)

DEFAULT = SplitConfig()


def labelled(**counts: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels and splits `[questions]` with these numbers of known and unknown questions."""
    rows = [(part, label) for part, (known, unknown) in counts.items()
            for label, n in ((1, known), (0, unknown)) for _ in range(n)]
    return np.array([label for _, label in rows]), np.array([part for part, _ in rows])


def message_of(known: np.ndarray, split: np.ndarray, options: SplitConfig = DEFAULT) -> str:
    with pytest.raises(InputError) as caught:
        check_labels(known, split, options)
    return str(caught.value)


def test_fractions_are_those_of_the_settings() -> None:
    assert fractions(DEFAULT) == pytest.approx(
        {"train": 0.55, "validate": 0.1, "calibrate": 0.15, "test": 0.2})
    published = fractions(SplitConfig(by="published", validate=0.15, test=0.15))
    assert published == pytest.approx({"train": 0.7, "validate": 0.15, "test": 0.15})
    assert evaluate.MIN_PER_LABEL == 10


@pytest.mark.parametrize(("options", "minimum", "reason"), [
    (DEFAULT, 100, "test gets 0.2 of all and needs 10 known and 10 unknown ones"),
    (SplitConfig(test=0.4), 50, "test gets 0.4 of all and needs 10 known and 10 unknown ones"),
    (SplitConfig(test=0.4, validate=0.05), 80,
     "validate gets 0.05 of all and needs 2 known and 2 unknown ones"),
    (SplitConfig(by="published", test=0.3), 68,
     "test gets 0.3 of all and needs 10 known and 10 unknown ones")])
def test_an_impossible_number_of_questions(options: SplitConfig, minimum: int, reason: str) -> None:
    check_number(minimum, options)
    with pytest.raises(InputError) as caught:
        check_number(minimum - 1, options)
    assert str(caught.value) == (
        f"questions: expected at least {minimum}, and better {3 * minimum}, found {minimum - 1}: {reason}; "
        f"{minimum} suffice if the network answers half of them correctly, {3 * minimum} if it answers "
        "between 17% and 83%")


@pytest.mark.parametrize(("options", "advised"), [(DEFAULT, 300), (SplitConfig(test=0.4), 150)])
@pytest.mark.parametrize("accuracy", [1 / 6, 0.3, 5 / 6])
def test_the_advised_number_suffices_for_most_accuracies(options: SplitConfig, advised: int,
                                                         accuracy: float) -> None:
    known = (np.arange(advised) < round(accuracy * advised)).astype(int)
    check_labels(known, assign_splits(np.arange(advised), ["a"] * advised, known, options), options)
    assert few_questions_warning(advised, options) == []
    assert few_questions_warning(2 * advised // 3, options) == [
        f"{2 * advised // 3} suffice only if the network answers between 25% and 75% of them correctly; "
        f"{advised} are advised for these splits"]


def test_questions_without_a_group() -> None:
    datasets, entities = ["a", "b", "a", "c", "b"], [None, "b: x", None, "c: y", None]
    assert [line.partition("; ")[0] for line in missing_groups(datasets, entities, DEFAULT)] == [
        "a has no column `group`: each question is its own group",
        "1 of 2 questions of b have no `group`: each of these is its own group"]
    assert missing_groups(datasets, entities, SplitConfig(by="published")) == [], "it has no groups"


def test_small_splits() -> None:
    enough = {"train": (100, 100), "validate": (2, 2), "calibrate": (20, 20), "test": (10, 10)}
    assert small_splits_warning(*labelled(**enough), DEFAULT) == []
    train, calibrate = small_splits_warning(
        *labelled(**enough | {"train": (120, 31), "calibrate": (19, 40)}), DEFAULT)
    assert train.startswith("The train split has only 120 known and 31 unknown questions (at least 100 of ")
    assert calibrate.startswith("The calibrate split has only 19 known and 40 unknown questions (at least 20")
    published = SplitConfig(by="published", validate=0.15, test=0.25)
    line, = small_splits_warning(*labelled(train=(100, 100), validate=(20, 2), test=(10, 10)), published)
    assert line.startswith("The validate split has only 20 known and 2 unknown questions")


@pytest.mark.parametrize(("options", "minimum"), [(DEFAULT, 100), (SplitConfig(test=0.4), 50)])
def test_the_smallest_number_suffices_if_half_of_the_answers_are_correct(
        options: SplitConfig, minimum: int) -> None:
    known = np.arange(minimum) % 2
    check_labels(known, assign_splits(np.arange(minimum), ["a"] * minimum, known, options), options)


def test_the_message_counts_every_split() -> None:
    known, split = labelled(train=(5, 61), validate=(1, 11), calibrate=(1, 17), test=(2, 22))
    assert message_of(known, split) == (  # 8 more in test, which gets a fifth; 9 of 120 are correct
        "questions: expected at least 40 more known ones, found 9 known and 111 unknown (known: train 5 "
        "(needs 2), validate 1 (needs 2), calibrate 1 (needs 2), test 2 (needs 10); unknown: train 61 (needs "
        "2), validate 11 (needs 2), calibrate 17 (needs 2), test 22 (needs 10)): about 534 more questions "
        "needed at this accuracy (7.5%)")
    assert message_of(1 - known, split).startswith(
        "questions: expected at least 40 more unknown ones, found 111 known and 9 unknown (known: train 61")
    both = message_of(*labelled(train=(9, 9), validate=(2, 1), calibrate=(2, 2), test=(8, 10)))
    assert both.startswith(
        "questions: expected at least 10 more known and 10 more unknown ones, found 21 known and 22 unknown")
    assert both.endswith(": about 21 more questions needed at this accuracy (48.8%)")


@pytest.mark.parametrize(("answers", "label", "which"), [(0, "known", "none"), (1, "unknown", "all")])
def test_equal_labels_need_other_questions(answers: int, label: str, which: str) -> None:
    counts = (30, 0) if answers else (0, 30)
    message = message_of(*labelled(train=counts, validate=counts, calibrate=counts, test=counts))
    assert f"expected at least 50 more {label} ones" in message
    assert message.endswith(f": the network answers {which} of these correctly")


def test_the_published_split_has_no_calibrate_part() -> None:
    counts = labelled(train=(9, 9), validate=(2, 2), test=(10, 9))
    options = SplitConfig(by="published", validate=0.15, test=0.25)
    message = message_of(*counts, options)
    assert "calibrate" not in message and "expected at least 4 more unknown ones, found 21 known" in message
    counts = labelled(train=(9, 9), validate=(2, 2), test=(10, 10))
    check_labels(*counts, options)
