"""`tilelli abstention` end to end on tiny networks: changed parameters, interruption, results, own files."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tests.eval.abstention.small import SEEDS, SHAPE, STEPS, N, options
from tests.eval.running import write
from tests.reference_impl.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax.eval.abstention.command import main
from tilelli_jax.eval.abstention.config import DATA_FILES, AbstentionConfig
from tilelli_jax.eval.abstention.study import CALIBRATION, PROMPTS, AbstentionStudy
from tilelli_jax.eval.abstention.variants import VARIANTS
from tilelli_jax.eval.tables import read_columns
from tilelli_jax.loading import store
from tilelli_jax.models import VanillaConfig
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.signals.names import HEAD
from tilelli_jax.training import loop

# The parameters that each variant may change.
CHANGES = {"v4": r".*", "v5": r"blocks\.\d+\.router\..*", "v6": r"blocks\.\d+\.router\..*",
           "v7": r"blocks\.\d+\.router\..*|abstain\..*", "v8a": r"blocks\.\d+\.router\..*|abstain\..*",
           "v8b": r"blocks\.\d+\.router\..*|abstain\..*", "router-kl": r"blocks\.\d+\.router\..*|abstain\..*",
           "splice": r"abstain\..*", "v9": r"abstain\..*"}
# One variant of each kind; the exhaustive tests cover the others.
FEW = ("v4", "v7", "v8b", "splice", "v9", "mean-pool-head", "pca-head")
OTHERS = tuple(name for name in VARIANTS if name not in FEW)


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """A few variants of one seed, interrupted by Ctrl-C in the first update of v4 and resumed."""
    out, steps, should_stop = place / "out", [], loop.should_stop
    config = write(place / "tiny.yaml", options(out, seeds=[0], variants=list(FEW)))

    def interrupting(step: int) -> bool:
        steps.append(step)
        if len(steps) == STEPS + 1:
            signal.raise_signal(signal.SIGINT)
        return should_stop(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "should_stop", interrupting)
        assert main(["--config", config]) == 130
        assert list(out.glob("networks/v4-0-*")) and not list(out.glob("networks/v4-0-*/summary.json"))
        assert not (out / "report.md").exists()
        assert main(["--config", config]) == 0
    assert steps[:STEPS + 1] == [1, 2, 1] and steps.count(1) <= 6, "the base is trained once"
    return out


@pytest.fixture(scope="module")
def several(place: Path, done: Path) -> dict[str, Any]:
    """results.json of two variants with two seeds, in a directory for the part."""
    before = {path: path.stat().st_mtime_ns for path in done.iterdir() if path.is_file()}
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert main(["--config", str(place / "tiny.yaml"), "--variants", "v4, v8b", "--seeds", "0,1"]) == 0
    # A finished stage is reused: its line has words before the path.
    assert re.search(r"^v4-0: [a-z]", stderr.getvalue(), re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in done.iterdir() if path.is_file()} == before
    return json.loads((done / "parts" / "v4+v8b-seeds-0+1" / "results.json").read_text())


@pytest.fixture(scope="module")
def study(place: Path, done: Path) -> AbstentionStudy:
    return AbstentionStudy(config_lib.load(AbstentionConfig, place / "tiny.yaml"), done)


def arrays(study: AbstentionStudy, name: str, seed: int) -> dict[str, np.ndarray]:
    return to_arrays(store.load(study.network(name, seed)))


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """The parameters that are not bit-identical, and new parameters that are not zero."""
    assert before.keys() <= after.keys()
    return {name for name, array in after.items()
            if not np.array_equal(array, before.get(name, np.zeros_like(array)))}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.exhaustive if name in OTHERS else ()) for name in CHANGES])
def test_a_variant_changes_only_the_parameters_it_trains(study: AbstentionStudy, name: str) -> None:
    before, after = (arrays(study, network, 0) for network in (VARIANTS[name].start, name))
    moved = changed(before, after)
    assert moved and all(re.fullmatch(CHANGES[name], parameter) for parameter in moved), moved
    for group in CHANGES[name].split("|"):  # it changes every group that it may change
        assert any(re.fullmatch(group, parameter) for parameter in moved)
    if name == "v4":
        assert len(moved) == len(after)
    assert CHANGES.keys() == {name for name, variant in VARIANTS.items() if variant.kind != "fitted"}


def test_generation_is_unchanged_where_only_the_head_changes(study: AbstentionStudy) -> None:
    same = [name for name, variant in VARIANTS.items() if variant.preserves_generation]
    answers = {name: read_columns(study.measured(name, 0) / PROMPTS)["answer"].tolist()
               for name in ("v4", *same)}
    for name in same:
        assert answers[name] == answers["v4"], name
    ids = np.arange(40, dtype=np.int32)[None] + 60
    start = store.load(study.network("v4", 0))(ids)
    for name in ("v9", "splice"):
        np.testing.assert_array_equal(start, store.load(study.network(name, 0))(ids))
    assert {name for name, variant in VARIANTS.items() if not variant.preserves_generation} == {
        "v4", "v5", "v6", "v7", "v8a", "v8b", "router-kl"}


def test_the_router_changes_without_the_router_entropy_loss(study: AbstentionStudy) -> None:
    assert VARIANTS["v8b"].router_entropy_weight == 0
    drift = {name: read_columns(study.measured(name, 0) / PROMPTS)["drift"].mean()
             for name in ("v4", "v8b", "v9", "splice")}
    noise = max(abs(drift[name]) for name in ("v4", "v9", "splice"))  # measured: 2e-9
    assert noise < 1e-7 and drift["v8b"] > 1e-6


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(VARIANTS), marks=pytest.mark.exhaustive)],
                         ids=["few", "all"])
def test_the_report(place: Path, done: Path, names: tuple[str, ...]) -> None:
    if names != FEW:
        assert main(["--config", str(place / "tiny.yaml"), "--variants", ",".join(names)]) == 0
        done = done / "parts" / "+".join(names)
    results = json.loads((done / "results.json").read_text())
    text = (done / "report.md").read_text()
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text), "every number is printed"
    assert results["seeds"] == [0] and set(results["variants"]) == set(names)
    assert "with one seed they do not cover the variation between seeds" in text
    assert "this v4 **does not count as coherent**" in text, "after two updates"
    for name in names:
        assert f"| {name} " in text
    for name in ("signal-and-chat", "heads"):
        assert f"figures/{name}.png" in text and (done / "figures" / f"{name}.png").stat().st_size > 5000
    assert "the vertical dotted line is v4's mean accuracy, the horizontal one chance (0.5)." in text
    assert re.search(r"\| v4 +\|.*\| reference +\|\n", text) and "| closed-book accuracy " in text
    v4, v9, v8b = (results["variants"][name] for name in ("v4", "v9", "v8b"))
    assert HEAD not in v4["signals"] and {"raw_probe", "sae_probe", "lens_entropy", "router_entropy_b1"} <= (
        v4["signals"].keys())
    assert v9["same_answers"] == [True] and v4["same_answers"] is None
    assert v9["cost"]["trained_parameters"] == 17 and v8b["cost"]["trained_parameters"] == 17 + 2 * 16 * 2
    if "v5" in names:
        assert results["variants"]["v5"]["cost"]["trained_parameters"] == 2 * 16 * 2
    assert v9["cost"]["parameters"] == v4["cost"]["parameters"] + 17
    assert v9["chat_loss"] == pytest.approx(v4["chat_loss"], rel=2e-6) and v8b["chat_loss"] != v4["chat_loss"]
    compared = {(row["a"], row["b"]) for row in results["head_comparisons"]}
    assert compared >= {("v9", "v8b"), ("mean-pool-head", "v9")}


@pytest.mark.exhaustive
def test_results_agree_with_the_tables(study: AbstentionStudy, several: dict[str, Any]) -> None:
    """AUROC is the mean over seeds of counted pairs; abstention rates are counted prompts."""
    variants = several["variants"]
    assert several["seeds"] == [0, 1] and set(variants) == {"v4", "v8b"}
    tables = {(name, seed): read_columns(study.measured(name, seed) / PROMPTS)
              for name in ("v4", "v8b") for seed in SEEDS}
    for name in ("v4", "v8b"):
        for score, direction in (("max_softmax_mean", -1), ("router_entropy", 1), ("abstain_p", 1)):
            if score not in variants[name]["signals"]:
                continue
            aurocs = []
            for seed in SEEDS:
                known = tables[name, seed]["regime"] == "in_domain"
                a, b = (direction * tables[name, seed][score][rows] for rows in (~known, known))
                aurocs.append(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b)))
            np.testing.assert_allclose(variants[name]["signals"][score]["by_seed"], aurocs, atol=1e-12)
            assert variants[name]["signals"][score]["cross_regime"]["point"] == pytest.approx(np.mean(aurocs))
            assert aurocs[0] != aurocs[1]  # each seed trains its own networks
    abstention, rates = variants["v8b"]["abstention"], []
    for i, seed in enumerate(SEEDS):
        calibrated = read_columns(study.measured("v8b", seed) / CALIBRATION)["abstain_p"]
        assert len(calibrated) == N and np.mean(calibrated > abstention["thresholds"][i]) <= 0.05
        rows = tables["v8b", seed]
        rates.append(np.mean(rows["abstain_p"][rows["regime"] == "gibberish"] > abstention["thresholds"][i]))
    assert abstention["calibrated"]["gibberish"]["point"] == pytest.approx(np.mean(rates))
    assert len(variants["v8b"]["chat_loss"]) == len(variants["v8b"]["same_answers"]) == 2


def test_a_stage_runs_only_what_it_needs(place: Path, done: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    times = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    config = str(place / "tiny.yaml")
    assert main(["--config", config, "--variants", "v9", "--stage", "measure"]) == 0
    output = capsys.readouterr().out
    assert "v4, seed 0: " in output and "v9, seed 0: " in output and "v8b" not in output
    assert main(["--config", config, "--stage", "data"]) == 0
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()} == times


def test_given_networks_are_not_trained(place: Path, study: AbstentionStudy, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """v4 and v9 are given as model directories, as a converted original would be."""
    for name in ("v4", "v9"):
        shutil.copytree(study.network(name, 0), tmp_path / name)
    given = {name: {"path": str(tmp_path / name)} for name in ("v4", "v9")}
    out = tmp_path / "out"
    config = write(tmp_path / "given.yaml", options(out, networks=given, seeds=[0], variants=["v4", "v9"],
                                                    prompts=str(place / "prompts.jsonl")))
    assert main(["--config", config]) == 0
    assert not (out / "networks").exists() and (out / "report.md").exists()
    given_aurocs, trained_aurocs = (
        json.loads((path / "results.json").read_text())["variants"]["v9"]["signals"][HEAD]["by_seed"]
        for path in (out, place / "out"))
    assert given_aurocs[0] == trained_aurocs[0]
    capsys.readouterr()


def test_prompts_without_answers_and_a_network_without_a_router(place: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    """As with the original's prompts, which have no answers: accuracy is undefined."""
    rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()]
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps(
        {key: row[key] for key in ("prompt", "regime")}) for row in rows))
    store.save(random_network(VanillaConfig(**SHAPE), 0)[0], tmp_path / "vanilla")
    out = tmp_path / "out"
    config = write(tmp_path / "bare.yaml", options(
        out, networks={"v4": {"path": str(tmp_path / "vanilla")}}, seeds=[0], variants=["v4"],
        prompts=str(tmp_path / "bare.jsonl")))
    assert main(["--config", config]) == 0
    notes, text = capsys.readouterr().err, (out / "report.md").read_text()
    assert "note: prompts: fewer than 30" in notes and "note: pairs.files: chat, answerability" in notes
    variant = json.loads((out / "results.json").read_text())["variants"]["v4"]
    assert variant["closed_book_accuracy"] is None and variant["drift"] is None
    assert "router_entropy" not in variant["signals"]
    assert "the prompts have no such answers" in text and "the network has no router" in text
    assert "Data about the built-in village" in text


