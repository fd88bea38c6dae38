"""Chat, calibration pairs and evaluation prompts as JSON lines, one object each.

    {"prompt": "Where does … live?", "response": "… lives in ….", "answerable": true}
    {"prompt": "Where does … live?", "regime": "in_domain", "answer": "…"}    (no "answer": there is none)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tilelli_jax.data.synthetic.village.conversations import VillagePair
from tilelli_jax.data.synthetic.village.questions import VillageQuestion
from tilelli_jax.data.synthetic.village.regimes import REGIMES, EvaluationPrompt
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import write_together


def chat_lines(pairs: Iterable[VillagePair]) -> bytes:
    """Returns pairs as lines."""
    return _lines(pair._asdict() for pair in pairs)


def bare_lines(lines: Iterable[tuple[str, bool]]) -> bytes:
    """Returns texts outside any turn as lines."""
    return _lines({"text": text, "answerable": known} for text, known in lines)


def calibration_lines(questions: Iterable[VillageQuestion]) -> bytes:
    """Returns questions as lines of answerable pairs."""
    return chat_lines(VillagePair(asked.prompt, asked.response, True) for asked in questions)


def regime_files(prompts: Iterable[EvaluationPrompt]) -> dict[str, bytes]:
    """Returns file name → lines of the prompts of one regime, for every regime."""
    found = list(prompts)
    return {f"{regime}.jsonl": _lines(
        {name: value for name, value in one._asdict().items() if value is not None}
        for one in found if one.regime == regime) for regime in REGIMES}


def write(contents: Mapping[Path, bytes], force: bool) -> None:
    """Writes all of the files, or none.

    Raises:
        InputError: one exists and `force` is false, or one cannot be written.
    """
    for path in contents:
        if path.is_dir() or (path.exists() and not force):
            raise InputError(f"{path}: " + ("expected a file, found a directory" if path.is_dir() else
                                            "already exists; --force replaces it"))
    made = [parent for path in contents for parent in path.parents if not parent.exists()]
    try:
        for path in contents:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_together(contents)
    except OSError as error:
        for parent in sorted(set(made), key=lambda parent: -len(parent.parts)):
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise InputError(f"{error.filename or next(iter(contents))}: cannot be written: "
                         f"{error.strerror or error}") from None


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
