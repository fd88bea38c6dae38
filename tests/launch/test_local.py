"""The local launcher with programs that need no JAX: starting, output, signals and ending."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))

import local  # noqa: E402

START = f"""
import sys
sys.path.insert(0, {str(LAUNCH)!r})
import local
sys.exit(local.run([sys.executable, "-c", *sys.argv[3:]], int(sys.argv[1]), 2, float(sys.argv[2])))
"""
NUMBER = "import os, sys, time, signal; from pathlib import Path; i = int(os.environ['TILELLI_PROCESS_ID'])\n"


def start(program: str, *arguments: str, processes: int = 2, grace: float = 10.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, str(processes), str(grace), NUMBER + program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = launcher.communicate(timeout=60)
    return launcher.returncode, out, err


def pids(folder: Path, count: int) -> list[int]:
    """Waits until `count` programs have written their process ids to `folder`, and returns them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        texts = [path.read_text() for path in folder.glob("*.pid")]
        if len(texts) == count and all(text.endswith("\n") for text in texts):
            return [int(text) for text in texts]
        time.sleep(0.02)
    raise AssertionError(f"{len(texts)} of {count} processes started")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(numbers: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, numbers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, numbers))


WAIT = "Path(sys.argv[1], f'{os.getpid()}.pid').write_text(f'{os.getpid()}\\n'); time.sleep(600)\n"
AFTER_OTHERS = "while len(list(Path(sys.argv[1]).glob('*.pid'))) < {}: time.sleep(0.02)\n"
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(),
                                reason="only Linux's /proc lists the running processes")


def test_every_process_gets_its_environment_and_the_first_ones_output_is_printed(tmp_path):
    program = """
keys = ("TILELLI_COORDINATOR", "TILELLI_NUM_PROCESSES", "JAX_PLATFORMS", "XLA_FLAGS")
Path(sys.argv[1], str(i)).write_text("|".join(os.environ[key] for key in keys))
print("process", i)
print("error of", i, file=sys.stderr)
"""
    status, out, err = finish(start(program, str(tmp_path), processes=3))
    assert status == 0
    assert out == "process 0\n"
    assert err == "error of 0\n"
    seen = [(tmp_path / str(i)).read_text() for i in range(3)]
    assert len(set(seen)) == 1
    coordinator, number, platforms, flags = seen[0].split("|")
    assert coordinator.startswith("127.0.0.1:")
    assert (number, platforms) == ("3", "cpu")
    assert "--xla_force_host_platform_device_count=2" in flags


def test_xla_flags_are_kept_and_the_platform_is_replaced(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    environment = local._environment("127.0.0.1:1", 2, 0, 4)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["XLA_FLAGS"].split() == ["--xla_cpu_enable_fast_math=false",
                                                "--xla_force_host_platform_device_count=4"]


@needs_proc
def test_one_failure_ends_all_with_its_status_and_last_lines(tmp_path):
    program = "if i == 1:\n " + AFTER_OTHERS.format(2) + " print('what went wrong'); sys.exit(3)\n" + WAIT
    launcher = start(program, str(tmp_path), processes=3, grace=1000)  # not used up: SIGTERM suffices
    others = pids(tmp_path, 2)
    status, _, err = finish(launcher)
    assert status == 3
    assert "[1] what went wrong" in err
    assert gone(others)


def test_the_first_failure_counts_not_those_it_causes(tmp_path):
    """Exit statuses after the first failure do not matter: here process 1 exits with 9 on SIGTERM."""
    program = ("if i == 0:\n " + AFTER_OTHERS.format(1) + " sys.exit(2)\n"
               "signal.signal(signal.SIGTERM, lambda *_: os._exit(9))\n" + WAIT)
    status, _, err = finish(start(program, str(tmp_path)))
    assert status == 2
    assert "failed first" not in err  # process 0's output is printed anyway


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path):
    program = ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
               "if i == 0:\n " + AFTER_OTHERS.format(1) + " sys.exit(4)\n" + WAIT)
    launcher = start(program, str(tmp_path), grace=0.5)
    others = pids(tmp_path, 1)
    assert finish(launcher)[0] == 4
    assert gone(others)


def test_a_killed_process_gives_status_128_plus_signal():
    assert finish(start("if i == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"))[0] == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_and_a_clean_end_is_a_success(tmp_path, number):
    program = """
def stop(*_):
    Path(sys.argv[1], f"{i}.stopped").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
""" + WAIT
    launcher = start(program, str(tmp_path))
    pids(tmp_path, 2)
    launcher.send_signal(number)
    assert finish(launcher)[0] == 0
    assert {path.name for path in tmp_path.glob("*.stopped")} == {"0.stopped", "1.stopped"}


