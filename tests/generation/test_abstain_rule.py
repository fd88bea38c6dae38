"""Abstention in generate and chat, its cost, and invalid abstain.json files."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
import pytest

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax.commands import chat
from tilelli_jax.commands.generate import main as generate
from tilelli_jax.data.turns import user_turn
from tilelli_jax.errors import InputError
from tilelli_jax.generation import abstain_rule, decoding
from tilelli_jax.generation.abstain_rule import NEVER, TEMPLATE, AbstainRule
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.models import RoutedConfig
from tilelli_jax.signals.prompts import PromptReader
from tilelli_jax.signals.uncertainty import UncertaintyReader

CONFIG = RoutedConfig(d_model=16, n_layers=2, max_seq_len=72, n_heads=2, d_head=8, top_k=4, dense_expand=2,
                      abstain_head=True, positions="learned")
PROMPTS = ("who?", "Where is it?", "how", "Zürich?", "is it so, or not so?", "x")
ABSTENTION = f" {TEMPLATE}"


@pytest.fixture(scope="module")
def model() -> Any:
    return random_network(CONFIG, 3)[0]


@pytest.fixture(scope="module")
def reader(model: Any) -> UncertaintyReader:
    return abstain_rule.signal_reader(model, "abstain_p")


@pytest.fixture
def path(model: Any, tmp_path: Path) -> Path:
    tilelli_jax.save(model, tmp_path / "model")
    return tmp_path / "model"


def make_rule(threshold: Any, network: str = "", signal: str = "abstain_p",
              direction: Any = 1) -> AbstainRule:
    return AbstainRule(signal, direction, threshold, TEMPLATE, 0.1, 20, 0.05, (0.09, 0.02, 0.2), network)


def between(values: np.ndarray, below: int = 3) -> float:
    """Returns a threshold with `below` of the values below it and none equal to it."""
    ranked = np.sort(values)
    assert ranked[below] - ranked[below - 1] > 1e-4, "too near for rounding"
    return float(ranked[below - 1:below + 1].mean())


def write_rule(path: Path, reader: UncertaintyReader, prompts: list[str], below: int = 3) -> list[bool]:
    """Writes a rule that answers `below` of the prompts; returns on which prompts it abstains."""
    values = abstain_rule.measure_signal(reader, prompts, "abstain_p")
    threshold = between(values, below)
    abstain_rule.write(path, make_rule(threshold, network_fingerprint(path)))
    return (values > threshold).tolist()


# --- When to abstain -------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["abstain_p", "max_softmax_last", "router_entropy_b1"])
def test_the_rule_abstains_beyond_the_threshold_in_both_directions(
        signal: str, reader: UncertaintyReader) -> None:
    values = abstain_rule.measure_signal(reader, PROMPTS, signal)
    threshold = between(values)
    up, down = (make_rule(threshold, signal=signal, direction=direction).abstains(reader, PROMPTS)
                for direction in (1, -1))
    assert up == (values > threshold).tolist() and down == (values < threshold).tolist()
    assert sum(up) == sum(down) == 3
    for direction in (1, -1):
        never = make_rule(NEVER, signal=signal, direction=direction)
        assert never.abstains(reader, PROMPTS) == [False] * 6 and never.rule == "never"
    assert make_rule(1.0).abstains(reader, []) == []


def test_a_value_at_the_threshold_is_answered(reader: UncertaintyReader) -> None:
    value = float(abstain_rule.measure_signal(reader, PROMPTS, "abstain_p")[2])
    for direction in (1, -1):
        assert not make_rule(value, direction=direction).abstains(reader, PROMPTS)[2]


def test_the_lens_is_computed_only_for_its_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(abstain_rule, "UncertaintyReader", lambda _, lens: seen.append(lens))
    for signal in ("lens_margin", "abstain_p"):
        abstain_rule.signal_reader(None, signal)
    assert seen == [True, False]


def test_only_the_end_of_a_long_prompt_is_read(reader: UncertaintyReader) -> None:
    long = "a beginning that is not read " * 4 + "z" * 72
    one, same, other = abstain_rule.measure_signal(reader, [long, b"z" * 72, "z" * 71 + "y"], "abstain_p")
    assert one == same != other


# --- The commands ----------------------------------------------------------------------------


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert generate([str(argument) for argument in arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("turn", [True, False])
def test_generate_abstains_on_these_prompts(turn: bool, path: Path, reader: UncertaintyReader,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [user_turn(prompt) for prompt in PROMPTS] if turn else list(PROMPTS)
    chat_option = ["--chat"] if turn else []
    arguments = ["--model", path, "--max-new", 5, *chat_option,
                 *(part for prompt in PROMPTS for part in ("--prompt", prompt))]
    plain = lines(capsys, *arguments)
    assert all(row.keys() == {"prompt", "text", "stopped"} for row in plain)
    abstained = write_rule(path, reader, inputs)
    assert lines(capsys, *arguments) == plain, "not asked for"
    assert lines(capsys, *arguments, "--abstain") == [
        {"prompt": prompt, "text": ABSTENTION, "stopped": True, "abstained": True} if abstains else
        {**row, "abstained": False} for prompt, abstains, row in zip(PROMPTS, abstained, plain, strict=True)]
    # A single prompt is printed as usual.
    i = abstained.index(True)
    assert generate(["--model", str(path), "--prompt", PROMPTS[i], "--abstain", *chat_option]) == 0
    out, err = capsys.readouterr()
    assert out == f"{inputs[i]}{ABSTENTION}\n" and ("calibrated on prompts in chat turns" in err) is not turn


def test_a_turn_ends_where_the_next_begins(path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def recorded(_: object, prompts: list[bytes], **options: Any) -> list[decoding.Continuation]:
        seen.append((prompts, options["stop"]))
        return [decoding.Continuation(b" yes", True, False)] * 2

    def streamed(_: object, ids: list[np.ndarray], **options: Any) -> Any:
        seen.append(ids[0].tobytes())
        return iter([decoding.Chunk(np.frombuffer(b" yes\nUSER: b", np.uint8)[None], [False])])

    monkeypatch.setattr(decoding, "generate", recorded)
    monkeypatch.setattr(decoding, "stream", streamed)
    command = ["--model", str(path), "--prompt", "\udcff?", "--chat", "--stop", "b"]
    assert generate([*command, "--prompt", "who"]) == 0
    inputs = [b"USER: \xff?\nTILELLI:", b"USER: who\nTILELLI:"]
    assert seen == [(inputs, ["b", "\nUSER:"])]
    capsys.readouterr()
    assert generate(command) == 0
    assert seen[1:] == [inputs[0]] and capsys.readouterr().out == "USER: \ufffd?\nTILELLI: yes\n"


def test_chat_abstains_and_continues(model: Any, path: Path, reader: UncertaintyReader,
                                     monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    """The template is a turn like any other: the next turn's signal is measured with it in the history."""
    histories, measurements = [], []

    def recorded(_: object, history: str, sampling: object) -> Any:
        histories.append(history)
        yield " yes"

    plain = AbstainRule.abstains

    def spying(self: AbstainRule, reader: UncertaintyReader, prompts: list[str]) -> list[bool]:
        measurements.append((reader, *prompts))
        return plain(self, reader, prompts)

    monkeypatch.setattr(chat, "reply", recorded)
    monkeypatch.setattr(AbstainRule, "abstains", spying)
    firsts = [user_turn(prompt) for prompt in PROMPTS]
    abstained = write_rule(path, reader, firsts)
    first = PROMPTS[abstained.index(True)]
    typed = [first, "and?", "/reset", PROMPTS[abstained.index(False)], "y" * 48]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    assert chat.main(["--model", str(path), "--abstain", "--max-new", "2"]) == 0
    out = capsys.readouterr().out
    assert "\nIt abstains if abstain_p is above 0." in out
    inputs = [history for _, history in measurements]
    second = f"{user_turn(first)}{ABSTENTION}\n{user_turn('and?')}"
    assert inputs == [user_turn(first), second, user_turn(typed[3]), user_turn(typed[4])], "cropped alike"
    assert len({id(reader) for reader, _ in measurements}) == 1, "one reader for all turns"
    values = abstain_rule.measure_signal(reader, [history for _, history in measurements], "abstain_p")
    threshold = abstain_rule.read(path, model).threshold
    assert histories == [history for (_, history), value in zip(measurements, values, strict=True)
                         if value <= threshold]
    assert values[0] > threshold >= values[2]
    assert out.count(f"TILELLI:{ABSTENTION}\n") == 4 - len(histories)


