"""The command `tilelli recall` on a tiny network that knows some answers, also interrupted and continued."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from tests.error_lines import assert_one_line
from tests.eval.running import stage, write
from tests.reference_impl.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.eval.calibration import calibrator_from_dict
from tilelli_jax.eval.estimators import panel
from tilelli_jax.eval.inputs.shards import Shards
from tilelli_jax.eval.recall import questions, shipped, verdicts
from tilelli_jax.eval.recall import study as study_module
from tilelli_jax.eval.recall.answering import greedy_ids
from tilelli_jax.eval.recall.command import compare, evaluate_shipped, main, predict
from tilelli_jax.eval.recall.config import (
    AnswersConfig,
    PromptConfig,
    QuestionsConfig,
    RecallConfig,
    SamplesConfig,
)
from tilelli_jax.eval.recall.predictor import KnowledgePredictor
from tilelli_jax.eval.recall.prompting import Prompter
from tilelli_jax.eval.recall.score import score
from tilelli_jax.eval.recall.scores import read
from tilelli_jax.eval.recall.study import RecallStudy
from tilelli_jax.eval.tables import read_columns
from tilelli_jax.loading import store
from tilelli_jax.loading.language import load_with_tokenizer
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.signals.prompts import PromptReader
from tilelli_jax.signals.robustness import Robustness
from tools import ship_study

ROOT = Path(__file__).parents[3]
WORDS = [f"w{i}" for i in range(60)]
PROMPT = {"template": "ask {question} ?", "instruction": ""}
N = 240


def write_tokenizer(path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["[UNK]", "ask", "?", "A", "B", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network, and questions whose labels depend on its entropy.

    Its answer is correct where the entropy at the end of the prompt is below the median, except for one in
    twenty of these, so that the labels are not perfectly separable.
    """
    path = tmp_path_factory.mktemp("recall")
    config = GPTNeoXConfig(vocab_size=65, d_model=16, n_layers=4, n_heads=2, d_hidden=32)
    store.save(random_network(config, 0)[0], path / "network")
    write_tokenizer(path / "network")
    language = load_with_tokenizer(path / "network")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(N)]
    prompter = Prompter(language, PromptConfig(**PROMPT))
    prompts = [prompter(text) for text in texts]
    entropy = np.zeros(N)
    for i, outputs in PromptReader(language.model, batch_size=20)(prompts):
        entropy[i] = outputs.crystallisation.prompt_features[0]
    answers = [language.tokenizer.decode(ids.tolist())
               for ids in greedy_ids(language, prompts, AnswersConfig(max_new=3, batch_size=20))]
    correct = (entropy < np.median(entropy)) & (rng.random(N) > 0.05)
    rows = [{"id": str(i), "dataset": "ab"[i % 2], "question": text, "answers": [given if ok else "nothing"],
             "popularity": float(rng.integers(0, 100)), "group": f"e{i % 2}{i // 6}",
             "category": "xyz"[i % 3], "paraphrases": [f"{text} {WORDS[i % 60]}"] * (i % 4 > 0)}
            for i, (text, given, ok) in enumerate(zip(texts, answers, correct, strict=True))]
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def options(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    return {
        "out": str(out), "network": {"path": str(place / "network")}, "prompt": PROMPT,
        "questions": {"sources": [str(place / "questions.jsonl")], "items": N},
        "signals": {"shard_items": 80, "batch_size": 20, "noise_samples": 1},
        "estimators": ["all"], "primary": ["sidecar - best_free", "p_true - words"],
        "samples": {"n": 3, "questions": 200},
        "answers": {"max_new": 3, "batch_size": 20},
        "fit": {"seeds": [0, 1], "sidecar": {"epochs": 8, "d_hidden": 8, "learning_rate": 1e-2},
                "c_values": [0.1], "saplma_depths": [0.5], "jobs": 1},
        "replicates": 100, "split": {"test": 0.3}} | changed


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """Output directory of the whole study, run once."""
    out = place / "out"
    assert main(["--config", write(place / "tiny.yaml", options(place, out))]) == 0
    return out


def test_the_report(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    assert results["questions"] == N and sum(results["splits"].values()) == N
    text, page = (done / "report.md").read_text(), (done / "report.html").read_text()
    for name in ("methods", "reliability", "risk-coverage", "entropy", "layer-probe", "cost",
                 "transfer-sidecar"):
        assert f"figures/{name}.png" in text and (done / "figures" / f"{name}.png").stat().st_size > 5000
    assert page.count("data:image/png;base64,") == 9 and "tiny.yaml" in text and "mean of 2 seeds" in text
    methods = json.loads((done / "methods.json").read_text())
    assert {row["method"] for row in methods} == {
        *panel.ESTIMATORS} - {"verbalised"}, "its replies have no numbers"
    # As constructed: entropy separates all but the mislabelled answers, length separates nothing.
    assert results["methods"]["first_token_entropy"]["auroc"]["point"] > 0.9
    assert results["methods"]["sidecar"]["auroc"]["point"] > 0.65
    assert results["methods"]["length"]["auroc"]["point"] < 0.75
    assert set(results["cross_dataset"]) == {"a → b", "b → a"}
    assert set(results["within_dataset"]) == {"a", "b"}
    for result in results["cross_dataset"].values():
        assert result["methods"]["first_token_entropy"]["auroc"]["point"] > 0.9
        assert "dataset" not in result["methods"]


def test_results_equal_those_of_scikit_learn(done: Path) -> None:
    """Recomputed from the scores and the questions on disk."""
    results = json.loads((done / "results.json").read_text())
    columns = read_columns(stage(done, "questions") / "questions.parquet")
    scores = read(stage(done, "fit"))
    test = columns["split"].astype(str) == "test"
    for name, metrics in results["methods"].items():
        runs = scores[None][name].scores[:, test]
        scored = ~np.isnan(runs[0])  # not all are sampled, and not all have paraphrases
        known, runs = columns["known"][test][scored], runs[:, scored]
        assert metrics["questions"] == scored.sum() and scored.sum() > 40
        areas = [roc_auc_score(known, run) for run in runs]
        np.testing.assert_allclose(metrics["runs"], areas, atol=1e-12)
        assert metrics["auroc"]["point"] == pytest.approx(np.mean(areas), abs=1e-12)
        assert metrics["auroc"]["low"] <= metrics["auroc"]["point"] <= metrics["auroc"]["high"]
        probabilities = scores[None][name].probabilities[:, test][:, scored]
        assert metrics["auprc"]["point"] == pytest.approx(
            np.mean([average_precision_score(known, run) for run in runs]), abs=1e-12)
        assert len(runs) == len(metrics["runs"]) and probabilities.min() >= 0
        assert probabilities.max() <= 1
        for run, calibrated in zip(runs, probabilities, strict=True):  # Platt keeps the order
            assert (np.diff(calibrated[np.argsort(run)]) >= 0).all()
    trained_groups = columns["group"][columns["dataset"] == "a"]
    crossed = results["cross_dataset"]["a → b"]["methods"]["sidecar"]["auroc"]["point"]
    rows = (columns["dataset"] == "b") & ~np.isin(columns["group"], trained_groups)
    assert crossed == pytest.approx(np.mean([roc_auc_score(columns["known"][rows], run[rows])
                                             for run in scores["a"]["sidecar"].scores]), abs=1e-12)
    assert results["cross_dataset"]["a → b"]["questions"] == rows.sum()


def test_the_build_stage(place: Path, done: Path) -> None:
    """Answers are graded, entities are in one split, signals equal the reader's, few activations are kept."""
    columns = read_columns(stage(done, "questions") / "questions.parquet")
    asked = questions.draw(QuestionsConfig(sources=(str(place / "questions.jsonl"),), items=N)).questions
    assert columns["question"].tolist() == [question.text for question in asked]
    assert columns["known"].tolist() == [
        int(given in question.answers) for given, question in zip(columns["answer"], asked, strict=True)]
    splits = {}
    for entity, split in zip([question.entity for question in asked], columns["split"], strict=True):
        assert splits.setdefault(entity, split) == split
    signals, language = Shards(stage(done, "signals")), load_with_tokenizer(place / "network")
    prompter = Prompter(language, PromptConfig(**PROMPT))
    few = [*range(0, N, 13), N - 1]  # other neighbours than in the study; 20, one compiled batch
    outputs = dict(PromptReader(language.model, batch_size=20)([prompter(asked[i].text) for i in few]))
    noise = Robustness(language.model, k=1, batch_size=20)(
        [prompter(asked[i].text).ids for i in few], few)
    for position, i in enumerate(few):
        np.testing.assert_allclose(signals.joined("by_layer")[i],
                                   outputs[position].crystallisation.by_layer, atol=2e-5)
        # Stored as float16, which rounds to 1 in 2¹¹.
        np.testing.assert_allclose(signals.joined("final")[i], outputs[position].final, rtol=2**-9, atol=2e-5)
    np.testing.assert_allclose(signals.joined("robustness")[few], noise, rtol=1e-3, atol=1e-6)
    assert signals.joined("final").shape == (N, 4, 16), "one vector per layer, of one position"


def test_the_same_command_again_reuses_all_stages(place: Path, done: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "stages").rglob("*") if path.is_file()}
    assert main(["--config", str(place / "tiny.yaml"), "--stage", "evaluate"]) == 0
    assert capsys.readouterr().err.count("as it is") == 8
    assert main(["--config", str(place / "tiny.yaml")]) == 0
    printed = capsys.readouterr()
    assert f"\nquestions and answers: {stage(done, 'questions') / 'questions.parquet'}\n" in printed.out
    train = [line for line in printed.err.splitlines() if "The train split has only" in line]
    assert len(train) == 1 and train[0].removeprefix("questions: ") in (done / "report.md").read_text()
    # Another grading rule does not run the network again.
    study = RecallStudy(dataclasses.replace(config_lib.load(RecallConfig, place / "tiny.yaml"),
                                      answers=AnswersConfig(max_new=3, batch_size=20, match="published")),
                        done)
    assert (study.signals, study.answers) == (stage(done, "signals"), stage(done, "answers"))
    assert before == {path: path.stat().st_mtime_ns for path in (done / "stages").rglob("*")
                      if path.is_file()}


def test_an_interrupted_build_continues(place: Path, done: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    plain, calls = PromptReader.__call__, []

    def stopping(self: PromptReader, prompts: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, prompts, **options)
    counted: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def counting(total: int, what: str, unit: str, *, done: int = 0) -> Iterator[Callable[[int], None]]:
        counts = counted[what] = [total, done]
        yield counts.append
    monkeypatch.setattr(study_module, "shown", counting)
    monkeypatch.setattr(PromptReader, "__call__", stopping)
    config = write(tmp_path / "tiny.yaml", options(place, tmp_path / "out"))
    assert main(["--config", config, "--stage", "build"]) == 130
    assert capsys.readouterr().err.endswith(
        f"finished stages are kept; to continue: tilelli recall --config {config} --stage build\n"
        "interrupted\n")
    assert len(list(stage(tmp_path / "out", "signals").glob("shard-*"))) == 2
    assert main(["--config", config, "--stage", "build"]) == 0
    assert calls == [80, 80, 80, 80], "the first two shards are reused"
    # The progress is that of all questions, not of one shard, and it starts after the reused ones.
    assert {what: counts[:2] for what, counts in counted.items()} == {"signals": [N, 160], "answers": [N, 0]}
    assert all(sum(counts[1:]) == N and len(counts) > 4 for counts in counted.values())
    for part in ("signals", "answers"):
        a, b = (Shards(stage(out, part)) for out in (done, tmp_path / "out"))
        for name in a.names:
            expected, found = a.joined(name), b.joined(name)
            if name.endswith("_cost"):  # all but the seconds
                expected, found = expected[:, :2], found[:, :2]
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_the_exported_sidecar_predicts_the_same(place: Path, done: Path) -> None:
    """P(knows) and the strongest writes from Python equal those of the study."""
    fitted = json.loads((stage(done, "fit") / "result.json").read_text())
    expected = read(stage(done, "fit"))[None]["sidecar"].probabilities[fitted["selected_run"]]
    columns = read_columns(stage(done, "questions") / "questions.parquet")
    predictor = KnowledgePredictor.open(place / "network", done / "sidecar")
    predictions = predictor.predict(columns["question"][:2].tolist())
    np.testing.assert_allclose([prediction.p for prediction in predictions], expected[:2], atol=1e-4)
    assert [prediction.strongest_layer for prediction in predictions] == (
        columns["strongest_write_layer"][:2].tolist())
    assert [prediction.strongest_write for prediction in predictions] == (
        columns["strongest_write"][:2].tolist())
    assert predictor.rule.calibrator == calibrator_from_dict(fitted["calibrator"])
    assert predictor.rule.verdict(99.0) == ("uncertain" if predictor.rule.knows_from is None
                                            else "likely knows")
    assert predictor.predict([]) == []


def test_predictions(place: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", str(place / "network"), "--sidecar", str(done / "sidecar")]
    assert predict([*base, "w1 w2", "w3"]) == 0
    shown = capsys.readouterr().out
    assert "P(knows)" in shown and "w1 w2" in shown and "layer " in shown
    (tmp_path / "some.csv").write_text("question\nw1 w2\nw3\n")
    assert predict([*base, "--questions", str(tmp_path / "some.csv"),
                    "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["w1 w2", "w3"]
    assert f"{rows[0]['p']:.3f}" in shown and set(rows[0]) == {
        "id", "question", "p", "verdict", "strongest_write_layer", "strongest_write", "p_layer_probe",
        "p_semantic_entropy_probe"}
    assert [row["id"] for row in rows] == ["1", "2"]


def test_predictions_are_checked_as_in_the_study(place: Path, done: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """The answers, and whether they are correct, are those of the study."""
    columns = read_columns(stage(done, "questions") / "questions.parquet")
    asked = {row["question"]: row for row in map(json.loads, (
        place / "questions.jsonl").read_text().splitlines())}
    texts = columns["question"][:40].tolist()
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({**asked[text], "id": f"q{i}"} if i else {"question": text}) + "\n"
                            for i, text in enumerate(texts)))
    base = ["--model", str(place / "network"), "--sidecar", str(done / "sidecar"), "--check"]
    assert predict([*base, "--questions", str(file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in rows] == columns["answer"][:40].tolist()
    assert [row["correct"] for row in rows] == [None, *(columns["correct"][1:40] == 1).tolist()]
    assert [row["id"] for row in rows] == ["1", *(f"q{i}" for i in range(1, 40))]
    assert 0 < sum(map(bool, (row["correct"] for row in rows))) < 39
    assert predict([*base, texts[0]]) == 0
    assert rows[0]["answer"] in capsys.readouterr().out


@pytest.mark.parametrize("name", [
    "first_token_entropy", "sequence_prob", "p_true", "semantic_entropy", "robustness", "cocoa"])
def test_the_score_of_one_estimator(name: str, place: Path, done: Path) -> None:
    """Without a study, the same number as in the study for the first questions, which are sampled alike."""
    columns = read_columns(stage(done, "questions") / "questions.parquet")
    expected = read(stage(done, "fit"))[None][name].scores[0, :6]
    found = score(name, place / "network", columns["question"][:6].tolist(), prompt=PromptConfig(**PROMPT),
                  answers=AnswersConfig(max_new=3), samples=SamplesConfig(n=3))
    if name == "robustness":  # one noisy pass in the study, four by default: another estimate
        assert found.shape == (6,) and (found < 0).all()
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_scores_that_are_learned_need_a_study(place: Path) -> None:
    for name in ("layer_probe", "agreement", "words", "nothing"):
        with pytest.raises(InputError, match=f"estimator: expected one that learns nothing.*found '{name}'"):
            score(name, place / "network", ["w1"])
    assert score("first_token_prob", place / "network", []).shape == (0,)


def test_primary_comparisons(place: Path, done: Path, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    """The differences are those of the full tables; the correction is for these two only."""
    results = json.loads((done / "results.json").read_text())
    first, second = results["primary"]
    assert first["comparison"] == f"sidecar - {results['free']}" and second["comparison"] == "p_true - words"
    full = {comparison["baseline"]: comparison for comparison in results["comparisons"]}
    assert first["difference"] == full[results["free"]]["difference"]
    p = sorted([first["p"], second["p"]])
    assert sorted([first["p_holm"], second["p_holm"]]) == pytest.approx([min(2 * p[0], 1), max(
        min(2 * p[0], 1), p[1])])
    assert "Primary comparisons" in (done / "report.md").read_text()
    for wrong in ("sidecar", "sidecar - nothing", "sidecar - words - words"):
        config = write(tmp_path / "a.yaml", options(place, tmp_path / "a", primary=[wrong]))
        assert main(["--config", config]) == 2
        assert_one_line(capsys.readouterr().err, "primary: expected 'A - B'", f"found '{wrong}'")


def test_linear_probes_predict_the_same(place: Path, done: Path) -> None:
    columns = read_columns(stage(done, "questions") / "questions.parquet")
    scores = read(stage(done, "fit"))[None]
    predictor = KnowledgePredictor.open(place / "network", done / "sidecar")
    predictions = predictor.predict(columns["question"][:5].tolist())
    for name in ("layer_probe", "semantic_entropy_probe"):
        np.testing.assert_allclose([prediction.by_probe[name] for prediction in predictions],
                                   scores[name].probabilities[0, :5], atol=2e-3)  # float16 in the study


def test_a_shipped_study(place: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluated again from what is shipped, all numbers are those of the study; its sidecar is found."""
    results = json.loads((done / "results.json").read_text())
    monkeypatch.setattr(shipped, "ROOT", tmp_path / "shipped")
    network = str(place / "network")
    assert predict(["--model", network, "w1 w2"]) == 2
    assert_one_line(capsys.readouterr().err, "--sidecar: expected the directory of a sidecar, because none "
                    f"is shipped for {network}; shipped are those of no network")
    assert evaluate_shipped(["--shipped", "tiny"]) == 2
    assert_one_line(capsys.readouterr().err, "--shipped: expected one of none, found 'tiny'")
    monkeypatch.setattr(ship_study, "MAX_BYTES", 1000)
    assert ship_study.main([str(done), "tiny"]) == 2
    assert_one_line(capsys.readouterr().err, f"{done}: expected at most 1,000 bytes to ship, found ")
    assert not list((tmp_path / "shipped").iterdir())
    monkeypatch.setattr(ship_study, "MAX_BYTES", 10**6)
    assert ship_study.main([str(done), "tiny"]) == 0
    assert evaluate_shipped(["--shipped", "--out", network]) == 2
    assert_one_line(capsys.readouterr().err, f"--out: {network}: expected a new directory or that of a",
                    "report, found other files")
    assert evaluate_shipped(["--shipped", "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    for key in set(results) - {"examples", "extremes", "entropy_by_layer"}:
        assert again[key] == results[key], key
    for kind, values in results["entropy_by_layer"].items():
        np.testing.assert_allclose(again["entropy_by_layer"][kind], values, rtol=2e-3)  # float16
    assert "Examples" not in (tmp_path / "again" / "report.md").read_text()
    assert predict(["--model", network, "w1 w2"]) == 0
    assert predict(["--model", network, "--sidecar", str(done / "sidecar"), "w1 w2"]) == 0
    assert predict(["--model", network, "--sidecar", "tiny", "w1 w2"]) == 0
    first, second, third = capsys.readouterr().out.split("P(knows)")[-3:]
    assert first.strip() == second.strip() == third.strip()
    # Of several, one with chat prompts is preferred, otherwise the first by name.
    shutil.copytree(shipped.ROOT / "tiny", shipped.ROOT / "a-copy")
    assert shipped.find_sidecar("", Path(network)).parent.name == "a-copy"
    rule = verdicts.read(shipped.ROOT / "tiny" / "sidecar")
    verdicts.write(shipped.ROOT / "tiny" / "sidecar", dataclasses.replace(
        rule, prompt=PromptConfig(template="chat")))
    assert shipped.find_sidecar("shipped", Path(network)).parent.name == "tiny"
    assert shipped.find_sidecar("a-copy", Path(network)).parent.name == "a-copy"
    assert predict(["--model", network, "--sidecar", "another", "w1 w2"]) == 2
    assert_one_line(capsys.readouterr().err, "--sidecar: another: expected a sidecar, found nothing",
                    "shipped are a-copy, tiny")


def test_comparing_studies(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((done / "results.json").read_text())
    assert compare([str(done), "--out", str(tmp_path / "all")]) == 0
    shown = capsys.readouterr().out
    assert "network, correctness, all" in shown and "network, correctness, b" in shown
    tree = json.loads((tmp_path / "all" / "results.json").read_text())
    assert tree["columns"] == [f"network, correctness, {name}" for name in ("all", "a", "b")]
    by_name = {row["method"]: row for row in tree["rows"]}
    assert set(by_name) == set(results["methods"])
    assert by_name["p_true"][tree["columns"][0]] == results["methods"]["p_true"]["auroc"]
    assert (tmp_path / "all" / "figures" / "matrix.png").stat().st_size > 5000
    assert compare([str(done), str(done), "--out", str(tmp_path / "twice")]) == 2
    assert_one_line(capsys.readouterr().err, "expected studies of different networks, tasks or questions",
                    "network, correctness, all twice")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"a": 1}')
    assert compare([str(tmp_path / "other")]) == 2
    assert_one_line(capsys.readouterr().err, "other: expected the results of a recall study")


def test_invalid_inputs(place: Path, done: Path, tmp_path: Path,
                        capsys: pytest.CaptureFixture[str]) -> None:
    def rejected(*argv: str) -> str:
        assert (main if argv[0] == "--config" else predict)(list(argv)) == 2
        return capsys.readouterr().err
    network, sidecar = str(place / "network"), str(done / "sidecar")
    base = ("--model", network, "--sidecar", sidecar)
    assert_one_line(rejected(*base), "error: expected a question")
    assert_one_line(rejected(*base, " "), "the question: expected text, found an empty question")
    # A pattern that matches no network, or two: the shell passes it as it is, or a path as a question.
    assert_one_line(rejected("--model", str(tmp_path / "*" / "model"), "--sidecar", sidecar, "w1"),
                    f"error: --model: {tmp_path}/*/model: no such directory; has the study finished?")
    assert_one_line(rejected("--model", "nowhere", "--sidecar", sidecar, "w1"),
                    "--model: nowhere: no such file or directory")
    assert_one_line(rejected("--model", network, "--sidecar", "nowhere", "w1"),
                    "--sidecar: nowhere: expected a sidecar, found nothing")
    assert_one_line(rejected(*base, "--tokenizer", "nowhere", "w1"), "--tokenizer: nowhere: expected")
    assert_one_line(rejected("--model", network, str(done), "--sidecar", sidecar, "w1"),
                    f"--model and --sidecar: expected one directory each, found another, '{done}', as a "
                    "question")
    (tmp_path / "bad.jsonl").write_text('{"question": "w1"}\n{"q": 1}\n')
    assert_one_line(rejected(*base, "w1", str(tmp_path / "bad.jsonl")), "question: expected text, found the "
                    f"file '{tmp_path / 'bad.jsonl'}'; --questions FILE reads questions from a file")
    assert_one_line(rejected(*base, "--questions", str(tmp_path / "bad.jsonl")), "bad.jsonl, row 2",
                    "question:")
    # Sidecars of other networks.
    store.save(store.build(SAEConfig(d_model=4, n_latents=8, k=2)), tmp_path / "sae")
    assert_one_line(rejected("--model", network, "--sidecar", str(tmp_path / "sae"), "w1"),
                    "expected a sidecar, found family sae")
    store.save(store.build(SidecarConfig(n_features=9)), tmp_path / "nine")
    assert_one_line(rejected("--model", network, "--sidecar", str(tmp_path / "nine"), "w1"),
                    "n_features: expected 12, found 9")
    named = SidecarConfig(features=("a_entropy_final", "a_maxprob_final"))
    store.save(store.build(named), tmp_path / "named")
    assert_one_line(rejected("--model", network, "--sidecar", str(tmp_path / "named"), "w1"),
                    "features: expected a_margin_final at 1, found a_maxprob_final")
    other = shutil.copytree(place / "network", tmp_path / "other")
    store.save(random_network(load_with_tokenizer(network).model.config, 1)[0], other)
    assert_one_line(rejected("--model", str(other), "--sidecar", sidecar, "w1"),
                    "trained on 'network': expected its weights in", "found others")
    assert predict(["--any-network", "--model", str(other), "--sidecar", sidecar, "w1", "w2"]) == 0
    capsys.readouterr()
    broken = shutil.copytree(done / "sidecar", tmp_path / "broken")
    (broken / "verdict.json").write_text('{"knows_from": 7}')
    assert_one_line(rejected("--model", network, "--sidecar", str(broken), "w1"), "verdict.json",
                    "cannot be read")
    arrays = {name: array * np.float32(1e30) for name, array in to_arrays(store.load(network)).items()}
    store.save(store.from_arrays(store.load_config(network), arrays), other)
    error = rejected("--any-network", "--model", str(other), "--sidecar", sidecar, "w1", "w2")
    assert_one_line(error, "question 1: expected a finite residual stream, found infinite or NaN")
    # Invalid networks.
    store.save(random_network(VanillaConfig(d_model=16, n_layers=1, max_seq_len=40, n_heads=2), 0)[0],
               tmp_path / "bytes")
    config = write(tmp_path / "a.yaml", options(
        place, tmp_path / "a", network={"path": str(tmp_path / "bytes")}, prompt={}))
    assert_one_line(rejected("--config", config), "prompt.template: chat")
    (other / "tokenizer.json").unlink()
    config = write(tmp_path / "b.yaml", options(place, tmp_path / "b", network={"path": str(other)}))
    assert_one_line(rejected("--config", config), "tokenizer.json", "no such file")
    (other / "model.safetensors").unlink()
    assert_one_line(rejected("--config", config), str(other), "model.safetensors is missing")
    config = write(tmp_path / "c.yaml", options(
        place, tmp_path / "c", network={"path": str(tmp_path / "none")}))
    assert_one_line(rejected("--config", config),
                    f"network.path: {tmp_path / 'none'}: no such file or directory")
    assert not (tmp_path / "c").exists()
    # Questions that are all in one group, and questions that are all unknown.
    rows = [{"question": f"w{i} w{i // 2}", "answers": "w1", "group": "same"} for i in range(80)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = write(tmp_path / "e.yaml", options(place, tmp_path / "e", questions={
        "sources": [str(tmp_path / "one.jsonl")], "items": 80}))
    error = rejected("--config", config)
    assert "questions.sources: expected at least 8 groups" in error and error.rstrip().endswith("found 1")
    assert not (tmp_path / "e").exists()
    assert_one_line(rejected("--config", config, "questions.items=40"),
                    "questions: expected at least 68, and better 204, found 40: test gets 0.3 of all and "
                    "needs 10 known and 10 unknown ones")
    rows = [{"question": f"w{i} w{i // 2}", "answers": "nothing", "group": i // 8} for i in range(80)]
    (tmp_path / "none.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = write(tmp_path / "d.yaml", options(place, tmp_path / "d", questions={
        "sources": [str(tmp_path / "none.jsonl")], "items": 80}))
    log, _, error = rejected("--config", config, "--stage", "build").rstrip().rpartition("\n")
    assert_one_line(error + "\n", "questions: expected at least 34 more known ones, found 0 known and 80 ",
                    "test 0 (needs 10)", "the network answers none of these correctly")
    assert "split.test: The held-out questions form 3 groups; at least 20 are required" in log
    columns = read_columns(stage(tmp_path / "d", "questions") / "questions.parquet")
    assert len(columns["answer"]) == 80, "the answers can be read"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("recall-*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations(path: Path) -> None:
    config = config_lib.load(RecallConfig, path)
    assert f"--config {path.stem}" in path.read_text()
    assert not config.network.train or config_lib.find(config.network.train).is_file()
