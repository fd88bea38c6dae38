"""`tilelli compare` end to end on tiny networks and two texts: interruption, resumption, invalid input."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from tests.error_lines import assert_one_line
from tests.eval.running import write
from tilelli_jax import config as config_lib
from tilelli_jax import train as train_command
from tilelli_jax.data.synthetic import stories
from tilelli_jax.errors import InputError
from tilelli_jax.eval.comparison import command, models, report
from tilelli_jax.eval.comparison.command import main
from tilelli_jax.eval.comparison.config import ComparisonConfig, TuningConfig, file_name
from tilelli_jax.eval.comparison.study import ComparisonStudy
from tilelli_jax.eval.inputs.networks import TrainingStopped
from tilelli_jax.eval.stages import read_result
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.training import loop
from tilelli_jax.training.tasks.text import TextTask

ROOT = Path(__file__).parents[3]
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts and a training configuration."""
    path = tmp_path_factory.mktemp("comparison")
    for name, seed in (("one", 0), ("two", 1)):
        (path / f"{name}.txt").write_bytes(stories.generate(6000, seed))
    write(path / "routed.yaml", {
        "model": {"family": "routed", "d_model": 16, "n_layers": 1, "max_seq_len": 16,
                  "pathways": ["dense"], "dense_expand": 2},
        "data": {"source": str(path / "one.txt")},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {"steps": STEPS, "batch_size": 8, "seq_len": 16, "log_every": 8, "eval_every": 8,
                  "eval_batch_size": 8, "eval_bytes": 100, "checkpoint_every": 8}})
    return path


