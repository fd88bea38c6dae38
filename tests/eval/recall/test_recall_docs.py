"""The Python lines of docs/recall.md run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.eval.recall.small import Place

PAGE = Path(__file__).parents[3] / "docs" / "recall.md"


def test_python(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """P(knows) of a question, and the score of one estimator."""
    question, score = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    exec(score.replace("DIR", str(place.model)), {})
    assert float(capsys.readouterr().out.strip("[]\n ")) < 0
    lines = question.replace("DIR", str(place.model))
    exec(lines.replace("runs/recall-demo/sidecar", str(place.sidecar)), {})
    p, rest = capsys.readouterr().out.split(" ", 1)
    assert 0 <= float(p) <= 1
    assert re.fullmatch(r"(likely knows|uncertain|likely beyond its knowledge) \d+ .+\n", rest, re.DOTALL)