@needs_proc
def test_the_second_signal_kills(tmp_path):
    program = """
def keep_running(*_):
    Path(sys.argv[1], f"{i}.asked").touch()
    time.sleep(600)
signal.signal(signal.SIGTERM, keep_running)
""" + WAIT
    launcher = start(program, str(tmp_path))
    children = pids(tmp_path, 2)
    launcher.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.asked"))) < 2:  # two simultaneous signals would be merged
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert launcher.poll() is None
    assert all(map(alive, children))
    launcher.send_signal(signal.SIGTERM)
    assert finish(launcher)[0] == 128 + signal.SIGTERM
    assert gone(children)


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent (prctl)")
def test_no_process_outlives_a_killed_launcher(tmp_path):
    launcher = start(WAIT, str(tmp_path))
    children = pids(tmp_path, 2)
    launcher.kill()
    launcher.wait()
    assert gone(children)


@needs_proc
def test_workers_of_a_process_are_also_killed(tmp_path):
    program = """
import subprocess
worker = subprocess.Popen(["sleep", "600"])
Path(sys.argv[1], f"{i}.pid").write_text(f"{worker.pid}\\n")
"""
    launcher = start(program, str(tmp_path))
    workers = pids(tmp_path, 2)
    assert finish(launcher)[0] == 0
    assert gone(workers)


def test_command_line(monkeypatch):
    calls = []
    monkeypatch.setattr(local, "run", lambda *arguments: calls.append(arguments) or 7)
    train = ["--config", "c.yaml", "train.steps=5"]
    assert local.main(["--processes", "3", "--devices", "4", "--", *train]) == 7
    assert calls == [([sys.executable, "-m", "tilelli_jax.train", "--distributed", *train], 3, 4, 10.0)]
    with pytest.raises(SystemExit):
        local.main(["--processes", "0", "--", "--config", "c.yaml"])


@needs_proc
def test_of_two_nearly_simultaneous_failures_the_first_is_reported(tmp_path):
    """After one process is killed, another may fail within milliseconds."""
    program = """
mark = Path(sys.argv[1], "pid")
if i == 1:
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").rename(mark)
    os.kill(os.getpid(), signal.SIGKILL)
while not mark.exists():
    time.sleep(0.001)
state = Path("/proc", mark.read_text(), "stat")
def dead():
    try:
        return state.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:  # reaped
        return True
while not dead():
    time.sleep(0.001)
time.sleep(0.003)
sys.exit(1)
"""
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        status, _, err = finish(start(program, str(folder)))
        assert status == 128 + signal.SIGKILL and "process 1 failed first" in err


class Child:
    """A process that has ended with `status`; `wait` returns after `before.wait` has returned."""

    def __init__(self, status, before=None):
        self.status, self.before, self.seen = status, before, threading.Event()
        self.signals = []

    def wait(self):
        if self.before:
            assert self.before.seen.wait(60)
            time.sleep(0.1)  # let the other thread report first
        self.seen.set()
        return self.status

    def send_signal(self, number):
        self.signals.append(number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(("first", "second", "received", "expected"), [
    (1, -signal.SIGKILL, [], (1, 137)),  # failed because the other was killed, and was noticed first
    (1, -signal.SIGSEGV, [], (1, 139)),
    (-signal.SIGABRT, -signal.SIGKILL, [], (1, 137)),
    (-signal.SIGKILL, -signal.SIGSEGV, [], (0, 137)),
    (3, -signal.SIGABRT, [], (0, 3)),  # aborted itself because the other failed
    (3, -signal.SIGTERM, [signal.SIGTERM], (0, 3)),  # by the forwarded signal
    (3, 4, [], (0, 3)), (0, 4, [], (1, 4)), (0, -signal.SIGTERM, [], (1, 143)), (0, 0, [], (0, 0))])
def test_a_killed_process_is_the_cause_even_if_noticed_late(monkeypatch, first, second, received,
                                                            expected):
    monkeypatch.setattr(local, "CAUSE_SECONDS", 60.0)  # ends when both have
    one = Child(first)
    two = Child(second, before=one)
    assert local._wait([one, two], received, 60.0) == expected


def test_the_wait_for_the_cause_of_a_failure_is_short(monkeypatch):
    """The others are then terminated, and their exit status is not the cause."""
    monkeypatch.setattr(local, "CAUSE_SECONDS", 0.01)
    terminated = Child(0)
    late = Child(-signal.SIGKILL, before=terminated)
    late.terminate = terminated.seen.set
    assert local._wait([Child(5), late], [], 60.0) == (0, 5)
