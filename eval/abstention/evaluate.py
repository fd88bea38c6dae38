"""The tables of an abstention study: statistics over variants and seeds, as JSON. Runs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.data.synthetic.village import EvaluationPrompt
from tilelli_jax.signals.names import BLOCK, HEAD

from ..metrics import auroc
from ..stats import Interval, bootstrap_two_way, holm
from ..thresholds import conformal_threshold
from .config import AbstentionConfig
from .decision import (
    BASELINES,
    IN_DOMAIN,
    ScoreTable,
    abstention_rates,
    apply_rule,
    bootstrap_auroc,
    by_regime,
    cross_regime,
    direction,
    table,
    unanswerable,
)
from .variants import CHAT

Tree = dict[str, Any]
# The pairs of variants whose heads are compared.
PAIRWISE = (("v9", "v8b"), ("v9", "v7"), ("v9", "splice"), ("splice", "v7"), ("v8a", "v7"), ("v8b", "v8a"),
            ("router-kl", "v8b"), ("v9", "router-kl"), ("mean-pool-head", "v9"), ("pca-head", "v9"))
EXAMPLES = 3  # prompts of each regime whose answers the report shows


class Measured(NamedTuple):
    """One variant of one seed: columns `[prompts]` of both sets of prompts, and result.json."""

    prompts: Mapping[str, Any]
    calibration: Mapping[str, Any]
    result: Mapping[str, Any]


def evaluate(prompts: Sequence[EvaluationPrompt], measured: Mapping[str, Sequence[Measured]],
             config: AbstentionConfig) -> Tree:
    """Returns all numbers of the report.

    Args:
        measured: variant → measurements, in the order of the seeds.
    """
    regimes = [prompt.regime for prompt in prompts]
    return {"seeds": list(config.seeds), "prompts": dict(Counter(regimes)),
            "variants": {name: _variant(name, prompts, runs, measured.get(CHAT), config)
                         for name, runs in measured.items()},
            "head_comparisons": _head_comparisons(regimes, measured, config)}


def scores_of(runs: Sequence[Measured], regimes: Sequence[str]) -> ScoreTable:
    """Returns every signal of a variant, `[seeds, prompts]`, oriented: higher means "not known"."""
    names = [name for name in runs[0].prompts if direction(name)]
    return table({name: np.stack([run.prompts[name] for run in runs]) for name in names}, regimes)


def is_closed_book(prompt: EvaluationPrompt) -> bool:
    """Whether a correct answer shows knowledge: the prompt has an answer and does not contain it."""
    return prompt.answer is not None and prompt.answer.casefold() not in prompt.prompt.casefold()


# ---------------------------------------------------------------------------------------------


def _variant(name: str, prompts: Sequence[EvaluationPrompt], runs: Sequence[Measured],
             start: Sequence[Measured] | None, config: AbstentionConfig) -> Tree:
    regimes = [prompt.regime for prompt in prompts]
    names = list(dict.fromkeys(regimes))
    scored = scores_of(runs, regimes)
    replicates, seed = config.replicates, config.seed
    cross = cross_regime(scored, replicates=replicates, seed=seed)
    of_unanswerable = unanswerable(scored, replicates=replicates, seed=seed)
    each = by_regime(scored, replicates=replicates, seed=seed)
    unknown = np.asarray(regimes) != IN_DOMAIN
    signals = {signal: {
        "cross_regime": cross[signal], "unanswerable": of_unanswerable[signal],
        "by_seed": [auroc(unknown, row) for row in scored.scores[signal]],
        "regimes": {regime: aurocs[signal] for regime, aurocs in each.items()}} for signal in scored.scores}
    results = [run.result for run in runs]
    same_answers = None if start is None or name == CHAT else [
        list(run.prompts["answer"]) == list(start_run.prompts["answer"])
        for run, start_run in zip(runs, start, strict=True)]
    correct = {regime: _correct(runs, prompts, regime, closed_book=False) for regime in names}
    closed_book = _correct(runs, prompts, IN_DOMAIN, closed_book=True)
    return {
        "signals": signals, "rule": _rule(scored, config), "abstention": _abstention(scored, runs, config),
        "accuracy": {regime: bootstrap_two_way(values, replicates=replicates, seed=seed)
                     for regime, values in correct.items() if values.size},
        "closed_book_accuracy": (bootstrap_two_way(closed_book, replicates=replicates, seed=seed)
                                 if closed_book.size else None),
        "closed_book_accuracy_by_seed": closed_book.mean(axis=1) if closed_book.size else None,
        "closed_book_accuracy_relative_to_v4": _relative_accuracy(closed_book, start, prompts, config),
        "regimes": {regime: {key: _mean(result["regimes"][regime][key] for result in results)
                             for key in results[0]["regimes"][regime]} for regime in names},
        "text_quality": {key: _mean(result["text_quality"][key] for result in results)
                         for key in results[0]["text_quality"]},
        "chat_loss": [result["chat_loss"] for result in results], "same_answers": same_answers,
        "drift": ([float(np.mean(run.prompts["drift"])) for run in runs]
                  if "drift" in runs[0].prompts else None),
        "router_conf": {regime: float(np.mean([run.prompts["router_conf"][np.asarray(regimes) == regime]
                                               for run in runs])) for regime in names}
        if "router_conf" in runs[0].prompts else None,
        "cost": results[0]["cost"] and {key: _mean(result["cost"][key] for result in results)
                                        for key in results[0]["cost"]},
        "examples": _examples(runs[0], regimes)}


def _rule(scored: ScoreTable, config: AbstentionConfig) -> Tree | None:
    """Applies the pre-registered rule to all signals except single blocks and router_conf.

    router_conf ranks prompts as router_entropy does.
    """
    baselines = [name for name in BASELINES if name in scored.scores]
    tested = [name for name in scored.scores
              if name not in (*baselines, "router_conf") and not name.startswith(BLOCK)]
    if not tested or not baselines:
        return None
    result = apply_rule(scored, tested, baselines, replicates=config.replicates, seed=config.seed)
    return {"baselines": baselines, "verdicts": [verdict._asdict() for verdict in result.verdicts],
            "comparisons": [comparison._asdict() for comparison in result.comparisons],
            "caution": result.caution}


def _abstention(scored: ScoreTable, runs: Sequence[Measured], config: AbstentionConfig) -> Tree | None:
    """Returns how often the head abstains: at the calibrated threshold of each seed, and above ½."""
    if HEAD not in scored.scores:
        return None
    thresholds = [conformal_threshold(run.calibration[HEAD], config.target_fpr).value for run in runs]
    return {"target_fpr": config.target_fpr, "thresholds": thresholds,
            "calibrated": abstention_rates(scored, HEAD, thresholds, replicates=config.replicates,
                                           seed=config.seed),
            "above_half": abstention_rates(scored, HEAD, 0.5, replicates=config.replicates, seed=config.seed)}


def _head_comparisons(regimes: Sequence[str], measured: Mapping[str, Sequence[Measured]],
                      config: AbstentionConfig) -> list[Tree]:
    """Compares the heads of pairs of variants: cross-regime AUROC on the same prompts and seeds."""
    heads = {name: np.stack([run.prompts[HEAD] for run in runs]) for name, runs in measured.items()
             if HEAD in runs[0].prompts}
    pairs = [(a, b) for a, b in PAIRWISE if a in heads and b in heads]
    if not pairs:
        return []
    scored = ScoreTable(np.asarray(regimes), heads)
    bootstrap = bootstrap_auroc(scored, scored.other_regimes, replicates=max(config.replicates, 2000),
                                seed=config.seed)
    raw = [bootstrap.p(a, b) for a, b in pairs]
    return [{"a": a, "b": b, "difference": bootstrap.difference(a, b), "p": p, "p_holm": float(corrected)}
            for (a, b), p, corrected in zip(pairs, raw, holm(raw), strict=True)]


def _correct(runs: Sequence[Measured], prompts: Sequence[EvaluationPrompt], regime: str,
             closed_book: bool) -> np.ndarray:
    """Returns whether each prompt of a regime that has an answer is answered correctly, f64 `[seeds,
    prompts]`.

    Args:
        closed_book: only prompts that do not contain their answer.
    """
    chosen = np.array([prompt.regime == regime
                       and (is_closed_book(prompt) if closed_book else prompt.answer is not None)
                       for prompt in prompts])
    return np.stack([np.asarray(run.prompts["correct"], float)[chosen] for run in runs])


def _relative_accuracy(closed_book: np.ndarray, start: Sequence[Measured] | None,
                       prompts: Sequence[EvaluationPrompt], config: AbstentionConfig) -> Interval | None:
    """Returns the closed-book accuracy relative to v4's, paired by prompts and seeds."""
    if start is None or not closed_book.size:
        return None
    before = _correct(start, prompts, IN_DOMAIN, closed_book=True)
    return bootstrap_two_way(np.stack([closed_book, before]), lambda means: means[0] / means[1],
                             replicates=config.replicates, seed=config.seed)


def _mean(values: Any) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def _examples(run: Measured, regimes: Sequence[str]) -> list[Tree]:
    """Returns the first prompts of every regime with the answers of the first seed."""
    examples = []
    for regime in dict.fromkeys(regimes):
        for i in [i for i, name in enumerate(regimes) if name == regime][:EXAMPLES]:
            examples.append({"regime": regime, "prompt": str(run.prompts["prompt"][i]),
                             "answer": bytes(run.prompts["answer"][i]).decode(errors="replace").strip()})
    return examples
