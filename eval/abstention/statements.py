"""What was published of the variants, held against what was found here: sentence by sentence.

Each statement has a criterion of its own, in numbers, fixed here. It is about this scale: small networks in
a made-up village say nothing of larger ones elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from eval.abstention.decision import IN_DOMAIN
from eval.abstention.variants import CHAT
from eval.conclusions import told
from eval.stats import Interval
from tilelli_jax.signals.uncertainty import HEAD

Tree = Mapping[str, Any]
CHANCE = 0.6  # a cross-regime AUROC up to here is called near chance: published are 0.51 to 0.55
COHERENT = 0.8  # of v4's share of right answers, from which a network is called coherent
GARBLED = 0.5  # below which garbled
HIGH = 0.7  # an AUROC from here is called high


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


def coherence(found: Tree, name: str) -> float | None:
    """Right answers in domain as a share of v4's; None where v4 has none."""
    right, before = (float(np.mean(found["variants"][one]["right_runs"])) for one in (name, CHAT))
    return right / before if before else None


def called(share: float | None) -> str:
    """Coherent, impaired or garbled."""
    if share is None:
        return "not to be told"
    return "coherent" if share >= COHERENT else "garbled" if share < GARBLED else "impaired"


def head(found: Tree, name: str) -> Interval:
    """The cross-regime AUROC of a variant's abstention."""
    return Interval.from_tree(found["variants"][name]["signals"][HEAD]["cross"])


def between(found: Tree, a: str, b: str) -> Tree:
    """The difference of two heads."""
    return next(one for one in found["between"] if (one["a"], one["b"]) == (a, b))


def answer_v9(found: Tree) -> list[str]:
    """Does the AUROC stay high, and does generation stay coherent?"""
    variants = found["variants"]
    if "v9" not in variants:
        return []
    area, same = head(found, "v9"), variants["v9"]["same_answers"]
    texts = [f"Trained alone, everything else frozen, the abstain head tells prompts in domain from all "
             f"others with AUROC {told(area)}, and what nobody can know from what can be answered with "
             f"{told(Interval.from_tree(variants['v9']['signals'][HEAD]['needed']))}: "
             + ("**it stays high**." if area.low > HIGH else
                "**it is above chance, and not high**." if area.low > 0.5 else
                "**it is not told apart from chance**.")]
    if "v8b" in variants:
        one = between(found, "v9", "v8b")
        change = Interval.from_tree(one["difference"])
        texts.append(f"Against v8b, which trains the router as well ({told(head(found, 'v8b'))}): "
                     f"{told(change, sign=True)}, "
                     + ("no difference that can be told." if not change.excludes_zero else
                        "less: part of the signal was in the router." if change.high < 0 else
                        "more: training the router did harm."))
    texts.append("Generation **stays coherent**: every answer is that of v4, to the bit, in "
                 f"{sum(same)} of {len(same)} seeds." if same and all(same) else
                 "Generation has changed, which it must not: this is a defect.")
    return texts


# ---------------------------------------------------------------------------------------------


def _near_chance(found: Tree) -> Statement:
    areas = {name: one["cross"]["point"] for name, one in found["variants"][CHAT]["signals"].items()
             if name in ("max_softmax_last", "max_softmax_mean", "router_entropy", "router_entropy_var")}
    most = max(areas, key=lambda name: abs(areas[name] - 0.5))
    return Statement(CHAT, "cross-regime AUROC of every signal is 0.51 to 0.55, near chance",
                     f"softmax and router signals all within {1 - CHANCE:g} and {CHANCE:g}",
                     f"farthest from ½: {most}, {areas[most]:.3f}",
                     all(1 - CHANCE <= area <= CHANCE for area in areas.values()))


def _gibberish_alone(found: Tree) -> Statement:
    area = Interval.from_tree(
        found["variants"][CHAT]["signals"]["max_softmax_mean"]["regimes"]["gibberish"])
    return Statement(CHAT, "max_softmax_mean tells gibberish, AUROC ≈ 0.93", "at least 0.85", told(area),
                     area.point >= 0.85)


def _router_wins_nothing(found: Tree) -> Statement:
    wins = {one["signal"]: one["wins"] for one in found["variants"][CHAT]["rule"]["verdicts"]
            if one["signal"] in ("router_entropy", "router_entropy_var")}
    most = max(wins, key=lambda name: len(wins[name]), default="")
    return Statement(CHAT, "the router's signals win no regime against the baselines", "none by the rule",
                     f"{most} wins {len(wins[most])}: {', '.join(wins[most]) or 'none'}" if wins else
                     "it has no router", not any(wins.values()) if wins else None)


