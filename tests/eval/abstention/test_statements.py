"""Published sentences held against made-up results that do and do not bear them out."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from eval.abstention.statements import Statement, answer_v9, called, coherence, statements

REGIMES = ("ood_topic", "ood_style", "factual_misleading", "long_input", "neo_false_inability", "gibberish")


def area(point: float, half: float = 0.02) -> dict[str, float]:
    return {"point": point, "low": point - half, "high": point + half}


def variant(right: float = 0.9, head: float | None = None, **changed: Any) -> dict[str, Any]:
    signals = {name: {"cross": area(0.53), "needed": area(0.6),
                      "regimes": {one: area(0.55) for one in REGIMES}}
               for name in ("max_softmax_last", "max_softmax_mean", "router_entropy", "router_entropy_var")}
    if head is not None:
        signals["abstain_p"] = {"cross": area(head), "needed": area(head), "regimes": {}}
    shares = {"in_domain": area(0.02), "gibberish": area(0.97, 0.03)}
    return {"signals": signals, "right_runs": [right, right], "drift": [0.2, 0.3],
            "same_answers": [False, False],
            "rule": {"verdicts": [{"signal": "router_entropy", "wins": []},
                                  {"signal": "router_entropy_var", "wins": []}]},
            "abstention": None if head is None else {"half": shares, "calibrated": shares}} | changed


@pytest.fixture
def published() -> dict[str, Any]:
    """Results as its authors report them."""
    variants = {"v4": variant(), "v5": variant(0.0), "v6": variant(0.85), "v7": variant(0.2, 0.76),
                "v8a": variant(0.2, 0.80), "v8b": variant(0.2, 0.85), "splice": variant(0.9, 0.54),
                "v9": variant(0.9, 0.84, same_answers=[True, True])}
    variants["v4"]["signals"]["max_softmax_mean"]["regimes"]["gibberish"] = area(0.93)
    variants["v6"]["signals"]["router_entropy"]["regimes"]["gibberish"] = area(0.9)
    variants["splice"]["abstention"]["half"] = {"in_domain": area(0.27), "gibberish": area(0.5)}
    return {"variants": variants, "between": [
        {"a": "v9", "b": "v8b", "difference": {"point": -0.01, "low": -0.03, "high": 0.01}}]}


def of(found: dict[str, Any], variant: str, part: str) -> Statement:
    one, = (one for one in statements(found) if one.variant == variant and part in one.published)
    return one


def test_what_was_published_is_reproduced_by_itself(published: dict[str, Any]) -> None:
    made = statements(published)
    assert len(made) == 18 and all(one.reproduced for one in made), [
        one for one in made if not one.reproduced]


@pytest.mark.parametrize(("change", "variant", "part"), [
    (lambda v: v["v4"]["signals"]["router_entropy"].update(cross=area(0.7)), "v4", "near chance"),
    (lambda v: v["v4"]["signals"]["router_entropy"].update(cross=area(0.3)), "v4", "near chance"),
    (lambda v: v["v4"]["signals"]["max_softmax_mean"]["regimes"].update(gibberish=area(0.8)), "v4", "≈ 0.93"),
    (lambda v: v["v4"]["rule"]["verdicts"][1].update(wins=["gibberish"]), "v4", "win no regime"),
    (lambda v: v["v5"].update(right_runs=[0.6]), "v5", "destroyed"),
    (lambda v: v["v6"].update(right_runs=[0.6]), "v6", "survives"),
    (lambda v: v["v6"]["signals"]["router_entropy"]["regimes"].update(ood_topic=area(0.8)), "v6",
     "misleading"),
    (lambda v: v["v6"]["signals"]["router_entropy"]["regimes"].update(gibberish=area(0.6)), "v6",
     "misleading"),
    (lambda v: v["v7"]["signals"]["abstain_p"].update(cross=area(0.6)), "v7", "0.76"),
    (lambda v: v["v7"]["abstention"]["half"].update(gibberish=area(0.5)), "v7", "93 %"),
    (lambda v: v["v8b"].update(right_runs=[0.9]), "v8b", "garbled"),
    (lambda v: v["v8a"]["signals"]["abstain_p"].update(cross=area(0.9)), "v8b", "less metacognition"),
    (lambda v: v["v8b"].update(drift=[0.2, 1e-5]), "v8b", "router moves"),
    (lambda v: v["splice"]["signals"]["abstain_p"].update(cross=area(0.8)), "splice", "0.54"),
    (lambda v: v["splice"]["abstention"]["half"].update(in_domain=area(0.05)), "splice", "27 %"),
])
def test_what_is_otherwise_is_not_reproduced(published: dict[str, Any], change: Any, variant: str,
                                             part: str) -> None:
    before = {(one.variant, one.published): one.reproduced for one in statements(published)}
    change(published["variants"])
    assert of(published, variant, part).reproduced is False
    after = {(one.variant, one.published): one.reproduced for one in statements(published)}
    assert sum(before[key] != after[key] for key in before) == 1


def test_only_what_was_measured_is_told(published: dict[str, Any]) -> None:
    some = copy.deepcopy(published)
    for name in ("v5", "v6", "v7", "v8a", "v8b", "splice", "v9"):
        del some["variants"][name]
    assert {one.variant for one in statements(some)} == {"v4"} and answer_v9(some) == []
    some["variants"]["v5"] = variant(0.0)
    some["variants"]["v4"]["rule"]["verdicts"] = []  # a transformer
    assert of(some, "v4", "win no regime").reproduced is None
    some["variants"]["v4"]["right_runs"] = [0.0]
    assert coherence(some, "v5") is None and of(some, "v5", "destroyed").reproduced is None
    assert [called(share) for share in (None, 0.79, 0.8, 0.5, 0.49)] == [
        "not to be told", "impaired", "coherent", "impaired", "garbled"]


def test_the_answer_for_v9(published: dict[str, Any]) -> None:
    texts = " ".join(answer_v9(published))
    assert "it stays high" in texts and "no difference that can be told" in texts
    assert "to the bit, in 2 of 2 seeds" in texts
    head = published["variants"]["v9"]["signals"]["abstain_p"]
    for cross, said in ((area(0.65), "above chance, and not high"),
                        (area(0.51), "not told apart from chance")):
        head["cross"] = cross
        assert said in " ".join(answer_v9(published))
    published["between"][0]["difference"] = {"point": -0.2, "low": -0.3, "high": -0.1}
    assert "part of the signal was in the router" in " ".join(answer_v9(published))
    published["variants"]["v9"]["same_answers"] = [True, False]
    assert "defect" in " ".join(answer_v9(published))
