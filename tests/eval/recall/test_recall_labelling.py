"""Too few questions are rejected before any answer if the number alone says so, otherwise before any fit."""

from __future__ import annotations

import numpy as np
import pytest
from tilelli_jax.eval.recall import evaluate
from tilelli_jax.eval.recall.config import SplitConfig
from tilelli_jax.eval.recall.labelling import assign_splits, check_labels, check_number, fractions

from tilelli_jax.errors import InputError

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
    (DEFAULT, 100, "test needs 10 known and 10 unknown questions, and gets 0.2 of all"),
    (SplitConfig(test=0.4), 50, "test needs 10 known and 10 unknown questions, and gets 0.4 of all"),
    (SplitConfig(test=0.4, validate=0.05), 80,
     "validate needs 2 known and 2 unknown questions, and gets 0.05 of all"),
    (SplitConfig(by="published", test=0.3), 68,
     "test needs 10 known and 10 unknown questions, and gets 0.3 of all")])
def test_an_impossible_number_of_questions(options: SplitConfig, minimum: int, reason: str) -> None:
    check_number(minimum, options)
    with pytest.raises(InputError) as caught:
        check_number(minimum - 1, options)
    assert str(caught.value) == (
        f"questions: expected at least {minimum}, of which the network answers {minimum // 2} correctly and "
        f"{minimum // 2} not, found {minimum - 1}: {reason}")


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
