"""The head of each shipped configuration gives its command, its cost, and the number to expect."""

from __future__ import annotations

import re

import pytest

from tilelli_jax import config as config_lib
from tilelli_jax.__main__ import COMMANDS

NAMES = sorted(config_lib.shipped())


@pytest.mark.parametrize("name", NAMES)
def test_head(name: str) -> None:
    head = "".join(re.findall(r"^#(.*\n)", config_lib.shipped()[name].read_text("utf-8"), re.MULTILINE))
    command, = re.findall(r"^   tilelli (\S+) .*--(?:config|expect) (\S+)", head, re.MULTILINE)[:1]
    assert command[0] in COMMANDS and command[1] == name
    if "Not run here" not in head:
        assert re.search(r"Cost: .*(second|minute|hour)", head), "cost"
        assert re.search(r"(AMD EPYC|Intel Xeon)", head), "machine"
        assert re.search(r"(Expect |docs/results/|depends on)", head), "number to expect"
