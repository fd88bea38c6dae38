"""Pairs of a prompt and its response as chat turns in rows of bytes, read as Grain pipelines.

A row holds one pair (`pack: false`), or several in sequence (`pack: true`), where the start of a turn also
ends the previous one. The networks have no reset within a row, so a packed pair is read as a later turn of
the conversation before it. A pair that has earlier turns comes after them; they are part of its prompt.

Plain text is in no turn, has no response, and all of it is prompt.

Pairs are assigned to rows once; an epoch reads each row once, in random order. As with windows, every
process knows the whole batch and fills its own rows: a position in the data is one integer, and the batch at
a position is the same for any number of processes.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import grain
import numpy as np

from tilelli_jax.data.chat_pairs import ChatPair, check_lengths
from tilelli_jax.data.reading import ALL, ENDLESS, Batches, Rows, read_ahead, shuffled
from tilelli_jax.data.turns import STOP
from tilelli_jax.errors import InputError

POSITION = 18  # bytes per position of a batch: 1 of text, 4 float32 weights, 1 flag
SHARED = len(STOP) - 1  # bytes that both end a turn and begin the next


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


class Turn(NamedTuple):
    """The bytes of a pair as a turn.

    Attributes:
        text: earlier turns, prompt and response with their turn markers.
        prompt_length: number of leading bytes up to the response.
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

    pairs: Sequence[ChatPair]
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


def pack_rows(pairs: Sequence[ChatPair], seq_len: int, *, pack: bool, seed: int = 0,
              loss_on: Literal["all", "answerable"] = "all",
              abstain_position: Literal["prompt", "pair"] = "prompt") -> ChatRows:
    """Puts pairs into rows: one per row, or, if packed, each into the fullest row that has room for it.

    A pair whose end is cut fills a row, so that no other pair is packed behind it.

    Args:
        seed: seed of the order in which pairs are packed.
        loss_on, abstain_position: see `ChatConfig`.

    Raises:
        InputError: a pair is longer than a row, or plain text is to be packed.
    """
    check_lengths(pairs, seq_len)
    turns = []
    for pair in pairs:
        if pair.is_plain and pack:
            raise InputError(f"chat.pack: expected false, as {pair.where} is plain text, found true")
        prompt, response = pair.given.encode(), pair.continuation.encode()
        text = prompt + response
        end = len(text) - len(STOP) if pair.complete and not pair.is_plain else len(text)
        abstain_length = len(prompt) if abstain_position == "prompt" else min(end, seq_len)
        turns.append(Turn(text, len(prompt), abstain_length))
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
                    max_rows: int | None = None, prefetch: int = 2) -> grain.IterDataset[ChatBatch]:
    """Returns all rows in order, as from `ChatRows.gather`; the last batch is padded with empty rows.

    Args:
        rows: indices of a batch's rows that this process reads; None: all.
        max_rows: use at most this many rows; None uses all.
    """
    n = min(len(source), max_rows or len(source))
    chosen = ALL if rows is None else rows

    def batch(index: int) -> ChatBatch:
        indices = np.arange(index * batch_size, (index + 1) * batch_size)
        return source.gather(np.where(indices < n, indices, -1)[chosen])
    return read_ahead(grain.MapDataset.range(-(-n // batch_size)).map(batch), prefetch)
