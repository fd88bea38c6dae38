"""The whole study on tiny networks: from the command line, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score

from tests.error_lines import assert_one_line
from tests.eval.running import stage, write
from tilelli_jax import config as config_lib
from tilelli_jax.data.synthetic import stories
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.eval.difficulty.command import main
from tilelli_jax.eval.difficulty.config import DifficultyConfig
from tilelli_jax.eval.difficulty.extract import Extraction
from tilelli_jax.eval.difficulty.report import conclusions_of
from tilelli_jax.eval.difficulty.scoring import NLLScorer
from tilelli_jax.eval.selective import aurc
from tilelli_jax.eval.tables import read_columns
from tilelli_jax.loading import store
from tilelli_jax.models.vanilla import VanillaConfig

ROOT = Path(__file__).parents[3]
TINY_SAE = {"model": {"family": "sae", "d_model": 16, "n_latents": 48, "k": 6},
            "activations": {"source": "activations"},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0},
            "train": {"steps": 40, "batch_size": 256, "eval_batch_size": 256, "eval_every": 40,
                      "checkpoint_every": 40}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two networks, a text, and the training configuration of an autoencoder."""
    path = tmp_path_factory.mktemp("study")
    tiny = VanillaConfig(d_model=16, n_layers=2, max_seq_len=64, n_heads=2)
    store.save(store.build(tiny, 0), path / "small_model")
    store.save(store.build(tiny, 1), path / "large_model")
    (path / "text.txt").write_bytes(stories.generate(30_000))
    (path / "sae.yaml").write_text(yaml.safe_dump(TINY_SAE))
    return path


