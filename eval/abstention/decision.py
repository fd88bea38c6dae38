"""Which signals predict that a network does not know: AUROC, a pre-registered rule, abstention rates.

All scores are oriented: higher means "not known". `direction` is 1 for signals with this orientation, −1 for
signals that are negated. An AUROC is the probability that a prompt of a regime scores above a prompt of
in_domain, with ties counted half.

Scores are `[seeds, prompts]`, one row per trained network. An AUROC is the mean over the rows. The bootstrap
resamples prompts, and rows where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilelli_jax.data.synthetic.village import ANSWERABLE
from tilelli_jax.signals import names

from ..checks import Floats
from ..stats import Interval, PairedBootstrap, bootstrap_two_way, exact_fraction, holm

IN_DOMAIN = "in_domain"
PROBES = ("raw_probe", "sae_probe")  # fitted to predict "not known"

# The pre-registered rule.
BASELINES = ("max_softmax_last", "max_softmax_mean", "abstain_p")
MARGIN = 0.02  # a signal's AUROC must exceed that of the best baseline by this much
MIN_WINS = 4  # regimes that a signal must win
KEY_REGIMES = ("gibberish", "factual_misleading", "neo_false_inability")  # at least one of these among them
REPLICATES = 1000
LEVEL = 0.95


class ScoreTable(NamedTuple):
    """The scores of every prompt."""

    regimes: NDArray[np.str_]  # [prompts]
    scores: dict[str, Floats]  # each [seeds, prompts], oriented: higher means "not known"

    @property
    def other_regimes(self) -> tuple[str, ...]:
        """All regimes except in_domain, in order of appearance."""
        return tuple(name for name in dict.fromkeys(self.regimes.tolist()) if name != IN_DOMAIN)


class SignalComparison(NamedTuple):
    """A signal compared with the best baseline in one regime."""

    signal: str
    regime: str
    auroc: Interval
    baseline: str  # the baseline with the highest AUROC
    baseline_auroc: Interval
    difference: Interval
    wins: bool
    p: float  # of "some baseline is at least as good": two-sided bootstrap, before correction
    p_corrected: float  # Holm over all comparisons
    wins_corrected: bool


class Verdict(NamedTuple):
    """The outcome of the rule for one signal, its reason, and the outcome after correction."""

    signal: str
    wins: tuple[str, ...]
    proven: bool
    reason: str
    wins_corrected: tuple[str, ...]
    proven_corrected: bool


class RuleResult(NamedTuple):
    """The outcome of the rule. Print `caution` wherever the verdicts are printed."""

    comparisons: list[SignalComparison]
    verdicts: list[Verdict]
    caution: str


def table(scores: Mapping[str, ArrayLike], regimes: Sequence[str],
          directions: Mapping[str, int] | None = None) -> ScoreTable:
    """Orients measured scores `[prompts]` or `[seeds, prompts]`: higher means "not known".

    Args:
        directions: 1 or −1 for each signal, fixed before the scores are inspected; by default `direction`.

    Raises:
        ValueError: a signal has no direction, the wrong shape or a NaN, or no prompt is in domain.
    """
    oriented, n = {}, len(regimes)
    for name, raw in scores.items():
        sign = direction(name) if directions is None else directions.get(name)
        if sign not in (1, -1):
            raise ValueError(f"directions: expected 1 or -1 for {name}, found {sign}")
        values = np.atleast_2d(np.asarray(raw, float))
        if values.ndim != 2 or values.shape[1] != n or np.isnan(values).any():
            raise ValueError(f"{name}: expected numbers [seeds, {n}], found shape {values.shape}"
                             + (" with NaN" if np.isnan(values).any() else ""))
        oriented[name] = sign * values
    if IN_DOMAIN not in regimes:
        raise ValueError(f"regimes: expected {IN_DOMAIN} among them, found none")
    return ScoreTable(np.asarray(regimes), oriented)


def direction(name: str) -> int:
    """Returns 1 or −1 for a signal, as `signals.names` says, or a fitted probe; 0 for other names."""
    return 1 if name in PROBES else names.direction(name)


def bootstrap_auroc(scored: ScoreTable, unknown: Collection[str], known: Collection[str] = (IN_DOMAIN,), *,
                    replicates: int = REPLICATES, seed: int = 42, level: float = LEVEL) -> PairedBootstrap:
    """Bootstraps the AUROC of every signal: prompts of `unknown` regimes against those of `known` regimes."""
    chosen = np.isin(scored.regimes, [*unknown, *known])
    labels = np.isin(scored.regimes[chosen], list(unknown)).astype(int)
    return PairedBootstrap(labels, {name: score[:, chosen] for name, score in scored.scores.items()},
                           replicates=replicates, seed=seed, level=level, draw_runs=True)


def by_regime(scored: ScoreTable, *, replicates: int = REPLICATES,
              seed: int = 42) -> dict[str, dict[str, Interval]]:
    """Returns regime → signal → AUROC of that regime against in_domain."""
    aurocs = {}
    for regime in scored.other_regimes:
        bootstrap = bootstrap_auroc(scored, [regime], replicates=replicates, seed=seed)
        aurocs[regime] = {name: bootstrap.interval(name) for name in scored.scores}
    return aurocs


def cross_regime(scored: ScoreTable, *, replicates: int = REPLICATES, seed: int = 42) -> dict[str, Interval]:
    """Returns signal → AUROC of all other regimes against in_domain: the published metric.

    Three of the other regimes can be answered (ANSWERABLE), so a high score there is not desirable;
    see `unanswerable`.
    """
    bootstrap = bootstrap_auroc(scored, scored.other_regimes, replicates=replicates, seed=seed)
    return {name: bootstrap.interval(name) for name in scored.scores}


def unanswerable(scored: ScoreTable, *, answerable: Collection[str] = ANSWERABLE,
                 replicates: int = REPLICATES, seed: int = 42) -> dict[str, Interval]:
    """Returns signal → AUROC of the unanswerable regimes against the answerable ones.

    This is the purpose of abstention. It is not part of the published rule.
    """
    known = [regime for regime in (IN_DOMAIN, *scored.other_regimes) if regime in answerable]
    unknown = [regime for regime in scored.other_regimes if regime not in answerable]
    bootstrap = bootstrap_auroc(scored, unknown, known, replicates=replicates, seed=seed)
    return {name: bootstrap.interval(name) for name in scored.scores}


# --- The rule --------------------------------------------------------------------------------


def apply_rule(scored: ScoreTable, signals: Sequence[str] | None = None, baselines: Sequence[str] = BASELINES,
               *,
               replicates: int = REPLICATES, seed: int = 42, level: float = LEVEL) -> RuleResult:
    """Applies the pre-registered rule, and the rule with correction for multiple comparisons.

    A signal wins a regime if its AUROC exceeds that of the best baseline by at least MARGIN and the interval
    of the difference excludes 0. It is proven if it wins MIN_WINS regimes, among them one of KEY_REGIMES.

    With correction, a signal wins a regime if the difference is as large and "some baseline is at least as
    good" is rejected at 1 − `level` after Holm's correction over all comparisons. The p of a comparison is
    the maximum over the baselines, so that the data do not choose one. It uses enough replicates for the
    correction to be passable. With few seeds p is too small, as intervals are too short (`PairedBootstrap`).

    Args:
        signals: the signals to test; None takes all except the baselines. A baseline among them is compared
            with the other baselines.

    Raises:
        ValueError: a signal or baseline was not measured, or a signal has no baseline.
    """
    tested = list(signals if signals is not None else
                  [name for name in scored.scores if name not in baselines])
    if unknown := [name for name in (*tested, *baselines) if name not in scored.scores]:
        raise ValueError(f"scores: expected {', '.join(unknown)} among them, "
                         f"found {', '.join(scored.scores)}")
    rivals = {name: [other for other in baselines if other != name] for name in tested}
    if not all(rivals.values()):
        raise ValueError("baselines: expected at least one besides the signal, found none")
    tests = len(tested) * len(scored.other_regimes)
    p_replicates = max(replicates, math.ceil(5 * tests / (1 - level)))
    comparisons = []
    for regime in scored.other_regimes if tested else ():
        bootstrap = bootstrap_auroc(scored, [regime], replicates=replicates, seed=seed, level=level)
        p_bootstrap = bootstrap_auroc(scored, [regime], replicates=p_replicates, seed=seed, level=level)
        for name in tested:
            best = max(rivals[name], key=lambda other: bootstrap.points[other])
            difference = bootstrap.difference(name, best)
            p = max(_p(p_bootstrap, name, other) if bootstrap.points[name] > bootstrap.points[other] else 1.0
                    for other in rivals[name])
            comparisons.append(SignalComparison(
                name, regime, bootstrap.interval(name), best, bootstrap.interval(best), difference,
                _exceeds_margin(difference) and difference.low > 0, p, math.nan, False))
    corrected = holm([comparison.p for comparison in comparisons])
    comparisons = [
        comparison._replace(p_corrected=float(p),
                            wins_corrected=bool(_exceeds_margin(comparison.difference) and p <= 1 - level))
        for comparison, p in zip(comparisons, corrected, strict=True)]
    verdicts = []
    for name in tested:
        own = [comparison for comparison in comparisons if comparison.signal == name]
        wins = tuple(comparison.regime for comparison in own if comparison.wins)
        wins_corrected = tuple(comparison.regime for comparison in own if comparison.wins_corrected)
        verdicts.append(Verdict(name, wins, is_proven(wins), _reason(wins, len(scored.other_regimes)),
                                wins_corrected, is_proven(wins_corrected)))
    return RuleResult(comparisons, verdicts, caution(len(tested), len(scored.other_regimes), level))


def is_proven(wins: Collection[str]) -> bool:
    """Whether there are at least MIN_WINS regimes, and one of KEY_REGIMES among them."""
    return len(wins) >= MIN_WINS and any(regime in KEY_REGIMES for regime in wins)


def caution(signals: int, regimes: int, level: float = LEVEL) -> str:
    """Returns a paragraph on the false-positive rate of the rule."""
    tests, chance = signals * regimes, (1 - level) / 2
    return (
        f"The rule makes {tests} comparisons ({signals} signals, {regimes} regimes) without correction for "
        "multiple comparisons. A signal that is only as good as the best baseline wins a regime with "
        f"probability about {chance:.1%}. Over {tests} independent comparisons this gives "
        f"{tests * chance:.2g} false wins on average, and at least one with probability "
        f"{1 - (1 - chance) ** tests:.0%}. The comparisons are not independent: all regimes share the "
        f"in-domain prompts, and all signals come from the same networks. False wins come together, so "
        f"{MIN_WINS} regimes are not {MIN_WINS} independent proofs. Two choices work against a signal: the "
        f"same prompts select the best baseline, and the margin is {MARGIN:g}. The corrected verdict limits "
        f"the probability of any false win to about {1 - level:.0%}.")


def _p(bootstrap: PairedBootstrap, name: str, other: str) -> float:
    """Returns p, or 1 where no replicate differs from another and p is undefined."""
    p = bootstrap.p(name, other)
    return 1.0 if math.isnan(p) else p


def _exceeds_margin(difference: Interval) -> bool:
    return difference.point >= MARGIN - 1e-9  # in binary, 0.82 − 0.80 is a little less than 0.02


def _reason(wins: Collection[str], regimes: int) -> str:
    if is_proven(wins):
        return f"wins {len(wins)} of {regimes} regimes"
    if len(wins) < MIN_WINS:
        return f"wins {len(wins)} of {regimes} regimes; the rule requires {MIN_WINS}"
    return f"wins {len(wins)} of {regimes} regimes, but none of {', '.join(KEY_REGIMES)}"


# --- Abstention ------------------------------------------------------------------------------


def abstention_rates(scored: ScoreTable, signal: str, thresholds: ArrayLike, *, replicates: int = REPLICATES,
                     seed: int = 42, level: float = LEVEL) -> dict[str, Interval]:
    """Returns regime → fraction of its prompts whose score is above the threshold.

    The rate on in_domain is the false-positive rate. Intervals resample prompts and seeds. With one seed, or
    where the rate is 0 or 1, they are those of `exact_fraction`, over prompts alone.

    Args:
        thresholds: one, or one per seed, in the direction of the scores in the table.
    """
    by_seed = np.broadcast_to(np.asarray(thresholds, float), len(scored.scores[signal]))
    abstains = scored.scores[signal] > by_seed[:, None]

    def rate(in_regime: NDArray[np.bool_]) -> Interval:
        chosen = abstains[:, in_regime]
        if len(chosen) == 1 or chosen.mean() in (0, 1):
            return exact_fraction(round(float(chosen.mean()) * chosen.shape[1]), chosen.shape[1], level)
        return bootstrap_two_way(chosen, replicates=replicates, seed=seed, level=level)
    return {regime: rate(scored.regimes == regime) for regime in (IN_DOMAIN, *scored.other_regimes)}
