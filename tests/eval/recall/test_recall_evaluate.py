"""What scores come to, by hand on made-up tables: who is heard, slices, verdicts, scopes, sentences."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from tilelli_jax.eval.inputs.networks import NetworkConfig
from tilelli_jax.eval.recall import evaluate, labelling, report, scores, verdicts
from tilelli_jax.eval.recall.config import (
    FitConfig,
    QuestionsConfig,
    RecallConfig,
    SplitConfig,
    VerdictConfig,
)
from tilelli_jax.eval.recall.questions import Question
from tilelli_jax.eval.recall.scores import Methods, Scores
from tilelli_jax.eval.recall.table import Table
from tilelli_jax.eval.recall.verdicts import VerdictRule

from tests.refusals import assert_one_line
from tilelli_jax.errors import InputError

N = 400


def table(seed: int = 0, **changed: np.ndarray) -> Table:
    """Two data sets; popularity of one of them only."""
    rng = np.random.default_rng(seed)
    dataset = np.array(["x/a", "b"])[np.arange(N) % 2]
    made = {"known": rng.integers(0, 2, N), "refused": np.zeros(N, bool),
            "part": np.array(["train", "validate", "calibrate", "test", "test"])[np.arange(N) % 5],
            "group": np.arange(N), "dataset": dataset,
            "popularity": np.where(dataset == "b", rng.integers(0, 1000, N), np.nan)} | changed
    return Table(rng.random((N, 3, 12)), rng.random((N, 10)), rng.random((N, 3, 3)), None, None,
                 text=np.array([f"question {i}" for i in range(N)]),
                 answer=np.array([f"answer {i}" for i in range(N)]), **made)  # type: ignore[arg-type]


def said(of: Table, seed: int = 1) -> Methods:
    """A sidecar of two runs that knows something, a rival that knows less, and one heard of data set b."""
    rng = np.random.default_rng(seed)
    def method(signal: float, runs: int = 1) -> Scores:
        found = signal * of.known + rng.standard_normal((runs, N))
        return Scores(found, expit(found))
    popularity = np.log10(of.popularity + 1)[None]
    return {"sidecar": method(2.0, 2), "negative entropy": method(0.5),
            "popularity": Scores(popularity, expit(popularity))}


def test_a_method_is_held_against_the_sidecar_where_it_is_heard() -> None:
    of = table()
    methods, test = said(of), of.rows("test")
    told = evaluate.compared(of, methods, test, 200, 0)
    heard = test[of.dataset[test] == "b"]
    assert told["methods"]["sidecar"]["questions"] == len(test) == 160
    assert told["methods"]["popularity"]["questions"] == len(heard) == 80
    assert told["methods"]["popularity"]["auroc"].point == pytest.approx(
        roc_auc_score(of.known[heard], methods["popularity"].scores[0, heard]))
    against = {one["against"]: one for one in told["comparisons"]}
    assert against["popularity"]["difference"].point == pytest.approx(
        np.mean([roc_auc_score(of.known[heard], run[heard]) for run in methods["sidecar"].scores])
        - told["methods"]["popularity"]["auroc"].point)
    assert against["popularity"]["p_holm"] >= against["popularity"]["p"]
    few = evaluate.compared(of, methods, test[:12], 200, 0)
    assert few["methods"] == {} and few["questions"] == 12, "too few of a kind: nothing is told"


def test_scopes_of_any_name_stay_apart(tmp_path: Path) -> None:
    of = table()
    found = {None: said(of, 1), "x/a": said(of, 2), "x/b": {"sidecar": said(of, 3)["sidecar"]}}
    scores.write(tmp_path, found)
    again = scores.read(tmp_path)
    assert list(again) == [None, "x/a", "x/b"] and list(again["x/a"]) == list(found["x/a"])
    for scope, methods in found.items():
        for name, one in methods.items():
            np.testing.assert_array_equal(again[scope][name].scores, one.scores)
            np.testing.assert_array_equal(again[scope][name].probabilities, one.probabilities)


def test_from_one_data_set_to_another_without_common_groups() -> None:
    of = table()
    group = of.group.copy()
    group[1] = group[0]  # a question of b, in a group with one of x/a
    of = table(group=group)
    told = evaluate.crossed(of, {None: said(of), "x/a": said(of, 2)}, 200, 0)
    assert list(told) == ["x/a → b"] and told["x/a → b"]["questions"] == N // 2 - 1
    linked = table(group=np.arange(N) // 2)
    told = evaluate.crossed(linked, {"x/a": said(linked, 2)}, 200, 0)
    assert told["x/a → b"] == {"questions": 0, "known": None, "groups": 0, "methods": {}, "comparisons": []}


def test_slices_of_popularity() -> None:
    of = table()
    rows = np.flatnonzero(of.dataset == "b")
    found = evaluate.slices(of, said(of), rows, 200, 0)
    assert [one["questions"] for one in found] == [50] * 4
    assert all(a["to"] <= b["from"] for a, b in itertools.pairwise(found))
    assert all("sidecar" in one["methods"] and "popularity" in one["methods"] for one in found)
    assert evaluate.slices(of, said(of), np.flatnonzero(of.dataset == "x/a"), 200, 0) == []
    few = evaluate.slices(of, said(of), rows[:20], 200, 0)
    assert sum(one["questions"] for one in few) == 20 and not any("methods" in one for one in few)


def test_verdicts_by_hand() -> None:
    known = np.array([1, 1, 1, 0, 0, 0, 1])
    words = ["likely knows"] * 4 + ["likely beyond its knowledge"] * 2 + ["uncertain"]
    found = evaluate.verdicts(known, np.arange(7), words, 200, 0)  # type: ignore[arg-type]
    assert found["likely knows"]["precision"].point == 0.75 and found["uncertain"]["precision"] is None
    beyond = found["likely beyond its knowledge"]
    assert beyond["precision"].point == 1.0 and beyond["precision"].low == pytest.approx(0.025**0.5)
    assert (beyond["questions"], beyond["known"], found["uncertain"]["known"]) == (2, 0.0, 1.0)
    silent = evaluate.verdicts(known, np.arange(7), [None] * 7, 200, 0)
    assert all(one["questions"] == 0 for one in silent.values())


def test_a_guarantee_hears_one_of_each_group() -> None:
    rng = np.random.default_rng(0)
    scores_ = np.repeat(rng.uniform(-4, 4, 300), 5)
    known = (np.repeat(rng.random(300), 5) < expit(2 * scores_)).astype(int)
    group = np.repeat(np.arange(300), 5)
    options = VerdictConfig(precision=0.85, guarantee=True, confidence=0.9)
    found = verdicts.thresholds(known, scores_, group, options)
    alone = verdicts.thresholds(known[::5], scores_[::5], group[::5], options)
    assert found == alone and found.green is not None and found.red is not None
    free = verdicts.thresholds(known, scores_, group, VerdictConfig(precision=0.85))
    assert free.green is not None and free.green < found.green, "a promise costs"
    with pytest.raises(InputError, match=r"verdict.guarantee: expected false with split.by published"):
        RecallConfig(network=NetworkConfig(path="x"), split=SplitConfig(by="published"), verdict=options)


def test_parts_as_published_have_none_to_calibrate_on() -> None:
    known = np.random.default_rng(0).integers(0, 2, 100)
    datasets = ["popqa", "triviaqa"] * 50
    options = SplitConfig(by="published", validate=0.15, test=0.15)
    part = labelling.parts(np.arange(100), datasets, known, options)
    assert set(part) == {"train", "validate", "test"} and (part == "test").sum() in range(13, 18)
    of = table(part=np.resize(part, N))
    assert of.calibrated_on == "validate"
    np.testing.assert_array_equal(of.rows("calibrate"), of.rows("validate"))


def test_labels_tell_refusals_apart() -> None:
    golds = ["Paris", "Unknown", "Rome", *["x"] * 51]
    asked = [Question(str(i), "d", f"{i}?", (gold,), "e" if i < 3 else None) for i, gold in enumerate(golds)]
    spoken = ["It is Paris", "Unknown", "I don't know", *["x"] * 51]
    found = labelling.labelled(asked, spoken, "strict", SplitConfig())
    assert found["known"][:3].tolist() == [1, 1, 0] and found["refused"][:3] == [False, False, True]
    assert found["answers"][0] == '["Paris"]' and len(set(found["group"][:3].tolist())) == 1


@pytest.mark.parametrize(("point", "low", "high", "groups", "expected"), [
    (0.7, 0.6, 0.8, 100, "better than chance"), (0.55, 0.45, 0.65, 100, "not told apart from chance"),
    (0.3, 0.2, 0.4, 100, "worse than chance"), (0.7, 0.6, 0.8, 12, "not told apart from chance")])
def test_sentences_say_no_more_than_numbers(point: float, low: float, high: float, groups: int,
                                            expected: str) -> None:
    interval = {"point": point, "low": low, "high": high}
    found = {"groups": groups,
             "methods": {"sidecar": {"auroc": interval, "runs": [point], "ece": interval,
                                     "ece_of_calibrated": 0.03}, "negative entropy": {"auroc": interval}},
             "comparisons": [{"against": "negative entropy", "difference": interval, "p_holm": 0.01}],
             "cross": {"a → b": {"questions": 9, "groups": 9, "methods": {}}},
             "fit": {"left_out": {"c": "few"}}}
    texts = " ".join(report.verdicts(found))
    assert f"one seed): {expected}." in texts and "too few of a kind to tell" in texts
    assert ("nothing here is sure" in texts) == (groups < 20)
    assert ("the sidecar is better" in texts) == (groups >= 20)
    assert "Nothing was learned from c alone: few." in texts
    assert ("worse than chance itself" in texts) == (high < 0.5)


def test_settings_that_cannot_be() -> None:
    for bad, message in (({"strengths": (float("nan"),)}, "strengths: expected finite numbers above 0"),
                         ({"strengths": (float("inf"),)}, r"found \[inf\]"), ({"seeds": ()}, r"found \[\]"),
                         ({"seeds": (2**32,)}, "seeds: expected different whole numbers from 0 to"),
                         ({"seeds": (1, 1)}, r"found \[1, 1\]")):
        with pytest.raises(InputError, match=message):
            FitConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="facts_people: expected a multiple of 60, found 70"):
        QuestionsConfig(sources=("facts",), facts_people=70)
    with pytest.raises(InputError, match="found path 'x' and train 'y'"):
        NetworkConfig(path="x", train="y")


@pytest.mark.parametrize(("change", "says"), [
    ({"network": {"name": "x", "n_layers": 3}}, "network: expected its name, contents and n_layers, or "),
    ({"network": {"name": "x", "contents": "y", "n_layers": "3"}}, "network: expected its name, contents "),
    ({"network": 3}, "cannot be read: "),
    ({"aim": {"precision": "high"}}, "aim: expected numbers under precision"),
    ({"green": "0.5"}, "green: expected a chance or null, found '0.5'"),
    ({"red": 10**400}, "red: expected a chance or null, found 1000"),
    ({"green": [1]}, "green: expected a chance or null, found [1]")])
def test_a_judge_that_somebody_has_changed(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    verdicts.write(tmp_path, VerdictRule(network={"name": "x", "contents": "y", "n_layers": 3}))
    assert verdicts.read(tmp_path).network["n_layers"] == 3
    tree = json.loads((tmp_path / verdicts.FILE).read_text())
    (tmp_path / verdicts.FILE).write_text(json.dumps(tree | change))
    with pytest.raises(InputError) as caught:
        verdicts.read(tmp_path)
    assert_one_line(f"error: {caught.value}\n", str(tmp_path / verdicts.FILE), says)


def test_a_judge_of_another_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text('{"calibrator": {"kind": "platt", "slope": 1, "level": 0}}')
    with pytest.raises(InputError, match=r"verdict.json: green: expected it, found nothing"):
        verdicts.read(tmp_path)


def test_examples_are_spaced_evenly_by_probability_and_keep_their_rows() -> None:
    of = table()
    rows = of.rows("test")
    scores = np.random.default_rng(3).standard_normal(len(rows))
    chances = 1 / (1 + np.exp(-scores))
    found = evaluate.examples(of, rows, scores, chances, VerdictRule(green=0.6, red=0.4))
    assert len(found) == evaluate.EXAMPLES
    p = [one["p"] for one in found]
    assert p == sorted(p, reverse=True) and (p[0], p[-1]) == (chances.max(), chances.min())
    for one in found:
        row = rows[int(np.argmin(np.abs(chances - one["p"])))]
        assert (one["question"], one["answer"]) == (f"question {row}", f"answer {row}")
        assert one["right"] == bool(of.known[row])
        assert one["verdict"] == ("likely knows" if one["p"] >= 0.6 else
                                  "likely beyond its knowledge" if one["p"] < 0.4 else "uncertain")
    few = evaluate.examples(of, rows[:3], scores[:3], chances[:3], VerdictRule())
    assert len(few) == 3 and {one["verdict"] for one in few} == {None}
