"""Measures one network: its signals and its greedy answer for every prompt, as columns `[prompts]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tilelli_jax.data.chat_pairs import ChatPair
from tilelli_jax.data.chat_rows import pack_rows
from tilelli_jax.data.synthetic.village import EvaluationPrompt
from tilelli_jax.data.turns import MODEL, STOP, USER, user_turn
from tilelli_jax.errors import InputError
from tilelli_jax.generation import decoding
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.signals.prompts import PromptIds
from tilelli_jax.signals.uncertainty import UncertaintyReader, signal_columns
from tilelli_jax.training.step import split_params
from tilelli_jax.training.tasks.chat import held_out_terms

from ..matching import is_match
from .config import AnswersConfig
from .detectors import has_refusal_phrase, is_affirmation, is_loop, is_utf8, text_quality

Columns = dict[str, np.ndarray]
BYTES = 256
MAX_LOSS_PAIRS = 500  # over which the chat loss is measured


def turn(prompt: str) -> PromptIds:
    """Returns a prompt as the user's turn and the start of the model's; the user's text is the question."""
    ids = user_turn(prompt).encode()
    return PromptIds(list(ids), len(USER), len(ids) - len(f"\n{MODEL}"))


def check_bytes(config: Any, name: str) -> None:
    """Raises InputError if such a network is not a byte-level network.

    Args:
        name: the network, for the error message.
    """
    tokens = getattr(config, "vocab_size", None)
    if not isinstance(config, RoutedConfig | VanillaConfig) or config.vocab_size < BYTES:
        raise InputError(f"{name}: expected a byte-level network, routed or vanilla, found family "
                         f"{config.family}" + (f" of {tokens} tokens" if tokens else ""))


def check_lengths(prompts: Sequence[str], config: Any, max_new: int) -> None:
    """Raises InputError if a prompt with its answer is longer than the network's context window."""
    for prompt in prompts:
        if (needed := len(turn(prompt).ids) + max_new) > config.max_seq_len and config.positions == "learned":
            raise InputError(f"prompts: {prompt!r:.60} takes {needed} bytes with its answer, and the network "
                             f"reads {config.max_seq_len}; shorten it, or answers.max_new")


def signals(reader: UncertaintyReader, prompts: Sequence[str], name: str) -> Columns:
    """Returns every signal of prompts as turns, `[prompts]` each, by the names of `signals.names`.

    Args:
        name: what is measured, for progress lines and errors.

    Raises:
        InputError: a signal is NaN, as where the weights are too large.
    """
    columns = signal_columns(reader.read([turn(prompt) for prompt in prompts], name))
    for signal, values in columns.items():
        if (broken := np.isnan(values)).any():
            raise InputError(f"{name}: {signal}: expected numbers, found NaN for the prompt "
                             f"{prompts[int(broken.argmax())]!r:.60}: the network's output is NaN")
    return columns


def answers(model: Any, prompts: Sequence[str], options: AnswersConfig) -> list[bytes]:
    """Generates an answer to each prompt greedily, up to the end of the model's turn."""
    generated = decoding.generate(model, [user_turn(prompt) for prompt in prompts], max_new=options.max_new,
                                  temperature=0, stop=STOP, batch_size=options.batch_size)
    return [continuation.data for continuation in generated]


def is_correct(answer: bytes, expected: str | None) -> bool:
    """Whether the answer states the expected words without denial or refusal (eval/matching.py).

    False if the prompt has no answer.
    """
    return expected is not None and is_match(answer.decode(errors="replace"), [expected])


def summarise(prompts: Sequence[EvaluationPrompt], generated: Sequence[bytes]) -> dict[str, Any]:
    """Returns JSON: the text quality of all answers, and for every regime the fraction that is correct, a
    refusal, an affirmation, a loop, and valid UTF-8.

    `correct` is None in a regime whose prompts have no answers.
    """
    regimes = {}
    for regime in dict.fromkeys(prompt.regime for prompt in prompts):
        pairs = [(prompt, answer) for prompt, answer in zip(prompts, generated, strict=True)
                 if prompt.regime == regime]
        texts = [answer.decode(errors="replace") for _, answer in pairs]
        correct = [is_correct(answer, prompt.answer) for prompt, answer in pairs if prompt.answer is not None]
        regimes[regime] = {"correct": float(np.mean(correct)) if correct else None,
                           "refused": float(np.mean([has_refusal_phrase(text) for text in texts])),
                           "affirmed": float(np.mean([is_affirmation(text) for text in texts])),
                           "loops": float(np.mean([is_loop(text) for text in texts])),
                           "valid_utf8": float(np.mean([is_utf8(answer) for _, answer in pairs]))}
    return {"text_quality": text_quality(generated)._asdict(), "regimes": regimes}


def chat_loss(model: Any, pairs: Sequence[ChatPair], batch_size: int) -> float:
    """Returns the mean cross-entropy of held-out responses, in nats per byte."""
    chosen = pairs[:MAX_LOSS_PAIRS]
    rows = pack_rows(chosen, max(pair.seq_len for pair in chosen), pack=False)
    network, params = split_params(model)
    return held_out_terms(network, rows, batch_size=batch_size)(params).get("cross_entropy", math.nan)
