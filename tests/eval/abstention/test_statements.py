"""Published sentences compared with made-up results that do and do not bear them out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tilelli_jax.eval.abstention.statements import Statement, answer_v9, called, ceiling, statements
from tilelli_jax.eval.metrics import auroc

REGIMES = ("ood_topic", "ood_style", "factual_misleading", "long_input", "neo_false_inability", "gibberish")


def area(point: float, half: float = 0.02) -> dict[str, float]:
    return {"point": point, "low": point - half, "high": point + half}


def variant(known: float = 0.9, head: float | None = None, ratio: float | None = None,
            **changed: Any) -> dict[str, Any]:
    names = ("max_softmax_last", "max_softmax_mean", "router_conf", "router_entropy", "router_entropy_var")
    signals = {name: {"cross": area(0.53), "unanswerable": area(0.6),
                      "regimes": {one: area(0.55) for one in REGIMES}} for name in names}
    if head is not None:
        signals["abstain_p"] = {"cross": area(head), "unanswerable": area(head + 0.05), "regimes": {}}
    shares = {"in_domain": area(0.02), "gibberish": area(1.0, 0.05)}
    return {"signals": signals, "known": area(known), "known_of_start": area(ratio or known / 0.9, 0.05),
            "known_runs": [known, known], "drift": [0.2, 0.3], "same_answers": [False, False],
            "regimes": {"in_domain": {"loops": 0.0}},
            "router_conf": {"in_domain": 0.6, **dict.fromkeys(REGIMES, 0.5)},
            "rule": {"verdicts": [{"signal": "router_entropy", "wins": []},
                                  {"signal": "router_entropy_var", "wins": []}]},
            "abstention": None if head is None else {"half": shares, "calibrated": shares}} | changed


@pytest.fixture
def published() -> dict[str, Any]:
    """Results as its authors report them."""
    variants = {"v4": variant(), "v5": variant(0.0), "v6": variant(0.9), "v7": variant(0.2, 0.76),
                "v8a": variant(0.2, 0.80), "v8b": variant(0.2, 0.85),
                "splice": variant(0.9, 0.54, same_answers=[True, True]),
                "v9": variant(0.9, 0.84, same_answers=[True, True])}
    variants["v4"]["signals"]["max_softmax_mean"]["regimes"]["gibberish"] = area(0.93)
    variants["v6"]["signals"]["router_entropy"]["regimes"]["gibberish"] = area(0.9)
    variants["splice"]["abstention"]["half"] = {"in_domain": area(0.27), "gibberish": area(0.5)}
    return {"variants": variants, "between": [
        {"a": a, "b": b, "difference": area(difference), "p_holm": 0.01} for a, b, difference in
        (("v9", "v8b", -0.01), ("v8a", "v7", 0.04), ("v8b", "v8a", 0.05), ("splice", "v7", -0.22))],
        "prompts": dict.fromkeys(("in_domain", *REGIMES), 48)}


def of(found: dict[str, Any], variant: str, part: str) -> Statement:
    one, = (one for one in statements(found) if one.variant == variant and part in one.published)
    return one


def test_what_was_published_is_reproduced_by_itself(published: dict[str, Any]) -> None:
    made = statements(published)
    assert len(made) == 20 and all(one.reproduced for one in made), [
        one for one in made if not one.reproduced]


def change(found: dict[str, Any], path: str, value: Any) -> None:
    """Sets what stands under `variant.key.key…`."""
    *way, last = path.split(".")
    tree = found["variants"]
    for key in way:
        tree = tree[key]
    tree[last] = value


# Where it stands, what makes the sentence false, what makes it untold, and which sentence it is.
CASES = [
    ("v4.signals.router_entropy.cross", area(0.7), area(0.6), "v4", "near chance"),
    ("v4.signals.max_softmax_last.cross", area(0.3), area(0.4), "v4", "near chance"),
    ("v4.signals.max_softmax_mean.regimes.gibberish", area(0.8), area(0.88), "v4", "≈ 0.93"),
    ("v5.known_of_start", area(0.6), area(0.5), "v5", "destroyed"),
    ("v6.known_of_start", area(0.6), area(0.8), "v6", "survives"),
    ("v6.signals.router_entropy.regimes.ood_topic", area(0.8), area(0.6), "v6", "misleading"),
    ("v6.signals.router_entropy.regimes.gibberish", area(0.6), area(0.7), "v6", "misleading"),
    ("v7.signals.abstain_p.cross", area(0.6), area(0.71), "v7", "0.76"),
    ("v7.abstention.half.gibberish", area(0.5), area(0.83), "v7", "93 %"),
    ("v8b.abstention.half.gibberish", area(0.8), area(0.9), "v8b", "100 %"),
    ("v8b.known_of_start", area(0.9), area(0.5), "v8b", "garbled"),
    ("splice.signals.abstain_p.cross", area(0.8), area(0.6), "splice", "0.54"),
    ("splice.abstention.half.in_domain", area(0.05), area(0.17), "splice", "27 %"),
    ("splice.abstention.half.in_domain", area(1.0), area(0.37), "splice", "27 %")]


@pytest.mark.parametrize(("path", "false", "untold", "variant", "part"), CASES)
def test_what_is_otherwise_is_not_reproduced(published: dict[str, Any], path: str, false: Any, untold: Any,
                                             variant: str, part: str) -> None:
    """Its interval elsewhere, or on both sides; no other sentence changes."""
    before = [one.reproduced for one in statements(published)]
    for value, outcome in ((false, False), (untold, None)):
        change(published, path, value)
        assert of(published, variant, part).reproduced is outcome
        after = [one.reproduced for one in statements(published)]
        assert sum(a is not b for a, b in zip(before, after, strict=True)) == 1


def test_wide_intervals_tell_nothing(published: dict[str, Any]) -> None:
    """Few prompts and seeds are no evidence for anything."""
    def widen(tree: Any) -> Any:
        if isinstance(tree, dict):
            if tree.keys() == {"point", "low", "high"}:
                return area(tree["point"], 0.6)
            return {key: widen(value) for key, value in tree.items()}
        return [widen(one) for one in tree] if isinstance(tree, list) else tree
    told = {one.published: one.reproduced for one in statements(widen(published))}
    assert {text for text, outcome in told.items() if outcome is not None} == {
        "the router's signals win no regime against the baselines",
        "the router moves although metacognition weighs nothing", "generation is preserved"}


def test_what_is_decided_otherwise(published: dict[str, Any]) -> None:
    change(published, "v4.rule.verdicts", [{"signal": "router_entropy_var", "wins": ["gibberish"]}])
    assert of(published, "v4", "win no regime").reproduced is False
    change(published, "v4.rule.verdicts", [])  # a transformer
    assert of(published, "v4", "win no regime").reproduced is None
    change(published, "v8b.drift", [0.2, 1e-5])
    assert of(published, "v8b", "router moves").reproduced is False
    change(published, "splice.same_answers", [True, False])
    assert of(published, "splice", "preserved").reproduced is False
    for step in (1, 2):  # either of them
        for difference, outcome in ((-0.1, False), (0.0, None), (0.05, True)):
            published["between"][step]["difference"] = area(difference)
            assert of(published, "v8b", "less metacognition").reproduced is outcome
    published["between"][3]["difference"] = area(0.0)  # v7 is near chance itself
    assert of(published, "splice", "0.54").reproduced is None
    change(published, "v4.signals.abstain_p", {"cross": area(0.9)})  # v4 has a head
    assert of(published, "v4", "near chance").reproduced is False


def test_only_what_was_measured_is_told(published: dict[str, Any]) -> None:
    some = copy.deepcopy(published)
    for name in ("v5", "v6", "v7", "v8a", "v8b", "splice", "v9"):
        del some["variants"][name]
    assert {one.variant for one in statements(some)} == {"v4"} and answer_v9(some) == []


def test_a_v4_that_knows_little_is_no_measure(published: dict[str, Any]) -> None:
    for known, chats in ((area(0.2), False), (None, None)):
        change(published, "v4.known", known)
        assert of(published, "v5", "destroyed").reproduced is None and called(published, "v6") == (
            "not to be told")
        assert of(published, "v4", "coherent").reproduced is chats
        assert "is not to be called coherent" in " ".join(answer_v9(published))


def test_what_a_chat_is_called(published: dict[str, Any]) -> None:
    for ratio, loops, word in ((area(0.9), 0.0, "coherent"), (area(0.8), 0.0, "not to be told"),
                               (area(0.7), 0.0, "impaired"), (area(0.4), 0.0, "garbled"),
                               (area(0.9), 0.6, "garbled"), (area(0.9), 0.2, "not to be told")):
        change(published, "v6.known_of_start", ratio)
        change(published, "v6.regimes.in_domain.loops", loops)
        assert called(published, "v6") == word


def test_the_area_that_can_be_reached_at_most() -> None:
    """Against scores that are 1 of what nobody can answer, and 0 of all else."""
    prompts = {"in_domain": 5, "ood_style": 2, "long_input": 7, "gibberish": 4, "ood_topic": 1}
    unknown = [regime in ("gibberish", "ood_topic") for regime, n in prompts.items() for _ in range(n)]
    cross = [regime != "in_domain" for regime, n in prompts.items() for _ in range(n)]
    assert ceiling({"prompts": prompts}) == pytest.approx(auroc(cross, unknown))


def test_the_answer_for_v9(published: dict[str, Any]) -> None:
    texts = " ".join(answer_v9(published))
    assert "that knew all would have about 0.75 there" in texts
    assert "it stays high" in texts and "no difference that can be told" in texts
    assert "to the bit, in 2 of 2 seeds: generation **stays coherent**" in texts
    for needed, said in ((area(0.65), "above chance, and not high"), (area(0.7), "is not to be told"),
                         (area(0.51), "not told apart from chance")):
        change(published, "v9.signals.abstain_p.unanswerable", needed)
        assert said in " ".join(answer_v9(published))
    published["between"][0]["difference"] = area(-0.2)
    assert "part of the signal was in the router" in " ".join(answer_v9(published))
    published["between"][0]["p_holm"] = 0.36
    assert "p 0.360 after Holm's correction: no difference that can be told" in " ".join(answer_v9(published))
    change(published, "v9.same_answers", [True, False])
    assert "defect" in " ".join(answer_v9(published))