def test_abstention_costs_one_pass_and_one_compilation(
        model: Any, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        request: pytest.FixtureRequest) -> None:
    passes: list[int] = []
    compiled: list[str] = []
    batch = PromptReader._batch

    def listen(event: str, _: float, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listen))
    jax.jit(lambda x: x + 1)(1.0)
    assert compiled, "the compilation event has another name"

    def counted(self: PromptReader, rows: Any, prompts: Any) -> Any:
        passes.append(len(rows.indices))
        return batch(self, rows, prompts)

    monkeypatch.setattr(PromptReader, "_batch", counted)
    abstain_rule.write(path, make_rule(0.5, network_fingerprint(path)))
    single_reader = abstain_rule.signal_reader(model, "abstain_p")
    for prompts in (["who?"], ["Where is it?"], [user_turn("why")]):
        make_rule(0.5).abstains(single_reader, prompts)
        if len(passes) == 1:
            compiled.clear()
    assert passes == [1, 1, 1] and compiled == []
    passes.clear()
    arguments = ["--model", path, "--max-new", 5,
                 *(part for prompt in PROMPTS for part in ("--prompt", prompt))]
    lines(capsys, *arguments)
    assert passes == []
    lines(capsys, *arguments, "--abstain")
    assert passes == [6]


def test_abstained_prompts_are_not_continued(path: Path, reader: UncertaintyReader,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decoding, "generate", lambda *_, **__: pytest.fail("must not be called"))
    abstain_rule.write(path, make_rule(-1.0, network_fingerprint(path)))
    assert generate(["--model", str(path), "--prompt", "who?", "--abstain"]) == 0
    assert capsys.readouterr().out == f"who?{ABSTENTION}\n"


