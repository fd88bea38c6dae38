"""Fixtures shared by the tests of the study."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.abstention.small import write_prompts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prompts.jsonl."""
    path = tmp_path_factory.mktemp("abstention")
    write_prompts(path / "prompts.jsonl")
    return path
