"""Metrics in JSON lines, TensorBoard, Weights & Biases and the terminal."""

from __future__ import annotations

import io
import json
import struct
import sys
import time

import numpy as np
import pytest

from tests.printed import Printed
from tilelli_jax.errors import InputError
from tilelli_jax.training import log as log_module
from tilelli_jax.training.log import LogConfig, MetricsLog, Progress, flat, read_metrics, require_extras
from tilelli_jax.training.loss import NATS


def open_log(path, from_step=0, config=None):
    return MetricsLog(path, config or LogConfig(), from_step=from_step, name="test", settings={})


def test_a_row_is_a_line_of_plain_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = open_log(path)
    log.write({"step": 1, "loss": np.float32(0.5), "use": np.array([[0.25, 0.75]], np.float32), "rate": None})
    log.write({"step": 2, "loss": float("nan"), "use": np.array([np.inf, 1.0])})
    # Checked before closing: a killed process leaves what it has logged.
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5, "use": [[0.25, 0.75]], "rate": None},
        {"step": 2, "loss": None, "use": [None, 1.0]}]
    log.close()


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1}}\n' for step in range(1, 6)) + '{"step": 6, "lo')
    log = open_log(path, from_step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    log.write({"step": 4, "loss": 2})
    log.close()
    assert [row["loss"] for row in read_metrics(path)] == [1, 1, 1, 2]


def test_reading_stops_at_a_truncated_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    for garbage in (b"\xff\xfe", b"[]", b"{}", b'{"step": "x"}', b"[" * 100_000):
        path.write_bytes(b'{"step": 1}\n' + garbage + b'\n{"step": 2}\n')
        assert read_metrics(path) == [{"step": 1}]


def test_flat():
    row = {"a": [1, [2, 3.5]], "b": 4, "c": None, "d": "text", "e": []}
    assert flat(row) == {"a/0": 1, "a/1/0": 2, "a/1/1": 3.5, "b": 4}


@pytest.mark.parametrize(("config", "message"), [
    (LogConfig(wandb_project="p"), "log.wandb_project needs wandb: pip install 'tilelli_jax.wandb.'"),
    (LogConfig(tensorboard=True), "log.tensorboard needs tensorboardX: pip install")])
def test_a_missing_extra_is_named(monkeypatch, config, message):
    monkeypatch.setattr(log_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        require_extras(config)
    require_extras(LogConfig())


def events(folder):
    """(step, tag, value) of every scalar in TensorBoard event files, and the steps they purge from."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2",
                                    reason="tensorboardX (extra: tensorboard) is not installed")
    scalars, restarts = [], []
    for path in sorted(folder.iterdir(), key=lambda path: int(path.suffix[1:])):  # by first step
        data = path.read_bytes()
        while data:  # records: length, checksum, event, checksum
            size, = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12:12 + size])
            data = data[16 + size:]
            if event.HasField("session_log"):
                restarts.append(event.step)
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return scalars, restarts


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX (extra: tensorboard) is not installed")
    config = LogConfig(tensorboard=True)
    require_extras(config)
    log = open_log(tmp_path / "metrics.jsonl", config=config)
    log.write({"step": 1, "loss": 0.5, "router_use": np.array([[0.25, 0.75]])})
    log.write({"step": 2, "loss": 0.25})
    log.close()
    log = open_log(tmp_path / "metrics.jsonl", from_step=1, config=config)
    log.write({"step": 2, "loss": 0.125})
    log.close()
    scalars, restarts = events(tmp_path / "tensorboard")
    assert scalars == [(1, "loss", 0.5), (1, "router_use/0/0", 0.25), (1, "router_use/0/1", 0.75),
                       (2, "loss", 0.25), (2, "loss", 0.125)]
    assert restarts[-1] == 2  # TensorBoard drops the first session's events from this step on


WANDB = """
import json
def init(**settings):
    return Run(settings)
class Run:
    def __init__(self, settings):
        self.file = open(settings["dir"] + "/calls.jsonl", "a")
        self.record(settings)
    def record(self, call):
        print(json.dumps(call), file=self.file, flush=True)
    def log(self, row, step):
        self.record([step, row])
    def finish(self):
        self.record("finished")
        self.file.close()
"""


def test_weights_and_biases(tmp_path, monkeypatch):
    """A stand-in for wandb records its calls: all sessions of a run share one id, other runs have another."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    config = LogConfig(wandb_project="mine")
    require_extras(config)
    ids = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        for step in (0, 1):
            log = open_log(tmp_path / run / "metrics.jsonl", from_step=step, config=config)
            log.write({"step": step + 1, "loss": 0.5, "router_use": np.array([[0.25, 0.75]])})
            log.close()
        calls = [json.loads(line) for line in (tmp_path / run / "calls.jsonl").read_text().splitlines()]
        rows = [[step, {"step": step, "loss": 0.5, "router_use/0/0": 0.25, "router_use/0/1": 0.75}]
                for step in (1, 2)]
        assert calls == [calls[0], rows[0], "finished", calls[0], rows[1], "finished"]
        ids.append(calls[0].pop("id"))
        assert calls[0] == {"project": "mine", "dir": str(tmp_path / run), "name": "test", "config": {},
                            "resume": "allow"}
    assert ids[0] != ids[1]
    monkeypatch.delitem(sys.modules, "wandb")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(20, 10, NATS.format)
    progress._refresh()
    assert "compiling … 0 s" in terminal.getvalue() and "0/20" not in terminal.getvalue()
    assert progress.is_compiling()
    progress.update(11, 0.6931, None, None)
    assert not progress.is_compiling()
    progress.update(12, 0.6931, 1234.5, 125.0)
    progress.print_line("a line")
    progress._refresh()
    progress.close()
    shown = terminal.getvalue()
    for part in ("12/20", "loss 0.693", "0.9999 bits/byte", "1,234 tokens/s, 2 min 5 s left", "a line\n"):
        assert part in shown
    assert "compiling" not in shown.partition("11/20")[2]


def test_progress_without_a_terminal(capsys):
    for show in (True, False):
        progress = Progress(20, 0, NATS.format, show=show)
        progress.update(1, 1.0, 5.0, 60.0)
        progress.print_line(f"a line {show}")
        progress.close()
    assert capsys.readouterr() == ("a line True\n", "")


def test_lines_at_intervals(capsys, monkeypatch):
    """Also while nothing is called, as during compilation and validation."""
    monkeypatch.setattr(log_module, "INTERVAL", 0.02)
    printed = Printed(lambda: capsys.readouterr().out)
    progress = Progress(20, 0, NATS.format, unit="positions")
    printed.wait_for("step 0 of 20: compiling … 0 s\n")
    progress.update(1, 0.6931, None, None)
    printed.wait_for("step 1 of 20: loss 0.6931 nats/byte, 0.9999 bits/byte\n")
    with progress.activity("validating"):
        printed.wait_for("step 1 of 20: validating … 0 s\n")
    progress.update(2, 0.6931, 1234.5, 125.0)
    printed.wait_for("step 2 of 20: loss 0.6931 nats/byte, 0.9999 bits/byte, 1,234 positions/s, "
                     "2 min 5 s left\n")
    progress.update(20, 0.6931, 1234.5, 0.0)
    printed.wait_for("positions/s\n")
    progress.close()
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().out == ""