def options(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    return {
        "out": str(out), "seed": 1,
        "data": {"family": "text", "source": str(place / "text.txt"), "items": 240, "prompt": 40,
                 "ending": 6},
        "network": {"path": str(place / "small_model")}, "large_model": {"path": str(place / "large_model")},
        "extract": {"layers": [1], "shard_items": 100},
        "sae": {"train": str(place / "sae.yaml"), "min_steps": 20, "max_dead": 0.9,
                "min_explained": 0.1},
        "probe": {"replicates": 400, "folds": 3, "jobs": 1}, "causal": {"items": 20, "controls": 1},
    } | changed


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """The output directory of a complete run."""
    out = place / "out"
    assert main(["--config", write(place / "tiny.yaml", options(place, out))]) == 0
    return out


def test_the_report(done: Path) -> None:
    found = json.loads((done / "results.json").read_text())
    results = found["layers"]["1"]
    assert results["probe"]["train"] + results["probe"]["test"] + results["probe"]["purged"] == 240
    assert found["config"]["network"]["path"].endswith("small_model") and found["unit"] == "nats"
    text, page = (done / "report.md").read_text(), (done / "report.html").read_text()
    for name in ("ladder-1", "risk-coverage-1", "reliability-1", "pareto-1"):
        assert f"figures/{name}.png" in text and (done / "figures" / f"{name}.png").stat().st_size > 5000
    assert page.count("data:image/png;base64,") >= 5 and "tiny.yaml" in text
    assert "`cheap.char_length`" in text, "all prompts have one length: the constant feature is listed"
    synthesis = json.loads((done / "synthesis.json").read_text())
    assert [row["study"] for row in synthesis] == [done.name] and (done / "synthesis.parquet").is_file()


def test_results_agree_with_the_tables(done: Path) -> None:
    """Recomputes each stage's result from its tables, with scikit-learn or by hand."""
    results = json.loads((done / "results.json").read_text())["layers"]["1"]
    scores = read_columns(stage(done, "probe-1") / "scores.parquet")
    names = list(results["probe"]["rungs"])
    assert {"P1_cheap", "P2_cheap_raw", "P3_cheap_sae", "P4_raw_only", "P5_sae_only"} <= set(names)
    for name in names:
        area = results["probe"]["rungs"][name]["auroc"]
        assert area["point"] == pytest.approx(roc_auc_score(scores["hard"], scores[name]), abs=1e-12)
        assert results["probe"]["rungs"][name]["auprc"] == pytest.approx(
            average_precision_score(scores["hard"], scores[name]), abs=1e-12)
        assert area["low"] <= area["point"] <= area["high"]
        risk = results["selective"]["rungs"][name]
        assert risk["aurc"]["point"] == pytest.approx(aurc(scores["error"], scores[name]), abs=1e-12)
        assert risk["risks"][-1] == pytest.approx(scores["error"].mean())
        raw = results["calibrate"]["rungs"][name]["raw"]
        assert raw["brier"] == pytest.approx(((scores[name] - scores["hard"])**2).mean(), abs=1e-9), (
            "the recalibrated probe is that of the ladder")
    large = Extraction(stage(done, "large_model"))
    assert large.items.tolist() == scores["item"].tolist()
    assert results["cascade"]["always_large"] == pytest.approx(large.numbers["loss"].mean())
    for positions in ("all", "boundary"):
        losses = read_columns(stage(done, "causal-1") / f"losses-{positions}.parquet")
        effects = results["causal"]["positions"][positions]
        assert effects["natural"] == pytest.approx(losses["natural"].mean())
        for latent, effect in effects["chosen"].items():
            assert effect["change"]["point"] == pytest.approx(
                (losses[latent] - losses["reconstructed"]).mean(), abs=1e-12)
            assert effect["items_changed"] == int((losses[latent] != losses["reconstructed"]).sum())
    # The unpatched loss is the extracted one.
    table = read_columns(stage(done, "items") / "items.parquet")
    np.testing.assert_allclose(losses["natural"], table["loss"][losses["item"]], atol=1e-5)


def test_the_autoencoder_is_evaluated_on_test_items(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())["layers"]["1"]["sae"]
    assert results["steps"] == 40 and 0.1 < results["explained"] < 1 and 0 < results["l0"] <= 6
    model = store.load(stage(done, "sae-1") / "run" / "model")
    assert (model.config.hook, model.config.layer, model.config.source_model) == (
        "resid_post", 1, "small_model")
    table = read_columns(stage(done, "items") / "items.parquet")
    held_out = json.loads((stage(done, "sae_eval-1") / "held-out" / "activations.json").read_text())
    rows = sum(shard["rows"] for shard in held_out["shards"])
    assert rows == results["rows"] == 45 * min(200, int((table["split"] == "test").sum()))


def test_the_report_names_latents_that_are_never_active(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())["layers"]["1"]
    for effects in results["causal"]["positions"].values():
        for i, effect in enumerate(effects["chosen"].values()):
            effect["items_changed"] = i  # 0 for the first
    first = next(iter(results["causal"]["positions"]["all"]["chosen"]))
    patched = [text for text in conclusions_of(results) if text.startswith("Positions patched: ")]
    assert len(patched) == 2 and all(
        text.endswith(f"their controls. Never active at these positions: {first}.") for text in patched)


def test_with_few_groups_every_comparison_is_inconclusive(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())["layers"]["1"]
    results["probe"]["groups"] = 19
    text = " ".join(conclusions_of(results))
    assert "form 19 groups; at least 20 are required" in text and "at equal cost: inconclusive." in text
    assert text.count(": inconclusive.") == 2 + text.count("AUROC, corrected p ") >= 5
    for words in ("chance", "significant gain", "significant loss", "not significant", "better", "worse"):
        assert words not in text


def test_the_calibration_table_is_folded(done: Path) -> None:
    text = (done / "report.md").read_text()
    shown, _, folded = text.partition("## Calibration")[2].partition("<details>")
    rungs = len(json.loads((done / "results.json").read_text())["layers"]["1"]["calibrate"]["rungs"])
    assert shown.count("| isotonic ") == 1 and folded.partition("</details>")[0].count("| isotonic ") == rungs


def times(path: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


def test_a_second_run_computes_nothing(done: Path, place: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network ran again")
    before = times(done / "stages")
    monkeypatch.setattr(NLLScorer, "score", never)
    assert main(["--config", str(place / "tiny.yaml")]) == 0
    assert "report: " in capsys.readouterr().out
    assert before == times(done / "stages")


@pytest.mark.exhaustive
def test_a_changed_option_recomputes_only_dependent_stages(done: Path, place: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in an output directory that was copied."""
    monkeypatch.setattr(NLLScorer, "score", lambda *args: pytest.fail("the network ran again"))
    out = shutil.copytree(done, tmp_path / "out")
    command = ["--config", str(place / "tiny.yaml"), f"out={out}", "--stage"]
    for name, option, expected in [
            ("selective", "probe.replicates=450", ["probe-1", "selective-1"]),
            ("probe", "labels.quantile=0.6", ["items", "probe-1"]),
            ("probe", "extract.shard_items=7", []),
            ("causal", "causal.controls=2", ["causal-1"]),
            ("sae", "sae.held_out=20", ["sae_eval-1"])]:
        before = {path.name for path in (out / "stages").iterdir()}
        assert main([*command, name, option]) == 0
        new = {path.name for path in (out / "stages").iterdir()} - before
        assert sorted(directory.rpartition("-")[0] for directory in new) == expected, option


def test_an_interrupted_extraction_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           done: Path) -> None:
    """After an interrupt between two shards only the rest runs, with the numbers of an uninterrupted run."""
    first_items: list[int] = []
    score = NLLScorer.score

    def interrupted(self: NLLScorer, questions: Any, numbers: Any) -> Any:
        if len(first_items) == 1:
            first_items.append(-1)
            raise KeyboardInterrupt
        first_items.append(numbers[0])
        return score(self, questions, numbers)
    monkeypatch.setattr(NLLScorer, "score", interrupted)
    config = write(tmp_path / "tiny.yaml", options(place, tmp_path / "out"))
    assert main(["--config", config, "--stage", "extract"]) == 130
    assert not (tmp_path / "out" / "report.md").exists()
    assert main(["--config", config, "--stage", "extract"]) == 0
    assert first_items == [0, -1, 100, 200]
    ours, theirs = (Extraction(stage(out, "extract")) for out in (tmp_path / "out", done))
    np.testing.assert_array_equal(ours.numbers["loss"], theirs.numbers["loss"])
    for a, b in zip(ours.activations(1), theirs.activations(1), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
def test_an_insufficient_autoencoder(place: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The study rejects it; with sae.force it continues, and the report says so."""
    config = str(place / "tiny.yaml")
    assert main(["--config", config, "sae.min_steps=1000"]) == 2
    assert_one_line(capsys.readouterr().err.splitlines(keepends=True)[-1],
                    "rejected: it was trained for 40 updates (minimum 1000)", "sae.force=true")
    assert main(["--config", config, "sae.min_explained=1.0", "sae.max_dead=0.0"]) == 2
    assert "explains" in capsys.readouterr().err.splitlines()[-1]
    try:
        assert main(["--config", config, "sae.min_steps=1000", "sae.force=true"]) == 0
        assert "fails a quality check: it was trained for 40 updates" in (done / "report.md").read_text()
        assert "autoencoder forced" in (done / "synthesis.md").read_text()
    finally:
        assert main(["--config", config]) == 0


def saved(path: Path, config: Any) -> Path:
    store.save(store.build(config, 0), path)
    return path


@pytest.mark.parametrize(("kind", "message"), [
    ("nothing", "expected a model directory"),
    ("network", "expected an autoencoder, found family vanilla"),
    ("width", "expected an autoencoder of width 16, found 8"),
    ("layer", "expected an autoencoder of layer 1, found 0"),
    ("hook", "expected an autoencoder of hook resid_post, found mlp_write"),
    ("random", "random weights explain")])
def test_unsuitable_autoencoders_are_rejected(kind: str, message: str, place: Path, tmp_path: Path,
                                              done: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    config = SAEConfig(d_model=16, n_latents=48, k=6)
    path = {"nothing": lambda: tmp_path / "none", "network": lambda: place / "small_model",
            "width": lambda: saved(tmp_path / "sae", SAEConfig(d_model=8, n_latents=48, k=6)),
            "layer": lambda: saved(tmp_path / "sae", SAEConfig(d_model=16, n_latents=48, k=6, layer=0)),
            "hook": lambda: saved(tmp_path / "sae", dataclasses.replace(config, hook="mlp_write")),
            "random": lambda: saved(tmp_path / "sae", config)}[kind]()
    changed = options(place, shutil.copytree(done, tmp_path / "out"),
                      sae={"path": str(path)})
    assert main(["--config", write(tmp_path / "tiny.yaml", changed), "--stage", "probe"]) == 2
    assert_one_line(capsys.readouterr().err.splitlines(keepends=True)[-1], message, str(path))


@pytest.mark.parametrize(("change", "message"), [
    ({"extract": {"layers": []}}, "extract.layers: expected different layers"),
    ({"extract": {"layers": [2]}}, "extract.layers: expected 0 to 1, found 2"),
    ({"extract": {"layers": [1], "hook": "embed"}}, "extract.hook: expected one of"),
    ({"network": {"path": "nowhere"}},
     "network.path: nowhere: no such file or directory"),
    ({"sae": {"path": "runs/{x}-{layer}"}}, "runs/{x}-1"), ({"sae": {"path": "a{"}}, "a{"),
    ({"network": {}}, "network.path: expected a network's directory, or train"),
    ({"cascade": {"large": 0.5}}, "cascade.large: expected more than small"),
    ({"causal": {"positions": ["some"]}}, "causal.positions[0]: expected all or boundary, found text 'some'"),
    ({"data": {"family": "text", "source": "nowhere.txt"}}, "data.source: nowhere.txt: no such file"),
    ({"data": {"family": "series", "source": "nowhere.csv"}}, "nowhere.csv"),
    ({"data": {"family": "texts"}}, "data.family: expected one of squad, hellaswag, text, series"),
    ({"data": {"family": "text", "source": "stories", "items": 60, "prompt": 60, "ending": 6}},
     "item 0: expected at most 64 tokens, the network's context length, found 66 in prompt and ending"),
    ({"split": {"by": "grup"}}, "split.by: expected group or topic or order"),
    ({"out": "/proc/x"}, "out: /proc/x: cannot be written"), ({"probes": {}}, "unknown key 'probes'"),
    ({"other_studies": ["elsewhere"]}, "other_studies: elsewhere/results.json: no such file")])
def test_invalid_input(change: dict[str, Any], message: str, place: Path, tmp_path: Path, done: Path,
                  capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "out" if "other_studies" in change else tmp_path / "out"
    config = write(tmp_path / "tiny.yaml", options(place, out) | change)
    assert main(["--config", config]) == 2
    assert_one_line(capsys.readouterr().err.splitlines(keepends=True)[-1], message)
    assert not (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize(("keys", "value"), [
    (("name",), 3), (("layers", "1", "probe", "hard"), "many"), (("layers", "1", "probe", "test"), 10 ** 400),
    (("layers", "1", "probe", "rungs", "P1_cheap", "auroc", "point"), "x"), (("layers", "1"), [])])
def test_invalid_results_of_other_studies(keys: tuple[str, ...], value: object, place: Path, tmp_path: Path,
                                          done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((done / "results.json").read_text())
    *parents, last = keys
    functools.reduce(operator.getitem, parents, results)[last] = value
    (tmp_path / "results.json").write_text(json.dumps(results))
    config = write(tmp_path / "tiny.yaml", options(place, tmp_path / "out")
                   | {"other_studies": [str(tmp_path)]})
    assert main(["--config", config]) == 2
    assert_one_line(capsys.readouterr().err.splitlines(keepends=True)[-1], str(tmp_path / "results.json"))
    assert not (tmp_path / "out" / "items").exists()


def test_the_split_keeps_topics_together(place: Path, tmp_path: Path) -> None:
    rows = [{"context": f"{word} {i} was here", "question": f"who was {word}{i}", "title": f"topic {i // 6}",
             "answers": {"text": ["nobody" if i % 3 else "a long list of all of them"]}}
            for i, word in enumerate(["ann", "bob", "cid", "dot"] * 30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changed = options(place, tmp_path / "out", sae={}, large_model=None,
                      split={"by": "topic", "max_similarity": 1.1},
                      data={"family": "squad", "source": str(tmp_path / "rows.json"), "max_tokens": 30})
    assert main(["--config", write(tmp_path / "tiny.yaml", changed), "--stage", "probe"]) == 0
    table = read_columns(stage(tmp_path / "out", "items") / "items.parquet")
    assert set(table["group"]) == {f"topic {i}" for i in range(20)}
    test = table["split"] == "test"
    assert test.any() and not set(table["group"][test]) & set(table["group"][table["split"] == "train"])


@pytest.mark.exhaustive
def test_several_endings(place: Path, tmp_path: Path) -> None:
    """HellaSwag: an item is hard if a wrong ending has a lower NLL; both splits contain both domains."""
    rng = np.random.default_rng(0)
    words = ["a", "cat", "dog", "runs", "sits", "up", "down", "then", "by", "on", "off", "home"]

    def random_words(n: int) -> str:
        return " ".join(rng.choice(words, n))
    rows = [{"ctx_a": random_words(5), "ctx_b": random_words(3),
             "endings": [random_words(4) for _ in range(4)], "label": i % 4,
             "activity_label": "x", "source_id": f"{('activitynet', 'wikihow')[i % 2]}~{i // 2}"}
            for i in range(160)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changed = options(place, tmp_path / "out", data={"family": "hellaswag", "source": "hf:nothing"},
                      split={"max_similarity": 1.1}, sae={}, large_model=None)
    config = write(tmp_path / "tiny.yaml", changed)
    assert main(["--config", config, "--data", str(tmp_path / "rows.jsonl")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["layers"]["1"]
    found = Extraction(stage(tmp_path / "out", "extract"))
    assert found.positions.tolist() == [4] * 160, "the first token of each ending"
    wrong = found.numbers["picked"] != np.arange(160) % 4
    table = read_columns(stage(tmp_path / "out", "items") / "items.parquet")
    np.testing.assert_array_equal(table["hard"], wrong)
    test = table["split"] == "test"
    assert results["probe"]["hard"] == pytest.approx(wrong[test].mean())
    assert {*table["domain"][test]} == {*table["domain"][~test]} == {"activitynet", "wikihow"}
    assert set(results["probe"]["rungs"]["P1_cheap"]["domains"]) == {"activitynet", "wikihow"}
    assert "cascade" not in results and "causal" not in results
    assert "P3_cheap_sae" not in results["probe"]["rungs"]
    assert "fraction of wrong answers" in (tmp_path / "out" / "report.md").read_text().lower()


SHIPPED = sorted((ROOT / "configs").glob("difficulty-*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies(path: Path) -> None:
    config = config_lib.load(DifficultyConfig, path)
    assert f"--config {path.stem}" in path.read_text()
    large = config.large_model.train if config.large_model else ""
    for name in (config.network.train, large, config.sae.train):
        assert not name or config_lib.find(name).is_file()
