"""Pairs of a prompt and its response as chat turns in rows of bytes, read as Grain pipelines.

A row holds one pair (`pack: false`), or several in sequence (`pack: true`), where the start of a turn also
ends the previous one. The networks have no reset within a row, so a packed pair is read as a later turn of
the conversation before it. No pair is ever cut.

A line may hold plain text instead of a pair: it is in no turn, has no response, and all of it is prompt.

Pairs are assigned to rows once; an epoch reads each row once, in random order. As with windows, every
process knows the whole batch and fills its own rows: a position in the data is one integer, and the batch at
a position is the same for any number of processes.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import grain
import numpy as np

from tilelli_jax.config import Section, setting
from tilelli_jax.data.documents import json_lines
from tilelli_jax.data.reading import ALL, ENDLESS, Batches, Rows, read_ahead, shuffled
from tilelli_jax.data.turns import STOP, answered, asked, text_of
from tilelli_jax.errors import InputError

POSITION = 18  # bytes per position of a batch: 1 of text, 4 float32 weights, 1 flag
SHARED = len(STOP) - 1  # bytes that both end a turn and begin the next


@dataclasses.dataclass(frozen=True)
class ChatConfig(Section):
    """Pairs of a prompt and its response to fine-tune on."""

    source: str = setting(
        "", ".jsonl file with prompt and response on each line, and answerable: false for pairs without an "
        "answer; a line may have text instead, which is read outside any turn")
    valid: str = setting("", ".jsonl file of validation pairs; empty: a fraction of the source")
    valid_fraction: float = setting(
        0.1, "fraction of the source's distinct prompts held out for validation, chosen by a hash of their "
        "text", above=0, below=1)
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


class Pair(NamedTuple):
    """A prompt and its response, empty for plain text; `where` is its line, for errors."""

    prompt: str
    response: str
    answerable: bool
    where: str


class ChatBatch(NamedTuple):
    """Rows of a batch. Position t reads byte t and predicts byte t + 1; arrays are `[rows, seq_len]` by
    default.

    Attributes:
        bytes: uint8 `[rows, seq_len + 1]`, zero in the padding.
        response: f32, 1 where the predicted byte is of a response that counts in the loss.
        prompt: f32, weights over the positions of `ChatConfig.abstain_position`; they sum to 1 per pair.
        last: f32, 1 at the last of these positions.
        inside: f32, 1 at all positions except padding.
        unanswerable: bool, true at these positions in pairs without an answer.
        rows: int64 `[rows]`: index of each row in `ChatRows.rows`; −1 for an empty row.
    """

    bytes: np.ndarray
    response: np.ndarray
    prompt: np.ndarray
    last: np.ndarray
    inside: np.ndarray
    unanswerable: np.ndarray
    rows: np.ndarray


class Splits(NamedTuple):
    """The training and the validation pairs."""

    train: list[Pair]
    valid: list[Pair]

    def fingerprint(self) -> str:
        """Returns a hash of all pairs' contents, independent of file names."""
        texts = json.dumps([[pair[:3] for pair in part] for part in self])
        return hashlib.sha256(texts.encode()).hexdigest()


