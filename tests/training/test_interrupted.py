"""Training in a separate process that is killed, terminated or interrupted gives the uninterrupted result."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.compiled import READ_ONLY
from tilelli_jax.train import main
from tilelli_jax.training.log import read_metrics

STEPS = 60
OVERRIDES = [f"train.steps={STEPS}", "train.checkpoint_every=5", "train.eval_every=20"]
PATIENCE = 300  # seconds; a start takes a few on an idle machine
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


class Training:
    """`tilelli train` in a separate process."""

    def __init__(self, command, environment, run_dir):
        self.run_dir = run_dir
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)

    def at_row(self, row):
        """Waits until `row` steps are logged; returns whether the process is still running."""
        path = self.run_dir / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= row:
                return True
            time.sleep(0.002)
        return False

    def end(self, number=None):
        """Sends a signal, and waits; returns exit status, stdout and stderr."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def reference(tiny_file, tmp_path_factory):
    """The directory of an uninterrupted run. It fills the compilation cache."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    assert main(["--config", str(tiny_file), f"run_dir={run_dir}", *OVERRIDES]) == 0
    return run_dir


@pytest.mark.parametrize(("numbers", "last_environment"), [
    ((signal.SIGKILL,), {}),
    pytest.param((signal.SIGKILL, signal.SIGINT), {}, marks=pytest.mark.exhaustive),
    pytest.param((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), NO_CACHE, marks=pytest.mark.exhaustive)],
    ids=["killed", "killed and interrupted", "killed and terminated"])
def test_an_interrupted_run_equals_the_uninterrupted_one(reference, train_command, environment, tmp_path,
                                                         numbers, last_environment):
    # The saved configuration also reproduces the run.
    resumed = tmp_path / "resumed"
    again = [*train_command, "--config", str(reference / "config.yaml"), f"run_dir={resumed}"]
    seed = time.time_ns()
    rng = random.Random(seed)
    print(f"moments drawn with seed {seed}")
    last = 10  # when it starts to save step 10, step 5 is saved
    for number in numbers:
        process = Training(again, environment | READ_ONLY, resumed)
        last += rng.randint(1, 8)
        if not process.at_row(last):
            pytest.fail(f"ended by itself: {process.end()}")
        time.sleep(rng.uniform(0.0, 0.02))  # a random moment within the step
        status, out, err = process.end(number)
        last = len(read_metrics(resumed / "metrics.jsonl"))
        if number == signal.SIGKILL:
            assert status == -signal.SIGKILL
            continue
        # It saved at this step, and printed nothing else.
        assert status == {signal.SIGTERM: 0, signal.SIGINT: 130}[number]
        assert f"stopped and saved at step {last} of {STEPS}; the same command resumes" in out
        assert (resumed / "checkpoints" / str(last)).is_dir() and not (resumed / "summary.json").exists()
        assert err.strip() == ("" if number == signal.SIGTERM else
                               "saving and stopping; press Ctrl-C again to stop immediately")
    status, out, err = Training(again, environment | READ_ONLY | last_environment, resumed).end()
    assert (status, err) == (0, "") and "resuming from step " in out
    assert number == signal.SIGKILL or f"resuming from step {last}" in out

    assert_same_run(resumed, reference)


@pytest.mark.exhaustive
def test_killed_at_any_time_on_a_mesh(train_command, environment, tiny_file, tmp_path):
    """While starting, training, saving and ending, with a user's compilation cache."""
    environment = environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                                 "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    reference, resumed = tmp_path / "reference", tmp_path / "resumed"
    command = [*train_command, "--config", str(tiny_file), *OVERRIDES, "mesh.data=1", "mesh.fsdp=4",
               "mesh.tensor=2"]
    process, marks = Training([*command, f"run_dir={reference}"], environment, reference), [time.monotonic()]
    for row in (1, STEPS):
        assert process.at_row(row), process.end()
        marks.append(time.monotonic())
    status, out, err = process.end()
    assert (status, err) == (0, "") and "8 × cpu" in out
    starting, training, ending = np.diff([*marks, time.monotonic()])
    seed = time.time_ns()
    rng = random.Random(seed)
    print(f"moments drawn with seed {seed}")
    last = 0
    # Additional rows to wait for, and then a time span in seconds.
    for more, span in ((0, starting / 2), (1, 0.3 * training), (STEPS, ending)):
        process = Training([*command, f"run_dir={resumed}"], environment | READ_ONLY, resumed)
        if more:
            process.at_row(min(last + more, STEPS))
        time.sleep(rng.uniform(0, span))
        process.end(signal.SIGKILL)
        if (resumed / "metrics.jsonl").exists():
            last = len(read_metrics(resumed / "metrics.jsonl"))
    status, _, err = Training([*command, f"run_dir={resumed}"], environment | READ_ONLY, resumed).end()
    assert (status, err) == (0, "")
    assert_same_run(resumed, reference)


def assert_same_run(resumed, reference):
    def timeless_rows(run_dir):
        """Returns the metrics that do not depend on time."""
        return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}
                for row in read_metrics(run_dir / "metrics.jsonl")]
    assert [row["step"] for row in timeless_rows(resumed)] == list(range(1, STEPS + 1))
    for resumed_row, reference_row in zip(timeless_rows(resumed), timeless_rows(reference), strict=True):
        assert resumed_row == reference_row  # to the last bit
    for name in ("model.safetensors", "config.json"):
        assert (resumed / "model" / name).read_bytes() == (reference / "model" / name).read_bytes()
    summary, expected = (json.loads((run_dir / "summary.json").read_text())
                         for run_dir in (resumed, reference))
    changing = {"seconds": 0, "git_commit": ""}  # a commit may fall between the two
    assert summary | changing == expected | changing


@pytest.mark.exhaustive
def test_bad_input_is_one_line_in_a_process_too(train_command, environment, tiny_file, tmp_path):
    command = [*train_command, "--config", str(tiny_file), f"run_dir={tmp_path / 'run'}", "mesh.fsdp=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: mesh: data × fsdp × tensor = -1 × 3 × 1 does not make 1 device\n"
    assert not (tmp_path / "run").exists()
