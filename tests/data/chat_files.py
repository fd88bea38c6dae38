"""Pairs of prompt and response, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.data.chat_pairs import ChatPair


def pairs_of(n: int, seed: int = 0) -> list[ChatPair]:
    rng = np.random.default_rng(seed)
    def word() -> str:
        return "".join(rng.choice(list("abcdé"), rng.integers(1, 9)))
    return [ChatPair(f"{i} {word()}", word(), bool(rng.random() < 0.6), f"line {i}") for i in range(n)]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
