"""Prompts of an evaluation, read from JSON lines: those of the repository, or a user's own.

    {"prompt": "…", "regime": "in_domain", "answer": "…"}

`answer`, which may be left out, is what a right answer has in it. Other keys are not looked at. A
directory holds any number of .jsonl files; one that is called after a regime holds only that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilelli_jax.data.documents import json_lines
from tilelli_jax.data.turns import text_of
from tilelli_jax.data.village import REGIMES, Prompt
from tilelli_jax.errors import InputError

BUILT_IN = Path(__file__).with_suffix("")
LEAST = 2  # prompts of a regime: of one alone nothing can be resampled


def read(path: str | Path = BUILT_IN, regimes: Sequence[str] = REGIMES) -> list[Prompt]:
    """The prompts of a directory or file, regime by regime.

    Args:
        regimes: those that it must have prompts of; all of the others are read as well.

    Raises:
        InputError: no such file, a line that is no prompt, one that was there before, a regime with
            fewer than two prompts.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: expected .jsonl files of prompts, found none")
    found: dict[str, tuple[Prompt, str]] = {}
    for file in files:
        for where, row in json_lines(file):
            one = _prompt(row, where, file)
            if one.prompt in found:
                raise InputError(f"{where}: prompt: the same as in {found[one.prompt][1]}")
            found[one.prompt] = one, where
    counts = Counter(one.regime for one, _ in found.values())
    if missing := [regime for regime in regimes if not counts[regime]]:
        raise InputError(f"{path}: expected prompts of {len(regimes)} regime{'s' * (len(regimes) > 1)}, "
                         f"found none of {', '.join(missing)}")
    for one, where in found.values():
        if counts[one.regime] < LEAST:
            raise InputError(f"{where}: the only prompt of {one.regime}, expected {LEAST} at least")
    return sorted((one for one, _ in found.values()), key=lambda one: REGIMES.index(one.regime))


# ---------------------------------------------------------------------------------------------


def _prompt(row: Any, where: str, file: Path) -> Prompt:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with prompt and regime, found {row!r:.40}")
    prompt, regime, answer = text_of(row, "prompt", where), row.get("regime"), row.get("answer")
    if regime not in REGIMES:
        raise InputError(f"{where}: regime: expected one of {', '.join(REGIMES)}, "
                         f"found {row.get('regime', 'nothing')!r:.40}")
    if file.stem in REGIMES and regime != file.stem:
        raise InputError(f"{where}: regime: expected {file.stem}, as the file is called, found {regime}")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise InputError(f"{where}: answer: expected text or none, found {answer!r:.40}")
    return Prompt(prompt, regime, answer)
