"""What the stages of a study measure of some questions, as the arrays of a shard.

An array `…_cost [questions, 3]` has the forward tokens beyond the prompt's pass, the generated tokens and the
seconds of each question; ids that prompts share count in each. A shard's questions share its time equally; a
greedy answer and the samples of its question share theirs by their number.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.generation.answers import Answers
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.signals.prompts import PromptIds, PromptReader
from tilelli_jax.signals.robustness import Robustness

from ..estimators import judgement
from ..estimators.samples import equal_answers
from ..inputs.shards import Shards
from .answering import answer, answer_text, p_true_logits, verbalise
from .config import RecallConfig
from .prompting import Prompter
from .questions import Question

Advance = Callable[[int], object]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class StudyInputs:
    """The questions of a study and the network that answers them.

    Attributes:
        needs: the measurements that the estimators need; see `estimators.interface.Need`.
    """

    config: RecallConfig
    needs: set[str]
    language: LanguageModel
    prompter: Prompter
    questions: Sequence[Question]
    prompts: Sequence[PromptIds]


def signals(study: StudyInputs, reader: PromptReader, noise: Robustness | None, rows: Sequence[int],
            advance: Advance) -> Arrays:
    """Runs one pass of each prompt.

    Arrays: `by_layer`, `prompt_features`, `entropies`, `best`, `strongest_layer`, `strongest_token`, `tokens`
    (length of the prompt) and, as needed, `final` and `robustness`, see `estimators.table.QuestionTable`; and
    `prompt_cost` and `robustness_cost`, see `costs`. The tokens of the prompt's pass itself do not count.
    """
    prompts, begun = [study.prompts[i] for i in rows], time.perf_counter()
    by_index = dict(reader(prompts, advance=advance))
    outputs = [by_index[i] for i in range(len(prompts))]
    arrays = {name: np.stack([getattr(output.crystallisation, name) for output in outputs])
              for name in ("by_layer", "prompt_features", "entropies", "best", "strongest_layer",
                           "strongest_token")}
    arrays["tokens"] = np.array([len(prompt.ids) for prompt in prompts], np.int64)
    if "final" in study.needs:
        arrays["final"] = _streams(study, rows, [output.final for output in outputs])
    arrays["prompt_cost"] = _cost(begun, [(0, 0)] * len(rows))
    if noise is not None:
        begun = time.perf_counter()
        arrays["robustness"] = noise([prompt.ids for prompt in prompts], list(rows),
                                     np.stack([output.final[-1] for output in outputs]))
        arrays["robustness_cost"] = _cost(begun, [
            (study.config.signals.noise_samples * len(prompt.ids), 0) for prompt in prompts])
    return arrays


def answers(study: StudyInputs, rows: Sequence[int], advance: Advance) -> Arrays:
    """Generates the greedy answers, and samples of the first `samples.questions` questions if needed.

    Arrays: `tokens` of all answers and their `lengths`; `log_probs`, `entropies` and `divergences` of their
    tokens, and the numbers of these in `statistics` (the token that ends an answer included); `greedy_cost`,
    see `costs`. As needed `answer_final [questions, layers, d_model]`, and of the questions in `sample_item`
    `[sampled]`: `samples_cost`; `sample_tokens` of all samples; `sample_lengths`, `sample_ended` and
    `sample_log_probs` `[sampled, n]` (the token that ends a sample included); `sample_streams [sampled, n,
    d_model]`.
    """
    config = study.config
    limit = len(study.questions) if config.samples.questions is None else config.samples.questions
    sampled = [i for i in rows if "samples" in study.needs and i < limit]
    plain = [i for i in rows if i not in set(sampled)]
    by_item: dict[int, Answers] = {}
    seconds: dict[int, tuple[float, float]] = {}  # of the greedy answer and of the samples
    for items, options in ((sampled, config.samples), (plain, None)):
        begun = time.perf_counter()
        generated = answer(study.language, [study.prompts[i] for i in items], config.answers, advance,
                           prompt=config.prompt, samples=options, streams=items,
                           layers=None if "answer_final" in study.needs else ())
        by_item |= dict(zip(items, generated, strict=True))
        each = (time.perf_counter() - begun) / max(len(items), 1)
        greedy_share = 1.0 if options is None else 1 / (1 + options.n)
        seconds |= dict.fromkeys(items, (greedy_share * each, (1 - greedy_share) * each))
    greedy = [by_item[i].greedy for i in rows]
    for i in rows:
        for given in (by_item[i].greedy, *by_item[i].samples):
            if not np.isfinite([*given.log_probs, *given.entropies]).all():
                raise InputError(f"question {study.questions[i].id}: expected finite probabilities of the "
                                 "answer, found infinite or NaN: the network's weights may be damaged")
    arrays = {"tokens": _flat([given.ids for given in greedy], np.int32),
              "lengths": np.array([len(given.ids) for given in greedy], np.int64),
              "statistics": np.array([len(given.log_probs) for given in greedy], np.int64),
              **{name: _flat([getattr(given, name) for given in greedy], np.float32)
                 for name in ("log_probs", "entropies", "divergences")},
              "greedy_cost": np.array([(0, len(by_item[i].greedy.log_probs), seconds[i][0]) for i in rows])}
    if "answer_final" in study.needs:
        arrays["answer_final"] = _streams(study, rows, [given.streams for given in greedy])
    if "samples" in study.needs:
        drawn = [given for i in sampled for given in by_item[i].samples]
        shape, width = (len(sampled), config.samples.n), study.language.model.config.d_model
        arrays |= {
            "sample_item": np.array(sampled, np.int64),
            "samples_cost": np.array([
                (0, sum(len(given.log_probs) for given in by_item[i].samples), seconds[i][1])
                for i in sampled]).reshape(-1, 3),
            "sample_tokens": _flat([given.ids for given in drawn], np.int32),
            "sample_lengths": np.array([len(given.log_probs) for given in drawn], np.int64).reshape(shape),
            "sample_ended": np.array([given.ended for given in drawn], bool).reshape(shape),
            "sample_log_probs": np.array([given.log_probs.sum(dtype=np.float64) for given in drawn],
                                         np.float64).reshape(shape),
            "sample_streams": np.array([given.streams[0] for given in drawn], np.float32).reshape(
                *shape, width)}
    return arrays


def judgements(study: StudyInputs, rows: Sequence[int], texts: Sequence[str], advance: Advance) -> Arrays:
    """Asks the network about its answers, `texts` of all questions.

    Arrays, as needed: `p_true_logits [questions, 2]`, of true and false; `verbalised [questions]`, 0 to 1,
    NaN for a reply without a number; and the `_cost` of each, see `costs`.
    """
    given = ([study.questions[i].text for i in rows], [texts[i] for i in rows], study.config.answers, advance)
    arrays: Arrays = {}
    if "p_true" in study.needs:
        begun = time.perf_counter()
        arrays["p_true_logits"], lengths = p_true_logits(study.language, study.prompter, *given)
        arrays["p_true_cost"] = _cost(begun, [(length, 0) for length in lengths])
    if "verbalised" in study.needs:
        begun = time.perf_counter()
        replies, tokens = verbalise(study.language, study.prompter, *given)
        arrays["verbalised"] = np.array([judgement.verbalised(reply) for reply in replies])
        arrays["verbalised_cost"] = _cost(begun, tokens)
    return arrays


def agreement(study: StudyInputs, rows: Sequence[int], answers: Sequence[str], advance: Advance) -> Arrays:
    """Answers the paraphrases.

    Arrays: `agreement [questions]`, the fraction of a question's paraphrases whose answer has the same
    meaning as that of the question in `answers`, NaN if it has none; and `agreement_cost`.
    """
    begun = time.perf_counter()
    pairs = [(i, text) for i in rows for text in study.questions[i].paraphrases]
    prompts = [study.prompter(text, f"a paraphrase of question {study.questions[i].id}") for i, text in pairs]
    generated = answer(study.language, prompts, study.config.answers, advance, prompt=study.config.prompt)
    equal: dict[int, list[bool]] = {i: [] for i in rows}
    tokens = {i: np.zeros(2) for i in rows}
    for (i, _), prompt, given in zip(pairs, prompts, generated, strict=True):
        tokens[i] += len(prompt.ids), len(given.greedy.log_probs)
        text = answer_text(study.language.tokenizer.decode(given.greedy.ids.tolist()))
        equal[i].append(equal_answers(answers[i], text))
    return {"agreement": np.array([np.mean(equal[i]) if equal[i] else np.nan for i in rows]),
            "agreement_cost": _cost(begun, list(tokens.values()))}


def read(path: Path) -> Arrays:
    """Returns the arrays of a stage's shards."""
    shards = Shards(path)
    return {name: shards.joined(name) for name in shards.names}


