"""A run with a time budget: it equals the run with as many updates, also if it is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest

from tests.compiled import READ_ONLY
from tests.error_lines import assert_one_line
from tests.train.runs import losses
from tilelli_jax import train as train_module
from tilelli_jax.errors import InputError
from tilelli_jax.train import main
from tilelli_jax.training import loop
from tilelli_jax.training.budget import StepTimes

BUDGET = ["train.minutes=5", "train.steps=1000"]


@pytest.fixture
def decided(monkeypatch):
    """Decides for the 12 updates of `finished`, once; returns the list of decisions."""
    decisions = []

    def decide_steps(task, training, config, begin):
        decisions.append(config.minutes)
        return 12, StepTimes(20.0, 1 / 4.5, 1.0)
    monkeypatch.setattr(train_module, "decide_steps", decide_steps)
    return decisions


def test_a_budget_is_a_number_of_updates(finished, tiny_file, tmp_path, capsys, monkeypatch, decided):
    """The run stops half-way and resumes; the number of updates is decided once."""
    run_dir = tmp_path / "run"
    args = ["--config", str(tiny_file), f"run_dir={run_dir}", *BUDGET]
    monkeypatch.setattr(loop, "should_stop", lambda step: step == 7)
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "5 minutes: 12 updates at 4.5 per second\nnote: only 12 updates fit into 5 minutes" in out
    assert "saved at step 7 of 12" in out
    assert json.loads((run_dir / "budget.json").read_text()) == {"steps": 12, "updates_per_second": 4.5}
    monkeypatch.setattr(loop, "should_stop", lambda step: False)
    assert main(args) == 0
    assert "per second" not in capsys.readouterr().out and decided == [5.0]
    assert losses(run_dir) == losses(finished[0])  # bit for bit
    assert (run_dir / "model/model.safetensors").read_bytes() == (
        finished[0] / "model/model.safetensors").read_bytes()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 12
    # The complete run can be trained on, without the budget but with no other one.
    assert main(args) == 0
    assert "is complete" in capsys.readouterr().out
    assert main([*args, "train.minutes=6", "--resume"]) == 2
    assert_one_line(capsys.readouterr().err, "train.minutes was 5.0 and is now 6.0", "choose another run_dir")
    assert main([*args, "train.minutes=null", "train.steps=13", "--resume"]) == 0
    assert list(losses(run_dir)) == list(range(1, 14))


def test_killed_before_the_decision_or_just_after(finished, tiny_file, tmp_path, decided, monkeypatch,
                                                  capsys):
    run_dir = tmp_path / "run"
    args = ["--config", str(tiny_file), f"run_dir={run_dir}", *BUDGET, "train.export=last"]

    def killed(*arguments, **named):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "decide_steps", killed)
        assert main(args) == 130
    assert not (run_dir / "budget.json").exists()
    assert capsys.readouterr().err == "nothing is trained yet; the same command starts again\ninterrupted\n"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "Trainer", killed)
        assert main(args) == 130
    assert (run_dir / "budget.json").exists() and decided == [5.0]
    assert main(args) == 0
    assert decided == [5.0] and losses(run_dir) == losses(finished[0])


@pytest.mark.parametrize(("change", "parts"), [
    (["train.minutes=0"], ["train.minutes: expected a number > 0"]),
    (["train.minutes=-1"], ["train.minutes: expected a number > 0"]),
    (["train.minutes=.nan"], ["train.minutes: expected a"]),
    (["train.minutes=.inf"], ["train.minutes: expected a"]),
    (["train.minutes=five"], ["train.minutes: expected a number", "'five'"])])
def test_no_budget(change, parts, tiny_file, tmp_path, capsys):
    assert main(["--config", str(tiny_file), f"run_dir={tmp_path / 'run'}", *change]) == 2
    assert_one_line(capsys.readouterr().err, *parts)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_budget_gets_none(resumable, capsys):
    run_dir, args = resumable
    before = (run_dir / "config.yaml").read_text()
    for force in ([], ["--resume"]):
        assert main([*args, "train.minutes=5", *force]) == 2
        assert_one_line(capsys.readouterr().err, "train.minutes was None and is now 5.0")
    assert (run_dir / "config.yaml").read_text() == before


def test_a_budget_that_is_too_small_can_be_raised(tiny_file, tmp_path, capsys, monkeypatch):
    args = ["--config", str(tiny_file), f"run_dir={tmp_path / 'run'}", "train.steps=1000"]

    def too_small(*arguments):
        raise InputError("train.minutes: expected at least 2")
    monkeypatch.setattr(train_module, "decide_steps", too_small)
    assert main([*args, "train.minutes=1"]) == 2
    assert not (tmp_path / "run/budget.json").exists()
    capsys.readouterr()
    monkeypatch.setattr(train_module, "decide_steps", lambda *arguments: (12, StepTimes(20.0, 1 / 4.5, 1.0)))
    assert main([*args, "train.minutes=2"]) == 0
    assert "minutes: 2.0\n" in (tmp_path / "run/config.yaml").read_text()


def test_a_small_text_is_noticed_before_the_speed_is_measured(tiny_file, tmp_path, capsys, monkeypatch):
    def too_small(*arguments):
        raise InputError("train.minutes: expected at least 2")
    monkeypatch.setattr(train_module, "decide_steps", too_small)
    # 10,000 updates of 128 bytes read 64 kB 20 times, nine tenths of 71.1 kB.
    assert main(["--config", str(tiny_file), f"run_dir={tmp_path / 'run'}", "train.minutes=1",
                 "train.steps=10000"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == (
        "note: 18,000 bytes to train on are read up to 71 times in 10,000 updates: expect the network to "
        "overfit; use 72 kB of text or more, or fewer updates")
    assert_one_line(err, "expected at least 2")


@pytest.mark.parametrize(("content", "part"), [
    ("{", "budget.json"), ('{"steps": 0}', "steps: expected an integer ≥ 1, found 0"),
    ('{"steps": true}', "found True"), (None, "budget.json is missing; --resume with train.minutes=null")])
def test_a_damaged_or_missing_decision(content, part, resumable, capsys):
    run_dir, args = resumable
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("minutes: null", "minutes: 5.0"))
    if content is not None:
        (run_dir / "budget.json").write_text(content)
    assert main([*args, "train.minutes=5"]) == 2
    assert_one_line(capsys.readouterr().err, part)


@pytest.mark.exhaustive
def test_a_budget_is_met_and_kills_change_nothing(train_command, environment, tiny_file, tmp_path):
    """Killed while it measures, and twice while it trains."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    command = [*train_command, "--config", str(tiny_file), "train.steps=1000000", "train.log_every=1",
               "train.eval_every=100", "train.checkpoint_every=20"]
    begin = time.monotonic()
    done = subprocess.run([*command, f"run_dir={whole}", "train.minutes=1"], env=environment,
                          capture_output=True, text=True, timeout=300)
    seconds = time.monotonic() - begin
    assert (done.returncode, done.stderr) == (0, "")
    # A busy machine takes longer than its budget: compiling and saving are not foreseen.
    assert 30 < seconds < 240, f"{seconds:.0f} s for a budget of 60 s\n{done.stdout}"

    # Killed.
    command = [*command, f"run_dir={run_dir}", "train.minutes=0.5"]

    def kill_when(condition):
        process = subprocess.Popen(command, env=environment | READ_ONLY, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()

    def rows():
        path = run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0
    kill_when((run_dir / "config.yaml").exists)
    assert not (run_dir / "budget.json").exists()
    kill_when(lambda: rows() >= 30)
    steps = json.loads((run_dir / "budget.json").read_text())["steps"]
    kill_when(lambda: rows() >= 60)
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    assert json.loads((run_dir / "budget.json").read_text())["steps"] == steps
    unkilled = tmp_path / "unkilled"
    assert main(["--config", str(run_dir / "config.yaml"), f"run_dir={unkilled}", "train.minutes=null",
                 f"train.steps={steps}"]) == 0
    assert losses(run_dir) == losses(unkilled)
    assert (run_dir / "model/model.safetensors").read_bytes() == (
        unkilled / "model/model.safetensors").read_bytes()
