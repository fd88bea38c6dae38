"""SIGINT and SIGTERM: every command ends as it is asked to, whatever it is at."""

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

from tilelli_jax import interrupts
from tilelli_jax.errors import InputError, command

COMMAND = """
import gc, hashlib, os, signal, sys, time
from tilelli_jax import interrupts
from tilelli_jax.errors import command
def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)
    [None for _ in range(1000)]
{settings}
@command
def main(argv):
    {moment}
    time.sleep(20)
    print("went on to its end")
sys.exit(main([]))
"""
# C code of many seconds, in which Python runs no handler of signals: as XLA's compiler.
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
    ("def swallow():\n    try: send()\n    except BaseException: pass", "swallow(); interrupts.raise_if_received()"),
    ("def swallow():\n    try: send()\n    except BaseException: pass", "swallow(); return 0"),
    ("def rename():\n    try: send()\n    except BaseException: raise RuntimeError('callback failed')",
     "rename()"),
], ids=["garbage collection", "a finaliser", "plain work", "swallowed, and looked at", "swallowed at the end",
        "made another error"])
@pytest.mark.parametrize(("number", "status", "said"), [
    (signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")])
def test_a_signal_is_not_lost(settings: str, moment: str, number: int, status: int, said: str,
                              environment: dict[str, str]) -> None:
    settings = settings.replace("send()", f"send({number})")
    moment = moment.replace("send()", f"send({number})")
    assert ended(settings, moment, environment) == (status, "", said)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_what_runs_no_handler(number: int, status: int,
                                                   environment: dict[str, str]) -> None:
    process = started("", BUSY, environment)
    assert process.stdout and process.stdout.readline() == "busy\n"
    time.sleep(0.5)  # it says so just before
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
    """Its handler runs after C code of some tenths of a second: it is the first, and no repetition."""
    late = (f"import threading; threading.Timer(0.2, os.kill, (os.getpid(), {number})).start(); "
            "begun = time.monotonic()\n"
            "    while time.monotonic() - begun < 0.2: hashlib.pbkdf2_hmac('sha256', b'', b'', 1_500_000)")
    assert ended("", late, environment)[:2] == (status, "")


# As threads of XLA's compiler may.
CRASHES = """
import ctypes
class Late:
    def __del__(self):  # on the interpreter's way out
        ctypes.string_at(0)
sys.late = Late()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_the_process_ends_at_once(number: int, status: int, environment: dict[str, str],
                                                 tmp_path: Path) -> None:
    """What libraries' threads do on the interpreter's way out does not change its exit status."""
    program = COMMAND.format(settings=CRASHES, moment=f"print('said'); send({number})")
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "tilelli").write_text(f"exec(open({str(tmp_path / 'program.py')!r}).read())")
    done = subprocess.run([sys.executable, str(tmp_path / "tilelli")], env=environment, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "said\n"), done.stderr


def test_a_second_signal_ends_what_is_slow_to_end(environment: dict[str, str]) -> None:
    slow = ("def slow():\n    try: send()\n    finally:\n"
            "        try: send()\n        except BaseException: pass\n"
            "        time.sleep(20)")
    begun = time.monotonic()
    assert ended(slow, "slow()", environment) == (130, "", "interrupted\n")
    assert time.monotonic() - begun < 15


def test_what_is_ignored_stays_ignored(environment: dict[str, str]) -> None:
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    assert ended(ignore, "send(); print('done'); return 0", environment) == (0, "done\n", "")


@pytest.mark.parametrize("module", ["tilelli_jax.train", "eval.recall", "convert"])
def test_a_signal_while_modules_are_imported(module: str, environment: dict[str, str],
                                             tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def heard(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'numpy':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(heard)\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", module, "--help"], env=environment | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_noted_work_goes_on_after_the_first_signal_and_not_after_the_second(
        capfd: pytest.CaptureFixture[str]) -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred("saving", seen.append):
        assert interrupts.received() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received() == signal.SIGINT and seen == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(0)
    assert seen == [signal.SIGINT] and interrupts.received() is None
    assert capfd.readouterr().err == "\nsaving; press Ctrl-C again to stop immediately\n"


def test_what_was_asked_of_one_command_is_asked_of_the_one_that_called_it() -> None:
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
    assert inner([]) == 0 and interrupts.received() is None  # nothing later is stopped by an old signal


def test_an_answered_interrupt_is_forgotten() -> None:
    @command
    def main(argv: object) -> int:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            interrupts.forget_interrupt()
            interrupts.raise_if_received()
        time.sleep(interrupts.GRACE + 0.2)  # no timer of theirs is left
        return 7

    assert main([]) == 7


@pytest.mark.parametrize("error", [InputError("no"), RuntimeError("another")])
def test_another_error_keeps_its_name(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """What fails while a noted signal waits is what is reported."""
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


def test_handlers_come_and_go() -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.handled(), interrupts.handled():
        assert [signal.getsignal(number) for number in interrupts.SIGNALS] != before
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_what_a_library_has_made_of_either_signal_is_known_by_its_text(environment: dict[str, str]) -> None:
    """As of a callback that XLA calls: another error, without a cause, which quotes what was raised."""
    rename = ("def rename():\n    try: send({0})\n    except BaseException as error: text = repr(error)\n"
              "    raise RuntimeError('INTERNAL: CpuCallback error: ' + text)")
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        assert ended(rename.format(int(number)), "rename()", environment)[0] == status


def test_a_second_signal_ends_what_is_slow_after_the_command(environment: dict[str, str]) -> None:
    """As threads that Python waits for at its end."""
    begin = "interrupts._handlers = interrupts._Handlers(from_start=True)  # as of `python -m`"
    slow = ("import threading; threading.Thread(target=time.sleep, args=(20,)).start()\n"
            "    try: send()\n    finally: send()")
    begun = time.monotonic()
    status, out, _ = ended(begin, slow, environment)
    assert (status, out) == (130, "") and time.monotonic() - begun < 15


@pytest.mark.parametrize("again", [False, True])
def test_sigterm_that_a_scheduler_repeats_is_one_request(again: bool) -> None:
    """Work that saves is not stopped by a second one at once, but by one that comes later."""
    with contextlib.ExitStack() as until, interrupts.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received() == signal.SIGTERM
        if again:
            until.enter_context(pytest.raises(SystemExit, match="143"))
            time.sleep(interrupts.REPEATED + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_waits_while_it_is_held() -> None:
    done = []
    with interrupts.handled(), pytest.raises(KeyboardInterrupt):
        with interrupts.blocked(), interrupts.blocked():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("whole")
        done.append("never")
    assert done == ["whole"]
    with interrupts.deferred(), interrupts.blocked():
        os.kill(os.getpid(), signal.SIGINT)
    with interrupts.deferred():
        with interrupts.blocked():
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.received() is None
        assert interrupts.received() == signal.SIGINT
