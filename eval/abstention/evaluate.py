"""What signals and answers of all variants and seeds come to: a tree of JSON. Nothing here asks a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.data.village import Prompt
from tilelli_jax.signals.names import BLOCK, HEAD

from ..metrics import auroc
from ..stats import Interval, bootstrap_two_way, holm
from ..thresholds import conformal_threshold
from .config import AbstentionConfig
from .decision import (
    BASELINES,
    IN_DOMAIN,
    Table,
    apply_rule,
    abstained,
    by_regime,
    cross_regime,
    direction,
    table,
    unanswerable,
    versus,
)
from .variants import CHAT

Tree = dict[str, Any]
# Which variants' heads are compared with each other: what the study asks.
PAIRWISE = (("v9", "v8b"), ("v9", "v7"), ("v9", "splice"), ("splice", "v7"), ("v8a", "v7"), ("v8b", "v8a"),
            ("tether", "v8b"), ("v9", "tether"), ("pooled", "v9"), ("low-rank", "v9"))
SHOWN = 3  # prompts of a regime whose answers are shown


class Measured(NamedTuple):
    """A variant of one seed: columns `[prompts]` of evaluation and calibration, and result.json."""

    prompts: Mapping[str, Any]
    calibration: Mapping[str, Any]
    about: Mapping[str, Any]


def evaluate(prompts: Sequence[Prompt], found: Mapping[str, Sequence[Measured]],
             config: AbstentionConfig) -> Tree:
    """All that the report tells.

    Args:
        found: variant → what was measured, a seed after the other.
    """
    regimes = [one.regime for one in prompts]
    return {"seeds": list(config.seeds), "prompts": dict(Counter(regimes)),
            "variants": {name: _variant(name, prompts, runs, found.get(CHAT), config)
                         for name, runs in found.items()},
            "between": _between(regimes, found, config)}


def scores_of(runs: Sequence[Measured], regimes: Sequence[str]) -> Table:
    """Every signal of a variant, `[seeds, prompts]`, pointing up."""
    names = [name for name in runs[0].prompts if direction(name)]
    return table({name: np.stack([run.prompts[name] for run in runs]) for name in names}, regimes,
                 {name: direction(name) for name in names})


def is_telling(prompt: Prompt) -> bool:
    """Whether a right answer shows that something is known: it does not stand in the prompt."""
    return prompt.answer is not None and prompt.answer.casefold() not in prompt.prompt.casefold()


# ---------------------------------------------------------------------------------------------


def _variant(name: str, prompts: Sequence[Prompt], runs: Sequence[Measured],
             start: Sequence[Measured] | None, config: AbstentionConfig) -> Tree:
    regimes = [one.regime for one in prompts]
    scored = scores_of(runs, regimes)
    replicates, seed = config.replicates, config.seed
    cross = cross_regime(scored, replicates=replicates, seed=seed)
    wanted = unanswerable(scored, replicates=replicates, seed=seed)
    each = by_regime(scored, replicates=replicates, seed=seed)
    unknown = np.asarray(regimes) != IN_DOMAIN
    signals = {signal: {
        "cross": cross[signal], "unanswerable": wanted[signal],
        "runs": [auroc(unknown, row) for row in scored.scores[signal]],
        "regimes": {regime: areas[signal] for regime, areas in each.items()}} for signal in scored.scores}
    said = [run.about for run in runs]
    same = None if start is None or name == CHAT else [
        list(run.prompts["answer"]) == list(one.prompts["answer"])
        for run, one in zip(runs, start, strict=True)]
    right = {regime: _right(runs, prompts, regime, telling=False) for regime in dict.fromkeys(regimes)}
    known = _right(runs, prompts, IN_DOMAIN, telling=True)
    return {
        "signals": signals, "rule": _rule(scored, config), "abstention": _abstention(scored, runs, config),
        "right": {regime: bootstrap_two_way(found, replicates=replicates, seed=seed)
                  for regime, found in right.items() if found.size},
        "known": bootstrap_two_way(known, replicates=replicates, seed=seed) if known.size else None,
        "known_runs": known.mean(axis=1) if known.size else None,
        "known_of_start": _ratio(known, start, prompts, config),
        "regimes": {regime: {key: _mean(one["regimes"][regime][key] for one in said)
                             for key in said[0]["regimes"][regime]} for regime in dict.fromkeys(regimes)},
        "health": {key: _mean(one["health"][key] for one in said) for key in said[0]["health"]},
        "chat_loss": [one["chat_loss"] for one in said], "same_answers": same,
        "drift": ([float(np.mean(run.prompts["drift"])) for run in runs]
                  if "drift" in runs[0].prompts else None),
        "router_conf": {regime: float(np.mean([run.prompts["router_conf"][np.asarray(regimes) == regime]
                                               for run in runs])) for regime in dict.fromkeys(regimes)}
        if "router_conf" in runs[0].prompts else None,
        "cost": said[0]["cost"] and {key: _mean(one["cost"][key] for one in said)
                                     for key in said[0]["cost"]},
        "examples": _examples(runs[0], regimes)}


def _rule(scored: Table, config: AbstentionConfig) -> Tree | None:
    """The pre-registered rule, of all signals but single blocks, and router_conf: it ranks as the entropy."""
    baselines = [name for name in BASELINES if name in scored.scores]
    judged = [name for name in scored.scores
              if name not in (*baselines, "router_conf") and not name.startswith(BLOCK)]
    if not judged or not baselines:
        return None
    found = apply_rule(scored, judged, baselines, replicates=config.replicates, seed=config.seed)
    return {"baselines": baselines, "verdicts": [one._asdict() for one in found.verdicts],
            "duels": [one._asdict() for one in found.duels], "caution": found.caution}


def _abstention(scored: Table, runs: Sequence[Measured], config: AbstentionConfig) -> Tree | None:
    """How often the head abstains: at the thresholds calibrated for each seed, and above ½."""
    if HEAD not in scored.scores:
        return None
    at = [conformal_threshold(run.calibration[HEAD], config.target_fpr) for run in runs]
    return {"target_fpr": config.target_fpr, "thresholds": [one.value for one in at],
            "calibrated": abstained(scored, HEAD, [one.value for one in at], replicates=config.replicates,
                                    seed=config.seed),
            "half": abstained(scored, HEAD, 0.5, replicates=config.replicates, seed=config.seed)}


def _between(regimes: Sequence[str], found: Mapping[str, Sequence[Measured]],
             config: AbstentionConfig) -> list[Tree]:
    """The heads of two variants, by their cross-regime AUROC on the same prompts and seeds."""
    heads = {name: np.stack([run.prompts[HEAD] for run in runs]) for name, runs in found.items()
             if HEAD in runs[0].prompts}
    pairs = [(a, b) for a, b in PAIRWISE if a in heads and b in heads]
    if not pairs:
        return []
    scored = Table(np.asarray(regimes), heads)
    drawn = versus(scored, scored.others, replicates=max(config.replicates, 2000), seed=config.seed)
    raw = [drawn.p(a, b) for a, b in pairs]
    return [{"a": a, "b": b, "difference": drawn.difference(a, b), "p": p, "p_holm": float(corrected)}
            for (a, b), p, corrected in zip(pairs, raw, holm(raw), strict=True)]


def _right(runs: Sequence[Measured], prompts: Sequence[Prompt], regime: str, telling: bool) -> np.ndarray:
    """Whether prompts of a regime that have an answer are answered rightly, f64 `[seeds, such prompts]`.

    Args:
        telling: of those only whose answer does not stand in them.
    """
    here = np.array([one.regime == regime and (is_telling(one) if telling else one.answer is not None)
                     for one in prompts])
    return np.stack([np.asarray(run.prompts["right"], float)[here] for run in runs])


def _ratio(known: np.ndarray, start: Sequence[Measured] | None, prompts: Sequence[Prompt],
           config: AbstentionConfig) -> Interval | None:
    """What is answered rightly, as a share of what v4 answers so: paired by prompts and seeds."""
    if start is None or not known.size:
        return None
    before = _right(start, prompts, IN_DOMAIN, telling=True)
    return bootstrap_two_way(np.stack([known, before]), lambda means: means[0] / means[1],
                             replicates=config.replicates, seed=config.seed)


def _mean(values: Any) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def _examples(run: Measured, regimes: Sequence[str]) -> list[Tree]:
    """The first prompts of every regime, and what the first seed answers."""
    found = []
    for regime in dict.fromkeys(regimes):
        for i in [i for i, one in enumerate(regimes) if one == regime][:SHOWN]:
            found.append({"regime": regime, "prompt": str(run.prompts["prompt"][i]),
                          "answer": bytes(run.prompts["answer"][i]).decode(errors="replace").strip()})
    return found
