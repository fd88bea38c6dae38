"""Pairs of a prompt and its response, read from .jsonl files for fine-tuning.

Each line is a pair, a conversation, or plain text:

    {"prompt": "…", "response": "…"}                         one pair; "answerable": false if it has no answer
    {"messages": [{"role": "user", "content": "…"}, …]}      see `chat_messages`; also "conversations"
    {"text": "…"}                                            in no turn and without a response

Every reply of a conversation makes a pair, which has the turns before it as its context, as `tilelli chat`
presents a conversation to the network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tilelli_jax.config import Section, setting
from tilelli_jax.data.chat_messages import KEYS, read_messages
from tilelli_jax.data.documents import json_lines
from tilelli_jax.data.turns import format_turns, model_turn, turn_text, user_turn
from tilelli_jax.errors import InputError

log = logging.getLogger(__name__)
FORMATS = {"prompt": "prompt", "response": "prompt", "text": "text"} | dict(zip(KEYS, KEYS, strict=True))
LISTED = 5  # lines that a message names
TooLong = Literal["error", "drop", "cut"]


@dataclasses.dataclass(frozen=True)
class ChatConfig(Section):
    """Pairs of a prompt and its response to fine-tune on."""

    source: str = setting(
        "", ".jsonl file; each line has prompt and response, or messages (OpenAI) or conversations "
        "(ShareGPT), each of whose replies makes a pair with the turns before it; answerable: false marks "
        "pairs without an answer; a line may have text instead, which is read outside any turn")
    valid: str = setting("", ".jsonl file of validation pairs; empty: a fraction of the source")
    valid_fraction: float = setting(
        0.1, "fraction of the source's distinct prompts held out for validation, chosen by a hash of their "
        "text; a conversation counts by its first prompt", above=0, below=1)
    too_long: TooLong = setting(
        "error", "what to do with pairs longer than train.seq_len, in training and validation: error; drop, "
        "leave them out; cut, shorten them: leave out earlier turns, then truncate the prompt on the left "
        "until the response has half of the row or all it needs, then the response on the right")
    pack: bool = setting(
        False, "put several pairs in a training row, each read as a later turn of those before it; false: "
        "one padded pair per row, as always in validation")
    loss_on: Literal["all", "answerable"] = setting(
        "all", "pairs whose responses count in the cross-entropy: all, or those with an answer")
    abstain_position: Literal["prompt", "pair"] = setting(
        "prompt", "positions over which the router-entropy loss averages, and at whose last one the abstain "
        "head is trained: the prompt, or prompt and response")
    shuffle_seed: int = setting(
        0, "seed of the order of training rows, and of the assignment of pairs to packed rows", min=0,
        max=2**32 - 1)
    prefetch: int = setting(2, "batches to read ahead of the current update; 0: none", min=0, max=1000)


class ChatPair(NamedTuple):
    """A prompt and its response, or plain text, which has no response.

    Attributes:
        answerable: false if the prompt has no answer.
        where: the line of the file, for errors.
        context: earlier turns of the conversation, (prompt, response) each.
        complete: false if the end of the response is cut off, so that the turn does not end.
    """

    prompt: str
    response: str
    answerable: bool
    where: str
    context: tuple[tuple[str, str], ...] = ()
    complete: bool = True

    @property
    def is_plain(self) -> bool:
        return not self.response

    @property
    def given(self) -> str:
        """The text before the response: earlier turns, the user's turn and the start of the model's."""
        return self.prompt if self.is_plain else format_turns(self.context) + user_turn(self.prompt)

    @property
    def continuation(self) -> str:
        """The text to predict: the response and the end of its turn."""
        if self.is_plain:
            return ""
        return model_turn(self.response) if self.complete else f" {self.response}"

    @property
    def seq_len(self) -> int:
        """The number of bytes that the network reads: all but the last, which is only predicted."""
        given = len(self.given.encode())
        return max(given, given + len(self.continuation.encode()) - 1)

    @property
    def opening(self) -> str:
        """The first prompt of the conversation."""
        return self.context[0][0] if self.context else self.prompt


class ChatSplits(NamedTuple):
    """The training and the validation pairs."""

    train: list[ChatPair]
    valid: list[ChatPair]

    def fingerprint(self) -> str:
        """Returns a hash of all pairs' contents as they are trained on, independent of file names."""
        texts = json.dumps([[_content(pair) for pair in part] for part in self])
        return hashlib.sha256(texts.encode()).hexdigest()


