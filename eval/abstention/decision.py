"""Which signal tells what a network does not know, by a rule fixed beforehand; and how much is declined.

Every score points one way here: up, where something is not known. POINTS says which signals do so by
themselves (1) and which rise with what is known and are negated (−1). An AUROC is the chance that a
prompt of a regime scores above one in domain, ties half: the same number that the confidence has for
telling what is in domain.

Scores are `[seeds, prompts]`, a row for each network that was trained. Their AUROC is the mean over the
rows, and the bootstrap draws prompts, and rows where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilelli_jax.data.village import ANSWERABLE
from tilelli_jax.signals.names import BLOCK

from ..checks import Floats
from ..stats import Interval, PairedBootstrap, bootstrap_two_way, exact_share, holm

IN_DOMAIN = "in_domain"
POINTS: dict[str, int] = {
    "max_softmax_last": -1, "max_softmax_mean": -1, "abstain_p": 1, "router_conf": -1,
    "router_entropy": 1,
    # Nothing is published of these. We expect a network in doubt to differ more from block to block and
    # from position to position, and to settle later on what it says.
    "router_entropy_var": 1, "lens_entropy": 1, "lens_settling": 1, "lens_margin": -1,
    "raw_probe": 1, "sae_probe": 1}  # these are fitted to point up

# The rule.
BASELINES = ("max_softmax_last", "max_softmax_mean", "abstain_p")
MARGIN = 0.02  # by which a signal's AUROC exceeds that of the best baseline
ENOUGH = 4  # regimes that it wins
TELLING = ("gibberish", "factual_misleading", "neo_false_inability")  # one of these among them
REPLICATES = 1000
LEVEL = 0.95


class Table(NamedTuple):
    """What every prompt scored."""

    regimes: NDArray[np.str_]  # [prompts]
    scores: dict[str, Floats]  # each [seeds, prompts], all pointing up

    @property
    def others(self) -> tuple[str, ...]:
        """The regimes but in_domain, in the order in which they come."""
        return tuple(name for name in dict.fromkeys(self.regimes.tolist()) if name != IN_DOMAIN)


class SignalComparison(NamedTuple):
    """A signal against the best baseline, in one regime."""

    signal: str
    regime: str
    auroc: Interval
    baseline: str
    best: Interval
    difference: Interval
    wins: bool
    p: float  # of "not every baseline is beaten", two-sided bootstrap, before correction
    p_corrected: float  # Holm over all duels
    wins_corrected: bool


class Verdict(NamedTuple):
    """What the rule says of a signal, why, and what is left of it after correction."""

    signal: str
    wins: tuple[str, ...]
    proven: bool
    reason: str
    wins_corrected: tuple[str, ...]
    proven_corrected: bool


class Judgement(NamedTuple):
    """`caution` is to stand wherever the verdicts do."""

    duels: list[SignalComparison]
    verdicts: list[Verdict]
    caution: str


def table(scores: Mapping[str, ArrayLike], regimes: Sequence[str],
          points: Mapping[str, int] = POINTS) -> Table:
    """Scores `[prompts]` or `[seeds, prompts]` as they were measured, turned so that they point up.

    Args:
        points: for each signal 1 or −1, said before the scores are looked at.

    Raises:
        ValueError: a signal without a direction, another shape, what is no number, no prompt in domain.
    """
    found, n = {}, len(regimes)
    for name, given in scores.items():
        if points.get(name) not in (1, -1):
            raise ValueError(f"points: expected 1 or -1 for {name}, found {points.get(name)}")
        values = np.atleast_2d(np.asarray(given, float))
        if values.ndim != 2 or values.shape[1] != n or np.isnan(values).any():
            raise ValueError(f"{name}: expected numbers [seeds, {n}], found shape {values.shape}"
                             + (" with NaN" if np.isnan(values).any() else ""))
        found[name] = points[name] * values
    if IN_DOMAIN not in regimes:
        raise ValueError(f"regimes: expected {IN_DOMAIN} among them, found none")
    return Table(np.asarray(regimes), found)


def direction(signal: str) -> int:
    """1 or −1 as POINTS says, also of a single block; 0 for what is no signal."""
    return POINTS["router_entropy"] if signal.startswith(BLOCK) else POINTS.get(signal, 0)


def versus(scored: Table, unknown: Collection[str], known: Collection[str] = (IN_DOMAIN,), *,
           replicates: int = REPLICATES, seed: int = 42, level: float = LEVEL) -> PairedBootstrap:
    """How well every signal tells the prompts of some regimes from those of others."""
    chosen = np.isin(scored.regimes, [*unknown, *known])
    labels = np.isin(scored.regimes[chosen], list(unknown)).astype(int)
    return PairedBootstrap(labels, {name: score[:, chosen] for name, score in scored.scores.items()},
                           replicates=replicates, seed=seed, level=level, draw_runs=True)


def by_regime(scored: Table, *, replicates: int = REPLICATES,
              seed: int = 42) -> dict[str, dict[str, Interval]]:
    """Regime → signal → AUROC of in_domain against it."""
    found = {}
    for regime in scored.others:
        drawn = versus(scored, [regime], replicates=replicates, seed=seed)
        found[regime] = {name: drawn.interval(name) for name in scored.scores}
    return found


def cross_regime(scored: Table, *, replicates: int = REPLICATES, seed: int = 42) -> dict[str, Interval]:
    """Signal → AUROC of in_domain against all the rest: the published number.

    Of the rest, three can be answered (ANSWERABLE). To score them high is no merit; see `unanswerable`.
    """
    drawn = versus(scored, scored.others, replicates=replicates, seed=seed)
    return {name: drawn.interval(name) for name in scored.scores}


def unanswerable(scored: Table, *, answerable: Collection[str] = ANSWERABLE,
                 replicates: int = REPLICATES, seed: int = 42) -> dict[str, Interval]:
    """Signal → AUROC of the regimes that can be answered against those that cannot.

    That is what an abstention is for. It is no part of the published rule.
    """
    known = [regime for regime in (IN_DOMAIN, *scored.others) if regime in answerable]
    unknown = [regime for regime in scored.others if regime not in answerable]
    drawn = versus(scored, unknown, known, replicates=replicates, seed=seed)
    return {name: drawn.interval(name) for name in scored.scores}


# --- The rule --------------------------------------------------------------------------------


def apply_rule(scored: Table, signals: Sequence[str] | None = None, baselines: Sequence[str] = BASELINES, *,
          replicates: int = REPLICATES, seed: int = 42, level: float = LEVEL) -> Judgement:
    """The rule, as fixed: and beside it what it says after correction.

    A signal wins a regime if its AUROC exceeds that of the best baseline there by MARGIN at least and
    the interval of the difference excludes 0. It is proven if it wins ENOUGH regimes, one of TELLING
    among them.

    Corrected, a regime is won if the difference is as large, and "some baseline is as good" is rejected
    at 1 − `level` after Holm's correction over all duels. p is the largest over the baselines, so that
    none is chosen by the data; it is read off replicates so many that the correction can be passed. Of a
    few seeds it is too small, as intervals are too short (`PairedBootstrap`).

    Args:
        signals: those to be judged; None takes all but the baselines. A baseline that is judged is held
            against the others.

    Raises:
        ValueError: a signal or baseline that was not measured, or none to be compared with.
    """
    judged = list(signals if signals is not None else
                  [name for name in scored.scores if name not in baselines])
    if unknown := [name for name in (*judged, *baselines) if name not in scored.scores]:
        raise ValueError(f"scores: expected {', '.join(unknown)} among them, "
                         f"found {', '.join(scored.scores)}")
    against = {name: [other for other in baselines if other != name] for name in judged}
    if not all(against.values()):
        raise ValueError("baselines: expected one at least besides the signal, found none")
    tests = len(judged) * len(scored.others)
    fine = max(replicates, math.ceil(5 * tests / (1 - level)))
    duels = []
    for regime in scored.others if judged else ():
        drawn = versus(scored, [regime], replicates=replicates, seed=seed, level=level)
        finely = versus(scored, [regime], replicates=fine, seed=seed, level=level)
        for name in judged:
            best = max(against[name], key=lambda other: drawn.points[other])
            difference = drawn.difference(name, best)
            p = max(_p_ahead(finely, name, other) if drawn.points[name] > drawn.points[other] else 1.0
                    for other in against[name])
            duels.append(SignalComparison(name, regime, drawn.interval(name), best, drawn.interval(best), difference,
                              _ahead(difference) and difference.low > 0, p, math.nan, False))
    corrected = holm([duel.p for duel in duels])
    duels = [duel._replace(p_corrected=float(p),
                           wins_corrected=bool(_ahead(duel.difference) and p <= 1 - level))
             for duel, p in zip(duels, corrected, strict=True)]
    verdicts = []
    for name in judged:
        wins = tuple(duel.regime for duel in duels if duel.signal == name and duel.wins)
        left = tuple(duel.regime for duel in duels if duel.signal == name and duel.wins_corrected)
        verdicts.append(Verdict(name, wins, is_proven(wins), _reason(wins, len(scored.others)), left,
                                is_proven(left)))
    return Judgement(duels, verdicts, caution(len(judged), len(scored.others), level))


def is_proven(wins: Collection[str]) -> bool:
    """Whether so many regimes are enough, and the right ones among them."""
    return len(wins) >= ENOUGH and any(regime in TELLING for regime in wins)


def caution(signals: int, regimes: int, level: float = LEVEL) -> str:
    """What the rule leaves out of account, in words."""
    tests, chance = signals * regimes, (1 - level) / 2
    return (
        f"The rule makes {tests} comparisons ({signals} signals, {regimes} regimes) and corrects for "
        "none. Where a signal is as good as the best baseline and no better, its interval lies above 0 "
        f"with a chance of about {chance:.1%}: {tests * chance:.2g} of these {tests} on average, and one "
        f"at least with {1 - (1 - chance) ** tests:.0%}, were they independent. They are not. All regimes "
        "are compared with the same prompts in domain, and all signals come from the same networks: what "
        f"is won by luck is won several times over, so {ENOUGH} regimes are no {ENOUGH}-fold proof. That "
        f"the best baseline is chosen by the same prompts, and the margin of {MARGIN:g}, work against a "
        "signal. The corrected verdict holds the chance that any regime is falsely won at about "
        f"{1 - level:.0%}.")


def _p_ahead(drawn: PairedBootstrap, name: str, other: str) -> float:
    """1 where nothing varies from one draw to another, of which there is no p."""
    p = drawn.p(name, other)
    return 1.0 if math.isnan(p) else p


def _ahead(difference: Interval) -> bool:
    return difference.point >= MARGIN - 1e-9  # 0.82 − 0.80 is a little less than 0.02 in binary


def _reason(wins: Collection[str], regimes: int) -> str:
    if is_proven(wins):
        return f"wins {len(wins)} of {regimes} regimes"
    if len(wins) < ENOUGH:
        return f"wins {len(wins)} of {regimes} regimes, {ENOUGH} are needed"
    return f"wins {len(wins)} of {regimes} regimes, but none of {', '.join(TELLING)}"


# --- What is declined ------------------------------------------------------------------------


def abstained(scored: Table, signal: str, thresholds: ArrayLike, *, replicates: int = REPLICATES,
              seed: int = 42, level: float = LEVEL) -> dict[str, Interval]:
    """Regime → share of its prompts that are declined: scores above the threshold.

    That of in_domain is the false-positive rate. The intervals resample prompts and seeds; of one seed, and
    where all or none are declined, they are those of `exact_share`, for prompts alone.

    Args:
        thresholds: one, or one for each seed, pointing up as the scores do.
    """
    lines = np.broadcast_to(np.asarray(thresholds, float), len(scored.scores[signal]))
    declined = scored.scores[signal] > lines[:, None]

    def share(here: NDArray[np.bool_]) -> Interval:
        found = declined[:, here]
        if len(found) == 1 or found.mean() in (0, 1):
            return exact_share(round(float(found.mean()) * found.shape[1]), found.shape[1], level)
        return bootstrap_two_way(found, replicates=replicates, seed=seed, level=level)
    return {regime: share(scored.regimes == regime) for regime in (IN_DOMAIN, *scored.others)}
