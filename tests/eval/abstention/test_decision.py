"""The rule on made-up tables that should and should not pass, against loops, and against chance."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tilelli_jax.eval.abstention import decision
from tilelli_jax.eval.abstention.decision import (
    BASELINES,
    Table,
    apply_rule,
    abstained,
    is_proven,
    table,
)
from tilelli_jax.eval.metrics import auroc
from tilelli_jax.eval.stats import PairedBootstrap, bootstrap_two_way, exact_share, holm

from tests.eval.running import draws
from tilelli_jax.data.village import ANSWERABLE, REGIMES

EACH = 40
WHICH = np.repeat(REGIMES, EACH)
RNG = np.random.default_rng(5)
NOISE = RNG.standard_normal(len(WHICH))


def made(lifts: dict[str, float], seeds: int = 1, own: float = 0.3, rng: int = 0) -> np.ndarray:
    """A score `[seeds, prompts]` that some regimes lift; most of its noise is common to all scores."""
    noise = own * np.random.default_rng(rng).standard_normal((seeds, len(WHICH)))
    return NOISE + noise + np.array([lifts.get(regime, 0.0) for regime in WHICH])


def against(signal: np.ndarray, **baselines: np.ndarray) -> Table:
    """A table with one signal and the three baselines, which know nothing if not given."""
    found = {name: made({}, rng=i + 1) for i, name in enumerate(BASELINES)}
    return Table(WHICH, {"router_entropy": signal, **found, **baselines})


FOUR = {"ood_topic": 2.0, "ood_style": 2.0, "long_input": 2.0, "gibberish": 2.0}


# --- Areas -----------------------------------------------------------------------------------


def test_scores_are_turned_and_checked() -> None:
    raw = {"max_softmax_last": np.arange(3.0), "abstain_p": np.arange(6.0).reshape(2, 3)}
    found = table(raw, ["in_domain", "gibberish", "mine"])
    np.testing.assert_array_equal(found.scores["max_softmax_last"], [[0, -1, -2]])
    np.testing.assert_array_equal(found.scores["abstain_p"], raw["abstain_p"])
    assert found.others == ("gibberish", "mine")
    assert set(BASELINES) < set(decision.POINTS) and all(decision.POINTS[name] for name in BASELINES)
    assert table({"x": [1.0]}, ["in_domain"], {"x": -1}).scores["x"] == -1
    for scores, regimes, message in (
            ({"x": [1.0]}, ["in_domain"], "points: expected 1 or -1 for x"),
            ({"abstain_p": [1.0, 2.0]}, ["in_domain"], "expected numbers"),
            ({"abstain_p": [math.nan]}, ["in_domain"], "NaN"),
            ({"abstain_p": [1.0]}, ["gibberish"], "in_domain")):
        with pytest.raises(ValueError, match=message):
            table(scores, regimes)


def test_areas_by_counting_pairs() -> None:
    scored = against(np.round(made(FOUR, seeds=3)))

    def counted(unknown: tuple[str, ...], known: tuple[str, ...]) -> float:
        areas = []
        for run in scored.scores["router_entropy"]:
            up, down = (run[np.isin(WHICH, some)] for some in (unknown, known))
            areas.append(np.mean([(a > b) + 0.5 * (a == b) for a, b in itertools.product(up, down)]))
        return float(np.mean(areas))
    others = REGIMES[1:]
    for regime, found in decision.by_regime(scored, replicates=50).items():
        assert found["router_entropy"].point == pytest.approx(counted((regime,), ("in_domain",)))
    assert decision.cross_regime(scored, replicates=50)["router_entropy"].point == pytest.approx(
        counted(others, ("in_domain",)))
    declined = tuple(regime for regime in others if regime not in ANSWERABLE)
    assert decision.unanswerable(scored, replicates=50)["router_entropy"].point == pytest.approx(
        counted(declined, ANSWERABLE))


def test_one_seed_draws_prompts_alone_and_several_draw_both() -> None:
    scored = against(made(FOUR))
    chosen = np.isin(WHICH, ("in_domain", "gibberish"))
    plain = PairedBootstrap((WHICH[chosen] == "gibberish").astype(int),
                            {name: score[0, chosen] for name, score in scored.scores.items()},
                            replicates=200)
    found = decision.versus(scored, ["gibberish"], replicates=200)
    for name in scored.scores:
        assert found.interval(name) == plain.interval(name)
    # Seeds that differ much more than prompts do: their spread is in the interval.
    lifts = np.linspace(0, 3, 8)
    uneven = against(np.concatenate([made({"gibberish": lift}) for lift in lifts]))
    drawn = decision.versus(uneven, ["gibberish"], replicates=2000)
    areas = [auroc(WHICH[chosen] == "gibberish", run[chosen]) for run in uneven.scores["router_entropy"]]
    among_seeds = np.std(areas) / math.sqrt(8)
    wide, narrow = drawn.interval("router_entropy"), PairedBootstrap(
        WHICH[chosen] == "gibberish", {"s": uneven.scores["router_entropy"][:, chosen]}).interval("s")
    assert wide.point == pytest.approx(narrow.point)
    assert wide.high - wide.low > narrow.high - narrow.low
    spread = math.hypot((narrow.high - narrow.low) / 3.92, among_seeds)
    assert (wide.high - wide.low) / 3.92 == pytest.approx(spread, rel=0.15)
    with pytest.raises(ValueError, match="as many runs"):
        decision.versus(against(made(FOUR, seeds=2), abstain_p=made({}, seeds=3)), ["gibberish"])


# --- The rule --------------------------------------------------------------------------------


def verdict(scored: Table, **settings) -> decision.Verdict:
    (found,) = apply_rule(scored, **settings).verdicts
    return found


def test_what_should_pass_does() -> None:
    found = verdict(against(made(FOUR)))
    assert set(found.wins) == set(FOUR) and found.proven and found.reason == "wins 4 of 6 regimes"
    assert found.wins_corrected == found.wins and found.proven_corrected
    seeds = verdict(against(made(FOUR, seeds=4), **{name: made({}, 4, rng=9) for name in BASELINES[:2]}))
    assert seeds.proven and seeds.proven_corrected


def test_three_regimes_are_too_few() -> None:
    found = verdict(against(made(dict.fromkeys(("ood_topic", "ood_style", "gibberish"), 2.0))))
    assert len(found.wins) == 3 and not found.proven
    assert found.reason == "wins 3 of 6 regimes, 4 are needed"


def test_four_regimes_without_a_telling_one_are_not_enough() -> None:
    """There are only three others: a set of one's own may have more."""
    regimes = np.where(WHICH == "gibberish", "mine", WHICH)
    scored = against(made({**FOUR, "mine": 2.0}))._replace(regimes=regimes)
    found = verdict(scored)
    assert set(found.wins) == {"ood_topic", "ood_style", "long_input", "mine"} and not found.proven
    assert "none of gibberish" in found.reason
    assert not is_proven(("a", "b", "c", "d")) and is_proven(("a", "b", "c", "gibberish"))