def open_pairs(config: ChatConfig, seq_len: int | None = None) -> ChatSplits:
    """Reads the pairs, and applies `ChatConfig.too_long`.

    Which prompts are held out does not depend on `too_long`.

    Args:
        seq_len: the largest `ChatPair.seq_len`; None: any.

    Raises:
        InputError: a file is unreadable or unusable, pairs are too long, or a split would be empty.
    """
    if not config.source:
        raise InputError("chat.source: expected a .jsonl file, found nothing")
    pairs = read_pairs(Path(config.source))
    fitted = fit_pairs(pairs, seq_len, config.too_long, config.source)
    if config.valid:
        valid = fit_pairs(read_pairs(Path(config.valid)), seq_len, config.too_long, config.valid)
        return _without_none(fitted, valid, config)
    # Split by prompt text, so that neither the file's order nor repeated prompts matter.
    prompts = sorted({pair.opening for pair in pairs},
                     key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(prompts) < 2:
        raise InputError(f"chat.valid: expected a file, as {config.source} has one prompt only")
    n_valid = min(max(1, round(len(prompts) * config.valid_fraction)), len(prompts) - 1)
    held_out = set(prompts[:n_valid])
    parts: dict[bool, list[ChatPair | None]] = {False: [], True: []}
    for pair, fitting in zip(pairs, fitted, strict=True):
        parts[pair.opening in held_out].append(fitting)
    return _without_none(parts[False], parts[True], config)


def read_pairs(path: Path) -> list[ChatPair]:
    """Returns the pairs of a JSONL file; ignores other keys of its lines.

    Raises:
        InputError: the file is unreadable or has no pairs, or a line is not a pair that can be a turn.
    """
    pairs: list[ChatPair] = []
    for where, row in json_lines(path):
        pairs += line_pairs(row, where)
    if not pairs:
        raise InputError(f"{path}: expected at least one pair, found none")
    return pairs


def line_pairs(row: Any, where: str) -> list[ChatPair]:
    """Returns the pairs of one line; see the module's docstring.

    Args:
        row: the line's JSON value.
        where: its location, for error messages.

    Raises:
        InputError: it is not a pair that can be a turn.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected prompt and response, messages or text, found {row!r:.40}")
    present = [key for key in FORMATS if key in row]
    if not present:
        raise InputError(f"{where}: expected prompt and response, messages, conversations or text, found "
                         f"{', '.join(row) or 'nothing'!s:.80}")
    form = FORMATS[present[0]]
    if other_keys := [key for key in present if FORMATS[key] != form]:
        raise InputError(f"{where}: {other_keys[0]}: expected no {present[0]} with it, found one")
    answerable = row.get("answerable", True)
    if not isinstance(answerable, bool):
        raise InputError(f"{where}: answerable: expected true or false, found {answerable!r:.40}")
    if form == "text":
        return [ChatPair(turn_text(row, "text", where), "", answerable, where)]
    if form == "prompt":
        return [ChatPair(turn_text(row, "prompt", where), turn_text(row, "response", where), answerable,
                         where)]
    exchanges = read_messages(row, form, where)
    turns = tuple(exchange[:2] for exchange in exchanges)
    return [ChatPair(exchange.prompt, exchange.response, answerable,
                     where if len(turns) == 1 else f"{where}, message {exchange.number}", turns[:i])
            for i, exchange in enumerate(exchanges) if exchange.in_loss]


def fit_pairs(pairs: Sequence[ChatPair], seq_len: int | None, too_long: TooLong,
              source: str) -> list[ChatPair | None]:
    """Returns the pairs as `ChatConfig.too_long` has them, None for each that is dropped; logs how many.

    Args:
        seq_len: the largest `ChatPair.seq_len`; None: any.
        source: the file, for messages.

    Raises:
        InputError: a pair is too long and `too_long` is "error", or no part of a turn fits.
    """
    if seq_len is None:
        return list(pairs)
    if too_long == "error":
        check_lengths(pairs, seq_len, source)
        return list(pairs)
    if message := _describe_long(pairs, seq_len, source):
        log.warning("%s: %s %s", source, {"drop": "dropped", "cut": "cut"}[too_long], message)
    return [pair if pair.seq_len <= seq_len else None if too_long == "drop" else _cut(pair, seq_len)
            for pair in pairs]


def check_lengths(pairs: Sequence[ChatPair], seq_len: int, source: str = "") -> None:
    """Raises InputError if a pair is longer than `seq_len`; the message names the first of them."""
    if message := _describe_long(pairs, seq_len, source):
        raise InputError(f"{source or 'pairs'}: expected pairs that fit in train.seq_len, found {message}; "
                         "train on longer rows, or set chat.too_long to drop or cut")


# ---------------------------------------------------------------------------------------------


def _content(pair: ChatPair) -> list[Any]:
    content = list(pair[:3])
    return content if not pair.context and pair.complete else [*content, pair.context, pair.complete]


def _describe_long(pairs: Sequence[ChatPair], seq_len: int, source: str) -> str:
    """Says how many pairs are too long, and which; empty if none is."""
    lengths = [(pair.seq_len, pair.where) for pair in pairs]
    long = [(length, where) for length, where in lengths if length > seq_len]
    if not long:
        return ""
    named = [where.removeprefix(f"{source}, ") for _, where in long[:LISTED]]
    return (f"{len(long):,} of {len(pairs):,} pairs longer than {seq_len:,} bytes, the longest "
            f"{max(long)[0]:,}: {'; '.join(named)}{'; …' if len(long) > LISTED else ''}")


def _cut(pair: ChatPair, seq_len: int) -> ChatPair:
    """Returns a pair shortened to `seq_len`."""
    if pair.is_plain:
        return pair._replace(prompt=_first_bytes(pair.prompt, seq_len))
    room = seq_len - min(len(pair.continuation.encode()) - 1, seq_len // 2)  # for all before the response
    while pair.context and len(pair.given.encode()) > room:
        pair = pair._replace(context=pair.context[1:])
    if (excess := len(pair.given.encode()) - room) > 0:
        prompt = pair.prompt.encode()[excess:].decode(errors="ignore").lstrip()
        if not prompt:
            raise InputError(f"{pair.where}: expected a train.seq_len with room for a turn, found {seq_len}")
        pair = pair._replace(prompt=prompt)
    room = seq_len + 1 - len(pair.given.encode())
    if len(pair.continuation.encode()) > room:  # not even the turn's end fits
        response = _first_bytes(f" {pair.response}", room)[1:]
        if not response:
            raise InputError(f"{pair.where}: expected a train.seq_len with room for a turn, found {seq_len}")
        pair = pair._replace(response=response, complete=False)
    return pair


def _first_bytes(text: str, size: int) -> str:
    """Returns the beginning of a text, in at most `size` bytes."""
    return text.encode()[:size].decode(errors="ignore")


def _without_none(train: Sequence[ChatPair | None], valid: Sequence[ChatPair | None],
                  config: ChatConfig) -> ChatSplits:
    splits = ChatSplits([pair for pair in train if pair], [pair for pair in valid if pair])
    for part, file, use in ((splits.train, config.source, "train on"),
                            (splits.valid, config.valid or config.source, "validate on")):
        if not part:
            raise InputError(f"chat.too_long: expected pairs of {file} to {use} that fit in train.seq_len, "
                             "found none")
    return splits
