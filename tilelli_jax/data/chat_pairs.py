"""Pairs of a prompt and its response, as turns in rows of bytes: Grain pipelines.

A row holds one pair (`pack: false`), or several after one another, the beginning of one turn being the
end of the one before (`pack: true`). Networks here have nothing that would make them forget within
a row: in a packed one a pair is read as a later turn of the conversation before it. No pair is ever cut.

A line may hold bare text in place of a pair: it stands outside of any turn, nothing of it is a response, and
all of it is judged.

Which pairs are in a row is settled once; an epoch reads each row once, in random order. As with
windows, every process knows the whole batch and fills its own rows: a position is one integer, and the
batch there is the same for any number of processes.
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

POSITION = 18  # bytes of a batch for each position: 1 of text, 4 weights of 4, 1 mark
SHARED = len(STOP) - 1  # bytes that end a turn and begin the next


@dataclasses.dataclass(frozen=True)
class ChatConfig(Section):
    """Pairs of a prompt and its response, to fine-tune on."""

    source: str = setting(
        "", "a .jsonl file: prompt, response, and answerable where that is false, on each line; or text "
        "alone, which is in no turn")
    valid: str = setting("", "such a file to validate on; empty: a part of the source")
    valid_fraction: float = setting(
        0.1, "share of the source's different prompts that is kept for validation; their text decides "
        "which", above=0, below=1)
    pack: bool = setting(
        False, "several pairs in a training row, each read as a later turn of those before it; "
        "otherwise one, padded. Validation always has one")
    loss_on: Literal["all", "answerable"] = setting(
        "all", "whose responses are learned; those of the others are read, no more")
    abstain_position: Literal["prompt", "pair"] = setting(
        "prompt", "over what the routers' entropy is judged, and at whose end the abstain head is: the "
        "prompt, or prompt and response")
    shuffle_seed: int = setting(
        0, "seed of the order of training rows, and of which pairs share one", min=0, max=2**32 - 1)
    prefetch: int = setting(2, "batches read ahead of the step in progress", min=0, max=1000)


class Pair(NamedTuple):
    """`where` names its line in an error. Bare text is a prompt without any response."""

    prompt: str
    response: str
    answerable: bool
    where: str


class ChatBatch(NamedTuple):
    """Rows of a batch. At position t byte t is read and byte t + 1 predicted: all but `bytes` and `rows`
    are `[rows, seq_len]`.

    Attributes:
        bytes: uint8 `[rows, seq_len + 1]`, zeros in the padding.
        response: f32, 1 where a byte of a response is predicted that is to be learned.
        prompt: f32, over the positions of a prompt, or of what else is judged; they add up to 1 for each.
        last: f32, 1 at the last of these positions.
        inside: f32, 1 at all positions but the padding.
        unanswerable: bool, true over these positions of pairs that have no answer.
        rows: int64 `[rows]`: which row of all; −1 for none.
    """

    bytes: np.ndarray
    response: np.ndarray
    prompt: np.ndarray
    last: np.ndarray
    inside: np.ndarray
    unanswerable: np.ndarray
    rows: np.ndarray


class Splits(NamedTuple):
    """Pairs to learn from and pairs to validate on."""

    train: list[Pair]
    valid: list[Pair]

    def fingerprint(self) -> str:
        """Of all that is learned from or validated on; not of the files' names."""
        texts = json.dumps([[pair[:3] for pair in part] for part in self])
        return hashlib.sha256(texts.encode()).hexdigest()


