"""The study as its users run it, on tiny networks: what each variant changes, interrupted, taken up again."""

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
from tilelli_jax.eval.abstention.command import main
from tilelli_jax.eval.abstention.config import DATA_FILES, AbstentionConfig
from tilelli_jax.eval.abstention.study import CALIBRATION, PROMPTS, Study
from tilelli_jax.eval.abstention.variants import VARIANTS
from tilelli_jax.eval.tables import read_columns

from tests.eval.abstention.small import SEEDS, SHAPE, STEPS, N, options
from tests.eval.running import write
from tests.refusals import assert_one_line
from tests.restated.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.models import VanillaConfig
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.signals.names import HEAD
from tilelli_jax.training import loop

# What each variant may change, by the names of the parameters.
CHANGES = {"v4": r".*", "v5": r"blocks\.\d+\.router\..*", "v6": r"blocks\.\d+\.router\..*",
           "v7": r"blocks\.\d+\.router\..*|abstain\..*", "v8a": r"blocks\.\d+\.router\..*|abstain\..*",
           "v8b": r"blocks\.\d+\.router\..*|abstain\..*", "tether": r"blocks\.\d+\.router\..*|abstain\..*",
           "splice": r"abstain\..*", "v9": r"abstain\..*"}
# One of each kind; that of the others is left to the exhaustive tests.
FEW = ("v4", "v7", "v8b", "splice", "v9", "pooled", "low-rank")
OTHERS = tuple(name for name in VARIANTS if name not in FEW)


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """A few variants of one seed: stopped by Ctrl-C in the first update of v4, and continued."""
    out, steps, plain = place / "out", [], loop.should_stop
    config = write(place / "tiny.yaml", options(out, seeds=[0], variants=list(FEW)))

    def interrupting(step: int) -> bool:
        steps.append(step)
        if len(steps) == STEPS + 1:
            signal.raise_signal(signal.SIGINT)
        return plain(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "should_stop", interrupting)
        assert main(["--config", config]) == 130
        assert list(out.glob("networks/v4-0-*")) and not list(out.glob("networks/v4-0-*/summary.json"))
        assert not (out / "report.md").exists()
        assert main(["--config", config]) == 0
    assert steps[:STEPS + 1] == [1, 2, 1] and steps.count(1) <= 6, "the base is not trained again"
    return out


@pytest.fixture(scope="module")
def several(place: Path, done: Path) -> dict[str, Any]:
    """Another seed of two variants beside it: results.json of both, in a directory of its own."""
    kept = {path: path.stat().st_mtime_ns for path in done.iterdir() if path.is_file()}
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert main(["--config", str(place / "tiny.yaml"), "--variants", "v4, v8b", "--seeds", "0,1"]) == 0
    assert "v4-0: as it is in" in told.getvalue()  # what is there is not made again
    assert {path: path.stat().st_mtime_ns for path in done.iterdir() if path.is_file()} == kept
    return json.loads((done / "parts" / "v4+v8b-seeds-0+1" / "results.json").read_text())


@pytest.fixture(scope="module")
def study(place: Path, done: Path) -> Study:
    return Study(config_lib.load(AbstentionConfig, place / "tiny.yaml"), done)


def arrays(study: Study, name: str, seed: int) -> dict[str, np.ndarray]:
    return to_arrays(store.load(study.network(name, seed)))


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """Parameters that are not the same to the bit; those that are new among them, if they are not zero."""
    assert before.keys() <= after.keys()
    return {name for name, array in after.items()
            if not np.array_equal(array, before.get(name, np.zeros_like(array)))}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.exhaustive if name in OTHERS else ()) for name in CHANGES])
def test_a_variant_changes_what_it_trains_and_nothing_else(study: Study, name: str) -> None:
    before, after = (arrays(study, one, 0) for one in (VARIANTS[name].start, name))
    moved = changed(before, after)
    assert moved and all(re.fullmatch(CHANGES[name], one) for one in moved), moved
    for group in CHANGES[name].split("|"):  # every group that it may change, it does
        assert any(re.fullmatch(group, one) for one in moved)
    if name == "v4":
        assert len(moved) == len(after)
    assert CHANGES.keys() == {name for name, one in VARIANTS.items() if one.kind != "fitted"}


def test_generation_stays_as_it_was_where_only_the_head_changes(study: Study) -> None:
    same = [name for name, one in VARIANTS.items() if one.generates_as_before]
    said = {name: read_columns(study.measured(name, 0) / PROMPTS)["answer"].tolist()
            for name in ("v4", *same)}
    for name in same:
        assert said[name] == said["v4"], name
    ids = np.arange(40, dtype=np.int32)[None] + 60
    start = store.load(study.network("v4", 0))(ids)
    for name in ("v9", "splice"):
        np.testing.assert_array_equal(start, store.load(study.network(name, 0))(ids))
    assert {name for name, one in VARIANTS.items() if not one.generates_as_before} == {
        "v4", "v5", "v6", "v7", "v8a", "v8b", "tether"}


