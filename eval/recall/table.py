"""Reads the table of a study from the directories of its stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError

from ..estimators import judgement
from ..estimators.likelihood import TokenStatistics
from ..estimators.samples import Equal, classes, equal_answers
from ..estimators.table import SPLITS, QuestionTable, Samples
from ..tables import read_columns
from . import measurements

QUESTIONS = "questions.parquet"
MIN_PER_SCOPE = 30  # known, and as many unknown, questions of a data set that methods are fitted to alone


Arrays = Mapping[str, np.ndarray]


def read(signals: Path, questions: Path, answers: Path, judgements: Path | None = None,
         agreement: Path | None = None, equal: Equal = equal_answers) -> QuestionTable:
    """Reads the table from the directories of the stages of these names; see `build`."""
    return build(read_columns(questions / QUESTIONS), *(
        {} if path is None else measurements.read(path)
        for path in (signals, answers, judgements, agreement)), equal=equal)


def build(columns: Mapping[str, Any], signals: Arrays, answers: Arrays, judgements: Arrays, agreement: Arrays,
          *, equal: Equal = equal_answers) -> QuestionTable:
    """Returns the table.

    Args:
        columns: the questions with their labels (`labelling.label`), and `samples`, a JSON list of each
            question's sampled answers.
        signals, answers, judgements, agreement: the arrays of `measurements`; empty if not measured.
        equal: whether two sampled answers have equal meaning.
    """
    def text(name: str) -> np.ndarray:
        return np.asarray(columns[name]).astype(str)

    logits = judgements.get("p_true_logits")
    return QuestionTable(
        signals["by_layer"], signals["prompt_features"], signals["entropies"],
        np.asarray(columns["known"], np.int64), np.asarray(columns["refused"], bool), text("split"),
        np.asarray(columns["group"]), text("question"), text("answer"), text("dataset"),
        np.asarray(columns["popularity"], float), text("category"),
        [json.loads(golds) for golds in columns["answers"]],
        final=signals.get("final"), robustness=signals.get("robustness"),
        greedy=_greedy(answers) if answers else None, answer_final=answers.get("answer_final"),
        p_true=None if logits is None else np.array([judgement.p_true(*pair) for pair in logits.tolist()]),
        verbalised=judgements.get("verbalised"), agreement=agreement.get("agreement"),
        samples=_samples(answers, list(columns["samples"]), equal) if "sample_item" in answers else None)


def check_dataset(table: QuestionTable, dataset: str) -> None:
    """Raises InputError if a data set has too few known or unknown questions, in all or in a split."""
    counts = np.zeros(2, np.int64)
    for split in SPLITS:
        counts += (found := np.bincount(table.known[table.rows(split, dataset)], minlength=2))
        if min(found) < 2:
            raise InputError(f"split.{split}: expected at least two known and two unknown questions of "
                             f"{dataset}, found {found[1]} and {found[0]}: use more or other questions")
    if min(counts) < MIN_PER_SCOPE:
        raise InputError(f"expected at least {MIN_PER_SCOPE} known and as many unknown questions of "
                         f"{dataset}, found {counts[1]} and {counts[0]}")


# ---------------------------------------------------------------------------------------------


def _greedy(answers: Arrays) -> list[TokenStatistics]:
    columns = [_split(answers[name], answers["statistics"])
               for name in ("log_probs", "entropies", "divergences")]
    return [TokenStatistics(*values) for values in zip(*columns, strict=True)]


def _samples(answers: Arrays, texts: list[str], equal: Equal) -> Samples:
    """The samples; `texts` are those of each question as a JSON list."""
    rows = answers["sample_item"]
    drawn = [json.loads(texts[row]) for row in rows]
    return Samples(rows, drawn, answers["sample_log_probs"].astype(float), answers["sample_lengths"],
                   answers["sample_streams"],
                   np.stack([classes(of_question, equal) for of_question in drawn]))


def _split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values.astype(float), np.cumsum(lengths)[:-1])