def test_a_baseline_that_knows_as_much_takes_every_win() -> None:
    scored = against(made(FOUR), abstain_p=made(FOUR, rng=7))
    assert verdict(scored).wins == () and verdict(scored).reason.startswith("wins 0")
    assert all(duel.baseline == "abstain_p" for duel in apply_rule(scored).duels if duel.regime in FOUR)
    # It matters not which of them it is.
    for name in BASELINES:
        assert verdict(against(made(FOUR), **{name: made(FOUR, rng=7)})).wins == ()


def test_a_sure_difference_below_the_margin_does_not_win() -> None:
    """A baseline ties some of 400 unknown with all the known, of which the signal mixes up none."""
    n = 400
    regimes = np.repeat(["in_domain", "gibberish"], n)
    knows = np.repeat([0.0, 1.0], n)
    for tied, wins in ((15, False), (16, True), (20, True)):
        ties = knows.copy()
        ties[n:n + tied] = 0.0
        (duel,) = apply_rule(Table(regimes, {"s": knows[None], "b": ties[None]}), baselines=["b"]).duels
        assert duel.difference.point == pytest.approx(tied / n / 2) and duel.difference.low > 0
        assert duel.p_corrected < 0.05 and duel.wins == duel.wins_corrected == wins
    assert decision._ahead(duel.difference._replace(point=0.82 - 0.8)) and 0.82 - 0.8 < 0.02


