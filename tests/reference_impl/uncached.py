"""Reference for decoding with caches: the logits of each new token from a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Forward = Callable[[np.ndarray, np.ndarray], jax.Array]


def forward_of(model: Any, **options: Any) -> Forward:
    """The compiled forward pass: ids `[rows, time]`, last `[rows]` → logits at `last`, `[rows, vocab]`.

    Args:
        options: options of `jax.jit`.
    """
    return jax.jit(lambda ids, last: model(ids)[jnp.arange(len(ids)), last], **options)


def logits_before(forward: Forward, prompts: Sequence[Any], made: Sequence[Any], window: int | None,
                  rows: int | None = None) -> np.ndarray:
    """The logits before each new token: `[prompts, n, vocab]`.

    Each is computed from the complete text before the token, or its last `window` tokens. All texts are
    padded to one length, to compile once; padding after a token does not affect its logits.

    Args:
        prompts: tokens of the prompts.
        made: n new tokens of each prompt.
        rows: number of texts per batch; by default all.
    """
    texts = []
    for prompt, new in zip(prompts, made, strict=True):
        complete = [*prompt, *new]
        ends = range(len(prompt), len(complete))
        texts += [complete[max(0, end - window) if window else 0:end] for end in ends]
    longest = window or max(map(len, texts))
    ids = np.array([[*text, *[0] * (longest - len(text))] for text in texts], np.int32)
    last = np.array([len(text) - 1 for text in texts])
    rows = rows or len(ids)
    logits = [np.asarray(forward(ids[i:i + rows], last[i:i + rows])) for i in range(0, len(ids), rows)]
    return np.concatenate(logits).reshape(len(prompts), -1, logits[0].shape[-1])
