"""Compares each published statement about the variants with the results of this study.

CLAIMS is the table of statements. Each has a numerical criterion, fixed here: bounds of some quantities.
There are three outcomes: the intervals of all quantities are within their bounds, one is outside, or one
includes a bound and is too wide to decide. Outcomes hold at this scale only: small networks and a synthetic
village.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tilelli_jax.data.synthetic.village import ANSWERABLE
from tilelli_jax.signals.names import HEAD, ROUTER

from ..conclusions import ALPHA, format_interval, format_p
from ..stats import Interval
from .decision import IN_DOMAIN
from .variants import CHAT, VARIANTS

Tree = Mapping[str, Any]
CHANCE = 0.6  # an AUROC from 0.4 to 0.6 counts as near chance; published are 0.51 to 0.55
COHERENT = 0.8  # accuracy relative to v4 from which a chat counts as coherent
GARBLED = 0.5  # accuracy relative to v4 below which it counts as garbled
MIN_ACCURACY = 0.5  # v4's closed-book accuracy below which accuracy relative to it means nothing
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
    """Returns the statements about the variants in the results, in the order of the variants."""
    found = []
    order = list(VARIANTS)
    for name, published, criterion, bounds in sorted(CLAIMS, key=lambda claim: order.index(claim[0])):
        if {name, *(other for bound in bounds for other in bound.compared)} <= results["variants"].keys():
            measured = [(bound, value) for bound in bounds
                        if (value := _measure(results, name, bound.quantity)) is not None]
            found.append(Statement(name, published, criterion,
                                   ", ".join(_describe(bound, value) for bound, value in measured),
                                   all_of(*(_is_within(value, bound) for bound, value in measured))))
    return found


def chat_quality(results: Tree, name: str) -> str:
    """Returns coherent, impaired, garbled or inconclusive, from accuracy relative to v4 and loops."""
    start, variant = results["variants"].get(CHAT), results["variants"][name]
    if start is None or not _is_reference(start):
        return "inconclusive"
    ratio = Interval.from_tree(variant[RELATIVE])
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


# What the answer to the study's question may say.
HEAD_SENTENCE = (
    "The abstain head, trained alone with everything else frozen, separates unanswerable from answerable "
    "prompts with AUROC {auroc}: {outcome}. The published metric, cross-regime AUROC (all other regimes "
    "against in_domain), is {cross_regime}; some of these regimes can be answered, so a perfect head would "
    "reach about {ceiling:.2f}.")
HEAD_OUTCOMES = {
    "high": f"**it stays high** (at least {HIGH:g})",
    "undecided": f"whether it is high (at least {HIGH:g}) is **inconclusive**: the interval includes it",
    "above chance": f"**it is above chance, but not high** (at least {HIGH:g})",
    "chance": "**it is not significantly above chance**, as the interval reaches 0.5 or less"}
V8B_SENTENCE = ("Compared with v8b, which trains the router as well (cross-regime AUROC {v8b}), v9 − v8b is "
                "{change}; the difference is {outcome}")
V8B_OUTCOMES = {
    "includes 0": "not significant (bootstrap p {p} after Holm's correction; the interval includes 0).",
    "p": "inconclusive: its interval excludes 0, but bootstrap p {p} after Holm's correction is not below "
         f"{ALPHA:g}.",
    "no p": "inconclusive: its interval excludes 0, but the bootstrap p is undefined, as all "
            "replicates are equal.",
    "lower": "significant (bootstrap p {p} after Holm's correction): part of the signal was in the router.",
    "higher": "significant (bootstrap p {p} after Holm's correction): training the router reduces the AUROC."}
GENERATION = {
    "changed": "Generation differs from v4's although no parameter that affects it was trained: this is a "
               "defect.",
    True: "Every answer is identical to v4's in {n} of {n} seeds: generation **stays coherent**.",
    False: "Every answer is identical to v4's in {n} of {n} seeds: generation is unchanged, but this v4 "
           "**does not count as coherent**."}


def answer_v9(results: Tree) -> list[str]:
    """Returns the answer to the study's question: is v9's AUROC high, and does generation stay coherent?"""
    variants = results["variants"]
    if "v9" not in variants:
        return []
    auroc, same = head_auroc(results, "v9", "unanswerable"), variants["v9"]["same_answers"]
    outcome = {True: "high", None: "undecided", False: "above chance" if auroc.low > 0.5 else "chance"}
    texts = [HEAD_SENTENCE.format(
        auroc=format_interval(auroc), outcome=HEAD_OUTCOMES[outcome[at_least(auroc, HIGH)]],
        cross_regime=format_interval(head_auroc(results, "v9")), ceiling=ceiling(results))]
    if "v8b" in variants:
        change, p = head_difference(results, "v9", "v8b"), _comparison(results, "v9", "v8b")["p_holm"]
        kind = ("includes 0" if not change.excludes_zero else "no p" if p is None else "p" if p >= ALPHA else
                "lower" if change.high < 0 else "higher")
        texts.append(V8B_SENTENCE.format(
            v8b=format_interval(head_auroc(results, "v8b")), change=format_interval(change, sign=True),
            outcome=V8B_OUTCOMES[kind].format(p=format_p(p))))
    coherent = all(_is_within(_measure(results, CHAT, bound.quantity) or NOT_MEASURED, bound)
                   for bound in COHERENT_CHAT)
    return [*texts, GENERATION[coherent if same and all(same) else "changed"].format(n=len(same or ()))]


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


class Bound(NamedTuple):
    """Limits of a quantity; without limits it is reported only.

    `quantity` is a path in the results of its variant, or the variants whose heads are compared, "a − b". Of
    a list with one value for each seed the lowest counts. `label` names the quantity in the result.
    """

    quantity: str
    low: float = -math.inf
    high: float = math.inf
    label: str = ""

    @property
    def compared(self) -> list[str]:
        return self.quantity.split(DIFFERENCE) if DIFFERENCE in self.quantity else []


DIFFERENCE = " − "
NOT_MEASURED = "not measured"
AUROC, WINS = f"signals.{HEAD}.cross_regime", "rule.verdicts"
ACCURACY, RELATIVE = "closed_book_accuracy", "closed_book_accuracy_relative_to_v4"


def _measure(results: Tree, name: str, quantity: str) -> Interval | str | None:
    """Returns a quantity, the reason why it is undefined, or None for a signal that the variant lacks."""
    if DIFFERENCE in quantity:
        return head_difference(results, *quantity.split(DIFFERENCE))
    if quantity == RELATIVE and not _is_reference(results["variants"][CHAT]):
        return "v4's own accuracy is too low"
    value = results["variants"][name]
    for key in quantity.split("."):
        if value is None or key not in value:
            return None if key in (*ROUTER, HEAD) else NOT_MEASURED
        value = value[key]
    if quantity == WINS:
        value = [len(verdict["wins"]) for verdict in value if verdict["signal"] in ROUTER]
        if value:
            return _number(max(value))
    match value:
        case None:
            return "the prompts have no such answers" if quantity == ACCURACY else NOT_MEASURED
        case []:
            return "the network has no router"
        case [bool(), *_]:
            return _number(sum(value) / len(value))
        case list():
            return _number(min(value))
        case Mapping():
            return Interval.from_tree(value)
    return _number(value)


def _number(value: float) -> Interval:
    return Interval(float(value), float(value), float(value))


def _is_within(value: Interval | str, bound: Bound) -> bool | None:
    if isinstance(value, str) or (bound.compared and not value.excludes_zero):
        return None
    return all_of(at_least(value, bound.low), at_most(value, bound.high))


def _describe(bound: Bound, value: Interval | str) -> str:
    text = value if isinstance(value, str) else (
        f"{value.point:.3g}" if value.low == value.high else format_interval(value))
    return f"{bound.label} {text}".strip()


def _comparison(results: Tree, a: str, b: str) -> Tree:
    return next(row for row in results["head_comparisons"] if (row["a"], row["b"]) == (a, b))


def _is_reference(start: Tree) -> bool:
    """Whether v4's closed-book accuracy is high enough for others to be measured relative to it."""
    return start[ACCURACY] is not None and start[ACCURACY]["point"] >= MIN_ACCURACY