def costs(*stages: Path | None) -> dict[str, dict[str, float]]:
    """Returns what each measurement costs: `forward` and `generated` tokens, mean; `seconds`, median."""
    result = {}
    for shards in (Shards(path) for path in stages if path is not None):
        for name in shards.names:
            if name.endswith("_cost"):
                values = shards.joined(name)
                result[name.removesuffix("_cost")] = {
                    "forward": float(values[:, 0].mean()), "generated": float(values[:, 1].mean()),
                    "seconds": float(np.median(values[:, 2]))}
    return result


def sampled_texts(language: LanguageModel, answers: Arrays, n: int) -> list[str]:
    """Returns the sampled answers of each of n questions, as a JSON list; empty for one without samples."""
    result = ["[]"] * n
    if "sample_item" in answers:
        lengths = answers["sample_lengths"] - answers["sample_ended"]
        every = texts(language, answers["sample_tokens"], lengths.reshape(-1))
        for i, item in enumerate(answers["sample_item"].tolist()):
            of_question = every[i * lengths.shape[1]:(i + 1) * lengths.shape[1]]
            result[item] = json.dumps(of_question, ensure_ascii=False)
    return result


def texts(language: LanguageModel, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Returns the answer in each generated text: `tokens` of all, one after the other."""
    parts = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
    return [answer_text(language.tokenizer.decode(ids.tolist())) for ids in parts]


# ---------------------------------------------------------------------------------------------


def _streams(study: StudyInputs, rows: Sequence[int], streams: Sequence[np.ndarray]) -> np.ndarray:
    """Residual streams of these questions, `[questions, layers, d_model]`, in the configured data type."""
    options = study.config.signals
    with np.errstate(over="ignore"):  # an overflow raises InputError below
        stacked = np.stack(streams).astype(options.dtype)
    if not (finite := np.isfinite(stacked).all(axis=(1, 2))).all():
        question = study.questions[rows[int(np.argmin(finite))]].id
        raise InputError(f"question {question}: expected a residual stream that is finite as "
                         f"{options.dtype}, found infinite or NaN values; signals.dtype=float32 has a larger "
                         "range")
    return stacked


def _flat(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)


def _cost(begun: float, tokens: Sequence[Iterable[float]]) -> np.ndarray:
    """`[questions, 3]`: forward and generated tokens of each question, and the seconds since `begun`."""
    each = (time.perf_counter() - begun) / len(tokens)
    return np.array([(*of_question, each) for of_question in tokens])
