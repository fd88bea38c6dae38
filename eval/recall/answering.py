"""Greedy answers of a network, and the answer text in what it generates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from tilelli_jax.generation.decoding import generate_ids
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.signals.batching import max_time
from tilelli_jax.signals.prompts import PromptIds

from .config import AnswersConfig

THOUGHT = re.compile(r"<\|channel>thought\n?.*?(?:<channel\|>|$)|<think>.*?(?:</think>|$)", re.DOTALL)
MARKERS = re.compile(r"<\|?/?(?:turn|channel|bos|eos|pad|end_of_turn|start_of_turn|im_end|eot_id|endoftext|s)"
                     r"\|?>")


def answer_ends(language: LanguageModel, config: AnswersConfig) -> tuple[int, ...]:
    """Returns the tokens that end an answer: the network's own, then those of `config.end_tokens`.

    For a byte-level network, a newline replaces `config.end_tokens`.
    """
    tokenizer = language.tokenizer
    texts = ["\n"] if language.model.is_byte_level else config.end_tokens
    configured = [token for token in map(tokenizer.token, texts) if token is not None]
    return tuple(dict.fromkeys([*getattr(language.model.config, "end_ids", ()), *configured]))


def answer(language: LanguageModel, prompts: Sequence[PromptIds], config: AnswersConfig,
           advance: Callable[[int], object] = lambda n: None) -> list[np.ndarray]:
    """Decodes greedily. Returns each answer's tokens without the one that ended it: int32 `[n]`.

    Args:
        advance: called with the number of prompts of each finished batch.
    """
    max_length, ends = max_time(language.model), answer_ends(language, config)
    budgets = [config.max_new if max_length is None else
               max(1, min(config.max_new, max_length - len(prompt.ids) + 1)) for prompt in prompts]
    answers: dict[int, np.ndarray] = {}
    for max_new in sorted(set(budgets)):  # separate batches: a long prompt must not shorten other answers
        rows = [i for i, budget in enumerate(budgets) if budget == max_new]
        generated = generate_ids(language.model, [prompts[i].ids for i in rows], max_new=max_new,
                                 temperature=0.0, end_ids=ends, batch_size=config.batch_size,
                                 advance=advance)
        answers |= {i: continuation.ids for i, continuation in zip(rows, generated, strict=True)}
    return [answers[i] for i in range(len(prompts))]


def answer_text(text: str) -> str:
    """Returns the first non-empty line of generated text, without thoughts and turn markers."""
    plain = MARKERS.sub("", THOUGHT.sub("", text))
    return next((line.strip() for line in plain.splitlines() if line.strip()), "")