def options(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    routed = str(place / "routed.yaml")
    return {
        "out": str(out), "reference": "full", "seeds": [0, 1],
        "models": {"ternary": {"train": routed, "set": ["model.quantizer=ternary"]},
                   "full": {"train": routed}},
        "texts": [str(place / "one.txt")]} | changed


def losses(out: Path, name: str, text: str) -> list[float]:
    """The losses in the summaries of the runs, by seed."""
    summaries = [json.loads(next((out / "runs").glob(f"{name}-{text}-{seed}-*/summary.json")).read_text())
                 for seed in (0, 1)]
    return [summary["final_valid_loss"] for summary in summaries]


@pytest.fixture(scope="module", params=[("one",), pytest.param(("one", "two"), marks=pytest.mark.exhaustive)],
                ids=["one", "two"])
def names(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The names of the texts."""
    return request.param


@pytest.fixture(scope="module")
def done(place: Path, names: tuple[str, ...]) -> Path:
    """The whole comparison, interrupted by Ctrl-C in its second run after six of eight updates; the
    comparison of both texts reuses the runs of the first text."""
    out, steps, should_stop = place / "out", [], loop.should_stop
    finished = len(list((out / "runs").glob("*/summary.json")))
    (out / "results.json").unlink(missing_ok=True)

    def interrupting(step: int) -> bool:
        steps.append(step)
        if len(steps) == STEPS + 6:
            signal.raise_signal(signal.SIGINT)
        return should_stop(step)
    config = write(place / "small.yaml", options(
        place, out, texts=[str(place / f"{name}.txt") for name in names]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "should_stop", interrupting)
        assert main(["--config", config]) == 130
        assert len(list((out / "runs").glob("*/summary.json"))) == finished + 1
        assert not (out / "results.json").exists()
        assert main(["--config", config]) == 0
    assert steps[STEPS:2 * STEPS] == [*range(1, STEPS + 1)]
    assert len(steps) == (4 * len(names) - finished) * STEPS, "no run is trained twice"
    return out


def test_results_agree_with_the_run_summaries(place: Path, done: Path, names: tuple[str, ...]) -> None:
    results = json.loads((done / "results.json").read_text())
    assert list(results["texts"]) == [str(place / f"{name}.txt") for name in names]
    for text, of_text in results["texts"].items():
        by_seed = {name: losses(done, name, Path(text).stem) for name in ("full", "ternary")}
        assert list(of_text["losses"]) == ["full", "ternary"], "the reference comes first"
        assert {name: row["by_seed"] for name, row in of_text["losses"].items()} == by_seed
        comparison, = of_text["comparisons"]
        welch = scipy.stats.ttest_ind(by_seed["ternary"], by_seed["full"], equal_var=False)
        assert comparison["p"]["welch"] == pytest.approx(welch.pvalue)
        assert comparison["difference"]["low"] == pytest.approx(welch.confidence_interval().low)
        assert comparison["differences"] == np.subtract(by_seed["ternary"], by_seed["full"]).tolist()
        assert comparison["min_p"] == {"unpaired": 2 / 6, "paired": 2 / 4}
        assert comparison["p"]["paired"] in (0.5, 1.0) and comparison["p_holm"] == comparison["p"]
        # After all updates, on the whole validation split, although the configuration sets eval_bytes to 100.
        for runs in of_text["runs"].values():
            assert {(run["steps"], run["tokens"]) for run in runs} == {(STEPS, 128 * STEPS)}
    assert results["sizes"]["full"]["parameters"] == results["sizes"]["ternary"]["parameters"]
    assert results["sizes"]["full"]["bits_per_weight"] == 32
    assert results["sizes"]["ternary"]["bits_per_weight"] == pytest.approx(math.log2(3))
    configs = [config_lib.read_yaml(path) for path in (done / "runs").glob("*/config.yaml")]
    assert len(configs) == 4 * len(names) and {config["train"]["eval_bytes"] for config in configs} == {0}
    assert all(config["seed"] == config["data"]["shuffle_seed"] for config in configs)


def test_report_has_its_figures_and_sentences(done: Path, names: tuple[str, ...]) -> None:
    text, page = (done / "report.md").read_text(), (done / "report.html").read_text()
    for name in [f"{figure}-{name}" for figure in ("losses", "differences") for name in names]:
        assert f"figures/{name}.png" in text and (done / "figures" / f"{name}.png").stat().st_size > 3000
    assert page.count("data:image/png;base64,") == 2 * len(names)
    *_, last = text.split("\n## ")
    assert last.startswith("How to reproduce\n\n- command: `tilelli compare --config ")
    assert [line.split(":")[0] for line in last.splitlines() if line.startswith("- ")] == [
        "- command", "- configuration", "- seeds", "- commit", "- device", "- machine", "- versions"]
    assert (done / "differences.parquet").is_file()
    for words in ("The difference is inconclusive (Welch's p",
                  "with 2 seeds the exact p cannot be below 0.333.",
                  "- 2 seeds; at least 4 are required: the exact p cannot be below 0.33, so no difference",
                  "With so few runs no difference can be significant",
                  "longer training may rank the models", "p cannot be below 0.5000",
                  "after the last update", "without a search"):
        assert words in text
    assert {row["model"] for row in json.loads((done / "models.json").read_text())} == {
        "full", "ternary"}


def test_repeating_the_command_trains_nothing(place: Path, done: Path, names: tuple[str, ...],
                                       capsys: pytest.CaptureFixture[str]) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*") if path.is_file()}
    before = times()
    assert main(["--config", str(place / "small.yaml")]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^evaluate: [a-z]", printed.err, re.MULTILINE) and "updates" not in printed.err
    assert "model" in printed.out and "ternary on" in printed.out and "report.html" in printed.out
    assert main(["--config", str(place / "small.yaml"), "--stage", "evaluate"]) == 0
    output = capsys.readouterr().out
    assert any(str(path) in output for path in (done / "stages").glob("evaluate-*"))
    # A comparison of one text alone reuses the runs.
    arguments = ["--config", str(place / "small.yaml"), f"texts=[{place / f'{names[-1]}.txt'}]"]
    assert main([*arguments, "--stage", "train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = place / f"{names[-1]}.txt"
    assert [line.split(": ")[0] for line in lines] == [
        f"{model} on {text}, seed {seed}" for model in ("full", "ternary") for seed in (0, 1)]
    assert all(Path(line.split(": ")[1], "summary.json").is_file() for line in lines)
    assert before == times()


def test_runs_of_one_seed_see_the_same_batches(place: Path) -> None:
    config = config_lib.from_dict(ComparisonConfig, options(place, place / "none"))
    study = ComparisonStudy(config, place / "none")
    seen = {}
    for model in study.models:
        for seed in (0, 1):
            task = TextTask(model.experiment(str(place / "one.txt"), seed), make_mesh(MeshConfig()))
            batches = iter(task.batches)
            seen[model.name, seed] = np.stack([next(batches).bytes for _ in range(STEPS)])
    for seed in (0, 1):
        np.testing.assert_array_equal(seen["full", seed], seen["ternary", seed])
    assert (seen["full", 0] != seen["full", 1]).any()


def test_learning_rate_search_is_the_same_for_all_models(place: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses runs of a separate seed, skips rates that diverge, and fails if all diverge."""
    tree = options(place, tmp_path, texts=[str(place / "one.txt")])
    config = dataclasses.replace(config_lib.from_dict(ComparisonConfig, tree),
                                 tuning=TuningConfig(rates=(0.1, 0.01, 1.0)))
    study, calls = ComparisonStudy(config, tmp_path), []

    def run(self: ComparisonStudy, model: models.ComparedModel, text: str, seed: int,
            rate: float) -> dict[str, Any]:
        calls.append((model.name, seed, rate))
        if rate == 1.0:
            raise TrainingStopped(train_command.DIVERGED)
        return {"final_valid_loss": {"full": rate, "ternary": -rate}[model.name], "run": f"{calls[-1]}"}
    monkeypatch.setattr(ComparisonStudy, "run", run)
    chosen = {name: read_result(path) for name, path in study.rates[str(place / "one.txt")].items()}
    assert [stage["chosen"] for stage in chosen.values()] == [0.01, 0.1]
    assert chosen["full"]["losses"] == {"0.1": 0.1, "0.01": 0.01, "1": None}
    assert {seed for _, seed, _ in calls} == {100} and len(calls) == 6
    runs, = study.runs.values()
    assert calls[6:] == [(name, seed, {"full": 0.01, "ternary": 0.1}[name]) for seed in (0, 1)
                         for name in ("full", "ternary")] and len(runs["full"]) == 2
    results = {"config": config_lib.to_dict(config), "tuning": {"one": chosen}}
    assert report.at_boundary(results) == ["full on one"]
    hot = ComparisonStudy(dataclasses.replace(config, tuning=TuningConfig(rates=(1.0,))), tmp_path / "hot")
    message = r"tuning.rates: expected a rate at which full does not diverge on .*, found 1;"
    with pytest.raises(InputError, match=message):
        hot.runs  # noqa: B018
    # A stage that was interrupted is not marked as finished.
    monkeypatch.setattr(ComparisonStudy, "run", lambda *_: (_ for _ in ()).throw(TrainingStopped(130)))
    stopped = ComparisonStudy(dataclasses.replace(config, tuning=TuningConfig(rates=(0.5,))),
                              tmp_path / "stopped")
    with pytest.raises(TrainingStopped):
        stopped.runs  # noqa: B018
    assert not list((tmp_path / "stopped").rglob("manifest.json"))


def test_invalid_configurations(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:
    """Each gives one line and exit status 2 before any training, and writes nothing."""
    monkeypatch.setattr(command, "write_report", lambda *_: pytest.fail("trains"))
    routed = str(place / "routed.yaml")

    def rejected(*parts: str, **changed: Any) -> None:
        config = write(tmp_path / "study.yaml", options(place, tmp_path / "out", **changed))
        assert main(["--config", config]) == 2
        assert_one_line(capsys.readouterr().err, *parts)
        assert not (tmp_path / "out").exists()

    def against(*settings: str, path: str = routed) -> dict[str, Any]:
        return {"models": {"full": {"train": routed}, "other": {"train": path, "set": list(settings)}}}
    rejected("other: expected the number of parameters of full", "within 1.0%", **against("model.d_model=24"))
    rejected("other: train.steps: expected 8, the value of full, found 9", **against("train.steps=9"))
    rejected("models.other: expected the configuration of a network trained on text from random weights, "
            "found sae-stories", models={"full": {"train": routed}, "other": {"train": "sae-stories"}})
    rejected("models.full: train.minutes: expected none, because all models make the same number of updates, "
            "found 5", set=["train.minutes=5"])
    rejected("other: data.valid_fraction: expected 0.1", **against("data.valid_fraction=0.2"))
    rejected("other: optimizer.name: expected adamw", **against("optimizer.name=muon"))
    rejected("other: expected no seed, which the study itself sets", **against("seed=3"))
    rejected("other: overrides: unknown key 'model.quantiser'", "model.quantizer",
            **against("model.quantiser=ternary"))
    rejected("other:", "none.yaml: no such file", **against(path=str(place / "none.yaml")))
    rejected("none.txt", texts=[str(place / "none.txt")])
    different = "expected names with different file names, found"
    rejected(f"texts: {different} 'a/one.txt' and 'b/one.txt' (both 'one')",
             texts=["stories", "a/one.txt", "b/one.txt"])
    rejected(f"texts: {different} 'x' and 'x' (both 'x')", texts=["x", "x"])
    rejected("texts: expected at least 1, found []", texts=[])
    rejected("models: expected at least 2, found []", models={})
    rejected(f"models: {different} 'a b' and 'a-b' (both 'a-b')",
            models={"a b": {"train": routed}, "a-b": {"train": routed}})
    rejected("models.other.path: expected a network's directory, or train",
            models={"full": {"train": routed}, "other": {}})
    rejected("models.other.path: expected only train and set, because the comparison trains its models; "
            "found 'x'", models={"full": {"train": routed}, "other": {"path": "x"}})
    rejected("unknown key 'models.other.trian' (did you mean 'models.other.train'?)",
            models={"full": {"train": routed}, "other": {"trian": routed}})
    rejected("models: expected names with a section each, found a list", models=["full", "other"])
    rejected("reference: expected one of ternary, full, found 'vanilla'", reference="vanilla")
    rejected("seeds: expected 2 to 10 different integers", "found [1]", seeds=[1])
    rejected("tuning.rates: expected different finite numbers above 0", tuning={"rates": [0.0]})
    rejected("tuning.seed: expected a seed other than [0, 1], found 1",
            tuning={"rates": [0.1], "seed": 1})
    (tmp_path / "short.txt").write_text("too short")
    rejected("texts:", "short.txt: train.seq_len: ", texts=[str(tmp_path / "short.txt")])
    assert main(["--config", str(tmp_path / "missing.yaml")]) == 2
    assert_one_line(capsys.readouterr().err, "missing.yaml: no such file")


def test_file_names() -> None:
    texts = ("stories", "books/my text.txt", "books/*.txt", "hf:a/b@c", "***")
    assert [file_name(text) for text in texts] == ["stories", "my-text", "books", "b-c", "text"]


SHIPPED = sorted((ROOT / "configs").glob("lite-vs-*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_comparison(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its models are comparable: sizes within the tolerance, the same text and budget."""
    monkeypatch.chdir(ROOT)
    config = config_lib.load(ComparisonConfig, path)
    compared = models.models(config)
    sizes = models.check(compared, config.texts[0], config.seeds[0], config.tolerance)
    assert f"--config {path.stem}" in path.read_text() and compared[0].name == "vanilla"
    bits = [round(sizes[name].bits_per_weight, 2) for name in ("lite", "ternary", "power3")]
    assert bits == [32, 1.58, 2.81]
    experiment = compared[0].experiment(config.texts[0], 0)
    assert f"{sizes['vanilla'].parameters:,}" in config_lib.find(compared[0].network.train).read_text()
    runs = len(compared) * (len(config.seeds) + len(config.tuning.rates))
    tokens = experiment.train.steps * experiment.train.batch_size * experiment.train.seq_len
    assert f"{runs} runs of {tokens:,} tokens" in path.read_text()
