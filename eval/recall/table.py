"""Reads the table of a study from the directories of its stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError

from ..estimators import asked
from ..estimators.likelihood import TokenStatistics
from ..estimators.samples import Equal, classes, equal_answers
from ..estimators.table import SPLITS, QuestionTable, Samples
from ..inputs.shards import Shards
from ..tables import read_columns

QUESTIONS = "questions.parquet"
MIN_PER_SCOPE = 30  # known, and as many unknown, questions of a data set that methods are fitted to alone


def read(signals: Path, questions: Path, answers: Path, judgements: Path | None = None,
         agreement: Path | None = None, equal: Equal = equal_answers) -> QuestionTable:
    """Reads the table from the directories of the stages of these names.

    Args:
        equal: whether two sampled answers have equal meaning.
    """
    shards, given, columns = Shards(signals), Shards(answers), read_columns(questions / QUESTIONS)
    judged = None if judgements is None else Shards(judgements)

    def text(name: str) -> np.ndarray:
        return columns[name].astype(str)

    def of(source: Shards | None, name: str) -> Any:
        return source.joined(name) if source is not None and name in source.names else None
    logits = of(judged, "p_true_logits")
    return QuestionTable(
        shards.joined("by_layer"), shards.joined("prompt_features"), shards.joined("entropies"),
        columns["known"].astype(np.int64), columns["refused"].astype(bool), text("split"), columns["group"],
        text("question"), text("answer"), text("dataset"), columns["popularity"].astype(float),
        text("category"), [json.loads(golds) for golds in columns["answers"]],
        final=of(shards, "final"), robustness=of(shards, "robustness"), greedy=_greedy(given),
        answer_final=of(given, "answer_final"),
        p_true=None if logits is None else np.array([asked.p_true(*pair) for pair in logits.tolist()]),
        verbalised=None if judged is None or "verbalised" not in judged.names else
        judged.joined("verbalised"),
        agreement=None if agreement is None else Shards(agreement).joined("agreement"),
        samples=_samples(given, columns["samples"].tolist(), equal) if "sample_item" in given.names else None)


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


def _greedy(answers: Shards) -> list[TokenStatistics]:
    columns = [_split(answers.joined(name), answers.joined("statistics"))
               for name in ("log_probs", "entropies", "divergences")]
    return [TokenStatistics(*values) for values in zip(*columns, strict=True)]


def _samples(answers: Shards, texts: list[str], equal: Equal) -> Samples:
    """The samples; `texts` are those of each question as a JSON list."""
    rows = answers.joined("sample_item")
    drawn = [json.loads(texts[row]) for row in rows]
    return Samples(rows, drawn, answers.joined("sample_log_probs").astype(float),
                   answers.joined("sample_lengths"), answers.joined("sample_streams"),
                   np.stack([classes(of_question, equal) for of_question in drawn]))


def _split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values.astype(float), np.cumsum(lengths)[:-1])
