"""What a source leaves open, compared on text: which of the possible settings predict it best."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from tilelli_jax.data import stories

from . import check
from .plan import Plan, as_override

BYTES, WINDOW = 2048, 256  # of the built-in stories, cut into windows
# Choices count as different from so many nats per byte on, and so many standard errors over the windows.
LEAST, ERRORS = 0.01, 3.0
Choice = dict[str, Any]  # the settings that are open, each with one of its values


def settle(plan: Plan) -> tuple[Plan, str]:
    """The plan with the choice that predicts text best, and one line about it; "" where nothing is open.

    What was assumed is kept where the text does not show it to be worse. PyTorch runs the network once
    for each choice.
    """
    if not plan.assumptions:
        return plan, ""
    keys = [assumption.key for assumption in plan.assumptions]
    ids = _windows(plan.config)
    if not ids.size:
        return plan, (f"{', '.join(keys)}: not compared: no text fits a vocabulary of "
                      f"{plan.config.vocab_size} and {plan.config.max_seq_len} positions")
    values = itertools.product(*((one.value, *one.others) for one in plan.assumptions))
    choices = [dict(zip(keys, chosen, strict=True)) for chosen in values]
    nats = np.array([_nats(plan, choice, ids) for choice in choices])
    taken, verdict = _verdict(choices, nats, math.log(plan.config.vocab_size))
    config = dataclasses.replace(plan.config, **choices[taken])
    return dataclasses.replace(plan, config=config, assumptions=()), (
        f"{', '.join(keys)}: {len(choices)} choices compared on {ids.size:,} bytes of stories: {verdict}")


def _windows(config: Any) -> np.ndarray:
    """Text as ids `[windows, time]`; none where the network has no tokens for it."""
    text = np.frombuffer(stories.generate(BYTES, split="valid"), np.uint8).astype(np.int64)
    size = min(WINDOW, config.max_seq_len)
    if size < 2 or text.max() >= config.vocab_size:
        return text[:0]
    return text[:len(text) // size * size].reshape(-1, size)


def _nats(plan: Plan, choice: Choice, ids: np.ndarray) -> np.ndarray:
    """Mean negative log-likelihood of the next byte: ids `[windows, time]` → nats `[windows]`, f64."""
    import torch
    network = check.restated(plan, dataclasses.replace(plan.config, **choice), "fast")
    text = torch.from_numpy(ids)
    with torch.no_grad():
        log_p = network(text)[:, :-1].double().log_softmax(-1)
    return np.asarray(-log_p.gather(-1, text[:, 1:, None])[..., 0].mean(1))


def _verdict(choices: list[Choice], nats: np.ndarray, chance: float) -> tuple[int, str]:
    """Which choice is taken, 0 being what was assumed, and why.

    Args:
        nats: `[choices, windows]`.
        chance: nats per byte of a network that knows nothing.
    """
    means = nats.mean(1)
    order = means.argsort(kind="stable").tolist()
    names = [f"{' '.join(as_override(*item) for item in choice.items())} ({mean:.4f} nats/byte)"
             for choice, mean in zip(choices, means, strict=True)]
    best, second = order[:2]
    if not means[best] < chance - LEAST:
        return 0, (f"inconclusive: none is better than chance ({chance:.4f}); {names[0]} is assumed, --set "
                   "chooses another")
    as_good = [i for i in order if not _worse(nats[i], nats[best])]
    if len(as_good) == 1:
        return best, f"{names[best]} predicts it best and is taken; next, {names[second]}"
    taken = 0 if 0 in as_good else best
    more = f" and {len(as_good) - 2} more" if len(as_good) > 2 else ""
    return taken, (f"inconclusive: {names[best]}, {names[as_good[1]]}{more} are too close; {names[taken]} is "
                   "assumed, --set chooses another")


def _worse(nats: np.ndarray, best: np.ndarray) -> bool:
    """Whether the same windows, `[windows]` twice, show it."""
    apart = nats - best
    return not apart.mean() <= max(LEAST, ERRORS * apart.std(ddof=1) / math.sqrt(len(apart)))
