"""Reading prompts: the built-in ones, the user's own, and invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilelli_jax.data.synthetic import village
from tilelli_jax.errors import InputError
from tilelli_jax.eval.abstention import prompts


def rows() -> list[dict]:
    return [{"prompt": f"{regime} {i}", "regime": regime} for regime in village.REGIMES for i in range(2)]


def write(path: Path, lines: list) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_built_in_prompts_match_the_generator() -> None:
    assert prompts.read() == village.prompts(village.world())


def test_own_prompts_in_a_file_or_a_directory(tmp_path: Path) -> None:
    mine = [*rows()[::-1], "", {"prompt": "née?", "regime": "in_domain", "answer": "oui", "id": 7}]
    from_file = prompts.read(write(tmp_path / "mine.jsonl", mine))
    regimes = [prompt.regime for prompt in from_file]
    assert regimes == sorted(regimes, key=village.REGIMES.index)
    assert village.EvaluationPrompt("née?", "in_domain", "oui") in from_file and len(from_file) == 15
    (tmp_path / "parts").mkdir()
    for regime in village.REGIMES:
        write(tmp_path / "parts" / f"{regime}.jsonl", [row for row in rows() if row["regime"] == regime])
    write(tmp_path / "parts" / "more.jsonl", [mine[-1]])
    assert sorted(prompts.read(tmp_path / "parts")) == sorted(from_file)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "mine.jsonl, line 3: not JSON"),
    ("[" * 100_000, "mine.jsonl, line 3: expected at most 100 levels"),
    ([1], r"mine.jsonl, line 3: expected an object with prompt and regime, found \[1\]"),
    ({"regime": "in_domain"}, "mine.jsonl, line 3: prompt: expected text, found none"),
    ({"prompt": " ", "regime": "in_domain"}, "line 3: prompt: expected text, found ' '"),
    ({"prompt": "x"}, "line 3: regime: expected one of in_domain, .*, found nothing$"),
    ({"prompt": "x", "regime": None}, "line 3: regime: expected one of in_domain, .*, found None$"),
    ({"prompt": "x", "regime": "in-domain"}, "line 3: regime: .* found 'in-domain'"),
    ({"prompt": "x", "regime": ["in_domain"]}, "line 3: regime: .* found"),
    ({"prompt": "x", "regime": "in_domain", "answer": 3}, "line 3: answer: expected text or null, found 3"),
    ({"prompt": "in_domain 1", "regime": "gibberish"}, "line 3: prompt: the same as in .*mine.jsonl, line 2"),
])
def test_invalid_lines(tmp_path: Path, line: object, message: str) -> None:
    lines = rows()
    with pytest.raises(InputError, match=message) as error:
        prompts.read(write(tmp_path / "mine.jsonl", [*lines[:2], line, *lines[2:]]))
    assert "\n" not in str(error.value)


def test_missing_prompts_and_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    few = [row for row in rows() if row["regime"] not in ("gibberish", "long_input")]
    with pytest.raises(InputError, match=r"mine.jsonl: .* found none of long_input, gibberish$"):
        prompts.read(write(path, few))
    with pytest.raises(InputError, match=r"mine.jsonl, line 14: expected at least 2 prompts of gibberish"):
        prompts.read(write(path, ["", *rows()[:-1]]))
    with pytest.raises(InputError, match="found none of in_domain"):
        prompts.read(write(path, []))
    with pytest.raises(InputError, match=r"none.jsonl: no such file"):
        prompts.read(tmp_path / "none.jsonl")
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"mine.jsonl, line 1: not JSON: expected UTF-8"):
        prompts.read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: expected .jsonl files of prompts, found none"):
        prompts.read(tmp_path / "empty")
    write(tmp_path / "empty" / "gibberish.jsonl", rows())
    with pytest.raises(InputError, match=r"gibberish.jsonl, line 1: regime: expected gibberish, the name of"):
        prompts.read(tmp_path / "empty")