# --- abstain.json ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [
    make_rule(0.25), make_rule(NEVER), make_rule(-3.0, signal="lens_margin", direction=-1)])
def test_a_rule_is_read_as_written(rule: AbstainRule, path: Path, model: Any) -> None:
    rule = dataclasses.replace(rule, network=network_fingerprint(path),
                               template="Das weiß ich nicht. 🙂")
    abstain_rule.write(path, rule)
    assert abstain_rule.read(path, model) == rule
    stored = json.loads((path / abstain_rule.FILE).read_text())
    assert (stored["threshold"] == "never") == (rule.threshold == NEVER)


def test_a_rule_is_valid_for_one_network(path: Path, model: Any, tmp_path: Path) -> None:
    abstain_rule.write(path, make_rule(0.5, network_fingerprint(path)))
    tilelli_jax.save(model, path)
    assert abstain_rule.read(path, model).threshold == 0.5, "the same weights, written again"
    copy = tmp_path / "copy"
    tilelli_jax.save(model, copy)
    (copy / abstain_rule.FILE).write_bytes((path / abstain_rule.FILE).read_bytes())
    assert abstain_rule.read(copy, model).threshold == 0.5, "the same weights elsewhere"
    other = random_network(CONFIG, 4)[0]
    tilelli_jax.save(other, path)
    with pytest.raises(InputError, match="expected a threshold made for the weights of"):
        abstain_rule.read(path, other)
    with pytest.raises(InputError, match="not a model directory: config\\.json is missing"):
        network_fingerprint(tmp_path)


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda tree: tree.pop("threshold"), "threshold: expected a value, found nothing"),
    (lambda tree: tree.update(threshold=math.inf), "threshold: expected a number, found inf"),
    (lambda tree: tree.update(threshold=math.nan), "threshold: expected a number, found nan"),
    (lambda tree: tree.update(threshold="often"), "threshold: expected a number or never, found text"),
    (lambda tree: tree.update(threshold=None), "threshold: expected a number or never, found null"),
    (lambda tree: tree.update(signal="abstain"), "signal: expected one of max_softmax_last, "),
    (lambda tree: tree.update(signal="router_entropy_b2"), "found 'router_entropy_b2'"),
    (lambda tree: tree.update(direction=0), "direction: expected 1 or -1, found an integer 0"),
    (lambda tree: tree.update(template=" "), "template: expected one line of text, found ' '"),
    (lambda tree: tree.update(template="No.\nUSER: hi"), "template: expected one line of text"),
    (lambda tree: tree.update(template="\ud800"), "expected text, found a lone surrogate"),
    (lambda tree: tree.update(target_fpr=2), "target_fpr: expected a number > 0 and < 1, found 2.0"),
    (lambda tree: tree.update(treshold=1), "unknown key 'treshold' (did you mean 'threshold'?)"),
    (lambda tree: tree.update(network="0123"), "network: expected a threshold made for the weights of"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_file_is_one_line_and_exit_2(change: Callable[[dict[str, Any]], Any], message: str, path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    abstain_rule.write(path, make_rule(0.5, network_fingerprint(path)))
    tree = json.loads((path / abstain_rule.FILE).read_text())
    change(tree)
    (path / abstain_rule.FILE).write_text(json.dumps(tree))
    assert generate(["--model", str(path), "--prompt", "x", "--abstain"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, str(path / abstain_rule.FILE), message)


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_missing_file_gives_the_command_to_write_it(
        command: str, path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    main, more = (chat.main, []) if command == "chat" else (generate, ["--prompt", "x"])
    assert main(["--model", str(path), "--abstain", *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, f"{path}: expected abstain.json, the threshold for --abstain, found none",
                    f"`tilelli abstention calibrate --model {path} --on FILE` makes one")
    for content in ("{", "[]"):
        (path / abstain_rule.FILE).write_text(content)
        assert main(["--model", str(path), "--abstain", *more]) == 2
        assert_one_line(capsys.readouterr().err, str(path / abstain_rule.FILE))


def test_a_rule_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"abstain\.json: cannot be written: No such file"):
        abstain_rule.write(tmp_path / "none", make_rule(0.5))
