"""The Python lines of docs/recall.md run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.eval.recall.small import Place

PAGE = Path(__file__).parents[3] / "docs" / "recall.md"


def test_a_question_from_python(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    block, = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    exec(block.replace("DIR", str(place.model)).replace("runs/recall-demo/sidecar", str(place.sidecar)), {})
    p, rest = capsys.readouterr().out.split(" ", 1)
    assert 0 <= float(p) <= 1
    assert re.fullmatch(r"(likely knows|uncertain|likely beyond its knowledge) \d+ .+\n", rest, re.DOTALL)