COHERENT_CHAT = (Bound(ACCURACY, low=MIN_ACCURACY),
                 Bound(f"regimes.{IN_DOMAIN}.loops", high=MAX_LOOPS, label="loops"))
GARBLED_CHAT = f"closed-book accuracy, relative to v4: below {GARBLED:g}", (Bound(RELATIVE, high=GARBLED),)
CLAIMS: tuple[tuple[str, str, str, tuple[Bound, ...]], ...] = (  # variant, published statement, criterion
    (CHAT, "cross-regime AUROC of every signal is 0.51 to 0.55, near chance",
     f"intervals of softmax, router and head signals from {1 - CHANCE:g} to {CHANCE:g}",
     tuple(Bound(f"signals.{signal}.cross_regime", 1 - CHANCE, CHANCE, signal)
           for signal in ("max_softmax_last", "max_softmax_mean", *ROUTER, HEAD))),
    (CHAT, "max_softmax_mean detects gibberish, AUROC ≈ 0.93", f"at least {0.93 - AUROC_MARGIN:g}",
     (Bound("signals.max_softmax_mean.regimes.gibberish", low=0.93 - AUROC_MARGIN),)),
    (CHAT, "the router's signals win no regime against the baselines", "no win by the rule",
     (Bound(WINS, high=0, label="most wins"),)),
    (CHAT, "the chat is coherent", f"closed-book accuracy of at least {MIN_ACCURACY:g}, at most "
     f"{MAX_LOOPS:g} loops", COHERENT_CHAT),
    ("v5", "the chat is destroyed", *GARBLED_CHAT),
    ("v6", "the chat survives", f"closed-book accuracy, relative to v4: at least {COHERENT:g}",
     (Bound(RELATIVE, low=COHERENT),)),
    ("v6", "router_conf detects gibberish (mean 0.37; in domain 0.62), but neither misleading questions "
     "(0.61) nor unknown topics (0.60)",
     f"AUROC of gibberish at least {HIGH:g}, of factual_misleading and ood_topic at most {CHANCE:g}",
     (Bound("signals.router_entropy.regimes.gibberish", low=HIGH, label="gibberish"),
      *(Bound(f"signals.router_entropy.regimes.{regime}", high=CHANCE, label=regime)
        for regime in ("factual_misleading", "ood_topic")),
      *(Bound(f"router_conf.{regime}", label=f"mean of {regime}")
        for regime in (IN_DOMAIN, "gibberish", "factual_misleading", "ood_topic")))),
    *((name, f"cross-regime AUROC of {HEAD} is {published:.2f}",
       f"at least {published - AUROC_MARGIN:.2f}",
       (Bound(AUROC, low=published - AUROC_MARGIN),))
      for name, published in (("v7", 0.76), ("v8a", 0.80), ("v8b", 0.85))),
    *((name, f"abstains on {100 * published:.0f} % of gibberish",
       f"{HEAD} > 0.5 on at least {published - RATE_MARGIN:.2f}",
       (Bound("abstention.above_half.gibberish", low=published - RATE_MARGIN),))
      for name, published in (("v7", 0.93), ("v8b", 1.0))),
    *((name, "the chat is garbled", *GARBLED_CHAT) for name in ("v7", "v8a", "v8b")),
    ("v8b", "the lower the router_entropy_weight (20, 5, 0), the better the head (0.76, 0.80, 0.85)",
     "v8a − v7 and v8b − v8a above 0",
     tuple(Bound(difference, low=0, label=difference) for difference in ("v8a − v7", "v8b − v8a"))),
    ("v8b", "the router changes although router_entropy_weight is 0",
     "KL of the routing at least 0.001 nats in every seed", (Bound("drift", low=1e-3, label="lowest"),)),
    ("splice", "the head of v7 on v4: AUROC 0.54, back to chance", f"at most {CHANCE:g}, and below v7's",
     (Bound(AUROC, high=CHANCE), Bound("splice − v7", high=0, label="splice − v7"))),
    ("splice", "27 % false positives",
     f"{HEAD} > 0.5 on {0.27 - RATE_MARGIN:.2f} to {0.27 + RATE_MARGIN:.2f} of in_domain",
     (Bound(f"abstention.above_half.{IN_DOMAIN}", 0.27 - RATE_MARGIN, 0.27 + RATE_MARGIN),)),
    ("splice", "generation is preserved", "every answer identical to v4's in every seed",
     (Bound("same_answers", low=1, label="fraction of seeds"),)))
