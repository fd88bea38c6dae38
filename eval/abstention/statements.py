"""Compares each published statement about the variants with the results of this study.

Each statement has a numerical criterion, fixed here, and three outcomes: its interval meets the criterion,
fails it, or is too wide to decide. Outcomes hold at this scale only: small networks and a synthetic village.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.data.synthetic.village import ANSWERABLE
from tilelli_jax.signals.names import HEAD, ROUTER

from ..conclusions import ALPHA, format_interval, format_p
from ..stats import Interval
from .decision import IN_DOMAIN
from .variants import CHAT

Tree = Mapping[str, Any]
CHANCE = 0.6  # an AUROC from 0.4 to 0.6 counts as near chance; published are 0.51 to 0.55
COHERENT = 0.8  # accuracy relative to v4 from which a chat counts as coherent
GARBLED = 0.5  # accuracy relative to v4 below which it counts as garbled
MIN_KNOWN = 0.5  # v4's accuracy on in-domain questions below which accuracy relative to it means nothing
MAX_LOOPS = 0.1  # fraction of a coherent network's answers that may be loops
HIGH = 0.7  # an AUROC from here counts as high
AUROC_MARGIN, RATE_MARGIN = 0.05, 0.1  # how far a result may be below the published AUROC or rate


class Statement(NamedTuple):
    """A published statement, the criterion of its reproduction, and the result.

    `reproduced` is None where the result is inconclusive.
    """

    variant: str
    published: str
    criterion: str
    result: str
    reproduced: bool | None


def statements(results: Tree) -> list[Statement]:
    """Returns the statements about the variants in the results."""
    variants = results["variants"]
    return [check(results) for needed, check in _STATEMENTS if all(name in variants for name in needed)]


def chat_quality(results: Tree, name: str) -> str:
    """Returns coherent, impaired, garbled or inconclusive, from accuracy relative to v4 and loops."""
    start, variant = results["variants"].get(CHAT), results["variants"][name]
    if start is None or not _is_reference(start):
        return "inconclusive"
    ratio = Interval.from_tree(variant["known_relative_to_v4"])
    loops = variant["regimes"][IN_DOMAIN]["loops"]
    if ratio.high < GARBLED or loops > 0.5:
        return "garbled"
    if ratio.low >= COHERENT and loops <= MAX_LOOPS:
        return "coherent"
    return "impaired" if ratio.high < COHERENT and ratio.low >= GARBLED else "inconclusive"


def head_auroc(results: Tree, name: str, metric: str = "cross_regime") -> Interval:
    """Returns the AUROC of a variant's abstain head; `metric` is cross_regime or unanswerable."""
    return Interval.from_tree(results["variants"][name]["signals"][HEAD][metric])


def head_difference(results: Tree, a: str, b: str) -> Interval:
    """Returns the difference of two heads in cross-regime AUROC."""
    return Interval.from_tree(_comparison(results, a, b)["difference"])


def ceiling(results: Tree) -> float:
    """Returns the cross-regime AUROC of a head that separates unanswerable from answerable prompts perfectly.

    Prompts of the other answerable regimes tie with those in domain, and ties count half.
    """
    others = {regime: n for regime, n in results["prompts"].items() if regime != IN_DOMAIN}
    unanswerable = sum(n for regime, n in others.items() if regime not in ANSWERABLE)
    return 0.5 + 0.5 * unanswerable / sum(others.values())


