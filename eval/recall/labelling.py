"""Grades the answers, assigns every question to a split, and checks that no split is too small."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError

from ..estimators.table import UNANSWERABLE
from ..matching import Rule, is_match, is_refusal
from . import splits
from .config import SplitConfig, Task
from .questions import Question

Columns = dict[str, Any]
# Known questions, and as many unknown ones, that each split needs: to fit and select, and for intervals.
NEEDED = {"train": 2, "validate": 2, "calibrate": 2, "test": 10}
ADVISED = 3  # times the smallest number of questions: enough if the network answers 1/6 to 5/6 of them
# With fewer known or fewer unknown questions than these: what is then doubtful.
SMALL = {"train": (100, "the sidecar and the probes may be much weaker than with more questions"),
         "calibrate": (20, "P(knows) and the thresholds of the verdicts are rough")}


def label(questions: Sequence[Question], answers: Sequence[str], match: Rule, options: SplitConfig,
          task: Task = "correctness") -> Columns:
    """Returns columns `[questions]`: question and answer, whether it is correct or a refusal, group, split.

    `known` is the label: whether the answer is correct, or for the task answerability whether there is one.
    For correctness, questions without an answer are in the split UNANSWERABLE.

    Args:
        answers: the network's answers.

    Raises:
        InputError: a split is empty.
    """
    correct = np.array([is_match(answer, question.answers, match)
                        for answer, question in zip(answers, questions, strict=True)], np.int64)
    answerable = np.array([question.answerable for question in questions])
    known = correct if task == "correctness" else answerable.astype(np.int64)
    datasets = np.array([question.dataset for question in questions])
    group = groups(questions)
    divided = answerable | (task == "answerability")
    split = np.full(len(questions), UNANSWERABLE)
    split[divided] = assign_splits(group[divided], datasets[divided].tolist(), known[divided], options)
    return {"id": [q.id for q in questions], "dataset": datasets.tolist(),
            "question": [q.text for q in questions], "group": group,
            "popularity": [q.popularity for q in questions], "answer": answers,
            "answers": [json.dumps(q.answers, ensure_ascii=False) for q in questions],
            "entity": [q.entity for q in questions], "category": [q.category for q in questions],
            "known": known, "correct": correct,
            "refused": [is_refusal(answer) and not is_correct
                        for answer, is_correct in zip(answers, correct, strict=True)], "split": split}


def groups(questions: Sequence[Question]) -> np.ndarray:
    """Returns group numbers `[questions]`: questions with equal text, id or entity share a group."""
    return splits.group_ids([q.text for q in questions], [q.id for q in questions],
                            [q.entity for q in questions])


def assign_splits(group: np.ndarray, datasets: Sequence[str], known: np.ndarray, options: SplitConfig
                  ) -> np.ndarray:
    """Returns the split of each question, `[questions]`. Raises InputError if a split is empty."""
    if options.by == "published":
        published = splits.published_splits(datasets, known, options.seed, options.validate, options.test)
        main = published["main"]
        rows_of = {"train": main["train"], "validate": main["val"], "test": main["test"]}
    else:
        strata = [f"{name}|{label}" for name, label in zip(datasets, known, strict=True)]
        try:
            rows_of = splits.grouped_splits(group, strata, fractions(options), options.seed)
        except ValueError as error:
            raise InputError(f"split.{error}") from None
    split = np.empty(len(known), "<U9")
    for name, rows in rows_of.items():
        split[rows] = name
    return split


def fractions(options: SplitConfig) -> dict[str, float]:
    """Returns the fraction of the questions in each split."""
    by_split = {"validate": options.validate, "calibrate": options.calibrate, "test": options.test}
    if options.by == "published":
        del by_split["calibrate"]
    return {"train": 1 - sum(by_split.values()), **by_split}


def check_number(n: int, options: SplitConfig) -> None:
    """Raises InputError if n questions are too few, whatever the network answers."""
    per_label, bottleneck = _needed(fractions(options))
    least = 2 * per_label
    if n < least:
        raise InputError(
            f"questions: expected at least {least}, and better {ADVISED * least}, found {n}: {bottleneck} "
            f"gets {fractions(options)[bottleneck]:g} of all and needs {NEEDED[bottleneck]} known and "
            f"{NEEDED[bottleneck]} unknown ones; {least} suffice if the network answers half of them "
            f"correctly, {ADVISED * least} if it answers between {1 / (2 * ADVISED):.0%} and "
            f"{1 - 1 / (2 * ADVISED):.0%}")


def few_questions_warning(n: int, options: SplitConfig) -> list[str]:
    """Returns a warning if n questions suffice only for some accuracies of the network, or nothing."""
    per_label, _ = _needed(fractions(options))
    if n >= ADVISED * 2 * per_label:
        return []
    return [f"{n} suffice only if the network answers between {per_label / n:.0%} and "
            f"{1 - per_label / n:.0%} of them correctly; {ADVISED * 2 * per_label} are advised for these "
            "splits"]


def missing_groups(datasets: Sequence[str], entities: Sequence[str | None], options: SplitConfig
                   ) -> list[str]:
    """Returns a sentence for each data set with questions of which it is not known what they are about.

    Args:
        datasets, entities: `[questions]`; None for an unknown entity.
    """
    if options.by != "group":
        return []
    counts: dict[str, list[bool]] = {}
    for name, entity in zip(datasets, entities, strict=True):
        counts.setdefault(name, []).append(entity is None)
    return [(f"{name} has no column `group`: each question is its own group" if all(missing) else
             f"{sum(missing)} of {len(missing)} questions of {name} have no `group`: each of these is its "
             "own group") + "; questions about one subject may fall into several splits, and the results "
            "may not hold for new subjects." for name, missing in counts.items() if any(missing)]


def small_splits_warning(known: np.ndarray, split: np.ndarray, options: SplitConfig) -> list[str]:
    """Returns a sentence for each split in which few questions are known or few are unknown.

    Args:
        known: `[questions]`, 1 for a correct answer; split: `[questions]`, their splits.
    """
    names = {"train": "train", "calibrate": "validate" if options.by == "published" else "calibrate"}
    counts = {use: [int(((split == names[use]) & (known == label)).sum()) for label in (1, 0)]
              for use in SMALL}
    return [f"The {names[use]} split has only {n_known} known and {n_unknown} unknown questions (at least "
            f"{enough} of each are advised): {doubt}."
            for use, (enough, doubt) in SMALL.items() for n_known, n_unknown in [counts[use]]
            if min(n_known, n_unknown) < enough]


def check_labels(known: np.ndarray, split: np.ndarray, options: SplitConfig) -> None:
    """Checks that each split has NEEDED known questions and as many unknown ones.

    Args:
        known: `[questions]`, 1 for a correct answer; split: `[questions]`, their splits.

    Raises:
        InputError: one has not. The message counts all splits, and says how many questions are missing.
    """
    by_split, labels = fractions(options), {"known": known == 1, "unknown": known == 0}
    found = {label: {part: int((mask & (split == part)).sum()) for part in by_split}
             for label, mask in labels.items()}
    # A short split lacks that many of its own, and gets only its fraction of what is added.
    missing = {label: max(0, *(_ceil((NEEDED[part] - counts[part]) / fraction)
                               for part, fraction in by_split.items()))
               for label, counts in found.items()}
    if not any(missing.values()):
        return
    counted = "; ".join(
        f"{label}: " + ", ".join(f"{part} {n} (needs {NEEDED[part]})" for part, n in counts.items())
        for label, counts in found.items())
    add = " and ".join(f"{n} more {label}" for label, n in missing.items() if n)
    accuracy = float(known.mean())
    rates = {"known": accuracy, "unknown": 1 - accuracy}
    if all(rates[label] for label, n in missing.items() if n):
        total = max(_ceil(n / rates[label]) for label, n in missing.items() if n)
        remedy = f"about {total} more questions needed at this accuracy ({accuracy:.1%})"
    else:
        remedy = f"the network answers {'all' if accuracy else 'none'} of these correctly"
    raise InputError(f"questions: expected at least {add} ones, found {labels['known'].sum()} known and "
                     f"{labels['unknown'].sum()} unknown ({counted}): {remedy}")


# ---------------------------------------------------------------------------------------------


def _needed(by_split: Mapping[str, float]) -> tuple[int, str]:
    """Returns how many known (and unknown) questions are needed in all, and the split that decides it."""
    per_label = {part: _ceil(NEEDED[part] / fraction) for part, fraction in by_split.items()}
    bottleneck = max(per_label, key=lambda part: per_label[part])
    return per_label[bottleneck], bottleneck


def _ceil(value: float) -> int:
    return math.ceil(value - 1e-9)  # 10 / 0.2 may be a little above 50
