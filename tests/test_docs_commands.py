"""Commands printed by README and docs: each exists, with its options, keys and configuration."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from tilelli_jax import config as config_lib
from tilelli_jax.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """The words of every command line that begins with `tilelli`, continued lines joined."""
    lines = re.findall(r"(?:^ {4}|`|&& )(tilelli [a-z][^`\n]*)", text.replace("\\\n", " "), re.M)
    return [shlex.split(re.split(r"  #| && | \$\(", line)[0], comments=True) for line in lines]


FOUND = [(page.relative_to(ROOT), words) for page in PAGES for words in commands(page.read_text("utf-8"))]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return {}


def help_of(name: str, helps: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    if name not in helps:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        helps[name] = capsys.readouterr().out
    return helps[name]


def test_they_are_found() -> None:
    assert len(FOUND) > 20
    assert {words[1] for _, words in FOUND} >= {"train", "recall", "difficulty", "convert"}


@pytest.mark.parametrize(("page", "words"), FOUND, ids=lambda found: str(found)[:60])
def test_a_printed_command(page: Path, words: list[str], helps: dict[str, str],
                           capsys: pytest.CaptureFixture[str]) -> None:
    name = " ".join(words[1:3]) if " ".join(words[1:3]) in COMMANDS else words[1]
    assert name in COMMANDS, page
    shown = help_of(name, helps, capsys)
    for word in words:
        if word.startswith("--") and len(word) > 2 and name != "train":
            assert word.partition("=")[0] in shown, (page, word)
    for option, value in itertools.pairwise(words):
        if option == "--config" and re.fullmatch(r"[a-z][a-z0-9-]*", value):
            assert value in config_lib.shipped(), (page, value)
    for before, word in itertools.pairwise(words):
        if before == "--set":  # a key of a network that the command does not know beforehand
            continue
        if match := re.fullmatch(r"([a-z_][a-z0-9_.]*)=.*", word, re.S):
            # In a mapping, NAME stands for any name.
            parts = [rf"({re.escape(part)}|NAME)" for part in match[1].split(".")]
            pattern = r"\.".join(parts)
            assert re.search(rf"^  {pattern}(\.\w+)* ", shown, re.M), (page, word)
