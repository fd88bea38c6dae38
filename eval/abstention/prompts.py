"""Reads evaluation prompts from JSON lines: the built-in ones or your own.

    {"prompt": "…", "regime": "in_domain", "answer": "…"}

`answer` is optional: the words that a correct answer contains. Other keys are ignored. A directory may hold
any number of .jsonl files; a file named after a regime holds prompts of that regime only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilelli_jax.data.documents import json_lines
from tilelli_jax.data.synthetic.village import REGIMES, EvaluationPrompt
from tilelli_jax.data.turns import turn_text
from tilelli_jax.errors import InputError

from ..inputs.rows import describe_cell

BUILT_IN = Path(__file__).with_suffix("")
MIN_PROMPTS = 2  # prompts of a regime: a single one cannot be resampled


def read(path: str | Path = BUILT_IN, regimes: Sequence[str] = REGIMES) -> list[EvaluationPrompt]:
    """Returns the prompts of a directory or file, sorted by regime.

    Args:
        regimes: regimes that must have prompts; prompts of other regimes are read as well.

    Raises:
        InputError: the file does not exist, a line is not a prompt or repeats an earlier one, or a regime has
            fewer than two prompts.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: expected .jsonl files of prompts, found none")
    by_text: dict[str, tuple[EvaluationPrompt, str]] = {}
    for file in files:
        for where, row in json_lines(file):
            prompt = _prompt(row, where, file)
            if prompt.prompt in by_text:
                raise InputError(f"{where}: prompt: the same as in {by_text[prompt.prompt][1]}")
            by_text[prompt.prompt] = prompt, where
    counts = Counter(prompt.regime for prompt, _ in by_text.values())
    if missing := [regime for regime in regimes if not counts[regime]]:
        raise InputError(f"{path}: expected prompts of {len(regimes)} regime{'s' * (len(regimes) > 1)}, "
                         f"found none of {', '.join(missing)}")
    for prompt, where in by_text.values():
        if counts[prompt.regime] < MIN_PROMPTS:
            raise InputError(f"{where}: expected at least {MIN_PROMPTS} prompts of {prompt.regime}, found 1")
    return sorted((prompt for prompt, _ in by_text.values()), key=lambda prompt: REGIMES.index(prompt.regime))


# ---------------------------------------------------------------------------------------------


def _prompt(row: Any, where: str, file: Path) -> EvaluationPrompt:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with prompt and regime, found {row!r:.40}")
    prompt, regime, answer = turn_text(row, "prompt", where), row.get("regime"), row.get("answer")
    if regime not in REGIMES:
        raise InputError(f"{where}: regime: expected one of {', '.join(REGIMES)}, "
                         f"found {describe_cell(row, 'regime')}")
    if file.stem in REGIMES and regime != file.stem:
        raise InputError(f"{where}: regime: expected {file.stem}, the name of the file, found {regime}")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise InputError(f"{where}: answer: expected text or null, found {answer!r:.40}")
    return EvaluationPrompt(prompt, regime, answer)
