"""The rule on synthetic tables that should and should not pass, against loops, and on random scores."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.eval.running import draws
from tilelli_jax.data.synthetic.village import ANSWERABLE, REGIMES
from tilelli_jax.eval.abstention import decision
from tilelli_jax.eval.abstention.decision import (
    BASELINES,
    ScoreTable,
    abstention_rates,
    apply_rule,
    is_proven,
    table,
)
from tilelli_jax.eval.metrics import auroc
from tilelli_jax.eval.stats import PairedBootstrap, bootstrap_two_way, exact_fraction, holm

PER_REGIME = 40
PROMPT_REGIMES = np.repeat(REGIMES, PER_REGIME)
RNG = np.random.default_rng(5)
NOISE = RNG.standard_normal(len(PROMPT_REGIMES))


def scores(lifts: dict[str, float], seeds: int = 1, own_noise: float = 0.3, rng: int = 0) -> np.ndarray:
    """Scores `[seeds, prompts]`, raised by `lifts`; most of the noise is shared by all scores."""
    noise = own_noise * np.random.default_rng(rng).standard_normal((seeds, len(PROMPT_REGIMES)))
    return NOISE + noise + np.array([lifts.get(regime, 0.0) for regime in PROMPT_REGIMES])


def table_of(signal: np.ndarray, **baselines: np.ndarray) -> ScoreTable:
    """A table with one signal and the three baselines, which are noise by default."""
    noise = {name: scores({}, rng=i + 1) for i, name in enumerate(BASELINES)}
    return ScoreTable(PROMPT_REGIMES, {"router_entropy": signal, **noise, **baselines})


FOUR_REGIMES = {"ood_topic": 2.0, "ood_style": 2.0, "long_input": 2.0, "gibberish": 2.0}


# --- AUROC -----------------------------------------------------------------------------------


def test_scores_are_oriented_and_checked() -> None:
    raw = {"max_softmax_last": np.arange(3.0), "abstain_p": np.arange(6.0).reshape(2, 3)}
    oriented = table(raw, ["in_domain", "gibberish", "mine"])
    np.testing.assert_array_equal(oriented.scores["max_softmax_last"], [[0, -1, -2]])
    np.testing.assert_array_equal(oriented.scores["abstain_p"], raw["abstain_p"])
    assert oriented.other_regimes == ("gibberish", "mine")
    assert all(decision.direction(name) for name in BASELINES)
    assert table({"x": [1.0]}, ["in_domain"], {"x": -1}).scores["x"] == -1
    for raw, regimes, message in (
            ({"x": [1.0]}, ["in_domain"], "directions: expected 1 or -1 for x"),
            ({"abstain_p": [1.0, 2.0]}, ["in_domain"], "expected numbers"),
            ({"abstain_p": [math.nan]}, ["in_domain"], "NaN"),
            ({"abstain_p": [1.0]}, ["gibberish"], "in_domain")):
        with pytest.raises(ValueError, match=message):
            table(raw, regimes)


def test_auroc_by_counting_pairs() -> None:
    scored = table_of(np.round(scores(FOUR_REGIMES, seeds=3)))

    def counted(unknown: tuple[str, ...], known: tuple[str, ...]) -> float:
        aurocs = []
        for run in scored.scores["router_entropy"]:
            positive, negative = (run[np.isin(PROMPT_REGIMES, regimes)] for regimes in (unknown, known))
            aurocs.append(np.mean([(a > b) + 0.5 * (a == b)
                                   for a, b in itertools.product(positive, negative)]))
        return float(np.mean(aurocs))
    others = REGIMES[1:]
    for regime, aurocs in decision.by_regime(scored, replicates=50).items():
        assert aurocs["router_entropy"].point == pytest.approx(counted((regime,), ("in_domain",)))
    assert decision.cross_regime(scored, replicates=50)["router_entropy"].point == pytest.approx(
        counted(others, ("in_domain",)))
    unanswerable = tuple(regime for regime in others if regime not in ANSWERABLE)
    assert decision.unanswerable(scored, replicates=50)["router_entropy"].point == pytest.approx(
        counted(unanswerable, ANSWERABLE))


def test_bootstrap_resamples_prompts_and_several_seeds() -> None:
    scored = table_of(scores(FOUR_REGIMES))
    chosen = np.isin(PROMPT_REGIMES, ("in_domain", "gibberish"))
    plain = PairedBootstrap((PROMPT_REGIMES[chosen] == "gibberish").astype(int),
                            {name: score[0, chosen] for name, score in scored.scores.items()},
                            replicates=200)
    bootstrap = decision.bootstrap_auroc(scored, ["gibberish"], replicates=200)
    for name in scored.scores:
        assert bootstrap.interval(name) == plain.interval(name)
    # If seeds differ much more than prompts, the interval includes their spread.
    lifts = np.linspace(0, 3, 8)
    uneven = table_of(np.concatenate([scores({"gibberish": lift}) for lift in lifts]))
    drawn = decision.bootstrap_auroc(uneven, ["gibberish"], replicates=2000)
    labels = PROMPT_REGIMES[chosen] == "gibberish"
    aurocs = [auroc(labels, run[chosen]) for run in uneven.scores["router_entropy"]]
    among_seeds = np.std(aurocs) / math.sqrt(8)
    wide, narrow = drawn.interval("router_entropy"), PairedBootstrap(
        labels, {"s": uneven.scores["router_entropy"][:, chosen]}).interval("s")
    assert wide.point == pytest.approx(narrow.point)
    assert wide.high - wide.low > narrow.high - narrow.low
    spread = math.hypot((narrow.high - narrow.low) / 3.92, among_seeds)
    assert (wide.high - wide.low) / 3.92 == pytest.approx(spread, rel=0.15)
    with pytest.raises(ValueError, match="many runs"):
        decision.bootstrap_auroc(table_of(scores(FOUR_REGIMES, seeds=2), abstain_p=scores({}, seeds=3)),
                                 ["gibberish"])


# --- The rule --------------------------------------------------------------------------------


def verdict(scored: ScoreTable, **settings) -> decision.Verdict:
    (only,) = apply_rule(scored, **settings).verdicts
    return only


def test_a_signal_that_wins_four_regimes_is_proven() -> None:
    outcome = verdict(table_of(scores(FOUR_REGIMES)))
    assert set(outcome.wins) == set(FOUR_REGIMES) and outcome.proven
    assert outcome.reason == "wins 4 of 6 regimes"
    assert outcome.wins_corrected == outcome.wins and outcome.proven_corrected
    baselines = {name: scores({}, 4, rng=9) for name in BASELINES[:2]}
    seeds = verdict(table_of(scores(FOUR_REGIMES, seeds=4), **baselines))
    assert seeds.proven and seeds.proven_corrected


def test_three_regimes_are_too_few() -> None:
    outcome = verdict(table_of(scores(dict.fromkeys(("ood_topic", "ood_style", "gibberish"), 2.0))))
    assert len(outcome.wins) == 3 and not outcome.proven
    assert outcome.reason == "wins 3 of 6 regimes; the rule requires 4"


def test_four_regimes_without_a_key_regime_are_not_enough() -> None:
    """The built-in prompts have only three others; the user's own prompts may have more."""
    regimes = np.where(PROMPT_REGIMES == "gibberish", "mine", PROMPT_REGIMES)
    scored = table_of(scores({**FOUR_REGIMES, "mine": 2.0}))._replace(regimes=regimes)
    outcome = verdict(scored)
    assert set(outcome.wins) == {"ood_topic", "ood_style", "long_input", "mine"} and not outcome.proven
    assert "none of gibberish" in outcome.reason
    assert not is_proven(("a", "b", "c", "d")) and is_proven(("a", "b", "c", "gibberish"))


