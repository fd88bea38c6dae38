"""Published statements compared with synthetic results that do and do not reproduce them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tilelli_jax.eval.abstention.published_claims import (
    Statement,
    answer_v9,
    ceiling,
    chat_quality,
    statements,
)
from tilelli_jax.eval.metrics import auroc

REGIMES = ("ood_topic", "ood_style", "factual_misleading", "long_input", "neo_false_inability", "gibberish")


def interval(point: float, half_width: float = 0.02) -> dict[str, float]:
    return {"point": point, "low": point - half_width, "high": point + half_width}


def variant(accuracy: float = 0.9, head: float | None = None, ratio: float | None = None,
            **changed: Any) -> dict[str, Any]:
    names = ("max_softmax_last", "max_softmax_mean", "router_conf", "router_entropy", "router_entropy_var")
    signals = {name: {"cross_regime": interval(0.53), "unanswerable": interval(0.6),
                      "regimes": {regime: interval(0.55) for regime in REGIMES}} for name in names}
    if head is not None:
        signals["abstain_p"] = {"cross_regime": interval(head), "unanswerable": interval(head + 0.05),
                                "regimes": {}}
    rates = {"in_domain": interval(0.02), "gibberish": interval(1.0, 0.05)}
    return {"signals": signals, "closed_book_accuracy": interval(accuracy),
            "closed_book_accuracy_relative_to_v4": interval(ratio or accuracy / 0.9, 0.05),
            "closed_book_accuracy_by_seed": [accuracy, accuracy],
            "drift": [0.2, 0.3], "same_answers": [False, False],
            "regimes": {"in_domain": {"loops": 0.0}},
            "router_conf": {"in_domain": 0.6, **dict.fromkeys(REGIMES, 0.5)},
            "rule": {"verdicts": [{"signal": "router_entropy", "wins": []},
                                  {"signal": "router_entropy_var", "wins": []}]},
            "abstention": None if head is None else {"above_half": rates, "calibrated": rates}} | changed


@pytest.fixture
def published() -> dict[str, Any]:
    """Results as in Tilelli's study."""
    variants = {"v4": variant(), "v5": variant(0.0), "v6": variant(0.9), "v7": variant(0.2, 0.76),
                "v8a": variant(0.2, 0.80), "v8b": variant(0.2, 0.85),
                "splice": variant(0.9, 0.54, same_answers=[True, True]),
                "v9": variant(0.9, 0.84, same_answers=[True, True])}
    variants["v4"]["signals"]["max_softmax_mean"]["regimes"]["gibberish"] = interval(0.93)
    variants["v6"]["signals"]["router_entropy"]["regimes"]["gibberish"] = interval(0.9)
    variants["splice"]["abstention"]["above_half"] = {"in_domain": interval(0.27), "gibberish": interval(0.5)}
    return {"variants": variants, "head_comparisons": [
        {"a": a, "b": b, "difference": interval(difference), "p_holm": 0.01} for a, b, difference in
        (("v9", "v8b", -0.01), ("v8a", "v7", 0.04), ("v8b", "v8a", 0.05), ("splice", "v7", -0.22))],
        "prompts": dict.fromkeys(("in_domain", *REGIMES), 48)}


def find_statement(results: dict[str, Any], variant: str, words: str) -> Statement:
    statement, = (statement for statement in statements(results)
                  if statement.variant == variant and words in statement.published)
    return statement


def test_the_published_results_reproduce_every_statement(published: dict[str, Any]) -> None:
    checked = statements(published)
    assert len(checked) == 20 and all(statement.reproduced for statement in checked), [
        statement for statement in checked if not statement.reproduced]


def change(results: dict[str, Any], path: str, value: Any) -> None:
    """Sets the value at `variant.key.key…`."""
    *keys, last = path.split(".")
    tree = results["variants"]
    for key in keys:
        tree = tree[key]
    tree[last] = value


# Path of a value, a value that contradicts the statement, one that is inconclusive, and the statement.
CASES = [
    ("v4.signals.router_entropy.cross_regime", interval(0.7), interval(0.6), "v4", "near chance"),
    ("v4.signals.max_softmax_last.cross_regime", interval(0.3), interval(0.4), "v4", "near chance"),
    ("v4.signals.max_softmax_mean.regimes.gibberish", interval(0.8), interval(0.88), "v4", "≈ 0.93"),
    ("v5.closed_book_accuracy_relative_to_v4", interval(0.6), interval(0.5), "v5", "destroyed"),
    ("v6.closed_book_accuracy_relative_to_v4", interval(0.6), interval(0.8), "v6", "survives"),
    ("v6.signals.router_entropy.regimes.ood_topic", interval(0.8), interval(0.6), "v6", "misleading"),
    ("v6.signals.router_entropy.regimes.gibberish", interval(0.6), interval(0.7), "v6", "misleading"),
    ("v7.signals.abstain_p.cross_regime", interval(0.6), interval(0.71), "v7", "0.76"),
    ("v7.abstention.above_half.gibberish", interval(0.5), interval(0.83), "v7", "93 %"),
    ("v8b.abstention.above_half.gibberish", interval(0.8), interval(0.9), "v8b", "100 %"),
    ("v8b.closed_book_accuracy_relative_to_v4", interval(0.9), interval(0.5), "v8b", "garbled"),
    ("splice.signals.abstain_p.cross_regime", interval(0.8), interval(0.6), "splice", "0.54"),
    ("splice.abstention.above_half.in_domain", interval(0.05), interval(0.17), "splice", "27 %"),
    ("splice.abstention.above_half.in_domain", interval(1.0), interval(0.37), "splice", "27 %")]


