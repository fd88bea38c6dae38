"""Thought seeding: puts P(knows) into a network's own thought or prompt, and generates its answer.

A thought seed is a sentence in the first person with P(knows) in whole percent and an instruction. Its place
depends on the prompt:

    chat, network with thoughts     thinking is enabled, a thought is opened, the seed is its unclosed start
    any other chat                  at the start of the network's own turn
    a template (`Q: …` and so on)   a line of its own before the prompt
Without a seed the prompt is the same: thinking is enabled for a network with thoughts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.generation.decoding import ContinuedIds

from ...thresholds import Thresholds
from ..answering import MARKERS, answer_ends, answer_text
from ..predictor import KnowledgePredictor

LOW, HIGH = 0.4, 0.7  # bounds of P(knows) for a sidecar without thresholds
MAX_NEW = 1024  # default maximum number of tokens of thought and answer

# Continues a prompt with the most likely tokens: ids, maximum number of new ones, ids that end it → pieces.
Continued = Callable[[Sequence[int], int, Sequence[int]], Generator[ContinuedIds]]


class Channel(NamedTuple):
    """The text around a network's thoughts: `begin`, `rest`, thought, `close`.

    `begin` and `close` are single tokens.
    """

    begin: str
    rest: str
    close: str


CHANNELS = (Channel("<|channel>", "thought\n", "<channel|>"), Channel("<think>", "\n", "</think>"))


class SeededPrompt(NamedTuple):
    """A prompt for an answer.

    `channel` is None for a network without thoughts; `in_thought` says whether the prompt ends inside a
    thought; `first_line` says whether the answer ends with its first line.
    """

    text: str
    channel: Channel | None
    in_thought: bool
    first_line: bool


class SeededAnswer(NamedTuple):
    """The state of a generation.

    `answer` is None until the thought ends. `done` is None during generation, then says whether the network
    ended the answer itself.
    """

    thought: str
    answer: str | None
    done: bool | None


def start_bounds(thresholds: Thresholds) -> tuple[float, float]:
    """Returns low and high for `seed` from a sidecar's thresholds on P(knows), to three digits.

    LOW or HIGH replaces a missing threshold. Low is at most high: where they overlap, knows_from takes
    precedence.
    """
    knows_from, unknown_below = thresholds
    high = round(max(HIGH, unknown_below or 0.0) if knows_from is None else knows_from, 3)
    return min(round(LOW if unknown_below is None else unknown_below, 3), high), high


def seed(p: float, low: float = LOW, high: float = HIGH) -> str:
    """Returns the thought for P(knows): below `low` do not guess, from `high` on answer directly.

    Raises:
        InputError: low is above high, or one of them is not a probability.
    """
    if not 0 <= low <= high <= 1:
        raise InputError("low and high: expected probabilities with low at most high, found "
                         f"{low:g} and {high:g}")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability, found {p}")
    # Short, because a byte-level network may have room for little more than its question.
    estimate = f"An inner probe gives me {int(100 * p + 0.5)}% to know this."
    if p < low:
        return f"{estimate} I will not guess: I say that I do not know."
    if p < high:
        return f"{estimate} I say first that I am unsure, then my best answer."
    return f"{estimate} I answer directly."


def channel_of(predictor: KnowledgePredictor) -> Channel | None:
    """Returns the thought channel whose tokens the network's tokenizer has, or None."""
    token_of = predictor.language.tokenizer.token
    return next((channel for channel in CHANNELS
                 if token_of(channel.begin) is not None and token_of(channel.close) is not None), None)


def seeded_prompt(predictor: KnowledgePredictor, question: str, thought: str = "") -> SeededPrompt:
    """Returns the prompt for an answer, with the thought seed if there is one; see the module."""
    prompter, line = predictor.prompter, f"{thought}\n" * bool(thought)
    if prompter.config.template != "chat":
        return SeededPrompt(line + prompter.text(question), None, False, True)
    text, channel = prompter.text(question, thinking=True), channel_of(predictor)
    if channel is None:
        return SeededPrompt(text + line, None, False, False)
    in_thought = text.rstrip().endswith((channel.begin, (channel.begin + channel.rest).rstrip()))
    if not thought:
        return SeededPrompt(text, channel, in_thought, False)
    opening = "" if in_thought else channel.begin + channel.rest
    return SeededPrompt(text + opening + thought, channel, True, False)


def split(generated: str, prompt: SeededPrompt) -> tuple[str, str | None]:
    """Splits generated text into thought and answer; the answer is None if the thought did not end.

    The answer is what follows the end of the last thought.
    """
    if prompt.first_line:
        return "", answer_text(generated)
    if prompt.channel is None:
        return "", _plain(generated)
    begin, rest, close = prompt.channel
    thought, ended, after = generated.rpartition(close)
    if begin in after or (prompt.in_thought and not ended):
        return _plain(generated.replace(begin + rest, "")), None
    return _plain(thought.replace(begin + rest, "")), _plain(after)


def answer_seeded(predictor: KnowledgePredictor, question: str, thought: str, continued: Continued, *,
                  max_new: int = MAX_NEW) -> Iterator[SeededAnswer]:
    """Generates an answer; each item of the iterator contains everything generated so far.

    Args:
        continued: generates the tokens.
        max_new: maximum number of tokens, limited by the network's maximum length.

    Raises:
        InputError: at the call, before the first item: the question is empty or leaves no room for an answer.
    """
    predictor.prompter(question)  # raises InputError for an invalid question
    prompt = seeded_prompt(predictor, question, thought)
    language = predictor.language
    ids, max_length = language.encode(prompt.text), language.model.config.max_seq_len
    if max_length - len(ids) < 1:
        parts = "its prompt and the thought" if thought else "its prompt"
        raise InputError(f"the question: expected fewer than {max_length} tokens with {parts}, the network's "
                         f"maximum, found {len(ids)}: there is no room for an answer")
    ends = answer_ends(language, predictor.rule.answers)
    return _states(predictor, prompt, continued(ids, min(max_new, max_length - len(ids)), ends))


def _states(predictor: KnowledgePredictor, prompt: SeededPrompt, pieces: Generator[ContinuedIds]
            ) -> Iterator[SeededAnswer]:
    ids, ended, decode = np.zeros(0, np.int32), False, predictor.language.tokenizer.decode
    with contextlib.closing(pieces):
        for piece in pieces:
            ids, ended = np.concatenate([ids, piece.ids]), piece.ended
            generated = decode(ids.tolist())
            if ended or (prompt.first_line and "\n" in generated.lstrip()):
                ended = True
                break
            complete = generated.rstrip("\N{REPLACEMENT CHARACTER}")  # drops a character that is incomplete
            yield SeededAnswer(*split(complete, prompt), None)
    yield SeededAnswer(*split(decode(ids.tolist()), prompt), ended)


def _plain(text: str) -> str:
    return MARKERS.sub("", text).strip()
