"""The plain forward pass in the place of decoding with caches: what each new token was chosen from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Forward = Callable[[np.ndarray, np.ndarray], jax.Array]


def forward_of(model: Any, **options: Any) -> Forward:
    """The forward pass as one program: ids `[rows, time]`, last `[rows]` → the logits there, `[rows, vocab]`.

    Args:
        options: those of `jax.jit`.
    """
    return jax.jit(lambda ids, last: model(ids)[jnp.arange(len(ids)), last], **options)


def logits_before(forward: Forward, prompts: Sequence[Any], made: Sequence[Any], window: int | None,
                  rows: int | None = None) -> np.ndarray:
    """The logits from which each of the new tokens was chosen: `[prompts, n, vocab]`.

    For each of them the text before it is read anew: all of it, or its last `window` tokens. All texts are
    filled up to one length, to compile once; what follows a token has no part in its logits.

    Args:
        prompts, made: tokens, of each prompt n new ones.
        rows: how many texts go through the network at once; by default all.
    """
    texts = []
    for prompt, new in zip(prompts, made, strict=True):
        whole = [*prompt, *new]
        ends = range(len(prompt), len(whole))
        texts += [whole[max(0, end - window) if window else 0:end] for end in ends]
    longest = window or max(map(len, texts))
    ids = np.array([[*text, *[0] * (longest - len(text))] for text in texts], np.int32)
    last = np.array([len(text) - 1 for text in texts])
    rows = rows or len(ids)
    found = [np.asarray(forward(ids[i:i + rows], last[i:i + rows])) for i in range(0, len(ids), rows)]
    return np.concatenate(found).reshape(len(prompts), -1, found[0].shape[-1])
