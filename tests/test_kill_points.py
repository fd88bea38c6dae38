"""The enumeration of kill points: every operation is one, and what is not atomic is found out."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from tests import kill_points
from tests.kill_points import kill_at_every_file_operation, kill_command_at_every_file_operation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork and SIGKILL")


def kills(path, operation):
    """How often an operation is killed, after something is there to operate on."""
    def prepare():
        shutil.rmtree(path, ignore_errors=True)
        (path / "directory" / "deeper").mkdir(parents=True)
        (path / "file").write_text("old text")

    return kill_at_every_file_operation(lambda: operation(path), lambda at: None, prepare=prepare, below=path)


def opened(path):
    with tempfile.NamedTemporaryFile(dir=path, delete=False) as file:
        file.write(b"text")


def by_handle(path):
    handle = os.open(path / "file", os.O_WRONLY)
    os.write(handle, b"text")
    os.fsync(handle)
    os.close(handle)


def read(path):
    (path / "file").read_text()
    list(path.iterdir())
    print("text", file=sys.stderr)
    with open(os.devnull, "w") as nowhere:
        nowhere.write("text")


@pytest.mark.parametrize(("operation", "expected"), [
    (read, 0),
    (lambda path: os.replace(path / "file", path / "new"), 1),
    (lambda path: (path / "file").rename(path / "new"), 1),
    (lambda path: os.link(path / "file", path / "new"), 1),
    (lambda path: (path / "new").symlink_to("file"), 1),
    (lambda path: (path / "file").unlink(), 1),
    (lambda path: (path / "directory" / "deeper").rmdir(), 1),
    (lambda path: (path / "a" / "b").mkdir(parents=True), 3),  # the first try fails
    (lambda path: shutil.rmtree(path / "directory"), 2),
    (lambda path: (path / "file").chmod(0o600), 1),
    (lambda path: os.truncate(path / "file", 3), 1),
    (lambda path: (path / "file").touch(), 1),
    (lambda path: (path / "new").write_text("text"), 3),  # opened, written, half of it written
    (opened, 4),  # by the name, by the handle
    (by_handle, 4),
    (lambda path: shutil.copy(path / "file", path / "new"), 4),  # opened, sent, found to be all, its mode set
])
def test_every_operation_is_a_point(tmp_path, operation, expected):
    assert kills(tmp_path / "below", operation) == expected


def test_the_states_between_are_seen(tmp_path):
    path, found = tmp_path / "file", []

    def action():
        with open(path, "w") as file:
            file.write("four")
            file.truncate()
        path.replace(tmp_path / "other")

    def prepare():
        (tmp_path / "other").unlink(missing_ok=True)
        path.write_text("old")

    assert kill_at_every_file_operation(action, lambda at: found.append(path.read_text()), prepare=prepare,
                                        below=tmp_path) == len(found)
    assert found == ["old", "", "fo", "four", "four"]
    assert (tmp_path / "other").read_text() == "four" and not path.exists()  # the last run was whole


def replaced(path, content):
    beside = path.with_suffix(".new")
    beside.write_text(content)
    beside.replace(path)


def test_what_is_written_beside_and_renamed_is_old_or_new(tmp_path):
    path, found = tmp_path / "file", []
    assert kill_at_every_file_operation(
        lambda: replaced(path, "new"), lambda at: found.append(path.read_text()),
        prepare=lambda: path.write_text("old"), below=tmp_path) == 4
    assert found == ["old"] * 4 and path.read_text() == "new"


def test_steps_leave_points_out(tmp_path):
    found = []
    assert kill_at_every_file_operation(lambda: replaced(tmp_path / "file", "new"), found.append,
                                        below=tmp_path, step=2) == 2
    assert found == [1, 3]


def test_an_action_that_fails_is_reported(tmp_path):
    def fails():
        (tmp_path / "file").write_text("")
        raise ValueError("of its own")

    with pytest.raises(AssertionError, match=r"(?s)before operation 2 it ended with 1: .*of its own"):
        kill_at_every_file_operation(fails, lambda at: None, below=tmp_path)
    with pytest.raises(AssertionError, match=r"takes longer than 0.1 s"):
        kill_at_every_file_operation(signal.pause, lambda at: None, below=tmp_path, patience=0.1)


def test_a_command_in_a_process_of_its_own(tmp_path, monkeypatch):
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('text')"
    found = []
    assert kill_command_at_every_file_operation(
        ["-c", code, str(tmp_path / "file")], lambda at: found.append((tmp_path / "file").exists()),
        prepare=lambda: (tmp_path / "file").unlink(missing_ok=True), below=tmp_path) == 3
    assert found == [False, True, True]
    monkeypatch.setenv(kill_points.AT, "0")
    with pytest.raises(AssertionError, match="No module named nowhere"):
        kill_command_at_every_file_operation(["-m", "nowhere"], lambda at: None, below=Path("/"))