def test_the_router_moves_without_metacognition(study: Study) -> None:
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
    found = json.loads((done / "results.json").read_text())
    text = (done / "report.md").read_text()
    assert found["seeds"] == [0] and set(found["variants"]) == set(names)
    assert "one seed says nothing of others" in text
    assert "this v4 **is not to be called coherent**" in text, "two updates teach no chat"
    for name in names:
        assert f"| {name} " in text
    for name in ("signal-and-chat", "heads"):
        assert f"figures/{name}.png" in text and (done / "figures" / f"{name}.png").stat().st_size > 5000
    v4, v9, v8b = (found["variants"][name] for name in ("v4", "v9", "v8b"))
    assert HEAD not in v4["signals"] and {"raw_probe", "sae_probe", "lens_entropy", "router_entropy_b1"} <= (
        v4["signals"].keys())
    assert v9["same_answers"] == [True] and v4["same_answers"] is None
    assert v9["cost"]["trained_parameters"] == 17 and v8b["cost"]["trained_parameters"] == 17 + 2 * 16 * 2
    if "v5" in names:
        assert found["variants"]["v5"]["cost"]["trained_parameters"] == 2 * 16 * 2
    assert v9["cost"]["parameters"] == v4["cost"]["parameters"] + 17
    assert v9["chat_loss"] == pytest.approx(v4["chat_loss"], rel=2e-6) and v8b["chat_loss"] != v4["chat_loss"]
    assert {(one["a"], one["b"]) for one in found["between"]} >= {("v9", "v8b"), ("pooled", "v9")}


@pytest.mark.exhaustive
def test_its_numbers_are_those_of_its_tables(study: Study, several: dict[str, Any]) -> None:
    """The mean over seeds, each by counting pairs; thresholds and shares by counting prompts."""
    found = several["variants"]
    assert several["seeds"] == [0, 1] and set(found) == {"v4", "v8b"}
    of = {(name, seed): read_columns(study.measured(name, seed) / PROMPTS)
          for name in ("v4", "v8b") for seed in SEEDS}
    for name in ("v4", "v8b"):
        for score, points in (("max_softmax_mean", -1), ("router_entropy", 1), ("abstain_p", 1)):
            if score not in found[name]["signals"]:
                continue
            areas = []
            for seed in SEEDS:
                known = of[name, seed]["regime"] == "in_domain"
                a, b = (points * of[name, seed][score][rows] for rows in (~known, known))
                areas.append(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b)))
            np.testing.assert_allclose(found[name]["signals"][score]["runs"], areas, atol=1e-12)
            assert found[name]["signals"][score]["cross"]["point"] == pytest.approx(np.mean(areas))
            assert areas[0] != areas[1]  # seeds are networks of their own
    gate, shares = found["v8b"]["abstention"], []
    for i, seed in enumerate(SEEDS):
        calibrated = read_columns(study.measured("v8b", seed) / CALIBRATION)["abstain_p"]
        assert len(calibrated) == N and np.mean(calibrated > gate["thresholds"][i]) <= 0.05
        rows = of["v8b", seed]
        shares.append(np.mean(rows["abstain_p"][rows["regime"] == "gibberish"] > gate["thresholds"][i]))
    assert gate["calibrated"]["gibberish"]["point"] == pytest.approx(np.mean(shares))
    assert len(found["v8b"]["chat_loss"]) == len(found["v8b"]["same_answers"]) == 2


def test_a_stage_makes_what_it_needs_and_no_more(place: Path, done: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    times = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    config = str(place / "tiny.yaml")
    assert main(["--config", config, "--variants", "v9", "--stage", "measure"]) == 0
    told = capsys.readouterr().out
    assert "v4, seed 0: " in told and "v9, seed 0: " in told and "v8b" not in told
    assert main(["--config", config, "--stage", "data"]) == 0
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()} == times


