"""What a network shows of every prompt, and what it answers: columns of one row for each prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tilelli_jax import decoding
from tilelli_jax.data.chat_pairs import Pair, pack_rows
from tilelli_jax.data.turns import MODEL, STOP, USER, answered, asked
from tilelli_jax.data.village import Prompt
from tilelli_jax.errors import InputError
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.signals.prompts import Prompt as TokenPrompt
from tilelli_jax.signals.uncertainty import UncertaintyReader, by_name
from tilelli_jax.training.chat import held_out_terms
from tilelli_jax.training.step import split_params

from ..matching import is_match
from .config import AnswersConfig
from .detectors import health, is_affirmation, is_loop, is_refusal, is_utf8

Columns = dict[str, np.ndarray]
BYTES = 256
HELD_OUT = 500  # pairs, at most, of which the chat loss is measured


def turn(prompt: str) -> TokenPrompt:
    """A prompt as the user's turn, and the beginning of the model's; the question is what the user says."""
    ids = asked(prompt).encode()
    return TokenPrompt(list(ids), len(USER), len(ids) - len(f"\n{MODEL}"))


def check_bytes(config: Any, what: str) -> None:
    """Raises InputError where such a network does not read bytes. `what` names it."""
    tokens = getattr(config, "vocab_size", None)
    if not isinstance(config, RoutedConfig | VanillaConfig) or config.vocab_size < BYTES:
        raise InputError(f"{what}: expected a network that reads bytes, routed or vanilla, found family "
                         f"{config.family}" + (f" of {tokens} tokens" if tokens else ""))


def check_lengths(prompts: Sequence[str], config: Any, max_new: int) -> None:
    """Raises InputError where a prompt with its answer is longer than the window of such a network."""
    for prompt in prompts:
        if (needed := len(turn(prompt).ids) + max_new) > config.max_seq_len and config.positions == "learned":
            raise InputError(f"prompts: {prompt!r:.60} takes {needed} bytes with its answer, and the network "
                             f"reads {config.max_seq_len}; shorten it, or answers.max_new")


def read(reader: UncertaintyReader, prompts: Sequence[str], what: str) -> Columns:
    """Every signal of prompts in turns, `[prompts]` each, under the names of `decision.POINTS`.

    Args:
        what: is read, for the terminal and for errors.

    Raises:
        InputError: one is no number, as of a network whose weights are too large.
    """
    found = by_name(reader.read([turn(prompt) for prompt in prompts], what))
    for name, values in found.items():
        if (broken := np.isnan(values)).any():
            raise InputError(f"{what}: {name}: expected numbers, found NaN for the prompt "
                             f"{prompts[int(broken.argmax())]!r:.60}: the network is broken there")
    return found


def answers(model: Any, prompts: Sequence[str], options: AnswersConfig) -> list[bytes]:
    """What is generated greedily after each prompt, to the end of the model's turn."""
    found = decoding.generate(model, [asked(prompt) for prompt in prompts], max_new=options.max_new,
                              temperature=0, stop=STOP, batch_size=options.batch_size)
    return [made.data for made in found]


def is_right(answer: bytes, expected: str | None) -> bool:
    """Whether its words are said, and not denied or declined (eval/matching.py); never where nobody knows."""
    return expected is not None and is_match(answer.decode(errors="replace"), [expected])


def spoken(prompts: Sequence[Prompt], said: Sequence[bytes]) -> dict[str, Any]:
    """Health of all answers, and of every regime what share is right, refused, affirmed, a loop, UTF-8.

    JSON. `right` is None where a regime has no right answers.
    """
    regimes = {}
    for regime in dict.fromkeys(one.regime for one in prompts):
        here = [(one, answer) for one, answer in zip(prompts, said, strict=True) if one.regime == regime]
        texts = [answer.decode(errors="replace") for _, answer in here]
        right = [is_right(answer, one.answer) for one, answer in here if one.answer is not None]
        regimes[regime] = {"right": float(np.mean(right)) if right else None,
                           "refused": float(np.mean([is_refusal(text) for text in texts])),
                           "affirmed": float(np.mean([is_affirmation(text) for text in texts])),
                           "loops": float(np.mean([is_loop(text) for text in texts])),
                           "valid_utf8": float(np.mean([is_utf8(answer) for _, answer in here]))}
    return {"health": health(said)._asdict(), "regimes": regimes}


def chat_loss(model: Any, pairs: Sequence[Pair], batch_size: int) -> float:
    """Mean cross-entropy of held-out responses, nats per byte."""
    chosen = pairs[:HELD_OUT]
    longest = max(len((asked(pair.prompt) + answered(pair.response)).encode()) for pair in chosen)
    rows = pack_rows(chosen, longest, pack=False)
    network, params = split_params(model)
    return held_out_terms(network, rows, batch_size=batch_size)(params).get("cross_entropy", math.nan)
