"""What came of the questions, and which of them are learned from: `questions.parquet`."""

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


def labelled(asked: Sequence[Question], spoken: Sequence[str], match: Rule, options: SplitConfig) -> Columns:
    """Columns `[questions]`: what was asked and said, whether that was right or declined, group and part.

    Raises:
        InputError: a part is left empty.
    """
    known = np.array([is_match(one, question.answers, match)
                      for one, question in zip(spoken, asked, strict=True)], np.int64)
    datasets = [question.dataset for question in asked]
    group = groups(asked)
    return {"id": [q.id for q in asked], "dataset": datasets, "question": [q.text for q in asked],
            "group": group, "popularity": [q.popularity for q in asked], "answer": spoken,
            "answers": [json.dumps(q.answers, ensure_ascii=False) for q in asked],
            "entity": [q.entity for q in asked], "known": known,
            "refused": [is_refusal(one) and not right for one, right in zip(spoken, known, strict=True)],
            "part": parts(group, datasets, known, options)}


def groups(asked: Sequence[Question]) -> np.ndarray:
    """What belongs together, `[questions]`: equal questions, equal ids, one entity."""
    return splits.same([q.text for q in asked], [q.id for q in asked], [q.entity for q in asked])


def parts(group: np.ndarray, datasets: Sequence[str], known: np.ndarray, options: SplitConfig) -> np.ndarray:
    """The part of each question, `[questions]`. Raises InputError where one is left empty."""
    if options.by == "published":
        published = splits.published(datasets, known, options.seed, options.validate, options.test)["main"]
        found = {"train": published["train"], "validate": published["val"], "test": published["test"]}
    else:
        shares = {"train": 1 - options.validate - options.calibrate - options.test,
                  "validate": options.validate, "calibrate": options.calibrate, "test": options.test}
        strata = [f"{name}|{one}" for name, one in zip(datasets, known, strict=True)]
        try:
            found = splits.grouped(group, strata, shares, options.seed)
        except ValueError as error:
            raise InputError(f"split.{error}") from None
    part = np.empty(len(known), "<U9")
    for name, rows in found.items():
        part[rows] = name
    return part
