"""Pairs as turns in rows of bytes: loss weights, packing, batches, and held-out prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilelli_jax.commands import chat
from tilelli_jax.data.chat_pairs import (
    ChatBatch,
    ChatConfig,
    ChatRows,
    Pair,
    open_pairs,
    pack_rows,
    read_pairs,
    training_rows,
    validation_rows,
)
from tilelli_jax.data.turns import answered, asked
from tilelli_jax.errors import InputError

WEIGHTS = ("response", "prompt", "last", "inside")


def pairs_of(n: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    def word() -> str:
        return "".join(rng.choice(list("abcdé"), rng.integers(1, 9)))
    return [Pair(f"{i} {word()}", word(), bool(rng.random() < 0.6), f"line {i}") for i in range(n)]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_turns_have_the_format_of_the_chat_command() -> None:
    assert asked("hi") == "USER: hi\nTILELLI:"
    turns = asked("hi") + answered("Hello.")
    assert turns.partition(chat.STOP)[0] == "USER: hi\nTILELLI: Hello." and turns.endswith("\nUSER:")


def test_one_pair_in_a_row() -> None:
    source = pack_rows([Pair("hé", "ok", False, "line 1")], 40, pack=False)
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
    pairs = [Pair("who", "I.", True, "line 1"), Pair("what", "hm", False, "line 2")]
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
    with pytest.raises(InputError, match=r"line 1: takes a train.seq_len of 9, found 8"):
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
        text = "".join(asked(pairs[pair].prompt) + f" {pairs[pair].response}\n" for pair in row) + "USER:"
        assert bytes(batch.bytes[i]).rstrip(b"\0").decode() == text
        predicted = bytes(batch.bytes[i, 1:][batch.response[i] == 1]).decode()
        assert predicted == "".join(answered(pairs[pair].response) for pair in row)
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
    some = list(validation_rows(source, batch_size=4, most=3, rows=[1, 3]))
    assert [batch.rows.tolist() for batch in some] == [[1, -1]]


def test_held_out_prompts(tmp_path: Path) -> None:
    """A prompt is in one split only, which its text alone determines."""
    rows = [{"prompt": f"q{i % 40}", "response": f"a{i}", "answerable": i % 2 == 0, "group": 7}
            for i in range(60)]
    splits = open_pairs(ChatConfig(source=str(written(tmp_path / "a.jsonl", rows)), valid_fraction=0.25))
    held_out = {pair.prompt for pair in splits.valid}
    assert len(held_out) == 10 and not held_out & {pair.prompt for pair in splits.train}
    assert len(splits.train) + len(splits.valid) == 60
    reversed_splits = open_pairs(ChatConfig(source=str(written(tmp_path / "b.jsonl", rows[::-1])),
                                            valid_fraction=0.25))
    assert {pair.prompt for pair in reversed_splits.valid} == held_out
    assert reversed_splits.fingerprint() != splits.fingerprint()
    again = open_pairs(ChatConfig(source=str(written(tmp_path / "c.jsonl", rows)), valid_fraction=0.25))
    assert again.fingerprint() == splits.fingerprint()
    other = open_pairs(ChatConfig(source=str(tmp_path / "a.jsonl"), valid=str(tmp_path / "b.jsonl")))
    assert len(other.train) == len(other.valid) == 60 and other.valid[0].where.endswith("b.jsonl, line 1")


def test_read_pairs(tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", [{"prompt": " hi\n", "response": "a\nb", "answerable": False}])
    path.write_text("\n" + path.read_text() + "\n")
    assert read_pairs(path) == [Pair("hi", "a\nb", False, f"{path}, line 2")]


GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(("rows", "parts"), [
    ([GOOD, 3], ["line 2", "expected prompt and response"]),
    ([GOOD, {"prompt": "a"}], ["line 2: response: expected text, found none"]),
    ([{"prompt": 3, "response": "b"}], ["line 1: prompt: expected text, found 3"]),
    ([{"prompt": "a", "response": " "}], ["line 1: response: expected text"]),
    ([GOOD | {"answerable": 1}], ["line 1: answerable: expected true or false, found 1"]),
    ([GOOD | {"response": "x\nUSER: y"}], ["line 1: response", "begins with USER:"]),
    ([GOOD | {"prompt": "TILELLI: y"}], ["line 1: prompt", "begins with TILELLI:"]),
    ([GOOD | {"prompt": "\ud800"}], ["line 1: expected text, found a lone surrogate"]),
    ([], ["at least one pair"]), ([GOOD, GOOD], ["chat.valid", "one prompt only"])])
def test_invalid_pairs(rows: list[Any], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        open_pairs(ChatConfig(source=str(written(tmp_path / "chat.jsonl", rows))))
    assert str(error.value).count("\n") == 0
    for part in ("chat.jsonl", *parts):
        assert part in str(error.value)


def test_invalid_sources_and_too_long_pairs(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": \xff}\n')
    for source, part in (("", "chat.source"), (str(tmp_path / "no.jsonl"), "no.jsonl: no such file"),
                         (str(tmp_path / "chat.jsonl"), "line 2: not JSON")):
        with pytest.raises(InputError, match=part):
            open_pairs(ChatConfig(source=source))
    pairs = [Pair("a", "b", True, "x.jsonl, line 7"), Pair("a", "b" * 9, True, "x.jsonl, line 8")]
    fits = len("USER: a\nTILELLI: b\nUSER:") - 1
    for pack in (False, True):
        assert len(pack_rows(pairs[:1], fits, pack=pack)) == 1
        with pytest.raises(InputError, match=rf"line 8: takes a train\.seq_len of {fits + 8}, found {fits};"):
            pack_rows(pairs, fits, pack=pack)
