"""tilelli abstention calibrate: the threshold it keeps, what it promises, what it refuses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tilelli_jax.eval.abstention.command import calibrate
from tilelli_jax.eval.abstention.decision import direction
from tilelli_jax.eval.inputs.networks import contents
from tilelli_jax.eval.thresholds import conformal_threshold

import tilelli_jax
from tests.refusals import assert_one_line
from tests.restated.random_weights import random_network
from tilelli_jax import abstain_rule
from tilelli_jax.data.turns import asked
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.store import build

SHAPE = {"d_model": 16, "n_layers": 2, "max_seq_len": 64, "n_heads": 2, "positions": "learned"}
ROUTED = RoutedConfig(**SHAPE, d_head=8, top_k=4, dense_expand=2, abstain_head=True)
QUESTIONS = [f"Where does {who} {what}?" for who in ("Ada", "Bo", "Cy", "Di", "Em", "Flo", "Gus", "Hal")
             for what in ("live", "sing", "work", "eat a pie", "go")]  # 40


@pytest.fixture(scope="module")
def model() -> Any:
    return random_network(ROUTED, 5)[0]


@pytest.fixture
def path(model: Any, tmp_path: Path) -> Path:
    tilelli_jax.save(model, tmp_path / "model")
    return tmp_path / "model"


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asked_for(tmp_path: Path) -> Path:
    return lines(tmp_path / "on.jsonl", [{"prompt": text, "response": "here"} for text in QUESTIONS])


def run(model: Path, on: Path, *more: object) -> int:
    return calibrate(["--model", str(model), "--on", str(on), *map(str, more)])


@pytest.mark.parametrize("signal", [
    "abstain_p", pytest.param("max_softmax_mean", marks=pytest.mark.exhaustive)])
def test_the_target_is_held_on_the_prompts(signal: str, model: Any, path: Path, asked_for: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, asked_for, "--signal", signal, "--fpr", 0.1, "--template", "Wer weiß?") == 0
    out, err = capsys.readouterr()
    found, reader = abstain_rule.read(path, model), abstain_rule.reader_of(model, signal)
    prompts, way = [asked(text) for text in QUESTIONS], direction(signal)
    expected = conformal_threshold(way * abstain_rule.measured(reader, prompts, signal), 0.1)
    assert (found.signal, found.direction, found.template) == (signal, way, "Wer weiß?")
    assert (found.target_fpr, found.prompts, found.measured_fpr) == (0.1, 40, expected.measured)
    np.testing.assert_allclose(found.threshold, way * expected.value, rtol=1e-6)
    np.testing.assert_allclose(found.expected_fpr, expected.expected)
    declined = found.abstains(reader, prompts)
    assert np.mean(declined) == found.measured_fpr == 3 / 40 <= 0.1  # the 37th of 40 is the threshold
    side = "above" if way == 1 else "below"
    assert err == "" and out == (
        "declines" + " " * (len(found.rule) - 8) + "  of these prompts  of others, foreseen\n"
        + "-" * len(found.rule) + "  ----------------  -------------------\n"
        + f"{found.rule}  3 of 40: 7.5%     9.8% [2.8%, 20.4%]\n{path / abstain_rule.FILE}\n")
    assert found.rule == f"where {signal} is {side} {found.threshold:.4g}"


def test_only_prompts_with_an_answer_count(path: Path, model: Any, tmp_path: Path, asked_for: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, asked_for) == 0
    first = abstain_rule.read(path, model)
    rows = [row for text in QUESTIONS for row in (
        {"prompt": f"  {text}\n", "answerable": True}, {"prompt": f"Why not {text}", "answerable": False})]
    capsys.readouterr()
    assert run(path, lines(tmp_path / "both.jsonl", rows)) == 0
    assert abstain_rule.read(path, model) == first
    assert capsys.readouterr().err == ("note: 40 without an answer left out: the rate is of those that have "
                                       "one\n")


def test_prompts_that_are_there_twice_are_noted(path: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": text} for text in (*QUESTIONS, *QUESTIONS[:3])]
    assert run(path, lines(tmp_path / "twice.jsonl", rows)) == 0
    assert capsys.readouterr().err == ("note: 3 of 43 prompts have been there before: what is foreseen is of "
                                       "prompts drawn as these were\n")


def test_too_few_prompts_decline_never_and_it_is_said(path: Path, model: Any, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    few = [{"prompt": text} for text in QUESTIONS[:9]]
    assert run(path, lines(tmp_path / "few.jsonl", few), "--fpr", 0.1) == 0
    assert "Never" not in capsys.readouterr().out and abstain_rule.read(path, model).threshold != abstain_rule.NEVER
    assert run(path, lines(tmp_path / "few.jsonl", few[:8]), "--fpr", 0.1) == 0
    assert "\nNever: 8 prompts are too few to hold 0.1; it takes 9 at least.\n" in capsys.readouterr().out
    found = abstain_rule.read(path, model)
    assert found.threshold == abstain_rule.NEVER and found.expected_fpr == (0, 0, 0) and found.measured_fpr == 0


def test_a_threshold_makes_no_other_network(path: Path, asked_for: Path) -> None:
    """Stages of studies are named by the networks they ask."""
    before = contents(path)
    assert run(path, asked_for) == 0 and (path / abstain_rule.FILE).is_file()
    assert contents(path) == before


# --- Refusals --------------------------------------------------------------------------------


def on(*rows: Any) -> Callable[[Path], list[object]]:
    return lambda tmp: ["--on", lines(tmp / "on.jsonl", list(rows))]


def network(config: Any) -> Callable[[Path], list[object]]:
    def arguments(tmp: Path) -> list[object]:
        made = random_network(config, 0)[0] if isinstance(config, VanillaConfig) else build(config)
        tilelli_jax.save(made, tmp / "other")
        return ["--model", tmp / "other"]
    return arguments


@pytest.mark.parametrize(("more", "says"), [
    (lambda tmp: ["--fpr", 0], "--fpr: expected a share above 0 and below 1, found 0.0"),
    (lambda tmp: ["--fpr", "nan"], "--fpr: expected a share above 0 and below 1, found nan"),
    (lambda tmp: ["--template", ""], "template: expected one line of text, found ''"),
    (lambda tmp: ["--template", "a\nUSER: b"], "template: expected one line of text"),
    (lambda tmp: ["--signal", "doubt"], "--signal: expected one that {tmp}/model has, of max_softmax_last, "),
    (lambda tmp: ["--signal", "drift"], "found 'drift'"),
    (network(VanillaConfig(**SHAPE)), "found 'abstain_p'; this network has no abstain head"),
    (network(SAEConfig(d_model=8, n_latents=8, k=2)), "{tmp}/other: expected a network that reads bytes, "
     "found family sae"),
    (lambda tmp: ["--model", tmp / "none"], "{tmp}/none: expected a model directory"),
    (lambda tmp: ["--on", tmp / "none.jsonl"], "{tmp}/none.jsonl: no such file"),
    (on("a"), "{tmp}/on.jsonl, line 1: expected an object with a prompt, found 'a'"),
    (on({"prompt": "a"}, {"text": "b"}), "{tmp}/on.jsonl, line 2: prompt: expected text, found none"),
    (on({"prompt": "a", "answerable": 0}), "line 1: answerable: expected true or false, found 0"),
    (on({"prompt": "a", "answerable": False}), "{tmp}/on.jsonl: expected prompts that can be answered, "
     "found none"),
    (on({"prompt": "a"}, {"prompt": "b" * 50}), "{tmp}/on.jsonl, line 2: prompt: takes 65 bytes as a turn, "
     "and {tmp}/model reads 64"),
    (lambda tmp: ["--stage", "all"], "unrecognized arguments: --stage all"),
])
def test_refusals_are_one_line_and_nothing_is_written(
        more: Callable[[Path], list[object]], says: str, path: Path, asked_for: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    given = more(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert run(path, asked_for, *given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, says.format(tmp=tmp_path))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_what_cannot_be_written_leaves_the_old_one(path: Path, model: Any, asked_for: Path,
                                                   monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, asked_for) == 0
    kept = (path / abstain_rule.FILE).read_bytes()
    capsys.readouterr()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run(path, asked_for, "--fpr", 0.5) == 2
    assert_one_line(capsys.readouterr().err, f"{path / abstain_rule.FILE}: cannot be written: No space left")
    assert (path / abstain_rule.FILE).read_bytes() == kept
    assert sorted(file.name for file in path.iterdir()) == ["abstain.json", "config.json",
                                                            "model.safetensors"]


def test_numbers_that_are_none_are_refused(path: Path, asked_for: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(abstain_rule, "measured", lambda *_: np.array([0.5, math.nan]))
    assert run(path, asked_for) == 2
    assert_one_line(capsys.readouterr().err, "abstain_p: expected numbers, found some that are not finite")
    assert not (path / abstain_rule.FILE).exists()
