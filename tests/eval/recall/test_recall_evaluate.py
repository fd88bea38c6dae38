"""Evaluation of scores on synthetic tables: comparisons, popularity bins, verdicts, scopes, conclusions."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from tests.error_lines import assert_one_line
from tilelli_jax.errors import InputError
from tilelli_jax.eval.conclusions import FEW, compare_with_chance
from tilelli_jax.eval.estimators import panel
from tilelli_jax.eval.estimators.table import QuestionTable
from tilelli_jax.eval.inputs.networks import NetworkConfig
from tilelli_jax.eval.recall import evaluate, labelling, report, report_rows, scores, sentences, verdicts
from tilelli_jax.eval.recall.config import (
    FitConfig,
    QuestionsConfig,
    RecallConfig,
    SplitConfig,
    VerdictConfig,
)
from tilelli_jax.eval.recall.questions import Question
from tilelli_jax.eval.recall.scores import Methods, Scores
from tilelli_jax.eval.recall.verdicts import VerdictRule
from tilelli_jax.eval.stats import Interval
from tilelli_jax.eval.tables import json_with_nulls

N = 400


def table(seed: int = 0, **changed: np.ndarray) -> QuestionTable:
    """Two data sets; popularity is known for one of them."""
    rng = np.random.default_rng(seed)
    dataset = np.array(["x/a", "b"])[np.arange(N) % 2]
    columns = {"known": rng.integers(0, 2, N), "refused": np.zeros(N, bool),
            "split": np.array(["train", "validate", "calibrate", "test", "test"])[np.arange(N) % 5],
            "group": np.arange(N), "dataset": dataset,
            "popularity": np.where(dataset == "b", rng.integers(0, 1000, N), np.nan)} | changed
    return QuestionTable(rng.random((N, 3, 12)), rng.random((N, 10)), rng.random((N, 3, 3)),
                 category=np.full(N, ""), answers=[[f"answer {i}"] for i in range(N)],
                 text=np.array([f"question {i}" for i in range(N)]),
                 answer=np.array([f"answer {i}" for i in range(N)]), **columns)  # type: ignore[arg-type]


def methods_of(data: QuestionTable, seed: int = 1) -> Methods:
    """A sidecar with two runs, a weaker method, and a method that scores data set b only."""
    rng = np.random.default_rng(seed)
    def method(signal: float, runs: int = 1) -> Scores:
        log_odds = signal * data.known + rng.standard_normal((runs, N))
        return Scores(log_odds, expit(log_odds))
    popularity = np.log10(data.popularity + 1)[None]
    return {"sidecar": method(2.0, 2), "first_token_entropy": method(0.5),
            "popularity": Scores(popularity, expit(popularity))}


def test_methods_are_compared_with_the_sidecar_where_they_have_scores() -> None:
    data = table()
    methods, test = methods_of(data), data.rows("test")
    result = evaluate.compare(data, methods, test, 200, 0)
    scored = test[data.dataset[test] == "b"]
    assert result["methods"]["sidecar"]["questions"] == len(test) == 160
    assert result["methods"]["popularity"]["questions"] == len(scored) == 80
    assert result["methods"]["popularity"]["auroc"].point == pytest.approx(
        roc_auc_score(data.known[scored], methods["popularity"].scores[0, scored]))
    comparisons = {comparison["baseline"]: comparison for comparison in result["comparisons"]}
    assert comparisons["popularity"]["difference"].point == pytest.approx(
        np.mean([roc_auc_score(data.known[scored], run[scored]) for run in methods["sidecar"].scores])
        - result["methods"]["popularity"]["auroc"].point)
    assert comparisons["popularity"]["p_holm"] >= comparisons["popularity"]["p"]
    few = evaluate.compare(data, methods, test[:12], 200, 0)
    assert few["methods"] == {} and few["questions"] == 12, "too few known or unknown questions"


def test_log_oddsare_read_as_written(tmp_path: Path) -> None:
    data = table()
    scopes = {None: methods_of(data, 1), "x/a": methods_of(data, 2),
              "x/b": {"sidecar": methods_of(data, 3)["sidecar"]}}
    scores.write(tmp_path, scopes)
    loaded = scores.read(tmp_path)
    assert list(loaded) == [None, "x/a", "x/b"] and list(loaded["x/a"]) == list(scopes["x/a"])
    for scope, methods in scopes.items():
        for name, expected in methods.items():
            np.testing.assert_array_equal(loaded[scope][name].scores, expected.scores)
            np.testing.assert_array_equal(loaded[scope][name].probabilities, expected.probabilities)


def test_cross_dataset_excludes_shared_groups() -> None:
    group = table().group.copy()
    group[1] = group[0]  # a question of b, in a group with one of x/a
    data = table(group=group)
    results = evaluate.cross_dataset(data, {None: methods_of(data), "x/a": methods_of(data, 2)}, 200, 0)
    assert list(results) == ["x/a → b"] and results["x/a → b"]["questions"] == N // 2 - 1
    linked = table(group=np.arange(N) // 2)
    results = evaluate.cross_dataset(linked, {"x/a": methods_of(linked, 2)}, 200, 0)
    assert results["x/a → b"] == {"questions": 0, "known": None, "groups": 0, "methods": {},
                                  "comparisons": []}


def test_within_categories_a_score_of_the_category_is_chance() -> None:
    """Categories differ in their fraction of known questions; one method knows only that."""
    rng = np.random.default_rng(0)
    category = np.array(["p", "q", "r"])[np.arange(N) % 3]
    known = (rng.random(N) < np.array([0.8, 0.5, 0.2])[np.arange(N) % 3]).astype(int)
    data = dataclasses.replace(table(known=known), category=category)
    of_category = np.array([2.0, 0.0, -2.0])[np.arange(N) % 3][None]
    methods = methods_of(data) | {"category": Scores(of_category, expit(of_category))}
    test = data.rows("test")
    overall = evaluate.compare(data, methods, test, 200, 0)["methods"]
    result = evaluate.within_category(data, methods, test, 200, 0, "first_token_entropy")
    assert overall["category"]["auroc"].point > 0.65
    assert tuple(result["methods"]["category"]["auroc"]) == (0.5, 0.5, 0.5)
    score = methods["sidecar"].scores[:, test]
    pairs = [(i, j) for i in range(len(test)) for j in range(len(test)) if known[test[i]] > known[test[j]]
             and category[test[i]] == category[test[j]]]
    assert result["methods"]["sidecar"]["auroc"].point == pytest.approx(
        np.mean([run[i] > run[j] for run in score for i, j in pairs]))
    assert set(result["methods"]["sidecar"]) == {"questions", "auroc"}
    assert [comparison["baseline"] for comparison in result["comparisons_with_free"]].count("category") == 1
    # In the report.
    results = {"within_category": json.loads(json_with_nulls(result)), "free": "first_token_entropy"}
    rows = report_rows.within_category_rows(results)
    assert rows[0]["method"] == "sidecar" and rows[0]["AUROC within"].point > 0.8
    text, = sentences._within_category_sentences(results)
    assert "better than chance. That of the best free score, first_token_entropy, is 0." in text
    assert evaluate.within_category(table(), methods, test, 200, 0, None) is None, "there are no categories"


def test_many_comparisons_are_summarised() -> None:
    names = {"a": (0.2, 0.01), "b": (-0.2, 0.01), "c": (0.2, 0.3), "d": (0.1, 0.02), "e": (0.1, None)}
    texts = sentences._summary_of_comparisons([
        {"baseline": name, "groups": 60, "p_holm": p, "difference": {"point": point}}
        for name, (point, p) in names.items()])
    assert [text.partition(" (")[0] for text in texts] == [
        "The sidecar is significantly better than a, d", "The sidecar is significantly worse than b",
        "The sidecar is not significantly different from c, e"]


def test_bins_of_popularity() -> None:
    data = table()
    methods, rows = methods_of(data), np.flatnonzero(data.dataset == "b")
    bins = evaluate.by_popularity(data, methods, rows, 200, 0)
    assert [result["questions"] for result in bins] == [50] * 4
    assert all(a["to"] <= b["from"] for a, b in itertools.pairwise(bins))
    assert all("sidecar" in result["methods"] and "popularity" in result["methods"] for result in bins)
    assert evaluate.by_popularity(data, methods, np.flatnonzero(data.dataset == "x/a"), 200, 0) == []
    few = evaluate.by_popularity(data, methods, rows[:20], 200, 0)
    assert sum(result["questions"] for result in few) == 20
    assert not any("methods" in result for result in few)


def test_precision_of_verdicts() -> None:
    known = np.array([1, 1, 1, 0, 0, 0, 1])
    given = ["likely knows"] * 4 + ["likely beyond its knowledge"] * 2 + ["uncertain"]
    results = evaluate.verdict_precision(known, np.arange(7), given, 200, 0)  # type: ignore[arg-type]
    assert results["likely knows"]["precision"].point == 0.75 and results["uncertain"]["precision"] is None
    beyond = results["likely beyond its knowledge"]
    assert beyond["precision"].point == 1.0 and beyond["precision"].low == pytest.approx(0.025**0.5)
    assert (beyond["questions"], beyond["known"], results["uncertain"]["known"]) == (2, 0.0, 1.0)
    without = evaluate.verdict_precision(known, np.arange(7), [None] * 7, 200, 0)
    assert all(result["questions"] == 0 for result in without.values())


def test_a_guarantee_uses_one_question_of_each_group() -> None:
    rng = np.random.default_rng(0)
    log_odds = np.repeat(rng.uniform(-4, 4, 300), 5)
    known = (np.repeat(rng.random(300), 5) < expit(2 * log_odds)).astype(int)
    group = np.repeat(np.arange(300), 5)
    options = VerdictConfig(precision=0.85, guarantee=True, confidence=0.9)
    guaranteed = verdicts.thresholds(known, log_odds, group, options)
    single = verdicts.thresholds(known[::5], log_odds[::5], group[::5], options)
    assert guaranteed == single and guaranteed.knows_from is not None and guaranteed.unknown_below is not None
    plain = verdicts.thresholds(known, log_odds, group, VerdictConfig(precision=0.85))
    assert plain.knows_from is not None
    assert plain.knows_from < guaranteed.knows_from, "a guarantee is stricter"
    with pytest.raises(InputError, match=r"verdict.guarantee: expected false with split.by published"):
        RecallConfig(network=NetworkConfig(path="x"), split=SplitConfig(by="published"), verdict=options)


def test_published_splits_calibrate_on_validate() -> None:
    known = np.random.default_rng(0).integers(0, 2, 100)
    datasets = ["popqa", "triviaqa"] * 50
    options = SplitConfig(by="published", validate=0.15, test=0.15)
    split = labelling.assign_splits(np.arange(100), datasets, known, options)
    assert set(split) == {"train", "validate", "test"} and (split == "test").sum() in range(13, 18)
    data = table(split=np.resize(split, N))
    assert data.calibrated_on == "validate"
    np.testing.assert_array_equal(data.rows("calibrate"), data.rows("validate"))


def test_labels_and_refusals() -> None:
    correct = ["Paris", "Unknown", "Rome", *["x"] * 51]
    asked = [Question(str(i), "d", f"{i}?", (text,), "e" if i < 3 else None)
             for i, text in enumerate(correct)]
    answers = ["It is Paris", "Unknown", "I don't know", *["x"] * 51]
    columns = labelling.label(asked, answers, "strict", SplitConfig())
    assert columns["known"][:3].tolist() == [1, 1, 0] and columns["refused"][:3] == [False, False, True]
    assert columns["answers"][0] == '["Paris"]' and len(set(columns["group"][:3].tolist())) == 1


@pytest.mark.parametrize(("point", "low", "high", "groups"), [
    (0.7, 0.6, 0.8, 100), (0.55, 0.45, 0.65, 100), (0.3, 0.2, 0.4, 100), (0.7, 0.6, 0.8, FEW - 1)])
@pytest.mark.parametrize(("p_holm", "p_text"), [
    (0.01, "p = 0.010"), (0.0002, "p < 0.001"), (0.3, "p = 0.300"), (None, "p is undefined")])
def test_conclusions_claim_no_more_than_the_numbers(point: float, low: float, high: float, groups: int,
                                                    p_holm: float | None, p_text: str) -> None:
    interval = {"point": point, "low": low, "high": high}
    results = {"groups": groups,
               "methods": {"sidecar": {"auroc": interval, "runs": [point], "ece": interval,
                                       "ece_if_calibrated": 0.03},
                           "first_token_entropy": {"auroc": interval}},
               "comparisons": [{"baseline": "first_token_entropy", "difference": interval, "p_holm": p_holm,
                                "groups": groups}],
               "within_category": None, "free": None,
               "cross_dataset": {"a → b": {"questions": 9, "groups": 9, "methods": {}}},
               "fit": {"excluded_datasets": {"c": "few"}}, "warnings": ["The train split is small."]}
    texts = sentences.conclusions(results)
    versus_chance, comparison = texts[0], next(text for text in texts if "Holm-" in text)
    assert f"paired bootstrap, Holm-corrected {p_text}: " in comparison
    assert ("(interval not corrected)" in comparison) is (p_holm in (0.3, None) or groups < FEW)
    assert any("Intervals are not corrected for the number of comparisons; p-values are" in text
               for text in texts)
    assert "The train split is small." in texts
    if groups < FEW:
        reason = f"inconclusive, because these questions form only {groups} groups, and with fewer than {FEW}"
        assert f"one seed): {reason}" in versus_chance and reason in comparison
        assert "significant" not in " ".join(texts)
    else:
        area = Interval(point, low, high)
        assert f"one seed): {compare_with_chance(area, groups)}." in versus_chance
        assert comparison.partition(f"{p_text}: ")[2].startswith(
            "inconclusive" if p_holm is None else "the sidecar is significantly better" if p_holm < 0.05 else
            "the difference is not significant")
    assert ("is worse than chance" in comparison) == (high < 0.5)
    assert any("(a → b): inconclusive, because the 9 questions" in text for text in texts)
    assert "No method is trained on c alone: few." in texts


def test_every_significant_comparison_has_a_sentence() -> None:
    interval = {"point": 0.7, "low": 0.6, "high": 0.8}
    p_holm = {"first_token_entropy": 0.9, "popularity": 0.02, "length": 0.3, "mahalanobis": 0.001}
    results = {"groups": 60, "methods": {name: {"auroc": interval, "runs": [0.7], "ece": interval,
                                                "ece_if_calibrated": 0.03} for name in ("sidecar", *p_holm)},
               "comparisons": [{"baseline": name, "p_holm": p, "groups": 60,
                                "difference": {"point": -0.068, "low": -0.121, "high": -0.02}}
                               for name, p in p_holm.items()],
               "within_category": None, "free": None, "cross_dataset": {}, "fit": {}, "warnings": []}
    compared = [text for text in sentences.conclusions(results) if "Holm-corrected" in text]
    assert compared[1] == ("Sidecar minus popularity: ΔAUROC −0.068 [−0.121, "
                           "−0.020], paired bootstrap, Holm-corrected p = 0.020: the sidecar is "
                           "significantly worse.")
    assert [name in text for name, text in zip(("entropy", "popularity", "mahalanobis"), compared)] == 3 * [
        True] and len(compared) == 3, "significant ones, and the negative entropy in any case"
    assert set(panel.MEANINGS) == set(report.STYLE_ORDER) == set(panel.ESTIMATORS)


def test_the_methods_of_a_report_are_described_with_their_papers() -> None:
    rows = report._method_descriptions(["consistency", "words", "sidecar"])
    assert [row["method"] for row in rows] == ["sidecar", "consistency", "words"]
    assert rows[0]["what it is"].startswith("a GRU") and rows[0]["learns from"] == "labels"
    assert rows[1] == {"method": "consistency", "what it is": panel.MEANINGS["consistency"],
                       "reads": "samples", "learns from": "nothing",
                       "source": "Wang et al. 2023, arXiv:2203.11171"}
    assert not any(text.startswith(("the same", "as ")) for text in panel.MEANINGS.values())


def test_invalid_settings() -> None:
    for bad, message in (({"c_values": (float("nan"),)}, "c_values: expected at least one finite number"),
                         ({"c_values": (float("inf"),)}, r"found \[inf\]"), ({"seeds": ()}, r"found \[\]"),
                         ({"seeds": (2**32,)}, "seeds: expected at least one integer from 0 to"),
                         ({"seeds": (1, 1)}, r"found \[1, 1\]")):
        with pytest.raises(InputError, match=message):
            FitConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="facts_people: expected a multiple of 60, found 70"):
        QuestionsConfig(sources=("facts",), facts_people=70)
    with pytest.raises(InputError, match="found path 'x' and train 'y'"):
        NetworkConfig(path="x", train="y")


@pytest.mark.parametrize(("change", "message"), [
    ({"network": {"name": "x", "n_layers": 3}}, "network: expected its name, fingerprint and n_layers, or "),
    ({"network": {"name": "x", "fingerprint": "y", "n_layers": "3"}},
     "network: expected its name, fingerprint "),
    ({"network": 3}, "cannot be read: "),
    ({"aim": {"precision": "high"}}, "aim: expected numbers under precision"),
    ({"knows_from": "0.5"}, "knows_from: expected a probability or null, found '0.5'"),
    ({"unknown_below": 10**400}, "unknown_below: expected a probability or null, found 1000"),
    ({"knows_from": [1]}, "knows_from: expected a probability or null, found [1]")])
def test_an_edited_verdict_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    verdicts.write(tmp_path, VerdictRule(network={"name": "x", "fingerprint": "y", "n_layers": 3}))
    assert verdicts.read(tmp_path).network["n_layers"] == 3
    tree = json.loads((tmp_path / verdicts.FILE).read_text())
    (tmp_path / verdicts.FILE).write_text(json.dumps(tree | change))
    with pytest.raises(InputError) as caught:
        verdicts.read(tmp_path)
    assert_one_line(f"error: {caught.value}\n", str(tmp_path / verdicts.FILE), message)


def test_an_incomplete_verdict_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text('{"calibrator": {"kind": "platt", "slope": 1, "intercept": 0}}')
    with pytest.raises(InputError, match=r"verdict.json: knows_from: expected .* found nothing"):
        verdicts.read(tmp_path)


def test_examples_are_evenly_spaced_and_keep_their_rows() -> None:
    data = table()
    rows = data.rows("test")
    log_odds = np.random.default_rng(3).standard_normal(len(rows))
    probabilities = 1 / (1 + np.exp(-log_odds))
    examples = evaluate.examples(data, rows, log_odds, probabilities,
                                 VerdictRule(knows_from=0.6, unknown_below=0.4))
    assert len(examples) == evaluate.N_EXAMPLES
    p = [example["p"] for example in examples]
    assert p == sorted(p, reverse=True) and (p[0], p[-1]) == (probabilities.max(), probabilities.min())
    for example in examples:
        row = rows[int(np.argmin(np.abs(probabilities - example["p"])))]
        assert (example["question"], example["answer"]) == (f"question {row}", f"answer {row}")
        assert example["correct"] == bool(data.known[row])
        assert example["verdict"] == ("likely knows" if example["p"] >= 0.6 else
                                      "likely beyond its knowledge" if example["p"] < 0.4 else "uncertain")
    few = evaluate.examples(data, rows[:3], log_odds[:3], probabilities[:3], VerdictRule())
    assert len(few) == 3 and {example["verdict"] for example in few} == {None}