@pytest.mark.parametrize(("path", "contradicting", "inconclusive", "variant", "words"), CASES)
def test_contradicting_and_inconclusive_results(published: dict[str, Any], path: str, contradicting: Any,
                                                inconclusive: Any, variant: str, words: str) -> None:
    """An interval that fails the criterion, or includes its limit; no other statement changes."""
    before = [statement.reproduced for statement in statements(published)]
    for value, outcome in ((contradicting, False), (inconclusive, None)):
        change(published, path, value)
        assert find_statement(published, variant, words).reproduced is outcome
        after = [statement.reproduced for statement in statements(published)]
        assert sum(a is not b for a, b in zip(before, after, strict=True)) == 1


def test_wide_intervals_are_inconclusive(published: dict[str, Any]) -> None:
    """As with few prompts and seeds."""
    def widen(tree: Any) -> Any:
        if isinstance(tree, dict):
            if tree.keys() == {"point", "low", "high"}:
                return interval(tree["point"], 0.6)
            return {key: widen(value) for key, value in tree.items()}
        return [widen(value) for value in tree] if isinstance(tree, list) else tree
    outcomes = {statement.published: statement.reproduced for statement in statements(widen(published))}
    assert {text for text, outcome in outcomes.items() if outcome is not None} == {
        "the router's signals win no regime against the baselines",
        "the router changes although router_entropy_weight is 0", "generation is preserved"}


def test_statements_without_an_interval(published: dict[str, Any]) -> None:
    change(published, "v4.rule.verdicts", [{"signal": "router_entropy_var", "wins": ["gibberish"]}])
    assert find_statement(published, "v4", "win no regime").reproduced is False
    change(published, "v4.rule.verdicts", [])  # a transformer
    assert find_statement(published, "v4", "win no regime").reproduced is None
    change(published, "v8b.drift", [0.2, 1e-5])
    assert find_statement(published, "v8b", "router changes").reproduced is False
    change(published, "splice.same_answers", [True, False])
    assert find_statement(published, "splice", "preserved").reproduced is False
    for step in (1, 2):  # each of the two steps
        for difference, outcome in ((interval(-0.1), False), (interval(0.0), None),
                                    (interval(0.0, 0.0), None), (interval(0.05), True)):
            published["head_comparisons"][step]["difference"] = difference
            assert find_statement(published, "v8b", "the lower the router_entropy").reproduced is outcome
    published["head_comparisons"][3]["difference"] = interval(0.0)  # v7 itself is near chance
    assert find_statement(published, "splice", "0.54").reproduced is None
    change(published, "v4.signals.abstain_p", {"cross_regime": interval(0.9)})  # v4 has a head
    assert find_statement(published, "v4", "near chance").reproduced is False


def test_results_and_criteria_as_text(published: dict[str, Any]) -> None:
    expected = {
        ("v7", "abstain_p is 0.76"): ("at least 0.71", "0.760 [0.740, 0.780]"),
        ("v8b", "abstains on 100 %"): ("abstain_p > 0.5 on at least 0.90", "1.000 [0.950, 1.050]"),
        ("v4", "coherent"): ("closed-book accuracy of at least 0.5, at most 0.1 loops",
                             "0.900 [0.880, 0.920], loops 0"),
        ("v4", "win no regime"): ("no win by the rule", "most wins 0"),
        ("v8b", "router changes"): ("KL of the routing at least 0.001 nats in every seed", "lowest 0.2"),
        ("splice", "0.54"): ("at most 0.6, and below v7's",
                             "0.540 [0.520, 0.560], splice − v7 −0.220 [−0.240, −0.200]")}
    for (variant, words), texts in expected.items():
        statement = find_statement(published, variant, words)
        assert (statement.criterion, statement.result) == texts
    assert [statement.variant for statement in statements(published)] == [
        *["v4"] * 4, "v5", *["v6"] * 2, *["v7"] * 3, *["v8a"] * 2, *["v8b"] * 5, *["splice"] * 3]