def answer_v9(results: Tree) -> list[str]:
    """Returns the answer to the study's question: is v9's AUROC high, and does generation stay coherent?"""
    variants = results["variants"]
    if "v9" not in variants:
        return []
    auroc, same = head_auroc(results, "v9", "unanswerable"), variants["v9"]["same_answers"]
    outcome = {
        True: f"**it stays high** (at least {HIGH:g})",
        None: f"whether it is high (at least {HIGH:g}) is **inconclusive**, as the interval includes "
              f"{HIGH:g}",
        False: f"**it is above chance, but not high** (at least {HIGH:g})" if auroc.low > 0.5 else
               "**it is not significantly above chance**, as the interval reaches 0.5 or less",
    }[at_least(auroc, HIGH)]
    texts = ["The abstain head, trained alone with everything else frozen, separates unanswerable from "
             f"answerable prompts with AUROC {format_interval(auroc)}: {outcome}. The published metric, "
             "cross-regime AUROC (all other regimes against in_domain), is "
             f"{format_interval(head_auroc(results, 'v9'))}; some of these regimes can be answered, so a "
             f"perfect head would reach about {ceiling(results):.2f}."]
    if "v8b" in variants:
        change, p = head_difference(results, "v9", "v8b"), _comparison(results, "v9", "v8b")["p_holm"]
        p_text = f"bootstrap p {format_p(p)} after Holm's correction"
        if not change.excludes_zero:
            conclusion = f"the difference is not significant ({p_text}; the interval includes 0)."
        elif p >= ALPHA:
            conclusion = (f"the difference is inconclusive: its interval excludes 0, but {p_text} is not "
                          f"below {ALPHA:g}.")
        else:
            conclusion = f"the difference is significant ({p_text}): " + (
                "part of the signal was in the router." if change.high < 0 else
                "training the router reduces the AUROC.")
        texts.append("Compared with v8b, which trains the router as well (cross-regime AUROC "
                     f"{format_interval(head_auroc(results, 'v8b'))}), v9 − v8b is "
                     f"{format_interval(change, sign=True)}; {conclusion}")
    if not same or not all(same):
        return [*texts, "Generation differs from v4's although no parameter that affects it was trained: "
                        "this is a defect."]
    texts.append(f"Every answer is identical to v4's in {sum(same)} of {len(same)} seeds: "
                 + ("generation **stays coherent**." if _chats(variants[CHAT]) else
                    "generation is unchanged, but this v4 **does not count as coherent**."))
    return texts


def at_least(interval: Interval, limit: float) -> bool | None:
    """Whether the interval is at or above the limit; None if it includes the limit."""
    return True if interval.low >= limit else False if interval.high < limit else None


def at_most(interval: Interval, limit: float) -> bool | None:
    """Whether the interval is at or below the limit; None if it includes the limit."""
    return True if interval.high <= limit else False if interval.low > limit else None


def all_of(*outcomes: bool | None) -> bool | None:
    """False if any outcome is False, otherwise None if any is None, otherwise True."""
    return False if False in outcomes else None if None in outcomes else True


# ---------------------------------------------------------------------------------------------


def _comparison(results: Tree, a: str, b: str) -> Tree:
    return next(row for row in results["head_comparisons"] if (row["a"], row["b"]) == (a, b))


def _is_reference(start: Tree) -> bool:
    """Whether v4 knows enough for other variants to be measured relative to it."""
    return start["known"] is not None and start["known"]["point"] >= MIN_KNOWN


def _chats(start: Tree) -> bool | None:
    """Whether v4 chats coherently, as published; None if inconclusive."""
    if start["known"] is None:
        return None
    return all_of(at_least(Interval.from_tree(start["known"]), MIN_KNOWN),
                  start["regimes"][IN_DOMAIN]["loops"] <= MAX_LOOPS)


def _v4_near_chance(results: Tree) -> Statement:
    aurocs = {name: Interval.from_tree(signal["cross_regime"])
              for name, signal in results["variants"][CHAT]["signals"].items()
              if name in ("max_softmax_last", "max_softmax_mean", *ROUTER, HEAD)}
    farthest = max(aurocs, key=lambda name: abs(aurocs[name].point - 0.5))
    return Statement(CHAT, "cross-regime AUROC of every signal is 0.51 to 0.55, near chance",
                     f"intervals of softmax, router and head signals from {1 - CHANCE:g} to {CHANCE:g}",
                     f"farthest from 0.5: {farthest}, {format_interval(aurocs[farthest])}",
                     all_of(*(all_of(at_least(auroc, 1 - CHANCE), at_most(auroc, CHANCE))
                              for auroc in aurocs.values())))