def test_an_equally_good_baseline_prevents_every_win() -> None:
    scored = table_of(scores(FOUR_REGIMES), abstain_p=scores(FOUR_REGIMES, rng=7))
    assert verdict(scored).wins == () and verdict(scored).reason.startswith("wins 0")
    assert all(comparison.baseline == "abstain_p" for comparison in apply_rule(scored).comparisons
               if comparison.regime in FOUR_REGIMES)
    # Any of the baselines will do.
    for name in BASELINES:
        assert verdict(table_of(scores(FOUR_REGIMES), **{name: scores(FOUR_REGIMES, rng=7)})).wins == ()


def test_a_significant_difference_below_the_margin_does_not_win() -> None:
    """The signal is perfect; the baseline ties some of 400 unknown prompts with all known ones."""
    n = 400
    regimes = np.repeat(["in_domain", "gibberish"], n)
    perfect = np.repeat([0.0, 1.0], n)
    for tied, wins in ((15, False), (16, True), (20, True)):
        ties = perfect.copy()
        ties[n:n + tied] = 0.0
        (comparison,) = apply_rule(ScoreTable(regimes, {"s": perfect[None], "b": ties[None]}),
                                   baselines=["b"]).comparisons
        assert comparison.difference.point == pytest.approx(tied / n / 2) and comparison.difference.low > 0
        assert comparison.p_corrected < 0.05 and comparison.wins == comparison.wins_corrected == wins
    assert decision._exceeds_margin(comparison.difference._replace(point=0.82 - 0.8)) and 0.82 - 0.8 < 0.02


