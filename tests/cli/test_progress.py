"""Progress of long work: lines at intervals, and time spans."""

from __future__ import annotations

import time

import pytest

from tests.printed import Printed
from tilelli_jax.cli import progress


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3599.7, "1 h 0 min"),
    (7500, "2 h 5 min"), (90_000, "25 h 0 min")])
def test_time_spans(seconds, text):
    assert progress.duration(seconds) == text


def test_lines_without_a_terminal(capsys, monkeypatch):
    """A line is printed at intervals, also while the first unit is not done."""
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    printed = Printed(lambda: capsys.readouterr().err)
    with progress.shown(2000, "answering", "question") as advance:
        printed.wait_for("answering: 0 of 2,000 questions\n")
        advance(1000)
        printed.wait_for("answering: 1,000 of 2,000 questions; 0 s left\n")
    with progress.shown(2000, "resumed", "question", done=1000):  # nothing is known of the speed
        printed.wait_for("resumed: 1,000 of 2,000 questions\n")
    with progress.shown(1, "quiet", "question", quiet=True):
        capsys.readouterr()
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_waiting_for_one_long_thing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    with progress.waiting("reporting"):
        Printed(lambda: capsys.readouterr().out).wait_for("reporting … 0 s\n")


def test_a_closed_stream_ends_nothing():
    calls = []

    def beat():
        calls.append(1)
        raise BrokenPipeError
    heartbeat = progress.Heartbeat(0.01, beat)
    deadline = time.monotonic() + 10
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    heartbeat.close()
    assert len(calls) >= 3 and not heartbeat._thread.is_alive()
