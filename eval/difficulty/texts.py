"""Questions that a language model is asked: SQuAD and HellaSwag as token ids, and what became of them.

A prompt is cut at its head to the tokens that the protocol allows. Nothing is put before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.metrics import Floats
from tilelli_jax.errors import InputError
from tilelli_jax.signals.scoring import Scored, Text, recording, score

Encode = Callable[[str], list[int]]
SQUAD_TOKENS, HELLASWAG_TOKENS = 200, 124  # of a prompt


class Question(NamedTuple):
    """A prompt, its possible continuations and which is right; what it is about, and its paragraph."""

    prompt: str
    endings: tuple[str, ...]
    right: int
    topic: str
    group: str


def read_rows(path: Path, most: int = 5000) -> list[dict[str, Any]]:
    """Rows of a JSON list, of JSON lines or of a parquet file.

    Raises:
        InputError: it cannot be read, or holds no rows.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).slice(0, most).to_pylist()
        else:
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if text.lstrip().startswith("[") else [
                json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected rows, as a JSON list, JSON lines or parquet")
    return rows[:most]


def squad(rows: Sequence[dict[str, Any]], source: str) -> list[Question]:
    """SQuAD's rows: `context, question, answers.text, title`; the first answer is the gold one."""
    def one(row: dict[str, Any]) -> Question:
        prompt = f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer:"
        return Question(prompt, (" " + row["answers"]["text"][0].strip(),), 0, row["title"], row["context"])
    return _each(rows, one, source)


def hellaswag(rows: Sequence[dict[str, Any]], source: str) -> list[Question]:
    """HellaSwag's rows: `ctx_a, ctx_b, endings, label, activity_label`."""
    def one(row: dict[str, Any]) -> Question:
        prompt = row["ctx_a"] + (" " + row["ctx_b"] if row["ctx_b"] else "")
        endings = tuple(" " + ending.strip() for ending in row["endings"])
        return Question(prompt, endings, int(row["label"]), row["activity_label"],
                        str(row.get("source_id", row["activity_label"])))
    return _each(rows, one, source)


def _each(rows: Sequence[dict[str, Any]], one: Callable[[dict[str, Any]], Question],
          source: str) -> list[Question]:
    found = []
    for i, row in enumerate(rows):
        try:
            found.append(one(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: row {i}: expected the columns of the data set: {error!r}") from None
    return found


READERS = {"squad": (squad, SQUAD_TOKENS), "hellaswag": (hellaswag, HELLASWAG_TOKENS)}


class Answers(NamedTuple):
    """What a network makes of questions.

    `prompt_nats` `[items]`: mean surprise at the prompt's tokens but the first, NaN where there is none.
    `ending_nats` `[items, endings]`: mean surprise at each ending's tokens.
    `ending_tokens` int `[items, endings]`: how many there are; `prompt_tokens` int `[items]`.
    `activations`: layer → `[items, positions, d_model]`: at the prompt's last token where there is one
    ending, otherwise at each ending's first.
    """

    prompt_nats: Floats
    ending_nats: Floats
    prompt_tokens: np.ndarray
    ending_tokens: np.ndarray
    activations: dict[int, np.ndarray]


def answer(model: Any, encode: Encode, questions: Sequence[Question], *, most_tokens: int, place: str,
           layers: tuple[int, ...], batch_size: int = 16, dtype: Any = np.float16,
           mesh: Any = None) -> Answers:
    """One pass of prompt and ending for each ending; a causal network's surprise at the prompt is in it.

    Raises:
        InputError: an ending has no tokens, or inner values are not finite (named by item and layer).
    """
    prompts = [encode(question.prompt)[-most_tokens:] for question in questions]
    endings = [[encode(ending) for ending in question.endings] for question in questions]
    for i, found in enumerate(endings):
        if not prompts[i] or not all(found):
            raise InputError(f"item {i}: expected tokens in the prompt and in every ending")
    several = len(endings[0]) > 1
    of = [(i, j) for i, found in enumerate(endings) for j in range(len(found))]
    texts = [Text(prompts[i] + endings[i][j], [len(prompts[i]) - (0 if several else 1)]) for i, j in of]
    nats = np.zeros((len(questions), len(endings[0])))
    prompt_nats = np.zeros(len(questions))
    kept = {layer: np.zeros((len(questions), len(endings[0]), 0), dtype) for layer in layers}
    tap_of = recording((place,), tuple(sorted(layers))) if layers else None
    for index, result in score(model, texts, tap_of, batch_size=batch_size, mesh=mesh, what="asking"):
        i, j = of[index]
        n = len(prompts[i])
        nats[i, j] = result.nats[n - 1:].mean(dtype=np.float64)
        if j == 0:
            prompt_nats[i] = result.nats[:n - 1].mean(dtype=np.float64) if n > 1 else np.nan
        if layers:
            _keep(kept, result, place, sorted(layers), i, j)
    return Answers(prompt_nats, nats, np.array([len(ids) for ids in prompts]),
                   np.array([[len(ids) for ids in found] for found in endings]), kept)


def _keep(kept: dict[int, np.ndarray], result: Scored, place: str, layers: Sequence[int], i: int,
          j: int) -> None:
    for layer, values in zip(layers, result.seen[place], strict=True):
        with np.errstate(over="ignore"):  # the next line names it
            found = values[0].astype(kept[layer].dtype)
        if not np.isfinite(found).all():
            raise InputError(f"item {i}, layer {layer}: activations are not finite as {kept[layer].dtype}")
        if not kept[layer].shape[-1]:
            kept[layer] = np.zeros((*kept[layer].shape[:2], len(found)), kept[layer].dtype)
        kept[layer][i, j] = found
