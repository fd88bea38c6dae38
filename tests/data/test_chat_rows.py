"""Pairs as turns in rows of bytes: loss weights, packing and batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.chat_files import pairs_of, written
from tilelli_jax.commands import chat
from tilelli_jax.data.chat_pairs import ChatPair, read_pairs
from tilelli_jax.data.chat_rows import ChatBatch, ChatRows, pack_rows, training_rows, validation_rows
from tilelli_jax.data.turns import model_turn, user_turn
from tilelli_jax.errors import InputError

WEIGHTS = ("response", "prompt", "last", "inside")


def test_turns_have_the_format_of_the_chat_command() -> None:
    assert user_turn("hi") == "USER: hi\nTILELLI:"
    turns = user_turn("hi") + model_turn("Hello.")
    assert turns.partition(chat.STOP)[0] == "USER: hi\nTILELLI: Hello." and turns.endswith("\nUSER:")


def test_one_pair_in_a_row() -> None:
    source = pack_rows([ChatPair("hé", "ok", False, "line 1")], 40, pack=False)
    row = source.gather(np.array([0]))
    text = "USER: hé\nTILELLI: ok\nUSER:".encode()
    assert bytes(row.bytes[0]) == text.ljust(41, b"\0")
    end = len("USER: hé\nTILELLI:".encode())
    predicted = bytes(row.bytes[0, 1:][row.response[0] == 1])
    assert predicted == b" ok\nUSER:" and set(row.response[0]) == {0, 1}
    assert bytes(row.bytes[0, :-1][row.prompt[0] > 0]) == text[:end]
    np.testing.assert_allclose(row.prompt[0].sum(), 1, rtol=1e-6)
    assert np.flatnonzero(row.last[0]).tolist() == [end - 1] and text[end - 1:end] == b":"
    assert row.inside[0].sum() == len(text) - 1 and row.unanswerable[0].sum() == end
    # An empty row.
    empty = source.gather(np.array([-1]))
    assert not any(array.any() for array in empty[:-1])


def test_loss_on_answerable_pairs_and_abstaining_after_the_answer() -> None:
    """The abstain position covers the pair up to its answer's end; unanswerable responses have no loss."""
    pairs = [ChatPair("who", "I.", True, "line 1"), ChatPair("what", "hm", False, "line 2")]
    source = pack_rows(pairs, 40, pack=False, loss_on="answerable", abstain_position="pair")
    batch = source.gather(np.array([0, 1]))
    for row, text in enumerate(("USER: who\nTILELLI: I.", "USER: what\nTILELLI: hm")):
        assert bytes(batch.bytes[row, :-1][batch.prompt[row] > 0]).decode() == text
        assert np.flatnonzero(batch.last[row]).tolist() == [len(text) - 1]
        assert batch.prompt[row].sum() == pytest.approx(1)
        assert batch.unanswerable[row].sum() == (len(text) if row else 0)
    assert bytes(batch.bytes[0, 1:][batch.response[0] == 1]) == b" I.\nUSER:" and not batch.response[1].any()
    assert source.counts.tolist() == [[9, 1, 26], [0, 1, 27]]
    packed = pack_rows(pairs, 60, pack=True, loss_on="answerable", abstain_position="pair")
    assert packed.counts[:, 0].sum() == 9 and packed.gather(np.array([0])).response.sum() == 9


def test_plain_text_is_outside_any_turn(tmp_path: Path) -> None:
    path = written(tmp_path / "bare.jsonl", [{"text": " In Gorham "}, {"text": "xq", "answerable": False}])
    pairs = read_pairs(path)
    source = pack_rows(pairs, 9, pack=False)
    batch = source.gather(np.array([0, 1]))
    assert bytes(batch.bytes[0]) == b"In Gorham\0" and bytes(batch.bytes[1, :2]) == b"xq"
    assert batch.prompt[0].tolist() == [np.float32(1 / 9)] * 9 and batch.last.sum(1).tolist() == [1, 1]
    assert not batch.response.any() and batch.unanswerable.sum(1).tolist() == [0, 2]
    batch = next(iter(training_rows(source, batch_size=2, seed=0)))
    assert not batch.response.any() and batch.last.sum() == pytest.approx(1)
    with pytest.raises(InputError, match=r"found 1 of 2 pairs longer than 8 bytes, the longest 9: .*line 1;"):
        pack_rows(pairs, 8, pack=False)
    with pytest.raises(InputError, match=r"^chat.pack: expected false, as .*line 1 is plain text"):
        pack_rows(pairs, 9, pack=True)
    both = written(tmp_path / "both.jsonl", [{"text": "a", "prompt": "b"}])
    with pytest.raises(InputError, match=r"line 1: text: expected no prompt with it, found one"):
        read_pairs(both)


