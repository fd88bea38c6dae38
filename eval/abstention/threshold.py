"""Calibrates the abstention threshold of one network and saves it in the model directory.

`chat` and `generate` apply it with --abstain (`tilelli_jax.generation.abstain_rule`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tilelli_jax.cli.tables import table
from tilelli_jax.data.documents import json_lines
from tilelli_jax.data.turns import turn_text, user_turn
from tilelli_jax.errors import InputError
from tilelli_jax.generation import abstain_rule
from tilelli_jax.generation.abstain_rule import NEVER, AbstainRule
from tilelli_jax.loading import store
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.signals.batching import max_time
from tilelli_jax.signals.names import HEAD, direction, signal_names

from ..thresholds import conformal_min_items, conformal_threshold


class Prompts(NamedTuple):
    """The answerable prompts of a file, each with its file and line for error messages."""

    texts: list[tuple[str, str]]
    left_out: int  # rows with `"answerable": false`


def read_prompts(path: Path) -> Prompts:
    """Reads JSON lines with `prompt` and optionally `answerable` (default true); other keys are ignored.

    Raises:
        InputError: the file cannot be read, a line has no prompt, or no prompt is answerable.
    """
    texts, left_out = [], 0
    for where, row in json_lines(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with a prompt, found {row!r:.40}")
        text, answerable = turn_text(row, "prompt", where), row.get("answerable", True)
        if not isinstance(answerable, bool):
            raise InputError(f"{where}: answerable: expected true or false, found {answerable!r:.40}")
        if answerable:
            texts.append((text, where))
        left_out += not answerable
    if not texts:
        raise InputError(f"{path}: expected prompts that can be answered, found none")
    return Prompts(texts, left_out)


def make(path: Path, prompts: Sequence[tuple[str, str]], signal: str, target_fpr: float,
         template: str) -> AbstainRule:
    """Measures the signal of every prompt as a turn, chooses the threshold, and writes the rule.

    Args:
        path: the model directory.
        prompts: texts with file and line, see `Prompts`.

    Raises:
        InputError: the target rate is out of range, or the network lacks the signal, is not byte-level, or
            has too short a context window for a prompt.
    """
    if not 0 < target_fpr < 1:
        raise InputError(f"--fpr: expected a fraction above 0 and below 1, found {target_fpr}")
    abstain_rule.check_template(template)
    model = store.load(path)
    if not getattr(model, "is_byte_level", False):
        raise InputError(f"{path}: expected a byte-level network, found family "
                         f"{model.config.family}")
    if signal not in (known := signal_names(model)):
        reason = "; this network has no abstain head" if signal == HEAD else ""
        raise InputError(f"--signal: expected a signal of {path}, one of {', '.join(known)}, found "
                         f"{signal!r:.60}{reason}")
    longest = max_time(model)
    for text, where in prompts:
        if longest is not None and (needed := len(user_turn(text).encode())) > longest:
            raise InputError(f"{where}: prompt: takes {needed} bytes as a turn, and {path} reads {longest}")
    sign = direction(signal)
    scores = sign * abstain_rule.measure_signal(abstain_rule.signal_reader(model, signal),
                                          [user_turn(text) for text, _ in prompts], signal)
    if not np.isfinite(scores).all():
        raise InputError(f"{path}: {signal}: expected numbers, found some that are not finite")
    threshold = conformal_threshold(scores, target_fpr)
    rule = AbstainRule(
        signal, 1 if sign == 1 else -1, NEVER if math.isinf(threshold.value) else sign * threshold.value,
        template, target_fpr, len(prompts), threshold.measured, tuple(threshold.expected),
        network_fingerprint(path))
    abstain_rule.write(path, rule)
    return rule


def format_rule(rule: AbstainRule) -> str:
    """Returns a table for the terminal, and a warning if the threshold is "never"."""
    mean, low, high = rule.expected_fpr
    count = round(rule.measured_fpr * rule.prompts)
    lines = [table([["abstains", "on these prompts", "on new prompts, expected"],
                    [rule.rule, f"{count} of {rule.prompts}: {rule.measured_fpr:.1%}",
                     f"{mean:.1%} [{low:.1%}, {high:.1%}]"]])]
    if rule.threshold == NEVER:
        lines.append(f"The model never abstains: {rule.prompts} prompts are too few for a false-positive "
                     f"rate of {rule.target_fpr:.4g}, which requires at least "
                     f"{conformal_min_items(rule.target_fpr)}.")
    return "\n".join(lines)
