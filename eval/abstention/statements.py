"""What was published of the variants, compared with what was found here: sentence by sentence.

Each statement has a criterion of its own, in numbers, fixed here, and three outcomes: its interval lies where
it should, lies elsewhere, or is too wide to tell. It is about this scale: small networks in a made-up village
say nothing of larger ones elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.data.village import ANSWERABLE
from tilelli_jax.signals.names import HEAD, ROUTER

from ..conclusions import ALPHA, format_interval, format_p
from ..stats import Interval
from .decision import IN_DOMAIN
from .variants import CHAT

Tree = Mapping[str, Any]
CHANCE = 0.6  # an AUROC from 1 − it to it is called near chance: published are 0.51 to 0.55
COHERENT = 0.8  # of what v4 knows, from which a network is called coherent
GARBLED = 0.5  # below which garbled
KNOWS = 0.5  # share of telling questions in domain that v4 has to answer, for that to mean anything
LOOPS = 0.1  # share of its answers that may be loops
HIGH = 0.7  # an AUROC from here is called high
AREA, SHARE = 0.05, 0.1  # what a published AUROC or share may be above what is found


class Statement(NamedTuple):
    """What was published, what makes it reproduced, what was found; `reproduced` None: not to be told."""

    variant: str
    published: str
    criterion: str
    found: str
    reproduced: bool | None


def statements(found: Tree) -> list[Statement]:
    """Those about variants that were measured."""
    variants = found["variants"]
    return [make(found) for needs, make in _STATEMENTS if all(name in variants for name in needs)]


def called(found: Tree, name: str) -> str:
    """Coherent, impaired, garbled or not to be told: by what it knows of what v4 knows, and its loops."""
    start, one = found["variants"].get(CHAT), found["variants"][name]
    if start is None or not _knows(start):
        return "not to be told"
    ratio = Interval.from_tree(one["known_of_start"])
    if ratio.high < GARBLED or one["regimes"][IN_DOMAIN]["loops"] > 0.5:
        return "garbled"
    if ratio.low >= COHERENT and one["regimes"][IN_DOMAIN]["loops"] <= LOOPS:
        return "coherent"
    return "impaired" if ratio.high < COHERENT and ratio.low >= GARBLED else "not to be told"


def head(found: Tree, name: str, what: str = "cross") -> Interval:
    """The AUROC of a variant's abstention: cross-regime, or `unanswerable`."""
    return Interval.from_tree(found["variants"][name]["signals"][HEAD][what])


def between(found: Tree, a: str, b: str) -> Interval:
    """The difference of two heads."""
    return Interval.from_tree(_pair(found, a, b)["difference"])


def ceiling(found: Tree) -> float:
    """The cross-regime AUROC of a head that tells all that nobody can answer from all that can be.

    A prompt of an answerable regime scores as those in domain do, and wins every other time.
    """
    others = {regime: n for regime, n in found["prompts"].items() if regime != IN_DOMAIN}
    unknown = sum(n for regime, n in others.items() if regime not in ANSWERABLE)
    return 0.5 + 0.5 * unknown / sum(others.values())


def answer_v9(found: Tree) -> list[str]:
    """Does the AUROC stay high, and does generation stay coherent?"""
    variants = found["variants"]
    if "v9" not in variants:
        return []
    area, same = head(found, "v9", "unanswerable"), variants["v9"]["same_answers"]
    verdict = {True: "**it stays high**", None: f"whether that is high (from {HIGH:g}) **is not to be told**",
               False: "**it is above chance, and not high**" if area.low > 0.5 else
                      "**it is not told apart from chance**"}[at_least(area, HIGH)]
    texts = ["Trained alone, everything else frozen, the abstain head tells what nobody can answer from what "
             f"can be answered with AUROC {format_interval(area)}: {verdict}. The published number, in domain against "
             f"all other regimes, is {format_interval(head(found, 'v9'))}; as some of these can be answered, a head "
             f"that knew all would have about {ceiling(found):.2f} there."]
    if "v8b" in variants:
        change, p = between(found, "v9", "v8b"), _pair(found, "v9", "v8b")["p_holm"]
        texts.append(f"Against v8b, which trains the router as well (cross-regime "
                     f"{format_interval(head(found, 'v8b'))}): {format_interval(change, sign=True)}, p {format_p(p)} after Holm's "
                     "correction: "
                     + ("no difference that can be told." if not change.excludes_zero or p >= ALPHA else
                        "less, part of the signal was in the router." if change.high < 0 else
                        "more, training the router did harm."))
    if not same or not all(same):
        return [*texts, "Generation has changed, which it must not: this is a defect."]
    texts.append(f"Every answer is that of v4, to the bit, in {sum(same)} of {len(same)} seeds: "
                 + ("generation **stays coherent**." if _chats(variants[CHAT]) else
                    "generation stays what it was, which with this v4 **is not to be called coherent**."))
    return texts