def test_networks_that_are_there(place: Path, study: Study, tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """v4 and v9 as model directories, as a converted original would be: nothing is trained."""
    for name in ("v4", "v9"):
        shutil.copytree(study.network(name, 0), tmp_path / name)
    given = [f"v4={tmp_path / 'v4'}", f"v9={tmp_path / 'v9'}"]
    out = tmp_path / "out"
    config = write(tmp_path / "given.yaml", options(out, given=given, seeds=[0], variants=["v4", "v9"],
                                                    prompts=str(place / "prompts.jsonl")))
    assert main(["--config", config]) == 0
    assert not (out / "networks").exists() and (out / "report.md").exists()
    there, here = (json.loads((path / "results.json").read_text())["variants"]["v9"]["signals"][HEAD]["runs"]
                   for path in (out, place / "out"))
    assert there[0] == here[0]
    capsys.readouterr()


def test_prompts_without_answers_and_a_network_without_a_router(place: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    """As the original's own prompts are: nothing can be told of what is known."""
    rows = [json.loads(line) for line in (place / "prompts.jsonl").read_text().splitlines()]
    (tmp_path / "bare.jsonl").write_text("\n".join(json.dumps(
        {key: row[key] for key in ("prompt", "regime")}) for row in rows))
    store.save(random_network(VanillaConfig(**SHAPE), 0)[0], tmp_path / "vanilla")
    out = tmp_path / "out"
    config = write(tmp_path / "bare.yaml", options(
        out, given=[f"v4={tmp_path / 'vanilla'}"], seeds=[0], variants=["v4"],
        prompts=str(tmp_path / "bare.jsonl")))
    assert main(["--config", config]) == 0
    told, text = capsys.readouterr().err, (out / "report.md").read_text()
    assert "note: prompts: fewer than 30" in told and "note: pairs.files: chat, semantic" in told
    found = json.loads((out / "results.json").read_text())["variants"]["v4"]
    assert found["known"] is None and found["drift"] is None and "router_entropy" not in found["signals"]
    assert "the prompts have no such answers" in text and "it has no router" in text
    assert "Of the village" in text


def test_a_splice_that_was_interrupted_is_made_anew(study: Study) -> None:
    path = study.network("splice", 0)
    (path.parent / "manifest.json").unlink()
    (path / "config.json").write_text("{")
    again = Study(study.config, study.out)
    assert again.network("splice", 0) == path and store.load(path).config.abstain_head


def test_nothing_held_out_is_learned_from(study: Study) -> None:
    asked = {name: [json.loads(line).get("prompt") for line in (study.data / f"{name}.jsonl").open()]
             for name in DATA_FILES}
    learned = {prompt for name in ("chat", "semantic", "answers") for prompt in asked[name]}
    for name in ("held_out", "calibration"):
        assert len(set(asked[name])) == len(asked[name]) and not learned & set(asked[name])
    assert not set(asked["held_out"]) & set(asked["calibration"])
    assert not {one.prompt for one in study.prompts} & (learned | set(asked["held_out"]))


def test_files_of_ones_own(study: Study, place: Path, tmp_path: Path,
                           capsys: pytest.CaptureFixture[str]) -> None:
    """They take the place of the village's, and what is in them is in the key."""
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": f"q{i}", "response": "a", "answerable": i % 2 == 0}) + "\n"
                           for i in range(50)))
    tree = options(tmp_path / "out", prompts=str(place / "prompts.jsonl"), seeds=[0])
    tree["pairs"]["files"] = [f"semantic={own}"]
    assert main(["--config", write(tmp_path / "own.yaml", tree), "--stage", "data"]) == 0
    made = Path(capsys.readouterr().out.split()[-1])
    assert (made / "semantic.jsonl").read_bytes() == own.read_bytes()
    assert (made / "chat.jsonl").read_bytes() == (study.data / "chat.jsonl").read_bytes()
    assert made.name != study.data.name
    own.write_text(own.read_text() + json.dumps({"prompt": "q" * 200, "response": "a"}) + "\n")
    assert main(["--config", str(tmp_path / "own.yaml"), "--stage", "data"]) == 2
    assert_one_line(capsys.readouterr().err, "line 51: takes a train.seq_len of")


@pytest.mark.parametrize(("name", "other"), [
    ("calibration", "semantic"), ("held_out", "chat"), ("calibration", "held_out")])
def test_what_is_held_out_is_nowhere_else(study: Study, place: Path, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str], name: str, other: str) -> None:
    """A prompt of the village's own in a file of one's own; and two files of one's own."""
    shared = next(json.loads(line)["prompt"] for line in (study.data / f"{other}.jsonl").open())
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": prompt, "response": "a", "answerable": i % 2 == 0}) + "\n"
                           for i, prompt in enumerate([*(f"q{i}" for i in range(60)), shared])))
    tree = options(tmp_path / "out", prompts=str(place / "prompts.jsonl"), seeds=[0])
    for given in ([f"{name}={own}"], [f"{name}={own}", f"{other}={own}"]):
        tree["pairs"]["files"] = given
        assert main(["--config", write(tmp_path / "own.yaml", tree), "--stage", "data"]) == 2
        *_, last = capsys.readouterr().err.splitlines(keepends=True)  # after what is told of
        assert_one_line(last, f"pairs.files: {own}: expected no prompt that is in ")