def _chat(name: str, published: str, garbled: bool) -> Callable[[Tree], Statement]:
    def make(found: Tree) -> Statement:
        share = coherence(found, name)
        return Statement(
            name, published, f"right answers in domain {'below ' if garbled else 'at least '}"
            f"{GARBLED if garbled else COHERENT:g} of v4's",
            "v4 answers nothing rightly" if share is None else f"{share:.2f} of v4's: {called(share)}",
            None if share is None else share < GARBLED if garbled else share >= COHERENT)
    return make


def _form_not_meaning(found: Tree) -> Statement:
    areas = {name: one["point"] for name, one in
             found["variants"]["v6"]["signals"]["router_entropy"]["regimes"].items()}
    return Statement("v6", "router_conf tells gibberish (0.37 against 0.62), but neither misleading (0.61) "
                     "nor unknown topics (0.60)", f"AUROC of router_conf on gibberish at least {HIGH:g}, on "
                     f"factual_misleading and ood_topic at most {CHANCE:g}",
                     ", ".join(f"{name} {areas[name]:.3f}" for name in
                               ("gibberish", "factual_misleading", "ood_topic")),
                     areas["gibberish"] >= HIGH
                     and max(areas["factual_misleading"], areas["ood_topic"]) <= CHANCE)


def _head_is(name: str, published: float) -> Callable[[Tree], Statement]:
    def make(found: Tree) -> Statement:
        area = head(found, name)
        return Statement(name, f"cross-regime AUROC of abstain_p is {published:.2f}",
                         "the interval holds it, or lies above", told(area), area.high >= published)
    return make


def _gibberish_declined(name: str, published: float) -> Callable[[Tree], Statement]:
    def make(found: Tree) -> Statement:
        share = Interval.from_tree(found["variants"][name]["abstention"]["half"]["gibberish"])
        return Statement(name, f"abstains from {100 * published:.0f} % of gibberish",
                         "the interval of abstain_p > ½ holds it, or lies above", told(share, 2),
                         share.high >= published)
    return make


def _less_is_more(found: Tree) -> Statement:
    areas = [head(found, name).point for name in ("v7", "v8a", "v8b")]
    return Statement("v8b", "the less metacognition is weighted (20, 5, 0), the better the head (0.76, 0.80, "
                     "0.85)", "v7 < v8a < v8b", " ".join(f"{area:.3f}" for area in areas),
                     areas[0] < areas[1] < areas[2])


def _router_moves(found: Tree) -> Statement:
    drift = found["variants"]["v8b"]["drift"]
    return Statement("v8b", "the router moves although metacognition weighs nothing", "KL above 0.001 nats "
                     "in every seed", f"KL of the routing {np.mean(drift):.3g} nats", min(drift) > 1e-3)


def _splice(found: Tree) -> Statement:
    area = head(found, "splice")
    return Statement("splice", "the head of v7 on v4: AUROC 0.54, back to chance", f"at most {CHANCE:g}",
                     told(area), area.point <= CHANCE)


def _splice_false(found: Tree) -> Statement:
    share = Interval.from_tree(found["variants"]["splice"]["abstention"]["half"][IN_DOMAIN])
    return Statement("splice", "27 % false positives", "the interval of abstain_p > ½ in domain holds it, "
                     "or lies above", told(share, 2), share.high >= 0.27)


_STATEMENTS: tuple[tuple[tuple[str, ...], Callable[[Tree], Statement]], ...] = (
    ((CHAT,), _near_chance), ((CHAT,), _gibberish_alone), ((CHAT,), _router_wins_nothing),
    (("v5",), _chat("v5", "the chat is destroyed", garbled=True)),
    (("v6",), _chat("v6", "the chat survives", garbled=False)), (("v6",), _form_not_meaning),
    (("v7",), _head_is("v7", 0.76)), (("v7",), _gibberish_declined("v7", 0.93)),
    (("v7",), _chat("v7", "the chat is garbled", garbled=True)),
    (("v8a",), _head_is("v8a", 0.80)), (("v8a",), _chat("v8a", "the chat is garbled", garbled=True)),
    (("v8b",), _head_is("v8b", 0.85)), (("v8b",), _gibberish_declined("v8b", 1.0)),
    (("v8b",), _chat("v8b", "the chat is garbled", garbled=True)),
    (("v7", "v8a", "v8b"), _less_is_more), (("v8b",), _router_moves), (("splice",), _splice),
    (("splice",), _splice_false))