def test_a_large_difference_that_is_not_sure_does_not_win() -> None:
    regimes = np.repeat(["in_domain", "gibberish"], 4)
    scored = Table(regimes, {"s": np.array([[1.0, 2, 3, 7, 4, 5, 6, 8]]),
                             "b": np.array([[1.0, 4, 5, 8, 2, 3, 6, 7]])})
    (duel,) = apply_rule(scored, baselines=["b"]).duels
    assert duel.difference.point > 0.1 and duel.difference.low <= 0 and not duel.wins


def test_being_reliably_worse_is_no_win() -> None:
    found = apply_rule(against(made(dict.fromkeys(FOUR, -2.0))))
    assert not any(duel.wins for duel in found.duels)
    assert all(duel.difference.excludes_zero and duel.p == 1 for duel in found.duels if duel.regime in FOUR)


def test_duels_by_a_loop() -> None:
    scored = against(made({"ood_topic": 0.4, "gibberish": 0.9}),
                     max_softmax_last=made({"gibberish": 0.3}))
    found = apply_rule(scored, replicates=100).duels
    raw = []
    for duel in found:
        chosen = np.isin(WHICH, ("in_domain", duel.regime))
        labels, areas, rng = WHICH[chosen] == duel.regime, {}, np.random.default_rng(42)
        picks = [rng.choice(len(labels), len(labels)) for _ in range(600)]
        for name, score in scored.scores.items():
            areas[name] = np.array([auroc(labels[pick], score[0, chosen][pick]) for pick in picks])
        points = {name: auroc(labels, score[0, chosen]) for name, score in scored.scores.items()}
        best = max(BASELINES, key=lambda name: points[name])
        gaps = (areas["router_entropy"] - areas[best])[:100]
        low, high = np.percentile(gaps, [2.5, 97.5])
        assert duel.baseline == best
        np.testing.assert_allclose(duel.difference, (points["router_entropy"] - points[best], low, high))
        assert duel.wins == (points["router_entropy"] - points[best] >= 0.02 and low > 0)
        ps = []
        for name in BASELINES:
            gap = areas["router_entropy"] - areas[name]
            rarer = min((gap <= 0).sum(), (gap >= 0).sum())
            ps.append(min(1, 2 * (rarer + 1) / 601) if points["router_entropy"] > points[name] else 1.0)
        raw.append(max(ps))
        assert duel.p == pytest.approx(raw[-1])
    np.testing.assert_allclose([duel.p_corrected for duel in found], holm(raw))


def test_a_baseline_is_judged_against_the_others() -> None:
    scored = against(made({}), abstain_p=made(FOUR, rng=7))
    found = apply_rule(scored, signals=["abstain_p", "router_entropy"])
    assert [one.proven for one in found.verdicts] == [True, False]
    assert all(duel.baseline != "abstain_p" for duel in found.duels if duel.signal == "abstain_p")
    with pytest.raises(ValueError, match="besides the signal"):
        apply_rule(scored, signals=["abstain_p"], baselines=["abstain_p"])
    with pytest.raises(ValueError, match="expected nobody among them"):
        apply_rule(scored, signals=["nobody"])
    assert apply_rule(scored, signals=[]).duels == []


