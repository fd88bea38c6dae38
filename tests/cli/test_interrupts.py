"""SIGINT and SIGTERM: commands end as requested, whatever they are doing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tilelli_jax.cli import interrupts
from tilelli_jax.cli.command import command
from tilelli_jax.errors import InputError

COMMAND = """
import gc, hashlib, os, signal, sys, time
from tilelli_jax.cli import interrupts
from tilelli_jax.cli.command import command
def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)
    [None for _ in range(1000)]
{settings}
@command
def main(argv):
    {moment}
    time.sleep(20)
    print("ran to its end")
sys.exit(main([]))
"""
# C code of many seconds, during which Python runs no signal handler, like XLA's compiler.
BUSY = "print('busy', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)"


def started(settings: str, moment: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    program = COMMAND.format(settings=settings, moment=moment)
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def ended(settings: str, moment: str, environment: dict[str, str]) -> tuple[int, str, str]:
    process = started(settings, moment, environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(("settings", "moment"), [
    ("def called(phase, info):\n    gc.callbacks.clear()\n    send()\ngc.callbacks.append(called)",
     "gc.collect()"),
    ("class Held:\n    def __del__(self): send()", "held = Held(); del held"),
    ("", "send()"),
    ("def swallow():\n    try: send()\n    except BaseException: pass",
     "swallow(); interrupts.raise_if_received()"),
    ("def swallow():\n    try: send()\n    except BaseException: pass", "swallow(); return 0"),
    ("def rename():\n    try: send()\n    except BaseException: raise RuntimeError('callback failed')",
     "rename()"),
], ids=["garbage collection", "a finaliser", "plain work", "swallowed, then checked", "swallowed at the end",
        "turned into another error"])
@pytest.mark.parametrize(("number", "status", "stderr"), [
    (signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")])
def test_a_signal_is_not_lost(settings: str, moment: str, number: int, status: int, stderr: str,
                              environment: dict[str, str]) -> None:
    settings = settings.replace("send()", f"send({number})")
    moment = moment.replace("send()", f"send({number})")
    assert ended(settings, moment, environment) == (status, "", stderr)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_c_code(number: int, status: int,
                                     environment: dict[str, str]) -> None:
    process = started("", BUSY, environment)
    assert process.stdout and process.stdout.readline() == "busy\n"
    time.sleep(0.5)  # it prints just before it starts
    process.send_signal(number)
    time.sleep(max(interrupts.PATIENCE, interrupts.REPEATED) + 0.5)
    assert process.poll() is None
    begun = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert (process.returncode, out) == (status, "")
    assert err == ("\nstopping after the current computation; press Ctrl-C again to stop immediately\n"
                   "interrupted\n" if number == signal.SIGINT else "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_that_is_handled_late_is_not_lost(number: int, status: int,
                                                     environment: dict[str, str]) -> None:
    """Its handler runs after 0.2 s of C code: it is the first signal, not a repetition."""
    late = (f"import threading; threading.Timer(0.2, os.kill, (os.getpid(), {number})).start(); "
            "begun = time.monotonic()\n"
            "    while time.monotonic() - begun < 0.2: hashlib.pbkdf2_hmac('sha256', b'', b'', 1_500_000)")
    assert ended("", late, environment)[:2] == (status, "")


# Crashes during exit, as threads of XLA's compiler can.
CRASHES = """
import ctypes
class Late:
    def __del__(self):  # during the interpreter's exit
        ctypes.string_at(0)
sys.late = Late()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_the_process_ends_immediately(number: int, status: int, environment: dict[str, str],
                                                     tmp_path: Path) -> None:
    """Crashes of library threads during exit do not change the exit status."""
    program = COMMAND.format(settings=CRASHES, moment=f"print('printed'); send({number})")
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "tilelli").write_text(f"exec(open({str(tmp_path / 'program.py')!r}).read())")
    done = subprocess.run([sys.executable, str(tmp_path / "tilelli")], env=environment, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "printed\n"), done.stderr


def test_a_second_signal_ends_slow_cleanup(environment: dict[str, str]) -> None:
    slow = ("def slow():\n    try: send()\n    finally:\n"
            "        try: send()\n        except BaseException: pass\n"
            "        time.sleep(20)")
    begun = time.monotonic()
    assert ended(slow, "slow()", environment) == (130, "", "interrupted\n")
    assert time.monotonic() - begun < 15


def test_an_ignored_signal_stays_ignored(environment: dict[str, str]) -> None:
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert ended(ignore, "send(); print('done'); return 0", environment) == (0, "done\n", "")