def open_pairs(config: ChatConfig) -> Splits:
    """Raises InputError where a file cannot be read or used, or nothing is left to validate on."""
    if not config.source:
        raise InputError("chat.source: expected a .jsonl file, found nothing")
    pairs = read_pairs(Path(config.source))
    if config.valid:
        return Splits(pairs, read_pairs(Path(config.valid)))
    # By the text: neither a file in some order nor a prompt that stands in it twice does harm.
    prompts = sorted({pair.prompt for pair in pairs},
                     key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(prompts) < 2:
        raise InputError(f"chat.valid: expected a file, as {config.source} has one prompt only")
    n_valid = min(max(1, round(len(prompts) * config.valid_fraction)), len(prompts) - 1)
    held_out = set(prompts[:n_valid])
    return Splits([pair for pair in pairs if pair.prompt not in held_out],
                  [pair for pair in pairs if pair.prompt in held_out])


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSONL file; what else its lines hold is passed over.

    Raises:
        InputError: the file cannot be read or has no pairs, or a line is no pair that can be a turn.
    """
    pairs = []
    for where, row in json_lines(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected prompt and response, or text, found {row!r:.40}")
        bare = "text" in row
        if bare and (more := [key for key in ("prompt", "response") if key in row]):
            raise InputError(f"{where}: text: expected alone, found {more[0]} beside it")
        prompt = text_of(row, "text" if bare else "prompt", where)
        response = "" if bare else text_of(row, "response", where)
        answerable = row.get("answerable", True)
        if not isinstance(answerable, bool):
            raise InputError(f"{where}: answerable: expected true or false, found {answerable!r:.40}")
        pairs.append(Pair(prompt, response, answerable, where))
    if not pairs:
        raise InputError(f"{path}: expected at least one pair, found none")
    return pairs


# ---------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """The bytes of a pair; how many of them, from the first, the model is given, and how many are judged."""

    text: bytes
    given: int
    judged: int


@dataclasses.dataclass(frozen=True)
class ChatRows:
    """Pairs laid into rows of `seq_len + 1` bytes.

    Attributes:
        turns: of each pair its bytes, how many of them the model is given, and how many are judged.
        imitated: bool `[pairs]`, whether its response is learned.
        rows: the pairs of each row, in order.
    """

    pairs: Sequence[Pair]
    turns: list[Turn]
    imitated: Sequence[bool]
    rows: list[list[int]]
    seq_len: int

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Of each row: bytes that are learned, pairs, and positions that are not padding, `[rows, 3]`."""
        responses = np.array([len(turn.text) - turn.given for turn in self.turns]) * np.array(self.imitated)
        lengths = np.array([len(turn.text) - SHARED for turn in self.turns])
        return np.array([[responses[row].sum(), len(row), lengths[row].sum() + SHARED - 1]
                         for row in self.rows])

    def gather(self, rows: np.ndarray) -> ChatBatch:
        """rows int `[n]`, −1 for one that is empty."""
        shape = len(rows), self.seq_len
        response, prompt, last, inside = (np.zeros(shape, np.float32) for _ in range(4))
        found = ChatBatch(np.zeros((len(rows), self.seq_len + 1), np.uint8), response, prompt, last,
                          inside, np.zeros(shape, bool), np.asarray(rows, np.int64))
        for i, row in enumerate(rows):
            at = 0
            for pair in self.rows[row] if row >= 0 else ():
                text, given, judged = self.turns[pair]
                stop, end = at + len(text), at + judged
                found.bytes[i, at:stop] = np.frombuffer(text, np.uint8)
                response[i, at + given - 1:stop - 1] = self.imitated[pair]
                prompt[i, at:end] = 1 / judged
                last[i, end - 1] = 1
                inside[i, at:stop - 1] = 1
                found.unanswerable[i, at:end] = not self.pairs[pair].answerable
                at = stop - SHARED
        return found

    def lines(self, rows: np.ndarray) -> list[str]:
        """Where the pairs of some rows come from."""
        return [self.pairs[pair].where for row in rows if row >= 0 for pair in self.rows[row]]


def pack_rows(pairs: Sequence[Pair], seq_len: int, *, pack: bool, seed: int = 0,
        loss_on: Literal["all", "answerable"] = "all",
        abstain_position: Literal["prompt", "pair"] = "prompt") -> ChatRows:
    """Puts pairs into rows: one in each, or, packed, each into the fullest row that has room for it.

    Args:
        seed: of the order in which pairs are packed.
        imitate, judge: see `ChatConfig`.

    Raises:
        InputError: a pair is longer than a row, or bare text is to be packed.
    """
    turns = []
    for pair in pairs:
        bare = not pair.response
        given = (pair.prompt if bare else asked(pair.prompt)).encode()
        rest = b"" if bare else answered(pair.response).encode()
        needed = max(len(given), len(given) + len(rest) - 1)
        if needed > seq_len:
            raise InputError(f"{pair.where}: takes a train.seq_len of {needed}, found {seq_len}; pairs are "
                             "not cut: leave it out, or train on longer rows")
        if bare and pack:
            raise InputError(f"chat.pack: expected false, as {pair.where} is bare text, found true")
        turns.append(Turn(given + rest, len(given), len(given) if bare or abstain_position == "prompt" else
                          len(given) + len(rest) - len(STOP)))
    rows = ([[i] for i in range(len(pairs))] if not pack else
            _packed([len(turn.text) for turn in turns], seq_len + 1, np.random.default_rng(seed)))
    return ChatRows(pairs, turns, [pair.answerable or loss_on == "all" for pair in pairs], rows, seq_len)


def _packed(lengths: list[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room and row, the fullest first
    least = min(lengths) - SHARED
    for i in map(int, rng.permutation(len(lengths))):
        found = bisect.bisect_left(open_rows, (lengths[i] - SHARED, -1))
        if found < len(open_rows):
            room, row = open_rows.pop(found)
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
    """Endless batches in random order, each row once in an epoch.

    What is 1 in `ChatRows.gather` is a share of the global batch here: `response`, `prompt`, `last` and
    `inside` add up to 1 over all its rows, so that sums over them are means.

    Args:
        rows: of a batch, those that this process reads; all of them by default.
    """
    chosen = ALL if rows is None else rows

    def batch(found: np.ndarray) -> ChatBatch:
        responses, pairs, inside = source.counts[found].sum(axis=0)
        part = source.gather(found[chosen])
        return part._replace(
            response=part.response / np.float32(max(responses, 1)), prompt=part.prompt / np.float32(pairs),
            last=part.last / np.float32(pairs), inside=part.inside / np.float32(inside))
    order = shuffled(len(source), seed).repeat(-(-ENDLESS // len(source)))
    # Packed into rows of another length, other pairs stand together: what was read is counted in pairs.
    return Batches(order, batch_size, batch, prefetch=prefetch, size=len(source.turns) / len(source))


def validation_rows(source: ChatRows, *, batch_size: int, rows: Rows | None = None,
                    most: int | None = None, prefetch: int = 2) -> grain.IterDataset[ChatBatch]:
    """All rows in order, as `ChatRows.gather` gives them; the last batch is filled up with empty ones.

    Args:
        rows: of a batch, those that this process reads; all of them by default.
        most: look at so many rows only.
    """
    n = min(len(source), most or len(source))
    chosen = ALL if rows is None else rows

    def batch(index: int) -> ChatBatch:
        found = np.arange(index * batch_size, (index + 1) * batch_size)
        return source.gather(np.where(found < n, found, -1)[chosen])
    return read_ahead(grain.MapDataset.range(-(-n // batch_size)).map(batch), prefetch)
