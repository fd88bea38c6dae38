"""The Python lines of README.md and of docs/train.md run as printed.

Those of the other pages are tested beside what they describe.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tilelli_jax
from tests.reference_impl.random_weights import random_network
from tilelli_jax import train
from tilelli_jax.data.synthetic import stories
from tilelli_jax.loading import store
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.vanilla import VanillaConfig

ROOT = Path(__file__).parents[1]
# Number of blocks that are tested in tests/eval.
ELSEWHERE = {"difficulty.md": 1, "evaluate.md": 1, "patching.md": 3, "recall.md": 2, "serve.md": 2}


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def test_the_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    store.save(random_network(VanillaConfig(d_model=16, n_layers=2, max_seq_len=32, n_heads=2), 0)[0],
               tmp_path / "runs/mine/model")
    monkeypatch.chdir(tmp_path)
    block, = blocks(ROOT / "README.md")
    exec(block, {})
    shape, effect = capsys.readouterr().out.rsplit(maxsplit=1)
    assert shape == "(1, 2, 9, 16)" and float(effect) > 1e-3


def test_the_lines_of_your_own_loop(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"family": "vanilla", "d_model": 16, "n_layers": 1, "max_seq_len": 16, "n_heads": 2}
    length = {"steps": 2, "eval_every": 2, "checkpoint_every": 1, "export": "last"}
    Path("run.yaml").write_text(yaml.safe_dump(tiny | {"model": model, "train": tiny["train"] | length}))
    assert train.main(["--config", "run.yaml", "run_dir=runs/mine"]) == 0
    capsys.readouterr()
    loop, orbax = blocks(ROOT / "docs/train.md")
    text = np.frombuffer(stories.generate(64), np.uint8)[:64].reshape(4, 16)
    names: dict[str, Any] = {"batches": [text.astype(np.int32)] * 20}
    before = tilelli_jax.load("runs/mine/model").nll(names["batches"][0])[0].mean()
    exec(loop, names)
    assert names["loss"] < before - 0.1
    for name, array in to_arrays(tilelli_jax.load("mine")).items():
        np.testing.assert_array_equal(array, to_arrays(names["model"])[name])
    exec(orbax, names)
    assert capsys.readouterr().out == "2\n"
    exported = to_arrays(tilelli_jax.load("runs/mine/model"))
    restored = to_arrays(names["model"])
    assert restored.keys() == exported.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(restored[name], array)


def test_every_page_with_python_has_a_test() -> None:
    found = {page.name: len(blocks(page)) for page in (ROOT / "docs").glob("*.md") if blocks(page)}
    assert found == {**ELSEWHERE, "train.md": 2}
