"""Chooses the settings that a source does not specify: those with the lowest NLL on text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from tilelli_jax.data.synthetic import stories

from . import check
from .plan import Plan, as_override

BYTES, WINDOW = 2048, 256  # length in bytes of the built-in stories, and of each window
# Two choices differ if their NLLs differ by more than this many nats per byte and this many standard errors
# over the windows.
MIN_DIFFERENCE, STANDARD_ERRORS = 0.01, 3.0
Choice = dict[str, Any]  # one value for each setting that the source does not specify


def resolve(plan: Plan) -> tuple[Plan, str]:
    """Returns the plan with the choice of lowest NLL, and one line that reports the comparison.

    Keeps the assumed values unless the text shows them to be worse. PyTorch runs the network once for each
    choice. A plan without assumptions is returned unchanged, with the line "".
    """
    if not plan.assumptions:
        return plan, ""
    keys = [assumption.key for assumption in plan.assumptions]
    ids = _windows(plan.config)
    if not ids.size:
        return plan, (f"{', '.join(keys)}: not compared: the test text does not fit a vocabulary of "
                      f"{plan.config.vocab_size} tokens and {plan.config.max_seq_len} positions")
    combinations = itertools.product(*((assumption.value, *assumption.others)
                                       for assumption in plan.assumptions))
    choices = [dict(zip(keys, values, strict=True)) for values in combinations]
    nll = np.array([_nll(plan, choice, ids) for choice in choices])
    chosen, verdict = _verdict(choices, nll, math.log(plan.config.vocab_size))
    config = dataclasses.replace(plan.config, **choices[chosen])
    return dataclasses.replace(plan, config=config, assumptions=()), (
        f"{', '.join(keys)}: {len(choices)} choices compared on {ids.size:,} bytes of stories: {verdict}")


def _windows(config: Any) -> np.ndarray:
    """The story text as token ids `[windows, time]`; empty if the vocabulary or context is too small."""
    text = np.frombuffer(stories.generate(BYTES, split="valid"), np.uint8).astype(np.int64)
    size = min(WINDOW, config.max_seq_len)
    if size < 2 or text.max() >= config.vocab_size:
        return text[:0]
    return text[:len(text) // size * size].reshape(-1, size)


def _nll(plan: Plan, choice: Choice, ids: np.ndarray) -> np.ndarray:
    """Mean NLL of the next byte in nats: ids `[windows, time]` → `[windows]`, f64."""
    import torch
    network = check.pytorch_network(plan, dataclasses.replace(plan.config, **choice), "fast")
    text = torch.from_numpy(ids)
    with torch.no_grad():
        log_p = network(text)[:, :-1].double().log_softmax(-1)
    return np.asarray(-log_p.gather(-1, text[:, 1:, None])[..., 0].mean(1))


def _verdict(choices: list[Choice], nll: np.ndarray, chance: float) -> tuple[int, str]:
    """Returns the index of the best choice and the sentence that reports it; index 0 is the assumed choice.

    Args:
        nll: nats per byte, `[choices, windows]`.
        chance: nats per byte of a uniform prediction.
    """
    means = nll.mean(1)
    order = means.argsort(kind="stable").tolist()
    names = [f"{' '.join(as_override(*item) for item in choice.items())} ({mean:.4f} nats/byte)"
             for choice, mean in zip(choices, means, strict=True)]
    best, second = order[:2]
    if not means[best] < chance - MIN_DIFFERENCE:
        return 0, (f"inconclusive: no choice is better than chance ({chance:.4f}); {names[0]} is assumed; "
                   "--set selects another")
    as_good = [i for i in order if not _is_worse(nll[i], nll[best])]
    if len(as_good) == 1:
        return best, f"{names[best]} has the lowest NLL and is used; second: {names[second]}"
    chosen = 0 if 0 in as_good else best
    more = f" and {len(as_good) - 2} more" if len(as_good) > 2 else ""
    return chosen, (f"inconclusive: {names[best]}, {names[as_good[1]]}{more} are too close; "
                    f"{names[chosen]} is assumed; --set selects another")


def _is_worse(nll: np.ndarray, best: np.ndarray) -> bool:
    """Whether `nll` exceeds `best` by more than the limits; both `[windows]`, paired by window."""
    difference = nll - best
    standard_error = difference.std(ddof=1) / math.sqrt(len(difference))
    return not difference.mean() <= max(MIN_DIFFERENCE, STANDARD_ERRORS * standard_error)