def at_least(found: Interval, line: float) -> bool | None:
    """Whether an interval lies there; None where it holds the line."""
    return True if found.low >= line else False if found.high < line else None


def at_most(found: Interval, line: float) -> bool | None:
    """Likewise."""
    return True if found.high <= line else False if found.low > line else None


def all_of(*outcomes: bool | None) -> bool | None:
    """False if one is, None if one is not to be told."""
    return False if False in outcomes else None if None in outcomes else True


# ---------------------------------------------------------------------------------------------


def _pair(found: Tree, a: str, b: str) -> Tree:
    return next(one for one in found["between"] if (one["a"], one["b"]) == (a, b))


def _knows(start: Tree) -> bool:
    return start["known"] is not None and start["known"]["point"] >= KNOWS


def _chats(start: Tree) -> bool | None:
    """Whether v4 chats coherently, which is published of it."""
    if start["known"] is None:
        return None
    return all_of(at_least(Interval.from_tree(start["known"]), KNOWS),
                  start["regimes"][IN_DOMAIN]["loops"] <= LOOPS)


def _near_chance(found: Tree) -> Statement:
    areas = {name: Interval.from_tree(one["cross"])
             for name, one in found["variants"][CHAT]["signals"].items()
             if name in ("max_softmax_last", "max_softmax_mean", *ROUTER, HEAD)}
    most = max(areas, key=lambda name: abs(areas[name].point - 0.5))
    return Statement(CHAT, "cross-regime AUROC of every signal is 0.51 to 0.55, near chance",
                     f"intervals of softmax, router and head within {1 - CHANCE:g} and {CHANCE:g}",
                     f"farthest from ½: {most}, {format_interval(areas[most])}",
                     all_of(*(all_of(at_least(area, 1 - CHANCE), at_most(area, CHANCE))
                              for area in areas.values())))


def _gibberish_alone(found: Tree) -> Statement:
    area = Interval.from_tree(
        found["variants"][CHAT]["signals"]["max_softmax_mean"]["regimes"]["gibberish"])
    return Statement(CHAT, "max_softmax_mean tells gibberish, AUROC ≈ 0.93", f"at least {0.93 - AREA:g}",
                     format_interval(area), at_least(area, 0.93 - AREA))


def _router_wins_nothing(found: Tree) -> Statement:
    wins = {one["signal"]: one["wins"] for one in found["variants"][CHAT]["rule"]["verdicts"]
            if one["signal"] in ("router_entropy", "router_entropy_var")}
    most = max(wins, key=lambda name: len(wins[name]), default="")
    return Statement(CHAT, "the router's signals win no regime against the baselines", "none by the rule",
                     f"{most} wins {len(wins[most])}: {', '.join(wins[most]) or 'none'}" if wins else
                     "it has no router", not any(wins.values()) if wins else None)


def _v4_chats(found: Tree) -> Statement:
    start = found["variants"][CHAT]
    return Statement(CHAT, "the chat is coherent", f"at least {KNOWS:g} of telling questions in domain "
                     f"answered rightly, at most {LOOPS:g} loops",
                     f"{format_interval(Interval.from_tree(start['known']), 2)}, loops "
                     f"{start['regimes'][IN_DOMAIN]['loops']:.2f}" if start["known"] else
                     "the prompts have no such answers", _chats(start))


def _chat(name: str, published: str, garbled: bool) -> Callable[[Tree], Statement]:
    criterion = (f"knows {'less than' if garbled else 'at least'} {GARBLED if garbled else COHERENT:g} of "
                 "what v4 knows in domain")

    def make(found: Tree) -> Statement:
        if not _knows(found["variants"][CHAT]):
            return Statement(name, published, criterion, "v4 knows too little for that", None)
        ratio = Interval.from_tree(found["variants"][name]["known_of_start"])
        return Statement(name, published, criterion, f"{format_interval(ratio, 2)}: {called(found, name)}",
                         at_most(ratio, GARBLED) if garbled else at_least(ratio, COHERENT))
    return make


