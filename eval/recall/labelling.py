"""Grades the answers and assigns every question to a split: the columns of `questions.parquet`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError

from ..matching import Rule, is_match, is_refusal
from . import splits
from .config import SplitConfig
from .questions import Question

Columns = dict[str, Any]


def label(questions: Sequence[Question], answers: Sequence[str], match: Rule, options: SplitConfig
          ) -> Columns:
    """Returns columns `[questions]`: question and answer, whether it is correct or a refusal, group, split.

    Args:
        answers: the network's answers.

    Raises:
        InputError: a split is empty.
    """
    known = np.array([is_match(answer, question.answers, match)
                      for answer, question in zip(answers, questions, strict=True)], np.int64)
    datasets = [question.dataset for question in questions]
    group = groups(questions)
    return {"id": [q.id for q in questions], "dataset": datasets, "question": [q.text for q in questions],
            "group": group, "popularity": [q.popularity for q in questions], "answer": answers,
            "answers": [json.dumps(q.answers, ensure_ascii=False) for q in questions],
            "entity": [q.entity for q in questions], "known": known,
            "refused": [is_refusal(answer) and not correct
                        for answer, correct in zip(answers, known, strict=True)],
            "split": assign_splits(group, datasets, known, options)}


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
        fractions = {"train": 1 - options.validate - options.calibrate - options.test,
                     "validate": options.validate, "calibrate": options.calibrate, "test": options.test}
        strata = [f"{name}|{label}" for name, label in zip(datasets, known, strict=True)]
        try:
            rows_of = splits.grouped_splits(group, strata, fractions, options.seed)
        except ValueError as error:
            raise InputError(f"split.{error}") from None
    split = np.empty(len(known), "<U9")
    for name, rows in rows_of.items():
        split[rows] = name
    return split