def _v4_detects_gibberish(results: Tree) -> Statement:
    auroc = Interval.from_tree(
        results["variants"][CHAT]["signals"]["max_softmax_mean"]["regimes"]["gibberish"])
    return Statement(CHAT, "max_softmax_mean detects gibberish, AUROC ≈ 0.93",
                     f"at least {0.93 - AUROC_MARGIN:g}", format_interval(auroc),
                     at_least(auroc, 0.93 - AUROC_MARGIN))


def _v4_router_wins_nothing(results: Tree) -> Statement:
    wins = {verdict["signal"]: verdict["wins"]
            for verdict in results["variants"][CHAT]["rule"]["verdicts"]
            if verdict["signal"] in ("router_entropy", "router_entropy_var")}
    best = max(wins, key=lambda name: len(wins[name]), default="")
    return Statement(CHAT, "the router's signals win no regime against the baselines", "no win by the rule",
                     f"most wins: {best}, {', '.join(wins[best]) or 'none'}" if wins else
                     "the network has no router", not any(wins.values()) if wins else None)


def _v4_chats(results: Tree) -> Statement:
    start = results["variants"][CHAT]
    return Statement(CHAT, "the chat is coherent", f"accuracy of at least {MIN_KNOWN:g} on in-domain "
                     f"questions that do not contain their answer, at most {MAX_LOOPS:g} loops",
                     f"{format_interval(Interval.from_tree(start['known']), 2)}, loops "
                     f"{start['regimes'][IN_DOMAIN]['loops']:.2f}" if start["known"] else
                     "the prompts have no such answers", _chats(start))


def _chat(name: str, published: str, garbled: bool) -> Callable[[Tree], Statement]:
    criterion = (f"known, relative to v4: {'below' if garbled else 'at least'} "
                 f"{GARBLED if garbled else COHERENT:g}")

    def check(results: Tree) -> Statement:
        if not _is_reference(results["variants"][CHAT]):
            return Statement(name, published, criterion, "v4's own accuracy is too low", None)
        ratio = Interval.from_tree(results["variants"][name]["known_relative_to_v4"])
        return Statement(name, published, criterion,
                         f"{format_interval(ratio, 2)}: {chat_quality(results, name)}",
                         at_most(ratio, GARBLED) if garbled else at_least(ratio, COHERENT))
    return check


def _v6_form_not_meaning(results: Tree) -> Statement:
    aurocs = {name: Interval.from_tree(auroc) for name, auroc in
              results["variants"]["v6"]["signals"]["router_entropy"]["regimes"].items()}
    means = results["variants"]["v6"]["router_conf"]
    names = ("gibberish", "factual_misleading", "ood_topic")
    return Statement(
        "v6", "router_conf detects gibberish (mean 0.37; in domain 0.62), but neither misleading questions "
        "(0.61) nor unknown topics (0.60)", f"AUROC of gibberish at least {HIGH:g}, of factual_misleading "
        f"and ood_topic at most {CHANCE:g}",
        ", ".join(f"{name} {format_interval(aurocs[name], 2)}" for name in names) + "; means "
        + ", ".join(f"{name} {means[name]:.2f}" for name in (IN_DOMAIN, *names)),
        all_of(at_least(aurocs["gibberish"], HIGH), at_most(aurocs["factual_misleading"], CHANCE),
               at_most(aurocs["ood_topic"], CHANCE)))


def _auroc_is(name: str, published: float) -> Callable[[Tree], Statement]:
    def check(results: Tree) -> Statement:
        auroc = head_auroc(results, name)
        return Statement(name, f"cross-regime AUROC of abstain_p is {published:.2f}",
                         f"at least {published - AUROC_MARGIN:.2f}", format_interval(auroc),
                         at_least(auroc, published - AUROC_MARGIN))
    return check


