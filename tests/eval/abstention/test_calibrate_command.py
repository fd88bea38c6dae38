"""`tilelli abstention calibrate`: the threshold, the expected rate, and invalid input."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax.data.turns import user_turn
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.eval.abstention.command import calibrate
from tilelli_jax.eval.thresholds import conformal_threshold
from tilelli_jax.generation import abstain_rule
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.loading.store import build
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.signals.names import direction

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
def calibration_file(tmp_path: Path) -> Path:
    return lines(tmp_path / "on.jsonl", [{"prompt": text, "response": "here"} for text in QUESTIONS])


def run(model: Path, on: Path, *more: object) -> int:
    return calibrate(["--model", str(model), "--on", str(on), *map(str, more)])


@pytest.mark.parametrize("signal", [
    "abstain_p", pytest.param("max_softmax_mean", marks=pytest.mark.exhaustive)])
def test_target_rate_holds_on_the_calibration_prompts(signal: str, model: Any, path: Path,
                                                      calibration_file: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, calibration_file, "--signal", signal, "--fpr", 0.1, "--template", "Wer weiß?") == 0
    out, err = capsys.readouterr()
    rule, reader = abstain_rule.read(path, model), abstain_rule.signal_reader(model, signal)
    prompts, sign = [user_turn(text) for text in QUESTIONS], direction(signal)
    expected = conformal_threshold(sign * abstain_rule.measure_signal(reader, prompts, signal), 0.1)
    assert (rule.signal, rule.direction, rule.template) == (signal, sign, "Wer weiß?")
    assert (rule.target_fpr, rule.prompts, rule.measured_fpr) == (0.1, 40, expected.measured)
    np.testing.assert_allclose(rule.threshold, sign * expected.value, rtol=1e-6)
    np.testing.assert_allclose(rule.expected_fpr, expected.expected)
    abstains = rule.abstains(reader, prompts)
    assert np.mean(abstains) == rule.measured_fpr == 3 / 40 <= 0.1  # the 37th of 40 is the threshold
    side = "above" if sign == 1 else "below"
    assert err == "" and out == (
        "abstains" + " " * (len(rule.rule) - 8) + "  on these prompts  on new prompts, expected\n"
        + "-" * len(rule.rule) + "  ----------------  ------------------------\n"
        + f"{rule.rule}  3 of 40: 7.5%     9.8% [2.8%, 20.4%]\n{path / abstain_rule.FILE}\n")
    assert rule.rule.endswith(f" {signal} is {side} {rule.threshold:.4g}")


def test_unanswerable_prompts_are_left_out(path: Path, model: Any, tmp_path: Path, calibration_file: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, calibration_file) == 0
    first = abstain_rule.read(path, model)
    rows = [row for text in QUESTIONS for row in (
        {"prompt": f"  {text}\n", "answerable": True}, {"prompt": f"Why not {text}", "answerable": False})]
    capsys.readouterr()
    assert run(path, lines(tmp_path / "both.jsonl", rows)) == 0
    assert abstain_rule.read(path, model) == first
    assert capsys.readouterr().err == ("note: 40 prompts without an answer left out: the false-positive rate "
                                       "counts answerable prompts only\n")


def test_repeated_prompts_give_a_note(path: Path, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": text} for text in (*QUESTIONS, *QUESTIONS[:3])]
    assert run(path, lines(tmp_path / "twice.jsonl", rows)) == 0
    assert capsys.readouterr().err == ("note: 3 of 43 prompts are repeats of others: the expected rate holds "
                                       "for new prompts with the same repetition\n")


def test_with_too_few_prompts_the_model_never_abstains(path: Path, model: Any, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    few = [{"prompt": text} for text in QUESTIONS[:9]]
    assert run(path, lines(tmp_path / "few.jsonl", few), "--fpr", 0.1) == 0
    assert "never" not in capsys.readouterr().out
    assert abstain_rule.read(path, model).threshold != abstain_rule.NEVER
    assert run(path, lines(tmp_path / "few.jsonl", few[:8]), "--fpr", 0.1) == 0
    assert ("\nThe model never abstains: 8 prompts are too few for a false-positive rate of 0.1, which "
            "requires at least 9.\n") in capsys.readouterr().out
    rule = abstain_rule.read(path, model)
    assert rule.threshold == abstain_rule.NEVER and rule.expected_fpr == (0, 0, 0) and rule.measured_fpr == 0


def test_a_threshold_does_not_change_the_fingerprint(path: Path, calibration_file: Path) -> None:
    """Stages of studies are named by the fingerprints of their networks."""
    before = network_fingerprint(path)
    assert run(path, calibration_file) == 0 and (path / abstain_rule.FILE).is_file()
    assert network_fingerprint(path) == before


# --- Invalid input ---------------------------------------------------------------------------


def on(*rows: Any) -> Callable[[Path], list[object]]:
    return lambda tmp: ["--on", lines(tmp / "on.jsonl", list(rows))]


def network(config: Any) -> Callable[[Path], list[object]]:
    def arguments(tmp: Path) -> list[object]:
        model = random_network(config, 0)[0] if isinstance(config, VanillaConfig) else build(config)
        tilelli_jax.save(model, tmp / "other")
        return ["--model", tmp / "other"]
    return arguments


@pytest.mark.parametrize(("more", "message"), [
    (lambda tmp: ["--fpr", 0], "--fpr: expected a fraction above 0 and below 1, found 0.0"),
    (lambda tmp: ["--fpr", "nan"], "--fpr: expected a fraction above 0 and below 1, found nan"),
    (lambda tmp: ["--template", ""], "template: expected one line of text, found ''"),
    (lambda tmp: ["--template", "a\nUSER: b"], "template: expected one line of text"),
    (lambda tmp: ["--signal", "doubt"],
     "--signal: expected a signal of {tmp}/model, one of max_softmax_last, "),
    (lambda tmp: ["--signal", "drift"], "found 'drift'"),
    (network(VanillaConfig(**SHAPE)), "found 'abstain_p'; this network has no abstain head"),
    (network(SAEConfig(d_model=8, n_latents=8, k=2)), "{tmp}/other: expected a byte-level network, "
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
def test_invalid_input_gives_one_line_and_writes_nothing(
        more: Callable[[Path], list[object]], message: str, path: Path, calibration_file: Path,
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = more(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert run(path, calibration_file, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, message.format(tmp=tmp_path))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_failed_write_leaves_the_old_rule(path: Path, model: Any, calibration_file: Path,
                                            monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, calibration_file) == 0
    before = (path / abstain_rule.FILE).read_bytes()
    capsys.readouterr()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run(path, calibration_file, "--fpr", 0.5) == 2
    assert_one_line(capsys.readouterr().err, f"{path / abstain_rule.FILE}: cannot be written: No space left")
    assert (path / abstain_rule.FILE).read_bytes() == before
    assert sorted(file.name for file in path.iterdir()) == [
        "README.md", "abstain.json", "config.json", "model.safetensors"]


def test_a_signal_that_is_not_finite_is_an_error(path: Path, calibration_file: Path,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(abstain_rule, "measure_signal", lambda *_: np.array([0.5, math.nan]))
    assert run(path, calibration_file) == 2
    assert_one_line(capsys.readouterr().err, "abstain_p: expected numbers, found some that are not finite")
    assert not (path / abstain_rule.FILE).exists()
