"""Telling a network, in its own thoughts, how likely it is to know; and what it says after them.

A thought seed is a sentence in the first person with P(knows) in whole percent, and what is to be done
about it. Where it is put depends on how the network is asked:

    a chat whose network thinks     thinking is on, a thought is opened, and the seed begins it, unclosed
    any other chat                  at the beginning of the network's own turn
    a template (`Q: …` and so on)   a line of its own before the prompt
Without a seed a network is asked in the same way: thinking is on where there is such a thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tilelli_jax import decoding
from tilelli_jax.errors import InputError

from .answering import MARKS, answer_ends, said
from .config import AnswersConfig
from .predictor import KnowledgePredictor

LOW, HIGH = 0.4, 0.7  # of P(knows)
MAX_NEW = 1024  # tokens of thought and answer, where nothing else limits them
CHUNK = 8  # tokens decoded between two looks at them: few enough to read along


class Channel(NamedTuple):
    """What stands around a network's thoughts; `begin` and `close` are tokens of their own."""

    begin: str
    rest: str
    close: str


CHANNELS = (Channel("<|channel>", "thought\n", "<channel|>"), Channel("<think>", "\n", "</think>"))


class Asked(NamedTuple):
    """`text` is what the network reads; `channel` None where it does not think, and `begun` where it
    already does; `first_line`: whether its answer is a line, and what comes after is no longer it."""

    text: str
    channel: Channel | None
    begun: bool
    first_line: bool


class SeededAnswer(NamedTuple):
    """`answer` is None as long as a thought has not ended. `done`: whether the network has ended it
    itself; None while it is still speaking."""

    thought: str
    answer: str | None
    done: bool | None


def seed(p: float, low: float = LOW, high: float = HIGH) -> str:
    """What a network is made to think of P(knows): below `low` not to guess, from `high` on to answer.

    Raises:
        InputError: low is above high, or one of them no chance.
    """
    if not 0 <= low <= high <= 1:
        raise InputError("low and high: expected chances, low not above high, found "
                         f"{low:g} and {high:g}")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a chance, found {p}")
    # Short, as a network that reads bytes may have room for little more than its question.
    told = f"An inner probe gives me {int(100 * p + 0.5)}% to know this."
    if p < low:
        return f"{told} I will not guess: I say that I do not know."
    if p < high:
        return f"{told} I say first that I am unsure, then my best answer."
    return f"{told} I answer directly."


def channel_of(predictor: KnowledgePredictor) -> Channel | None:
    """How the network thinks; None where its tokenizer knows no thoughts."""
    known = predictor.language.tokenizer.token
    return next((channel for channel in CHANNELS
                 if known(channel.begin) is not None and known(channel.close) is not None), None)


def asked(predictor: KnowledgePredictor, question: str, thought: str = "") -> Asked:
    """A question as it is put for an answer, perhaps with a thought; see the module."""
    prompter = predictor.prompter
    if prompter.config.template != "chat":
        return Asked(f"{thought}\n" * bool(thought) + prompter.text(question), None, False, True)
    text, channel = prompter.text(question, thinking=True), channel_of(predictor)
    if channel is None:
        return Asked(text + f"{thought}\n" * bool(thought), None, False, False)
    begun = text.rstrip().endswith((channel.begin, (channel.begin + channel.rest).rstrip()))
    if not thought:
        return Asked(text, channel, begun, False)
    return Asked(text + ("" if begun else channel.begin + channel.rest) + thought, channel, True, False)


def split(made: str, asked: Asked) -> tuple[str, str | None]:
    """The thought and the answer of what was generated; None for an answer that was not come to.

    The answer is what follows the last end of a thought. A thought without an end is none.
    """
    if asked.first_line:
        return "", said(made)
    if asked.channel is None:
        return "", _plain(made)
    begin, rest, close = asked.channel
    thought, ended, after = made.rpartition(close)
    if begin in after or (asked.begun and not ended):
        return _plain(made.replace(begin + rest, "")), None
    return _plain(thought.replace(begin + rest, "")), _plain(after)


def answer_seeded(predictor: KnowledgePredictor, question: str, thought: str = "", *, most: int = MAX_NEW,
          chunk: int = CHUNK) -> Iterator[SeededAnswer]:
    """The likeliest answer (greedy) as it comes: all of it so far, each time.

    Args:
        most: tokens, if the network has room for so many.

    Raises:
        InputError: at once, not with the first piece: the question is empty, or leaves no room.
    """
    predictor.prompter(question)  # refuses what cannot be asked
    how = asked(predictor, question, thought)
    language = predictor.language
    ids, reads = language.encode(how.text), language.model.config.max_seq_len
    if reads - len(ids) < 1:
        beside = "its prompt and the thought" if thought else "its prompt"
        raise InputError(f"the question has {len(ids)} tokens with {beside}, and the network reads "
                         f"{reads}: there is no room for an answer")
    ends = answer_ends(language, AnswersConfig())
    pieces = decoding.stream_ids(language.model, ids, max_new=min(most, reads - len(ids)),
                                 temperature=0.0, end_ids=ends, chunk=chunk)
    return _spoken(predictor, how, pieces)


def _spoken(predictor: KnowledgePredictor, how: Asked, pieces: Iterator[decoding.ContinuedIds]) -> Iterator[SeededAnswer]:
    ids, ended, decode = np.zeros(0, np.int32), False, predictor.language.tokenizer.decode
    for piece in pieces:
        ids, ended = np.concatenate([ids, piece.ids]), piece.ended
        made = decode(ids.tolist())
        if ended or (how.first_line and "\n" in made.lstrip()):
            ended = True
            break
        whole = made.rstrip("\N{REPLACEMENT CHARACTER}")  # which may be half a character
        yield SeededAnswer(*split(whole, how), None)
    yield SeededAnswer(*split(decode(ids.tolist()), how), ended)


def _plain(text: str) -> str:
    return MARKS.sub("", text).strip()