def _abstains_on_gibberish(name: str, published: float) -> Callable[[Tree], Statement]:
    def check(results: Tree) -> Statement:
        rate = Interval.from_tree(results["variants"][name]["abstention"]["above_half"]["gibberish"])
        return Statement(name, f"abstains on {100 * published:.0f} % of gibberish",
                         f"abstain_p > 0.5 on at least {published - RATE_MARGIN:.2f}",
                         format_interval(rate, 2), at_least(rate, published - RATE_MARGIN))
    return check


def _v8b_lower_weight_is_better(results: Tree) -> Statement:
    points = [head_auroc(results, name).point for name in ("v7", "v8a", "v8b")]
    steps = [head_difference(results, "v8a", "v7"), head_difference(results, "v8b", "v8a")]
    return Statement("v8b", "the lower the router_entropy_weight (20, 5, 0), the better the head (0.76, "
                     "0.80, 0.85)", "v8a − v7 and v8b − v8a above 0",
                     " ".join(f"{point:.3f}" for point in points) + "; "
                     + ", ".join(format_interval(step, sign=True) for step in steps),
                     all_of(*(step.low > 0 if step.excludes_zero else None for step in steps)))


def _v8b_router_moves(results: Tree) -> Statement:
    drift = results["variants"]["v8b"]["drift"]
    return Statement("v8b", "the router changes although router_entropy_weight is 0", "KL of the routing "
                     "above 0.001 nats in every seed", f"KL of the routing {np.mean(drift):.3g} nats",
                     min(drift) > 1e-3)


def _splice_auroc(results: Tree) -> Statement:
    auroc, change = head_auroc(results, "splice"), head_difference(results, "splice", "v7")
    return Statement("splice", "the head of v7 on v4: AUROC 0.54, back to chance",
                     f"at most {CHANCE:g}, and below v7's",
                     f"{format_interval(auroc)}; {format_interval(change, sign=True)}",
                     all_of(at_most(auroc, CHANCE), change.high < 0 if change.excludes_zero else None))


def _splice_false_positives(results: Tree) -> Statement:
    rate = Interval.from_tree(results["variants"]["splice"]["abstention"]["above_half"][IN_DOMAIN])
    low, high = 0.27 - RATE_MARGIN, 0.27 + RATE_MARGIN
    return Statement("splice", "27 % false positives",
                     f"abstain_p > 0.5 on {low:.2f} to {high:.2f} of in_domain", format_interval(rate, 2),
                     all_of(at_least(rate, low), at_most(rate, high)))


def _splice_preserves(results: Tree) -> Statement:
    same = results["variants"]["splice"]["same_answers"]
    return Statement("splice", "generation is preserved", "every answer identical to v4's",
                     f"in {sum(same)} of {len(same)} seeds", all(same))


_STATEMENTS: tuple[tuple[tuple[str, ...], Callable[[Tree], Statement]], ...] = (
    ((CHAT,), _v4_near_chance), ((CHAT,), _v4_detects_gibberish), ((CHAT,), _v4_router_wins_nothing),
    ((CHAT,), _v4_chats),
    (("v5",), _chat("v5", "the chat is destroyed", garbled=True)),
    (("v6",), _chat("v6", "the chat survives", garbled=False)), (("v6",), _v6_form_not_meaning),
    (("v7",), _auroc_is("v7", 0.76)), (("v7",), _abstains_on_gibberish("v7", 0.93)),
    (("v7",), _chat("v7", "the chat is garbled", garbled=True)),
    (("v8a",), _auroc_is("v8a", 0.80)), (("v8a",), _chat("v8a", "the chat is garbled", garbled=True)),
    (("v8b",), _auroc_is("v8b", 0.85)), (("v8b",), _abstains_on_gibberish("v8b", 1.0)),
    (("v8b",), _chat("v8b", "the chat is garbled", garbled=True)),
    (("v7", "v8a", "v8b"), _v8b_lower_weight_is_better), (("v8b",), _v8b_router_moves),
    (("splice",), _splice_auroc), (("splice",), _splice_false_positives), (("splice",), _splice_preserves))