def test_correction_can_be_passed_however_many_signals_there_are() -> None:
    sure = {f"s{i}": made(FOUR, rng=20 + i) for i in range(6)}
    found = apply_rule(Table(WHICH, {**against(made({})).scores, **sure}), replicates=200)
    assert len(found.duels) == 7 * 6
    assert [one.proven_corrected for one in found.verdicts] == [False] + [True] * 6
    assert "42 comparisons (7 signals, 6 regimes)" in found.caution and "65%" in found.caution


@draws(50, 150)
def test_signals_that_know_nothing_rarely_win(n: int) -> None:
    """Against one baseline as ignorant: at most 2.5 % of regimes, within 3 standard errors.

    Against the best of three: far fewer. And wins come together: a second regime is won much more often
    where one is than at large, which is what the corrected verdict allows for.
    """
    regimes = np.repeat(REGIMES[:4], 24)
    rng = np.random.default_rng(11)
    alone, best, any_corrected, proven = [], [], [], []
    for _ in range(n):
        scores = {name: rng.standard_normal((1, len(regimes))) for name in ("router_entropy", *BASELINES)}
        one = apply_rule(Table(regimes, scores), ["router_entropy"], BASELINES[:1], replicates=200)
        alone.append([duel.wins for duel in one.duels])
        any_corrected.append(any(duel.wins_corrected for duel in one.duels))
        three = apply_rule(Table(regimes, scores), replicates=200)
        best.append([duel.wins for duel in three.duels])
        proven.append(three.verdicts[0].proven)
    rate, won = np.mean(alone), np.array(alone)
    assert rate < 0.025 + 3 * math.sqrt(0.025 * 0.975 / (3 * n) * 2) and rate > 0.005
    assert np.mean(best) < 0.01 and np.mean(best) < rate and not any(proven)
    assert np.mean(any_corrected) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    pairs = [(row[i], row[j]) for row in won for i, j in itertools.permutations(range(3), 2)]
    together = np.mean([second for first, second in pairs if first])
    assert n < 150 or together > 2 * rate, "all regimes share the prompts in domain"


def test_shares_that_abstain() -> None:
    scored = Table(np.array(["in_domain"] * 4 + ["gibberish"] * 2),
                   {"abstain_p": np.array([[0.1, 0.6, 0.5, 0.2, 0.9, 0.8],
                                           [0.7, 0.7, 0.1, 0.1, 0.9, 0.2]])})
    found = abstained(scored, "abstain_p", 0.5)
    assert (found["in_domain"].point, found["gibberish"].point) == (3 / 8, 3 / 4)
    assert list(found) == ["in_domain", "gibberish"]
    own = abstained(scored, "abstain_p", [0.5, 0.15])
    assert (own["in_domain"].point, own["gibberish"].point) == (3 / 8, 1.0)
    assert own["gibberish"].high == 1 and own["gibberish"].low == pytest.approx(0.025 ** 0.5)
    one = abstained(Table(scored.regimes, {"abstain_p": scored.scores["abstain_p"][:1]}), "abstain_p", 0.5)
    assert one["in_domain"] == exact_share(1, 4)


def test_shares_are_drawn_as_it_is_said() -> None:
    rng = np.random.default_rng(0)
    scored = Table(np.array(["in_domain"] * 40), {"abstain_p": rng.random((3, 40))})
    found = abstained(scored, "abstain_p", 0.5, replicates=300, seed=7)["in_domain"]
    assert found == bootstrap_two_way(scored.scores["abstain_p"] > 0.5, replicates=300, seed=7)
    assert found != abstained(scored, "abstain_p", 0.5, replicates=300, seed=8)["in_domain"]


def test_it_is_pure() -> None:
    script = ("import sys, eval.abstention.decision, eval.abstention.detectors, eval.abstention.prompts\n"
              "assert not {'jax', 'flax', 'torch'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
