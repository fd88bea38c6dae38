"""A threshold for one network, chosen by prompts that it can answer, and kept beside its weights.

`chat` and `generate` keep to it with --abstain (`tilelli_jax.abstain_rule`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tilelli_jax import abstain_rule, store
from tilelli_jax.abstain_rule import NEVER, AbstainRule
from tilelli_jax.data.documents import json_lines
from tilelli_jax.data.turns import asked, text_of
from tilelli_jax.errors import InputError
from tilelli_jax.signals.names import HEAD
from tilelli_jax.signals.scoring import max_time
from tilelli_jax.signals.uncertainty import names
from tilelli_jax.tables import table

from ..thresholds import conformal_min_items, conformal_threshold
from .decision import direction


class Prompts(NamedTuple):
    """Those of a file that can be answered, each with the words that name its line in an error."""

    texts: list[tuple[str, str]]
    left_out: int  # rows that say of themselves that they cannot be


def read_prompts(path: Path) -> Prompts:
    """JSON lines with a prompt, and `answerable` where that is false; other keys are not looked at.

    Raises:
        InputError: the file cannot be read, a line holds no prompt, or none can be answered.
    """
    found, left_out = [], 0
    for where, row in json_lines(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with a prompt, found {row!r:.40}")
        text, known = text_of(row, "prompt", where), row.get("answerable", True)
        if not isinstance(known, bool):
            raise InputError(f"{where}: answerable: expected true or false, found {known!r:.40}")
        if known:
            found.append((text, where))
        left_out += not known
    if not found:
        raise InputError(f"{path}: expected prompts that can be answered, found none")
    return Prompts(found, left_out)


def make(path: Path, prompts: Sequence[tuple[str, str]], signal: str, target_fpr: float,
         template: str) -> AbstainRule:
    """Reads every prompt as a turn, chooses the threshold and writes it into the model directory.

    Args:
        prompts: with the words that name them, see `Prompts`.

    Raises:
        InputError: the share is none, or the network has no such signal, does not read bytes, or reads
            none as long as a prompt.
    """
    if not 0 < target_fpr < 1:
        raise InputError(f"--fpr: expected a share above 0 and below 1, found {target_fpr}")
    abstain_rule.check_template(template)
    model = store.load(path)
    if not getattr(model, "reads_bytes", False):
        raise InputError(f"{path}: expected a network that reads bytes, found family "
                         f"{model.config.family}")
    if signal not in (known := names(model)):
        lacks = "; this network has no abstain head" if signal == HEAD else ""
        raise InputError(f"--signal: expected one that {path} has, of {', '.join(known)}, found "
                         f"{signal!r:.60}{lacks}")
    most = max_time(model)
    for text, where in prompts:
        if most is not None and (needed := len(asked(text).encode())) > most:
            raise InputError(f"{where}: prompt: takes {needed} bytes as a turn, and {path} reads {most}")
    points = direction(signal)
    scores = points * abstain_rule.measured(abstain_rule.reader_of(model, signal), [asked(text) for text, _ in prompts],
                                    signal)
    if not np.isfinite(scores).all():
        raise InputError(f"{path}: {signal}: expected numbers, found some that are not finite")
    found = conformal_threshold(scores, target_fpr)
    made = AbstainRule(
        signal, 1 if points == 1 else -1, NEVER if math.isinf(found.value) else points * found.value,
        template, target_fpr, len(prompts), found.measured, tuple(found.expected), abstain_rule.of_network(path))
    abstain_rule.write(path, made)
    return made


def told(made: AbstainRule) -> str:
    """A table for the terminal; and where nothing can be promised, why."""
    mean, low, high = made.expected_fpr
    declined = round(made.measured_fpr * made.prompts)
    lines = [table([["declines", "of these prompts", "of others, foreseen"],
                    [made.rule, f"{declined} of {made.prompts}: {made.measured_fpr:.1%}",
                     f"{mean:.1%} [{low:.1%}, {high:.1%}]"]])]
    if made.threshold == NEVER:
        lines.append(f"Never: {made.prompts} prompts are too few to hold {made.target_fpr:.4g}; "
                     f"it takes {conformal_min_items(made.target_fpr)} at least.")
    return "\n".join(lines)