def open_pairs(config: ChatConfig) -> Splits:
    """Reads the pairs. Raises InputError if a file is unreadable or unusable, or a split would be empty."""
    if not config.source:
        raise InputError("chat.source: expected a .jsonl file, found nothing")
    pairs = read_pairs(Path(config.source))
    if config.valid:
        return Splits(pairs, read_pairs(Path(config.valid)))
    # Split by prompt text, so that neither the file's order nor repeated prompts matter.
    prompts = sorted({pair.prompt for pair in pairs},
                     key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(prompts) < 2:
        raise InputError(f"chat.valid: expected a file, as {config.source} has one prompt only")
    n_valid = min(max(1, round(len(prompts) * config.valid_fraction)), len(prompts) - 1)
    held_out = set(prompts[:n_valid])
    return Splits([pair for pair in pairs if pair.prompt not in held_out],
                  [pair for pair in pairs if pair.prompt in held_out])


def read_pairs(path: Path) -> list[Pair]:
    """Returns the pairs of a JSONL file; ignores other keys of its lines.

    Raises:
        InputError: the file is unreadable or has no pairs, or a line is not a pair that can be a turn.
    """
    pairs = []
    for where, row in json_lines(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected prompt and response, or text, found {row!r:.40}")
        is_plain = "text" in row
        if is_plain and (other_keys := [key for key in ("prompt", "response") if key in row]):
            raise InputError(f"{where}: text: expected no {other_keys[0]} with it, found one")
        prompt = text_of(row, "text" if is_plain else "prompt", where)
        response = "" if is_plain else text_of(row, "response", where)
        answerable = row.get("answerable", True)
        if not isinstance(answerable, bool):
            raise InputError(f"{where}: answerable: expected true or false, found {answerable!r:.40}")
        pairs.append(Pair(prompt, response, answerable, where))
    if not pairs:
        raise InputError(f"{path}: expected at least one pair, found none")
    return pairs


# ---------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """The bytes of a pair as a turn.

    Attributes:
        text: prompt and response with their turn markers.
        prompt_length: number of leading bytes that are the prompt.
        abstain_length: number of leading bytes up to `ChatConfig.abstain_position`.
    """

    text: bytes
    prompt_length: int
    abstain_length: int


@dataclasses.dataclass(frozen=True)
class ChatRows:
    """Pairs packed into rows of `seq_len + 1` bytes.

    Attributes:
        turns: the bytes of each pair.
        has_loss: bool `[pairs]`, whether the pair's response counts in the loss.
        rows: indices of the pairs in each row, in order.
    """

    pairs: Sequence[Pair]
    turns: list[Turn]
    has_loss: Sequence[bool]
    rows: list[list[int]]
    seq_len: int

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Per row: response bytes in the loss, pairs, and positions that are not padding, `[rows, 3]`."""
        responses = np.array([len(turn.text) - turn.prompt_length for turn in self.turns])
        responses = responses * np.array(self.has_loss)
        lengths = np.array([len(turn.text) - SHARED for turn in self.turns])
        return np.array([[responses[row].sum(), len(row), lengths[row].sum() + SHARED - 1]
                         for row in self.rows])

    def gather(self, rows: np.ndarray) -> ChatBatch:
        """Returns rows by index, int `[n]`; −1 gives an empty row."""
        shape = len(rows), self.seq_len
        response, prompt, last, inside = (np.zeros(shape, np.float32) for _ in range(4))
        batch = ChatBatch(np.zeros((len(rows), self.seq_len + 1), np.uint8), response, prompt, last,
                          inside, np.zeros(shape, bool), np.asarray(rows, np.int64))
        for i, row in enumerate(rows):
            at = 0
            for pair in self.rows[row] if row >= 0 else ():
                text, prompt_length, abstain_length = self.turns[pair]
                stop, end = at + len(text), at + abstain_length
                batch.bytes[i, at:stop] = np.frombuffer(text, np.uint8)
                response[i, at + prompt_length - 1:stop - 1] = self.has_loss[pair]
                prompt[i, at:end] = 1 / abstain_length
                last[i, end - 1] = 1
                inside[i, at:stop - 1] = 1
                batch.unanswerable[i, at:end] = not self.pairs[pair].answerable
                at = stop - SHARED
        return batch

    def lines(self, rows: np.ndarray) -> list[str]:
        """Returns the file lines of the pairs in some rows."""
        return [self.pairs[pair].where for row in rows if row >= 0 for pair in self.rows[row]]


def pack_rows(pairs: Sequence[Pair], seq_len: int, *, pack: bool, seed: int = 0,
              loss_on: Literal["all", "answerable"] = "all",
              abstain_position: Literal["prompt", "pair"] = "prompt") -> ChatRows:
    """Puts pairs into rows: one per row, or, if packed, each into the fullest row that has room for it.

    Args:
        seed: seed of the order in which pairs are packed.
        loss_on, abstain_position: see `ChatConfig`.

    Raises:
        InputError: a pair is longer than a row, or plain text is to be packed.
    """
    turns = []
    for pair in pairs:
        is_plain = not pair.response
        prompt = (pair.prompt if is_plain else asked(pair.prompt)).encode()
        response = b"" if is_plain else answered(pair.response).encode()
        needed = max(len(prompt), len(prompt) + len(response) - 1)
        if needed > seq_len:
            raise InputError(f"{pair.where}: takes a train.seq_len of {needed}, found {seq_len}; pairs are "
                             "not cut: remove it, or train on longer rows")
        if is_plain and pack:
            raise InputError(f"chat.pack: expected false, as {pair.where} is plain text, found true")
        on_prompt = is_plain or abstain_position == "prompt"
        abstain_length = len(prompt) if on_prompt else len(prompt) + len(response) - len(STOP)
        turns.append(Turn(prompt + response, len(prompt), abstain_length))
    rows = ([[i] for i in range(len(pairs))] if not pack else
            _packed([len(turn.text) for turn in turns], seq_len + 1, np.random.default_rng(seed)))
    return ChatRows(pairs, turns, [pair.answerable or loss_on == "all" for pair in pairs], rows, seq_len)


def _packed(lengths: list[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # free bytes and row, the fullest row first
    least = min(lengths) - SHARED
    for i in map(int, rng.permutation(len(lengths))):
        position = bisect.bisect_left(open_rows, (lengths[i] - SHARED, -1))
        if position < len(open_rows):
            room, row = open_rows.pop(position)
            room -= lengths[i] - SHARED
            rows[row].append(i)
        else:
            room, row = size - lengths[i], len(rows)
            rows.append([i])
        if room >= least:
            bisect.insort(open_rows, (room, row))
    return rows


def training_rows(source: ChatRows, *, batch_size: int, seed: int, rows: Rows | None = None,
                  prefetch: int = 2) -> grain.IterDataset[ChatBatch]:
    """Returns endless batches of rows in random order, each row once per epoch.

    The weights of `ChatRows.gather` are normalised over the global batch: `response`, `prompt`, `last` and
    `inside` each sum to 1 over all its rows, so that weighted sums are means.

    Args:
        rows: indices of a batch's rows that this process reads; None: all.
    """
    chosen = ALL if rows is None else rows

    def batch(indices: np.ndarray) -> ChatBatch:
        responses, pairs, inside = source.counts[indices].sum(axis=0)
        part = source.gather(indices[chosen])
        return part._replace(
            response=part.response / np.float32(max(responses, 1)), prompt=part.prompt / np.float32(pairs),
            last=part.last / np.float32(pairs), inside=part.inside / np.float32(inside))
    order = shuffled(len(source), seed).repeat(-(-ENDLESS // len(source)))
    # Rows of another length hold other pairs, so the position in the data is counted in pairs.
    return Batches(order, batch_size, batch, prefetch=prefetch, size=len(source.turns) / len(source))


def validation_rows(source: ChatRows, *, batch_size: int, rows: Rows | None = None,
                    most: int | None = None, prefetch: int = 2) -> grain.IterDataset[ChatBatch]:
    """Returns all rows in order, as from `ChatRows.gather`; the last batch is padded with empty rows.

    Args:
        rows: indices of a batch's rows that this process reads; None: all.
        most: use at most this many rows; None uses all.
    """
    n = min(len(source), most or len(source))
    chosen = ALL if rows is None else rows

    def batch(index: int) -> ChatBatch:
        indices = np.arange(index * batch_size, (index + 1) * batch_size)
        return source.gather(np.where(indices < n, indices, -1)[chosen])
    return read_ahead(grain.MapDataset.range(-(-n // batch_size)).map(batch), prefetch)
