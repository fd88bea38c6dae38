"""A batch larger than memory raises InputError before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.error_lines import assert_one_line
from tilelli_jax.data import reading
from tilelli_jax.data.activations import write_activations
from tilelli_jax.data.reading import PLACE, check_batches
from tilelli_jax.errors import InputError
from tilelli_jax.train import main

SMALL = {"family": "vanilla", "d_model": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 64}
ROWS = 2**30


def tree_of(task: str, path: Path) -> dict[str, Any]:
    """Returns a configuration for a kind of task."""
    train = {"steps": 1, "batch_size": 4, "seq_len": 64, "eval_batch_size": 4}
    if task == "text":
        return {"model": SMALL, "train": train}
    if task == "chat":
        (path / "pairs.jsonl").write_text("".join(
            json.dumps({"prompt": f"{i}?", "response": "yes"}) + "\n" for i in range(20)))
        return {"model": SMALL, "train": train, "chat": {"source": str(path / "pairs.jsonl")}}
    rows = np.random.default_rng(0).standard_normal((99, 4)).astype(np.float16)
    write_activations(path / "rows", [rows], {})
    return {"model": {"family": "sae", "d_model": 4, "n_latents": 8, "k": 2}, "train": train,
            "activations": {"source": str(path / "rows")}}


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size"])
@pytest.mark.parametrize(("task", "row_bytes"), [("text", 65), ("chat", 18 * 64), ("sae", 8)])
def test_a_batch_larger_than_memory(task: str, row_bytes: int, key: str, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reading, "memory_bytes", lambda: 10e9)
    monkeypatch.setattr("tilelli_jax.training.tasks.base.local_rows", None)  # no batch is allocated
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree_of(task, tmp_path)))
    arguments = ["--config", str(tmp_path / "a.yaml"), f"run_dir={tmp_path / 'run'}", f"train.{key}={ROWS}"]
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr().err,
                    f"error: train.{key}: expected a batch that fits into the 10 GB of memory, found "
                    f"1,073,741,824 rows of {row_bytes:,} bytes, which take ")


def test_the_largest_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several processes holds its part, and the indices of all rows."""
    monkeypatch.setattr(reading, "memory_bytes", lambda: 100 * (PLACE + 50))
    check_batches(100, 100, 50, 1)
    check_batches(100, 100, 100, 2)
    for sizes, key in (((101, 100), "train.batch_size"), ((100, 101), "train.eval_batch_size")):
        with pytest.raises(InputError, match=f"^{key}: expected a batch that fits"):
            check_batches(*sizes, 50, 1)
    with pytest.raises(InputError, match=r"^train\.batch_size"):
        check_batches(100, 100, 102, 2)


def test_the_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reading.memory_bytes() > 10**8
    monkeypatch.delattr("os.sysconf")  # as on Windows
    assert reading.memory_bytes() == float("inf")