def test_what_was_not_measured_is_inconclusive(published: dict[str, Any]) -> None:
    """Custom prompts may lack a regime; without a rule there are no wins."""
    del published["variants"]["v7"]["abstention"]["above_half"]["gibberish"]
    published["variants"]["v4"]["rule"] = None
    change(published, "v4.closed_book_accuracy", None)
    for variant, words, reason in (("v7", "93 %", "not measured"), ("v4", "win no regime", "not measured"),
                                   ("v4", "coherent", "the prompts have no such answers")):
        statement = find_statement(published, variant, words)
        assert statement.reproduced is None and reason in statement.result


def test_statements_about_missing_variants_are_left_out(published: dict[str, Any]) -> None:
    results = copy.deepcopy(published)
    for name in ("v5", "v6", "v7", "v8a", "v8b", "splice", "v9"):
        del results["variants"][name]
    assert {statement.variant for statement in statements(results)} == {"v4"} and answer_v9(results) == []


def test_a_v4_with_low_accuracy_is_no_reference(published: dict[str, Any]) -> None:
    for accuracy, chats in ((interval(0.2), False), (None, None)):
        change(published, "v4.closed_book_accuracy", accuracy)
        assert find_statement(published, "v5", "destroyed").reproduced is None
        assert chat_quality(published, "v6") == "inconclusive"
        assert find_statement(published, "v4", "coherent").reproduced is chats
        assert "does not count as coherent" in " ".join(answer_v9(published))


@pytest.mark.parametrize(("wins", "most", "reproduced"), [
    ((), 0, True), (("gibberish", "ood_topic"), 2, False)])
def test_the_signal_with_the_most_wins_counts(published: dict[str, Any], wins: tuple[str, ...], most: int,
                                              reproduced: bool) -> None:
    change(published, "v4.rule.verdicts", [
        {"signal": "router_entropy", "wins": list(wins)}, {"signal": "router_entropy_var", "wins": []},
        {"signal": "max_softmax_last", "wins": ["gibberish"] * 5}])  # not the router's
    statement = find_statement(published, "v4", "win no regime")
    assert statement.result == f"most wins {most}" and statement.reproduced is reproduced


def test_the_lowest_value_of_the_seeds_counts(published: dict[str, Any]) -> None:
    change(published, "v8b.drift", [0.2, 0.0005])
    statement = find_statement(published, "v8b", "the router changes")
    assert statement.result == "lowest 0.0005" and statement.reproduced is False


def test_chat_quality(published: dict[str, Any]) -> None:
    for ratio, loops, word in ((interval(0.9), 0.0, "coherent"), (interval(0.8), 0.0, "inconclusive"),
                               (interval(0.7), 0.0, "impaired"), (interval(0.4), 0.0, "garbled"),
                               (interval(0.9), 0.6, "garbled"), (interval(0.9), 0.2, "inconclusive")):
        change(published, "v6.closed_book_accuracy_relative_to_v4", ratio)
        change(published, "v6.regimes.in_domain.loops", loops)
        assert chat_quality(published, "v6") == word


def test_ceiling_of_the_cross_regime_auroc() -> None:
    """Against scores that are 1 on unanswerable prompts and 0 on all others."""
    prompts = {"in_domain": 5, "ood_style": 2, "long_input": 7, "gibberish": 4, "ood_topic": 1}
    unknown = [regime in ("gibberish", "ood_topic") for regime, n in prompts.items() for _ in range(n)]
    cross = [regime != "in_domain" for regime, n in prompts.items() for _ in range(n)]
    assert ceiling({"prompts": prompts}) == pytest.approx(auroc(cross, unknown))


def test_the_answer_for_v9(published: dict[str, Any]) -> None:
    texts = " ".join(answer_v9(published))
    assert "a perfect head would reach about 0.75" in texts
    assert "it stays high" in texts
    assert "difference is not significant (bootstrap p 0.010 after Holm's correction; the interval" in texts
    assert "identical to v4's in 2 of 2 seeds: generation **stays coherent**" in texts
    for value, words in ((interval(0.65), "above chance, but not high"),
                         (interval(0.7), "is **inconclusive**"),
                         (interval(0.51), "not significantly above chance")):
        change(published, "v9.signals.abstain_p.unanswerable", value)
        assert words in " ".join(answer_v9(published))
    published["head_comparisons"][0]["difference"] = interval(-0.2)
    assert "part of the signal was in the router" in " ".join(answer_v9(published))
    published["head_comparisons"][0]["p_holm"] = 0.36
    assert ("the difference is inconclusive: its interval, which is not corrected, excludes 0, but bootstrap "
            "p 0.360 after Holm's correction is not below 0.05") in " ".join(answer_v9(published))
    published["head_comparisons"][0]["p_holm"] = None  # all replicates are equal
    assert ("the difference is inconclusive: its interval excludes 0, but the bootstrap p is "
            "undefined") in " ".join(answer_v9(published))
    change(published, "v9.same_answers", [True, False])
    assert "defect" in " ".join(answer_v9(published))
