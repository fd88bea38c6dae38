"""The order of tests, their parts, and what pytest prints at its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest

TESTS = Path(__file__).parent


class Item(SimpleNamespace):
    """As much of a test as is looked at."""

    def __hash__(self) -> int:
        return id(self)

    def get_closest_marker(self, name: str) -> object:
        return self.marks.get(name)


def item(name: str, *marks: str) -> Item:
    return Item(path=TESTS / name, marks=dict.fromkeys(marks, True))


def ordered(items: list[Item], part: str | None = None) -> list[Item]:
    left_out: list[Item] = []
    config: Any = SimpleNamespace(getoption=lambda name: part, hook=SimpleNamespace(
        pytest_deselected=lambda items: left_out.extend(items)))
    chosen: Any = list(items)
    conftest.pytest_collection_modifyitems(config, chosen)
    assert sorted(map(id, [*chosen, *left_out])) == sorted(map(id, items))
    return chosen


def test_long_files_come_first_and_eight_devices_last_in_each() -> None:
    assert all((TESTS / name).is_file() for name in conftest.LONGEST)
    one, two, three = (item("test_a.py", "eight_devices"), item("test_a.py"), item(conftest.LONGEST[1]))
    four = item(conftest.LONGEST[0])
    assert ordered([one, two, three, four]) == [four, three, two, one]


@pytest.mark.parametrize("n", [1, 2, 6])
def test_every_test_is_in_one_part(n: int) -> None:
    items = [item(f"test_{i // 3}.py") for i in range(90)]
    parts = [ordered(items, f"{k}/{n}") for k in range(1, n + 1)]
    assert sorted(id(one) for part in parts for one in part) == sorted(map(id, items)) and all(parts)
    files = [{one.path for one in part} for part in parts]
    assert sum(map(len, files)) == 30, "a file is in one part"


@pytest.mark.parametrize("text", ["", "x", "1", "0/6", "7/6", "-1/2", "1/x", "1/0"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(pytest.UsageError, match=r"--part: expected K/N with K from 1 to N, found"):
        conftest._part(text)


@pytest.mark.exhaustive
def test_reasons_come_last_and_seconds_by_directory(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "test_it.py").write_text(
        "import time\n\ndef test_it():\n    time.sleep(0.2)\n    assert 1 == 2, 'they differ'\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = ["-m", "pytest", "-p", "tests.conftest", "--durations=1", "low"]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"PYTHONPATH": str(TESTS.parent)})
    assert done.returncode == 1 and not done.stderr
    lines = done.stdout.splitlines()
    assert any(line.endswith("  low") and 0.2 <= float(line.split()[0]) < 5 for line in lines), done.stdout
    start = lines.index("low/test_it.py::test_it failed (call):")
    assert start > lines.index("FAILED low/test_it.py::test_it - AssertionError: they differ")
    assert "they differ" in lines[start + 1] and start > len(lines) - 20