def test_a_large_difference_that_is_not_significant_does_not_win() -> None:
    regimes = np.repeat(["in_domain", "gibberish"], 4)
    scored = ScoreTable(regimes, {"s": np.array([[1.0, 2, 3, 7, 4, 5, 6, 8]]),
                             "b": np.array([[1.0, 4, 5, 8, 2, 3, 6, 7]])})
    (comparison,) = apply_rule(scored, baselines=["b"]).comparisons
    assert comparison.difference.point > 0.1 and comparison.difference.low <= 0 and not comparison.wins


def test_a_significantly_worse_signal_does_not_win() -> None:
    result = apply_rule(table_of(scores(dict.fromkeys(FOUR_REGIMES, -2.0))))
    assert not any(comparison.wins for comparison in result.comparisons)
    assert all(comparison.difference.excludes_zero and comparison.p == 1 for comparison in result.comparisons
               if comparison.regime in FOUR_REGIMES)


def test_comparisons_against_a_direct_loop() -> None:
    scored = table_of(scores({"ood_topic": 0.4, "gibberish": 0.9}),
                     max_softmax_last=scores({"gibberish": 0.3}))
    comparisons = apply_rule(scored, replicates=100).comparisons
    raw = []
    for comparison in comparisons:
        chosen = np.isin(PROMPT_REGIMES, ("in_domain", comparison.regime))
        labels, aurocs, rng = PROMPT_REGIMES[chosen] == comparison.regime, {}, np.random.default_rng(42)
        picks = [rng.choice(len(labels), len(labels)) for _ in range(600)]
        for name, score in scored.scores.items():
            aurocs[name] = np.array([auroc(labels[pick], score[0, chosen][pick]) for pick in picks])
        points = {name: auroc(labels, score[0, chosen]) for name, score in scored.scores.items()}
        best = max(BASELINES, key=lambda name: points[name])
        gaps = (aurocs["router_entropy"] - aurocs[best])[:100]
        low, high = np.percentile(gaps, [2.5, 97.5])
        assert comparison.baseline == best
        np.testing.assert_allclose(comparison.difference,
                                   (points["router_entropy"] - points[best], low, high))
        assert comparison.wins == (points["router_entropy"] - points[best] >= 0.02 and low > 0)
        ps = []
        for name in BASELINES:
            gap = aurocs["router_entropy"] - aurocs[name]
            fewer = min((gap <= 0).sum(), (gap >= 0).sum())
            ps.append(min(1, 2 * (fewer + 1) / 601) if points["router_entropy"] > points[name] else 1.0)
        raw.append(max(ps))
        assert comparison.p == pytest.approx(raw[-1])
    np.testing.assert_allclose([comparison.p_corrected for comparison in comparisons], holm(raw))


def test_a_baseline_is_compared_with_the_other_baselines() -> None:
    scored = table_of(scores({}), abstain_p=scores(FOUR_REGIMES, rng=7))
    result = apply_rule(scored, signals=["abstain_p", "router_entropy"])
    assert [outcome.proven for outcome in result.verdicts] == [True, False]
    assert all(comparison.baseline != "abstain_p" for comparison in result.comparisons
               if comparison.signal == "abstain_p")
    with pytest.raises(ValueError, match="besides the signal"):
        apply_rule(scored, signals=["abstain_p"], baselines=["abstain_p"])
    with pytest.raises(ValueError, match="expected nobody among them"):
        apply_rule(scored, signals=["nobody"])
    assert apply_rule(scored, signals=[]).comparisons == []


