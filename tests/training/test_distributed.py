"""Joining and stopping a distributed run: in this process, and in two processes of four devices each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.training import distributed

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, os, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tilelli_jax.training import distributed

def main():
    distributed.initialize()
    folder, fails = Path(sys.argv[1]), sys.argv[2] == "fails"
    process, devices = jax.process_index(), jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    split, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    numbers = jax.make_array_from_callback((devices,), split, lambda i: jnp.arange(devices)[i])
    total, stopped = jax.jit(jnp.sum, out_shardings=replicated), None

    def compiled_late(x):
        if process == 1:
            time.sleep(1)
            (folder / "compiled").touch()
        return x + 1
    waits = distributed.compile_barrier(jax.jit(compiled_late))
    waited = int(waits(jnp.zeros(3))[0]) == 1 and (folder / "compiled").exists()
    again = waits(jnp.ones(3)).tolist() == [2.0] * 3 and waits(jnp.ones(4)).shape == (4,)
    with distributed.signals_deferred():
        for step in range(3000):
            value = int(total(numbers))
            (folder / f"{process}.pid").write_text(f"{os.getpid()} ")
            if fails and process == 1:
                raise RuntimeError("made to fail")
            if distributed.should_stop(step):
                stopped = step
                break
            time.sleep(0.01)
        (folder / f"{process}.json").write_text(json.dumps(
            dict(total=value, devices=devices, local=jax.local_device_count(), stopped=stopped,
                 waited=waited, again=again)))
        return distributed.stop_status()

sys.exit(distributed.exit_on_failure(lambda argv: main())())
"""
START = f"""
import sys
sys.path.insert(0, {str(ROOT / "launch")!r})
import local
sys.exit(local.run([sys.executable, "-c", *sys.argv[1:]], 2, 4, 5.0))
"""


def start(folder: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", START, PROGRAM, str(folder), how], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""})


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_two_processes_compute_together_and_a_signal_to_one_stops_both_at_one_step(tmp_path, number, status):
    launcher = start(tmp_path, "runs")
    pid = tmp_path / "1.pid"
    deadline = time.monotonic() + 120
    written = ""
    while not written.endswith(" ") and launcher.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        written = pid.read_text() if pid.exists() else ""
    if launcher.poll() is None:
        os.kill(int(written), number)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == status, err
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first == second
    assert first["total"] == sum(range(8))
    assert (first["devices"], first["local"]) == (8, 4)
    assert first["stopped"] is not None
    # The other process compiled for a second longer, without communicating.
    assert first["waited"] and first["again"]


@pytest.mark.exhaustive
def test_one_failing_process_ends_both_immediately(tmp_path):
    """JAX's normal exit would wait five minutes for a process that waits in a collective."""
    launcher = start(tmp_path, "fails")
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "[1] RuntimeError: made to fail" in err
    assert not list(tmp_path.glob("*.json"))


def test_sigterm_to_a_single_process_is_reported_and_the_old_handler_returns():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.signals_deferred():
        assert not distributed.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert distributed.should_stop(2)
        assert distributed.should_stop(3)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not distributed.should_stop(1)  # an old signal does not stop later work


def test_the_first_interrupt_is_reported_and_the_second_interrupts():
    with pytest.raises(KeyboardInterrupt), distributed.signals_deferred():
        assert distributed.stop_status() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert distributed.should_stop(1)
        assert distributed.stop_status() == 130
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("compiles", "message"), [
    (True, "stopping after this update, which is still compiling"), (False, "saving and stopping")])
def test_the_message_says_what_is_waited_for(compiles, message, capfd):
    with distributed.signals_deferred(lambda: compiles):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == f"\n{message}; press Ctrl-C again to stop immediately\n"


@pytest.mark.parametrize(("environment", "message"), [
    (("", "2", "0"), "TILELLI_COORDINATOR not set"),
    (("host:1", "", ""), "TILELLI_NUM_PROCESSES, TILELLI_PROCESS_ID not set"),
    (("host", "2", "0"), "expected host:port, found 'host'"),
    ((":1", "2", "0"), "expected host:port"),
    (("host:http", "2", "0"), "expected host:port"),
    (("host:1", "two", "0"), "TILELLI_NUM_PROCESSES: expected an integer, found 'two'"),
    (("host:1", "2", "-1"), "TILELLI_PROCESS_ID: expected an integer, found '-1'"),
    (("host:1", "2", "2"), "expected 0 to 1, as TILELLI_NUM_PROCESSES is 2, found 2"),
])
def test_wrong_environment(monkeypatch, environment, message):
    names = (distributed.COORDINATOR, distributed.NUM_PROCESSES, distributed.PROCESS_ID)
    for name, value in zip(names, environment, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as raised:
        distributed.initialize()
    assert "\n" not in str(raised.value)


def test_without_a_detected_cluster_the_message_names_all(monkeypatch):
    """The error lists every cluster that would be detected."""
    calls = []

    def detect(*arguments, **more):
        calls.append((arguments, more))
        raise ValueError("coordinator_address should be defined.")
    for name in (distributed.COORDINATOR, distributed.NUM_PROCESSES, distributed.PROCESS_ID):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", detect)
    with pytest.raises(InputError) as raised:
        distributed.initialize()
    assert calls == [((), {})]
    for name in (distributed.COORDINATOR, "launch/local.py", "srun", "TPU", "GKE", "mpirun"):
        assert name in str(raised.value)


@pytest.mark.exhaustive
def test_outside_any_cluster():
    """The error lists every cluster that would be detected."""
    clean = {key: value for key, value in os.environ.items()
             if not key.startswith(("TILELLI_", "SLURM_", "OMPI_", "JAX_COORDINATOR", "KUBERNETES_"))}
    program = ("from tilelli_jax.cli.command import command\nfrom tilelli_jax.training import distributed\n"
               "raise SystemExit(command(lambda argv: distributed.initialize())([]))")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                            env=clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    for name in (distributed.COORDINATOR, "launch/local.py", "srun", "TPU", "GKE", "mpirun"):
        assert name in result.stderr


@pytest.mark.exhaustive
def test_slurm_is_detected():
    """Two tasks with the environment that srun sets."""
    job = 1 + os.getpid() % 4000  # JAX derives the port from it
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
             "SLURM_NTASKS": "2", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    program = ("import jax\nfrom tilelli_jax.training import distributed\ndistributed.initialize()\n"
               "print(jax.process_index(), jax.process_count(), jax.device_count(), "
               "distributed.should_stop(1))")
    tasks = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                              env=os.environ | slurm | {"SLURM_PROCID": task, "SLURM_LOCALID": task})
             for task in "01"]
    for number, task in enumerate(tasks):
        out, _ = task.communicate(timeout=120)
        assert task.returncode == 0
        assert out.splitlines()[-1] == f"{number} 2 2 False"