def test_packed_rows() -> None:
    """Every pair occurs once and uncut, a turn's end is the next one's start, and rows are almost full."""
    pairs = pairs_of(200)
    source = pack_rows(pairs, 100, pack=True, seed=3)
    assert sorted(pair for row in source.rows for pair in row) == list(range(200))
    batch = source.gather(np.arange(len(source)))
    for i, row in enumerate(source.rows):
        text = "".join(user_turn(pairs[pair].prompt) + f" {pairs[pair].response}\n" for pair in row) + "USER:"
        assert bytes(batch.bytes[i]).rstrip(b"\0").decode() == text
        predicted = bytes(batch.bytes[i, 1:][batch.response[i] == 1]).decode()
        assert predicted == "".join(model_turn(pairs[pair].response) for pair in row)
        assert batch.last[i].sum() == len(row) == pytest.approx(batch.prompt[i].sum())
        assert batch.inside[i].sum() == len(text.encode()) - 1
        flags = batch.unanswerable[i][batch.last[i] == 1]
        assert flags.tolist() == [not pairs[pair].answerable for pair in row]
    assert batch.inside.mean() > 0.9  # with one pair per row: a third
    alone = pack_rows(pairs, 100, pack=False)
    assert alone.rows == [[i] for i in range(200)]
    counts = [(array == 1).sum(1) for array in (batch.response, batch.last, batch.inside)]
    np.testing.assert_array_equal(source.counts, np.stack(counts, 1))
    assert pack_rows(pairs, 100, pack=True, seed=3).rows == source.rows
    assert pack_rows(pairs, 100, pack=True).rows != source.rows


def batches(source: ChatRows, n: int, **options: Any) -> list[ChatBatch]:
    iterator = iter(training_rows(source, seed=1, **options))
    return [next(iterator) for _ in range(n)]


@pytest.mark.parametrize("pack", [False, True])
def test_batches(pack: bool) -> None:
    """Weights sum to 1 over the global batch, for any number of processes; each row once per epoch."""
    source = pack_rows(pairs_of(60), 90, pack=pack)
    n = len(source)
    global_batches = batches(source, n, batch_size=8)
    for batch in global_batches:
        for name in WEIGHTS:
            assert getattr(batch, name).sum() == pytest.approx(1, rel=1e-5)
    seen = np.concatenate([batch.rows for batch in global_batches])
    for epoch in range(8):
        assert sorted(seen[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert seen[:n].tolist() != seen[n:2 * n].tolist()
    parts = [batches(source, 5, batch_size=8, rows=rows) for rows in ([0, 1, 2, 5], [3, 4, 6, 7])]
    for batch, first, second in zip(global_batches, *parts, strict=False):
        for array, first_part, second_part in zip(batch, first, second, strict=True):
            np.testing.assert_array_equal(array[[0, 1, 2, 5]], first_part)
            np.testing.assert_array_equal(array[[3, 4, 6, 7]], second_part)


def test_the_state_is_the_number_of_rows_read() -> None:
    source = pack_rows(pairs_of(30), 60, pack=False)
    iterator = iter(training_rows(source, batch_size=4, seed=1))
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    assert state == {"examples": 20, "size": 1}
    expected = next(iterator)
    other = iter(training_rows(source, batch_size=4, seed=1))
    other.set_state(state)
    for resumed_array, array in zip(next(other), expected, strict=True):
        np.testing.assert_array_equal(resumed_array, array)


def test_rows_of_another_length_resume_after_the_same_number_of_pairs() -> None:
    short, long = (pack_rows(pairs_of(60), length, pack=True) for length in (90, 180))
    assert len(short) > len(long)
    iterator = iter(training_rows(short, batch_size=4, seed=1, prefetch=0))
    for _ in range(3):
        next(iterator)
    read = 12 * 60 / len(short)  # pairs, on average
    other = iter(training_rows(long, batch_size=4, seed=1, prefetch=0))
    other.set_state(json.loads(json.dumps(iterator.get_state())))
    assert other.get_state() == {"examples": math.ceil(read * len(long) / 60), "size": 60 / len(long)}


def test_validation_rows() -> None:
    source = pack_rows(pairs_of(10), 60, pack=False)
    batch = list(validation_rows(source, batch_size=4))
    assert np.concatenate([batch.rows for batch in batch]).tolist() == [*range(10), -1, -1]
    assert sum(batch.last.sum() for batch in batch) == 10
    some = list(validation_rows(source, batch_size=4, max_rows=3, rows=[1, 3]))
    assert [batch.rows.tolist() for batch in some] == [[1, -1]]
