"""The files that a request to the page may name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio (extra: app) is not installed")

from tilelli_jax.errors import InputError
from tilelli_jax.eval.recall.app.uploads import check


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    directory = tmp_path / "uploads"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "mine.csv").write_text("question\nWho?\n")
    (tmp_path / "secret.csv").write_text("question\n4711\n")
    return directory


def test_uploaded_files(uploads: Path) -> None:
    check(["text", 1, None, {"path": str(uploads / "1" / "mine.csv"), "meta": {}}], uploads)
    check([{"path": None}, []], uploads)


def test_other_files(uploads: Path, tmp_path: Path) -> None:
    (uploads / "link.csv").symlink_to(tmp_path / "secret.csv")
    (uploads / "near.csv").symlink_to(uploads / "1" / "mine.csv")
    (uploads / "out").symlink_to(tmp_path)
    (uploads / "circle").symlink_to(uploads / "circle")
    os.mkfifo(uploads / "pipe.csv")
    outside: list[Any] = [
        tmp_path / "secret.csv", uploads / ".." / "secret.csv", uploads / "link.csv", uploads / "near.csv",
        uploads / "out" / "secret.csv", uploads / "circle", uploads / "pipe.csv", uploads, uploads / "1",
        uploads / "none.csv", "/dev/zero", "http://127.0.0.1/a.csv", "a\0b", "", 7, ["x"], "/" + "a" * 5000]
    for path in outside:
        file = {"path": path if not isinstance(path, Path) else str(path)}
        for data in ([file], [[{"value": [file]}]], [{"a": {"b": file}}]):
            with pytest.raises(InputError, match="file: expected one that was uploaded to this page"):
                check(data, uploads)


def test_a_deep_tree(uploads: Path) -> None:
    tree: Any = {"path": "/etc/hostname"}
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(InputError):
        check(tree, uploads)
