"""Two processes of four devices each, started by the local launcher, give one process's run on eight."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import tilelli_jax
from tests.compiled import READ_ONLY
from tests.tolerance import noise
from tilelli_jax.loading.store import build
from tilelli_jax.models import RoutedConfig
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.train import main
from tilelli_jax.training.log import read_metrics

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.py"
PATIENCE = 300  # seconds; a start takes a few on an idle machine
# Shards parameters over both processes.
MESH = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")
# No quantiser, whose rounding amplifies last-bit errors; an epsilon that keeps Adam from turning such errors
# into full updates; no clipping, which would hide a wrong scale; a schedule independent of the run's length.
OVERRIDES = ["model.quantizer=none", "optimizer.schedule=constant", "optimizer.eps=1e-3",
             "optimizer.clip_norm=0", "train.keep=4"]
SAME = noise(1, steps=12)  # tolerance after 12 updates, relative to the largest number
MIXED = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")

pytestmark = pytest.mark.eight_devices


@pytest.fixture(scope="module")
def command(tiny_file):
    def command(run_dir, *overrides, mesh=MESH):
        return ["--config", str(tiny_file), f"run_dir={run_dir}", *OVERRIDES, *mesh, *overrides]
    return command


@pytest.fixture(scope="module")
def by_one(command, tmp_path_factory):
    """The directory of a complete run of one process."""
    run_dir = tmp_path_factory.mktemp("by one") / "run"
    assert main(command(run_dir)) == 0
    return run_dir


def go_back(run_dir, step):
    """Turns a complete run into one with a damaged checkpoint at `step` and no later checkpoints."""
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    largest = max((run_dir / "checkpoints" / str(step) / "state" / "d").iterdir(),
                  key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "model")


def launched(args):
    """Returns the command for two processes of four devices each."""
    return [sys.executable, str(LAUNCHER), "--processes", "2", "--devices", "4", "--grace", "1", "--", *args]


@pytest.fixture
def launch(environment):
    """Starts two processes, and kills them at the end."""
    started = []

    def launch(args, more={}):  # noqa: B006
        started.append(subprocess.Popen(launched(args), env=environment | more, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True))
        return started[-1]
    yield launch
    for process in started:
        process.kill()
        process.communicate()


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")}


def assert_same_end(run_dir, other):
    assert losses(run_dir) == pytest.approx(losses(other), rel=SAME)
    run_summary, other_summary = (json.loads((path / "summary.json").read_text())
                                  for path in (run_dir, other))
    for key in ("best_valid_loss", "final_valid_loss"):
        assert run_summary[key] == pytest.approx(other_summary[key], rel=SAME)
    for key in ("best_step", "steps", "tokens", "parameters", "exported_step"):
        assert run_summary[key] == other_summary[key]
    run_summary, other_summary = (to_arrays(tilelli_jax.load(path / "model")) for path in (run_dir, other))
    for name, array in other_summary.items():
        np.testing.assert_allclose(run_summary[name], array, rtol=SAME, atol=SAME * np.abs(array).max())


@pytest.fixture(scope="module")
def by_two(by_one, command, environment, tmp_path_factory):
    """The directory of a run that two processes resumed from one process, and their output."""
    run_dir = tmp_path_factory.mktemp("by two") / "run"
    shutil.copytree(by_one, run_dir)
    go_back(run_dir, 9)  # both must reach the same conclusion
    done = subprocess.run(launched(command(run_dir)), env=environment, capture_output=True, text=True,
                          timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout, done.stderr


def test_two_processes_resume_the_run_of_one(by_one, by_two):
    run_dir, out, err = by_two
    assert "9: damaged checkpoint" in err and "skipped" in err and err.count("\n") == 1
    assert "resuming from step 8" in out and "8 × cpu" in out and out.count("this run, best") == 1
    assert_same_end(run_dir, by_one)


@pytest.mark.exhaustive
def test_two_processes_agree_on_a_budget(command, launch, tmp_path):
    """Each measures its own speed; the first decides."""
    run_dir = tmp_path / "run"
    process = launch(command(run_dir, "train.minutes=2", "train.steps=60"))
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    steps = json.loads((run_dir / "budget.json").read_text())["steps"]
    assert f"2 minutes: {steps} updates at " in out and list(losses(run_dir)) == list(range(1, steps + 1))


@pytest.mark.exhaustive
def test_one_process_resumes_the_run_of_two(by_one, by_two, command, tmp_path, capsys, caplog):
    """From the checkpoint that the two processes saved at step 9, on another mesh."""
    run_dir = tmp_path / "run"
    shutil.copytree(by_two[0], run_dir)
    go_back(run_dir, 12)
    assert main(command(run_dir, mesh=MIXED)) == 0
    assert "12: damaged checkpoint" in caplog.text
    assert "resuming from step 9" in capsys.readouterr().out
    assert_same_end(run_dir, by_one)


@pytest.mark.exhaustive
def test_one_process_resumes_on_another_mesh(by_one, command, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(by_one, run_dir)
    go_back(run_dir, 8)
    assert main(command(run_dir, mesh=("mesh.data=8",))) == 0
    assert "resuming from step 6" in capsys.readouterr().out
    assert_same_end(run_dir, by_one)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", [("mesh.data=8",), MIXED], ids=str)
def test_two_processes_equal_one_on_other_meshes(by_one, command, launch, tmp_path, mesh):
    process = launch(command(tmp_path / "run", mesh=mesh))
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "") and "8 × cpu" in out
    assert_same_end(tmp_path / "run", by_one)


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/environ").exists(),
                    reason="only Linux's /proc identifies the processes")
def test_one_of_two_processes_is_killed_and_the_run_resumes(command, launch, tmp_path):
    alone, torn = tmp_path / "alone", tmp_path / "torn"
    steps = ("train.steps=40", "train.checkpoint_every=5", "train.eval_every=10")
    process = launch(command(alone, *steps))
    assert process.communicate(timeout=PATIENCE)[1] == "" and process.returncode == 0
    seed = time.time_ns()
    rng = random.Random(seed)
    print(f"moments drawn with seed {seed}")
    last = 0
    for number in (1, 0):
        launcher = launch(command(torn, *steps), READ_ONLY)
        last += rng.randint(1, 8)
        wait_for_row(launcher, torn, last)
        os.kill(children(launcher)[number], signal.SIGKILL)
        launcher.communicate(timeout=PATIENCE)
        assert launcher.returncode == 128 + signal.SIGKILL
        last = len(losses(torn))
    process = launch(command(torn, *steps), READ_ONLY)
    assert process.communicate(timeout=PATIENCE)[1] == "" and process.returncode == 0
    assert losses(torn) == losses(alone)  # to the last bit
    tensors = [(path / "model" / "model.safetensors").read_bytes() for path in (torn, alone)]
    assert tensors[0] == tensors[1]


def wait_for_row(launcher, run_dir, row):
    deadline = time.monotonic() + PATIENCE
    while launcher.poll() is None and time.monotonic() < deadline and len(losses(run_dir)) < row:
        time.sleep(0.02)
    assert launcher.poll() is None, launcher.communicate()


def children(launcher):
    """Returns the launcher's processes by their number in the run."""
    pids = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return {process_number(int(pid)): int(pid) for pid in pids}