def test_the_correction_is_passable_with_many_signals() -> None:
    strong = {f"s{i}": scores(FOUR_REGIMES, rng=20 + i) for i in range(6)}
    result = apply_rule(ScoreTable(PROMPT_REGIMES, {**table_of(scores({})).scores, **strong}), replicates=200)
    assert len(result.comparisons) == 7 * 6
    assert [outcome.proven_corrected for outcome in result.verdicts] == [False] + [True] * 6
    assert "42 comparisons (7 signals, 6 regimes)" in result.caution and "65%" in result.caution


@draws(50, 150)
def test_noise_rarely_wins(n: int) -> None:
    """Against one baseline of noise: at most 2.5 % of regimes, within 3 standard errors.

    Against the best of three: far fewer. Wins are correlated: a second regime is won much more often if one
    is won, and the corrected verdict allows for this.
    """
    regimes = np.repeat(REGIMES[:4], 24)
    rng = np.random.default_rng(11)
    alone, best, any_corrected, proven = [], [], [], []
    for _ in range(n):
        noise = {name: rng.standard_normal((1, len(regimes))) for name in ("router_entropy", *BASELINES)}
        single = apply_rule(ScoreTable(regimes, noise), ["router_entropy"], BASELINES[:1], replicates=200)
        alone.append([comparison.wins for comparison in single.comparisons])
        any_corrected.append(any(comparison.wins_corrected for comparison in single.comparisons))
        three = apply_rule(ScoreTable(regimes, noise), replicates=200)
        best.append([comparison.wins for comparison in three.comparisons])
        proven.append(three.verdicts[0].proven)
    rate, won = np.mean(alone), np.array(alone)
    assert rate < 0.025 + 3 * math.sqrt(0.025 * 0.975 / (3 * n) * 2) and rate > 0.005
    assert np.mean(best) < 0.01 and np.mean(best) < rate and not any(proven)
    assert np.mean(any_corrected) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    pairs = [(row[i], row[j]) for row in won for i, j in itertools.permutations(range(3), 2)]
    together = np.mean([second for first, second in pairs if first])
    assert n < 150 or together > 2 * rate, "all regimes share the in-domain prompts"


def test_abstention_rates() -> None:
    scored = ScoreTable(np.array(["in_domain"] * 4 + ["gibberish"] * 2),
                   {"abstain_p": np.array([[0.1, 0.6, 0.5, 0.2, 0.9, 0.8],
                                           [0.7, 0.7, 0.1, 0.1, 0.9, 0.2]])})
    rates = abstention_rates(scored, "abstain_p", 0.5)
    assert (rates["in_domain"].point, rates["gibberish"].point) == (3 / 8, 3 / 4)
    assert list(rates) == ["in_domain", "gibberish"]
    by_seed = abstention_rates(scored, "abstain_p", [0.5, 0.15])
    assert (by_seed["in_domain"].point, by_seed["gibberish"].point) == (3 / 8, 1.0)
    assert by_seed["gibberish"].high == 1 and by_seed["gibberish"].low == pytest.approx(0.025 ** 0.5)
    first_seed = ScoreTable(scored.regimes, {"abstain_p": scored.scores["abstain_p"][:1]})
    one_seed = abstention_rates(first_seed, "abstain_p", 0.5)
    assert one_seed["in_domain"] == exact_fraction(1, 4)


def test_intervals_of_abstention_rates_are_two_way_bootstraps() -> None:
    rng = np.random.default_rng(0)
    scored = ScoreTable(np.array(["in_domain"] * 40), {"abstain_p": rng.random((3, 40))})
    rate = abstention_rates(scored, "abstain_p", 0.5, replicates=300, seed=7)["in_domain"]
    assert rate == bootstrap_two_way(scored.scores["abstain_p"] > 0.5, replicates=300, seed=7)
    assert rate != abstention_rates(scored, "abstain_p", 0.5, replicates=300, seed=8)["in_domain"]


def test_the_modules_do_not_import_jax_or_torch() -> None:
    script = ("import sys, eval.abstention.decision, eval.abstention.detectors, eval.abstention.prompts\n"
              "assert not {'jax', 'flax', 'torch'} & set(sys.modules)\n")
    process = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3],
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