def _form_not_meaning(found: Tree) -> Statement:
    areas = {name: Interval.from_tree(one) for name, one in
             found["variants"]["v6"]["signals"]["router_entropy"]["regimes"].items()}
    means = found["variants"]["v6"]["router_conf"]
    names = ("gibberish", "factual_misleading", "ood_topic")
    return Statement(
        "v6", "router_conf tells gibberish (0.37 against 0.62), but neither misleading (0.61) nor unknown "
        "topics (0.60)", f"AUROC of gibberish at least {HIGH:g}, of factual_misleading and ood_topic at most "
        f"{CHANCE:g}",
        ", ".join(f"{name} {format_interval(areas[name], 2)}" for name in names) + "; means "
        + ", ".join(f"{name} {means[name]:.2f}" for name in (IN_DOMAIN, *names)),
        all_of(at_least(areas["gibberish"], HIGH), at_most(areas["factual_misleading"], CHANCE),
               at_most(areas["ood_topic"], CHANCE)))


def _head_is(name: str, published: float) -> Callable[[Tree], Statement]:
    def make(found: Tree) -> Statement:
        area = head(found, name)
        return Statement(name, f"cross-regime AUROC of abstain_p is {published:.2f}",
                         f"at least {published - AREA:.2f}", format_interval(area), at_least(area, published - AREA))
    return make


def _gibberish_declined(name: str, published: float) -> Callable[[Tree], Statement]:
    def make(found: Tree) -> Statement:
        share = Interval.from_tree(found["variants"][name]["abstention"]["half"]["gibberish"])
        return Statement(name, f"abstains from {100 * published:.0f} % of gibberish",
                         f"abstain_p > ½ of at least {published - SHARE:.2f}", format_interval(share, 2),
                         at_least(share, published - SHARE))
    return make


def _less_is_more(found: Tree) -> Statement:
    areas = [head(found, name).point for name in ("v7", "v8a", "v8b")]
    steps = [between(found, "v8a", "v7"), between(found, "v8b", "v8a")]
    return Statement("v8b", "the less metacognition is weighted (20, 5, 0), the better the head (0.76, 0.80, "
                     "0.85)", "v8a − v7 and v8b − v8a above 0",
                     " ".join(f"{area:.3f}" for area in areas) + "; "
                     + ", ".join(format_interval(step, sign=True) for step in steps),
                     all_of(*(step.low > 0 if step.excludes_zero else None for step in steps)))


def _router_moves(found: Tree) -> Statement:
    drift = found["variants"]["v8b"]["drift"]
    return Statement("v8b", "the router moves although metacognition weighs nothing", "KL above 0.001 nats "
                     "in every seed", f"KL of the routing {np.mean(drift):.3g} nats", min(drift) > 1e-3)


def _splice(found: Tree) -> Statement:
    area, change = head(found, "splice"), between(found, "splice", "v7")
    return Statement("splice", "the head of v7 on v4: AUROC 0.54, back to chance",
                     f"at most {CHANCE:g}, and below v7's", f"{format_interval(area)}; {format_interval(change, sign=True)}",
                     all_of(at_most(area, CHANCE), change.high < 0 if change.excludes_zero else None))


def _splice_false(found: Tree) -> Statement:
    share = Interval.from_tree(found["variants"]["splice"]["abstention"]["half"][IN_DOMAIN])
    low, high = 0.27 - SHARE, 0.27 + SHARE
    return Statement("splice", "27 % false positives", f"abstain_p > ½ in domain of {low:.2f} to {high:.2f}",
                     format_interval(share, 2), all_of(at_least(share, low), at_most(share, high)))


def _splice_preserves(found: Tree) -> Statement:
    same = found["variants"]["splice"]["same_answers"]
    return Statement("splice", "generation is preserved", "every answer that of v4, to the bit",
                     f"in {sum(same)} of {len(same)} seeds", all(same))


_STATEMENTS: tuple[tuple[tuple[str, ...], Callable[[Tree], Statement]], ...] = (
    ((CHAT,), _near_chance), ((CHAT,), _gibberish_alone), ((CHAT,), _router_wins_nothing),
    ((CHAT,), _v4_chats),
    (("v5",), _chat("v5", "the chat is destroyed", garbled=True)),
    (("v6",), _chat("v6", "the chat survives", garbled=False)), (("v6",), _form_not_meaning),
    (("v7",), _head_is("v7", 0.76)), (("v7",), _gibberish_declined("v7", 0.93)),
    (("v7",), _chat("v7", "the chat is garbled", garbled=True)),
    (("v8a",), _head_is("v8a", 0.80)), (("v8a",), _chat("v8a", "the chat is garbled", garbled=True)),
    (("v8b",), _head_is("v8b", 0.85)), (("v8b",), _gibberish_declined("v8b", 1.0)),
    (("v8b",), _chat("v8b", "the chat is garbled", garbled=True)),
    (("v7", "v8a", "v8b"), _less_is_more), (("v8b",), _router_moves), (("splice",), _splice),
    (("splice",), _splice_false), (("splice",), _splice_preserves))