def process_number(pid):
    """Returns a process's number in its run."""
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(b"TILELLI_PROCESS_ID="):
            return int(entry.partition(b"=")[2])
    return None


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/environ").exists(),
                    reason="only Linux's /proc identifies the processes")
def test_sigterm_to_one_stops_and_saves_both(by_one, command, launch, tmp_path):
    run_dir = tmp_path / "run"
    launcher = launch(command(run_dir, "train.steps=100000", "train.checkpoint_every=10"))
    wait_for_row(launcher, run_dir, 12)
    os.kill(children(launcher)[1], signal.SIGTERM)
    out, err = launcher.communicate(timeout=PATIENCE)
    assert (launcher.returncode, err) == (0, "")
    last = max(losses(run_dir))
    assert f"stopped and saved at step {last} of 100000" in out
    assert (run_dir / "checkpoints" / str(last)).is_dir()
    # From the first step on, it equals the run of one process.
    expected = losses(by_one)
    assert {step: losses(run_dir)[step] for step in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.exhaustive
def test_two_processes_fine_tune_like_one(launch, tmp_path):
    """At the end the first process alone evaluates the held-out pairs once more."""
    tilelli_jax.save(build(RoutedConfig(d_model=16, n_layers=1, max_seq_len=48, n_heads=2, d_head=8, top_k=4,
                                        dense_expand=2), 0), tmp_path / "start")
    pairs = [{"prompt": f"Who is {i}?", "response": "Nobody.", "answerable": i % 2 == 0} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = tmp_path / "chat.yaml"
    config.write_text(yaml.safe_dump({
        "chat": {"source": str(tmp_path / "pairs.jsonl")}, "finetune": {"abstain_weight": 1.0},
        "optimizer": {"eps": 1e-3, "schedule": "constant"},
        "train": {"init_from": str(tmp_path / "start"), "steps": 4, "batch_size": 8, "seq_len": 48,
                  "log_every": 1, "eval_every": 2, "eval_batch_size": 8, "checkpoint_every": 2}}))
    args = ["--config", str(config)]
    process = launch([*args, f"run_dir={tmp_path / 'two'}"])
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "") and "8 × cpu" in out
    assert main([*args, f"run_dir={tmp_path / 'one'}"]) == 0
    assert_same_end(tmp_path / "two", tmp_path / "one")
    two, one = (json.loads((tmp_path / name / "summary.json").read_text())["held_out"]
                for name in ("two", "one"))
    assert two == pytest.approx(one, rel=SAME) and one["pairs"] > 0
