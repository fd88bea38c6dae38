"""The Python lines of README.md run as printed. Those of docs/ are tested beside what they describe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.reference_impl.random_weights import random_network
from tilelli_jax.loading import store
from tilelli_jax.models.vanilla import VanillaConfig

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"difficulty.md": 3, "recall.md": 1}  # number of blocks, tested in tests/eval


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def test_the_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    store.save(random_network(VanillaConfig(d_model=16, n_layers=2, max_seq_len=32, n_heads=2), 0)[0],
               tmp_path / "runs/mine/model")
    monkeypatch.chdir(tmp_path)
    block, = blocks(ROOT / "README.md")
    exec(block, {})
    assert capsys.readouterr().out == "(1, 1, 9, 16)\n"


def test_every_page_with_python_has_a_test() -> None:
    found = {page.name: len(blocks(page)) for page in (ROOT / "docs").glob("*.md") if blocks(page)}
    assert found == ELSEWHERE