def test_an_interrupted_splice_is_repeated(study: AbstentionStudy) -> None:
    path = study.network("splice", 0)
    (path.parent / "manifest.json").unlink()
    (path / "config.json").write_text("{")
    again = AbstentionStudy(study.config, study.out)
    assert again.network("splice", 0) == path and store.load(path).config.abstain_head


def test_held_out_prompts_are_not_in_the_training_files(study: AbstentionStudy) -> None:
    prompts = {name: [json.loads(line).get("prompt") for line in (study.data / f"{name}.jsonl").open()]
               for name in DATA_FILES}
    training = {prompt for name in ("chat", "answerability", "answers") for prompt in prompts[name]}
    for name in ("held_out", "calibration"):
        assert len(set(prompts[name])) == len(prompts[name]) and not training & set(prompts[name])
    assert not set(prompts["held_out"]) & set(prompts["calibration"])
    assert not {prompt.prompt for prompt in study.prompts} & (training | set(prompts["held_out"]))


def test_own_files_replace_the_generated_ones(study: AbstentionStudy, place: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """The hash in the name of the stage depends on their contents."""
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"q{i}", "response": "a", "answerable": i % 2 == 0}) + "\n"
                           for i in range(50)))
    tree = options(tmp_path / "out", prompts=str(place / "prompts.jsonl"), seeds=[0])
    tree["pairs"]["files"] = {"answerability": str(own)}
    assert main(["--config", write(tmp_path / "own.yaml", tree), "--stage", "data"]) == 0
    data = Path(capsys.readouterr().out.split()[-1])
    assert (data / "answerability.jsonl").read_bytes() == own.read_bytes()
    assert (data / "chat.jsonl").read_bytes() == (study.data / "chat.jsonl").read_bytes()
    assert data.name != study.data.name
    own.write_text(own.read_text() + json.dumps({"prompt": "q" * 200, "response": "a"}) + "\n")
    assert main(["--config", str(tmp_path / "own.yaml"), "--stage", "data"]) == 2
    assert_one_line(capsys.readouterr().err, "line 51: train.seq_len: expected at least")


@pytest.mark.parametrize(("name", "other"), [
    ("calibration", "answerability"), ("held_out", "chat"), ("calibration", "held_out")])
def test_own_files_must_not_share_held_out_prompts(study: AbstentionStudy, place: Path, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str], name: str,
                                                   other: str) -> None:
    """The user's file shares a prompt with a generated file, or with another file of the user."""
    shared = next(json.loads(line)["prompt"] for line in (study.data / f"{other}.jsonl").open())
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": prompt, "response": "a", "answerable": i % 2 == 0}) + "\n"
                           for i, prompt in enumerate([*(f"q{i}" for i in range(60)), shared])))
    tree = options(tmp_path / "out", prompts=str(place / "prompts.jsonl"), seeds=[0])
    for files in ({name: str(own)}, {name: str(own), other: str(own)}):
        tree["pairs"]["files"] = files
        assert main(["--config", write(tmp_path / "own.yaml", tree), "--stage", "data"]) == 2
        *_, last = capsys.readouterr().err.splitlines(keepends=True)  # after the log lines
        assert_one_line(last, f"pairs.files: {own}: expected no prompt that is in ")