@pytest.mark.parametrize("module", ["tilelli_jax.train", "eval.recall", "convert"])
def test_a_signal_while_modules_are_imported(module: str, environment: dict[str, str],
                                             tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def hook(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'numpy':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(hook)\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", module, "--help"], env=environment | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_deferred_work_continues_after_the_first_signal_only(
        capfd: pytest.CaptureFixture[str]) -> None:
    numbers = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred("saving", numbers.append):
        assert interrupts.received() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received() == signal.SIGINT and numbers == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        numbers.append(0)
    assert numbers == [signal.SIGINT] and interrupts.received() is None
    assert capfd.readouterr().err == "\nsaving; press Ctrl-C again to stop immediately\n"


def test_how_the_work_stops_is_printed_once_and_may_depend_on_the_moment(
        capfd: pytest.CaptureFixture[str]) -> None:
    for moment in ("compiling", "saving"):
        with interrupts.deferred(lambda: f"stopping while {moment}"):  # noqa: B023
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts._handlers
            interrupts._handlers.waiting = 1
            interrupts._handlers.explain(signal.SIGINT)  # no second time
        assert capfd.readouterr().err == (
            f"\nstopping while {moment}; press Ctrl-C again to stop immediately\n")


def test_c_code_in_deferred_work(environment: dict[str, str]) -> None:
    """The message comes although the handler cannot run, and is the work's."""
    process = started("", f"with interrupts.deferred('saving'): {BUSY}", environment)
    assert process.stdout and process.stdout.readline() == "busy\n"
    time.sleep(0.5)  # it prints just before it starts
    process.send_signal(signal.SIGINT)
    time.sleep(max(interrupts.PATIENCE, interrupts.REPEATED) + 0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "\nsaving; press Ctrl-C again to stop immediately\ninterrupted\n"


def test_an_interrupt_of_an_inner_command_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """As where `tilelli` runs a command."""
    @command
    def inner(argv: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError

    @command
    def outer(argv: object) -> int:
        return inner([])

    assert outer([]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_signal_to_an_inner_command_reaches_the_outer_one() -> None:
    @command
    def inner(argv: object) -> int:
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    @command
    def outer(argv: object) -> int:
        assert inner([]) == 0
        interrupts.raise_if_received()
        return 0

    with pytest.raises(SystemExit, match="143"):
        outer([])
    assert inner([]) == 0 and interrupts.received() is None  # an old signal does not stop later work


def test_a_handled_interrupt_is_forgotten() -> None:
    @command
    def main(argv: object) -> int:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            interrupts.forget_interrupt()
            interrupts.raise_if_received()
        time.sleep(interrupts.GRACE + 0.2)  # no timer remains
        return 7

    assert main([]) == 7


@pytest.mark.parametrize("error", [InputError("no"), RuntimeError("another")])
def test_other_errors_are_reported_as_they_are(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """An error during a deferred signal is reported instead of the signal."""
    def main(argv: object) -> int:
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            raise error

    run: Callable[..., int] = command(main)
    if isinstance(error, InputError):
        assert run([]) == 2 and capsys.readouterr().err == "error: no\n"
    else:
        with pytest.raises(RuntimeError, match="another"):
            run([])


def test_handlers_are_installed_and_removed() -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.handled(), interrupts.handled():
        assert [signal.getsignal(number) for number in interrupts.SIGNALS] != before
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_a_signal_turned_into_another_error_is_recognised_by_its_text(environment: dict[str, str]) -> None:
    """As with XLA callbacks: another error without a cause, whose text quotes the exception."""
    rename = ("def rename():\n    try: send({0})\n    except BaseException as error: text = repr(error)\n"
              "    raise RuntimeError('INTERNAL: CpuCallback error: ' + text)")
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        assert ended(rename.format(int(number)), "rename()", environment)[0] == status


def test_a_second_signal_ends_a_slow_exit(environment: dict[str, str]) -> None:
    """For example threads that Python joins at exit."""
    begin = "interrupts._handlers = interrupts._Handlers(from_start=True)  # as of `python -m`"
    slow = ("import threading; threading.Thread(target=time.sleep, args=(20,)).start()\n"
            "    try: send()\n    finally: send()")
    begun = time.monotonic()
    status, out, _ = ended(begin, slow, environment)
    assert (status, out) == (130, "") and time.monotonic() - begun < 15


@pytest.mark.parametrize("again", [False, True])
def test_sigterm_that_a_scheduler_repeats_is_one_request(again: bool) -> None:
    """An immediate second SIGTERM does not stop deferred work; a later one does."""
    with contextlib.ExitStack() as stack, interrupts.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received() == signal.SIGTERM
        if again:
            stack.enter_context(pytest.raises(SystemExit, match="143"))
            time.sleep(interrupts.REPEATED + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_blocked_signal_is_delayed() -> None:
    done = []
    with interrupts.handled(), pytest.raises(KeyboardInterrupt):
        with interrupts.blocked(), interrupts.blocked():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("finished")
        done.append("never")
    assert done == ["finished"]
    with interrupts.deferred(), interrupts.blocked():
        os.kill(os.getpid(), signal.SIGINT)
    with interrupts.deferred():
        with interrupts.blocked():
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.received() is None
        assert interrupts.received() == signal.SIGINT
