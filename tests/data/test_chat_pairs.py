"""Pairs as turns in rows of bytes: loss weights, packing, batches, and held-out prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilelli_jax.commands import chat
from tilelli_jax.data.chat_pairs import ChatConfig, ChatPair, ChatSplits, fit_pairs, open_pairs, read_pairs
from tilelli_jax.data.chat_rows import ChatBatch, ChatRows, pack_rows, training_rows, validation_rows
from tilelli_jax.data.turns import model_turn, user_turn
from tilelli_jax.errors import InputError

WEIGHTS = ("response", "prompt", "last", "inside")


def pairs_of(n: int, seed: int = 0) -> list[ChatPair]:
    rng = np.random.default_rng(seed)
    def word() -> str:
        return "".join(rng.choice(list("abcdé"), rng.integers(1, 9)))
    return [ChatPair(f"{i} {word()}", word(), bool(rng.random() < 0.6), f"line {i}") for i in range(n)]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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
    assert read_pairs(path) == [ChatPair("hi", "a\nb", False, f"{path}, line 2")]


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
    pairs = [ChatPair("a", "b", True, "x.jsonl, line 7"), ChatPair("a", "b" * 9, True, "x.jsonl, line 8")]
    fits = len("USER: a\nTILELLI: b\nUSER:") - 1
    for pack in (False, True):
        assert len(pack_rows(pairs[:1], fits, pack=pack)) == 1
        with pytest.raises(InputError, match=(f"found 1 of 2 pairs longer than {fits} bytes, the longest "
                                              f"{fits + 8}: x.jsonl, line 8;")):
            pack_rows(pairs, fits, pack=pack)


# Pairs that are too long.

TURNS = len("USER: \nTILELLI: \nUSER:")  # bytes of a pair besides its texts
LONG = [{"prompt": "a" * n, "response": "b"} for n in range(1, 10)]


def test_too_long_pairs_are_counted_and_named(tmp_path: Path) -> None:
    """In the source and in the validation file; a pair that just fits is not too long."""
    source, valid = (written(tmp_path / name, LONG) for name in ("source.jsonl", "valid.jsonl"))
    longest = TURNS + 9  # bytes that the longest pair reads
    assert len(open_pairs(ChatConfig(source=str(source)), longest)[0]) == 8
    for seq_len, n, lines in ((longest - 1, 1, "line 9"), (longest - 2, 2, "line 8; line 9"),
                              (TURNS + 1, 8, "line 2; line 3; line 4; line 5; line 6; …")):
        with pytest.raises(InputError) as error:
            open_pairs(ChatConfig(source=str(source)), seq_len)
        assert str(error.value) == (
            f"{source}: expected pairs that fit in train.seq_len, found {n} of 9 pairs longer than {seq_len} "
            f"bytes, the longest {longest}: {lines}; train on longer rows, or set chat.too_long to drop or "
            "cut")
    written(source, LONG[:1])
    with pytest.raises(InputError, match=rf"^{valid}: expected pairs that fit .* found 1 of 9 pairs"):
        open_pairs(ChatConfig(source=str(source), valid=str(valid)), longest - 1)


def test_too_long_pairs_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is left is what it was: the same pairs are held out, and the fingerprint is another one."""
    config = ChatConfig(source=str(written(tmp_path / "a.jsonl", LONG)), too_long="drop", valid_fraction=0.4)
    every, some = open_pairs(config), open_pairs(config, TURNS + 7)
    assert [message for _, _, message in caplog.record_tuples] == [
        f"{config.source}: dropped 2 of 9 pairs longer than {TURNS + 7} bytes, the longest {TURNS + 9}: "
        "line 8; line 9"]
    for part, complete in zip(some, every, strict=True):
        assert part == [pair for pair in complete if len(pair.prompt) <= 7] and part
    assert some.fingerprint() != every.fingerprint() == open_pairs(config, TURNS + 9).fingerprint()
    valid = ChatConfig(source=config.source, valid=str(written(tmp_path / "b.jsonl", LONG[-2:])),
                       too_long="drop")
    with pytest.raises(InputError, match=r"^chat.too_long: expected pairs of .*b.jsonl to validate on that"):
        open_pairs(valid, TURNS + 7)


def cut(seq_len: int, prompt: str, response: str, context: tuple[tuple[str, str], ...] = ()) -> ChatPair:
    pair, = fit_pairs([ChatPair(prompt, response, True, "x", context)], seq_len, "cut", "x")
    assert pair is not None and pair.seq_len <= seq_len
    return pair


def test_cutting(caplog: pytest.LogCaptureFixture) -> None:
    """The row of 40 bytes: half of it is the response's, or what the response needs."""
    given = len("USER: \nTILELLI:")  # 15 bytes
    # The end of the response goes first, and with it the end of the turn.
    pair = cut(40, "who", "b" * 60)
    assert (pair.prompt, pair.response, pair.complete) == ("who", "b" * 22, False)
    assert pair.given + pair.continuation == "USER: who\nTILELLI: " + "b" * 22 and pair.seq_len == 40
    # A response that fits but for the end of its turn stays whole.
    pair = cut(40, "who", "b" * 20)
    assert (pair.response, pair.complete) == ("b" * 20, False)
    assert cut(40, "who", "b" * 16) == ChatPair("who", "b" * 16, True, "x")
    # A prompt that is too long loses its beginning; a short response stays whole.
    pair = cut(40, "".join(map(str, range(10))) * 4, "yes")
    assert (pair.response, pair.complete) == ("yes", True)
    assert pair.prompt == ("0123456789" * 4)[-(40 - given - len(" yes\nUSER:") + 1):] and pair.seq_len == 40
    # Both are too long: each has half.
    pair = cut(40, "a" * 60, "b" * 60)
    assert (len(pair.prompt), len(pair.response), pair.complete) == (20 - given, 20, False)
    # No character is cut in two.
    pair = cut(40, "€" * 20, "€" * 20)
    assert (pair.prompt, pair.response) == ("€", "€" * 7) and pair.seq_len == 39
    # Text outside any turn loses its end.
    assert cut(9, "In Gorham", "").prompt == "In Gorham" and cut(8, "In Gorham", "").prompt == "In Gorha"
    # Whole earlier turns go before anything else.
    turns = (("one", "first"), ("two", "second"))
    complete = ChatPair("who", "me", True, "x", turns)
    assert complete.given == "USER: one\nTILELLI: first\nUSER: two\nTILELLI: second\nUSER: who\nTILELLI:"
    for seq_len, left in ((complete.seq_len, turns), (complete.seq_len - 1, turns[1:]), (51, ()), (26, ())):
        assert cut(seq_len, "who", "me", turns) == complete._replace(context=left)
    caplog.clear()
    fit_pairs([complete], complete.seq_len - 1, "cut", "x.jsonl")
    assert caplog.messages == [f"x.jsonl: cut 1 of 1 pairs longer than {complete.seq_len - 1} bytes, the "
                               f"longest {complete.seq_len}: x"]
    with pytest.raises(InputError, match=r"^x: expected a train.seq_len with room for a turn, found 16$"):
        cut(16, "who are you", "me")


def test_rows_of_cut_pairs() -> None:
    """A response without its end fills the row, and all of it counts in the loss."""
    pairs = [cut(40, "who", "b" * 60), ChatPair("a", "c", True, "y")]
    for pack in (False, True):
        source = pack_rows(pairs, 40, pack=pack, abstain_position="pair")
        assert sorted(source.rows) == [[0], [1]]
        batch = source.gather(np.array([source.rows.index([0])]))
        assert bytes(batch.bytes[0]).decode() == "USER: who\nTILELLI: " + "b" * 22
        assert bytes(batch.bytes[0, 1:][batch.response[0] == 1]).decode() == " " + "b" * 22
        assert batch.inside.sum() == 40 and np.flatnonzero(batch.last[0]).tolist() == [39]
        np.testing.assert_allclose(batch.prompt.sum(), 1, rtol=1e-6)


# Conversations.

def chat_line(*texts: str, system: str = "") -> dict[str, Any]:
    """A line of OpenAI's format; `texts` alternate between user and assistant."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def test_conversations(tmp_path: Path) -> None:
    """Every reply is a pair with the turns before it, in both formats; nothing is lost."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sharegpt = {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "hi"},
                                  {"from": "gpt", "value": "Hello."}]}
    context_only = chat_line("one", "1", "two", "2")
    context_only["messages"][1]["weight"] = 0
    path = written(tmp_path / "chat.jsonl", [
        chat_line(" one", "1", "two", "2\n", "three", "3"), chat_line("hi", "Hello.", system="Be kind."),
        sharegpt, {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}],
                   "answerable": False}, context_only])
    pairs = read_pairs(path)
    at = f"{path}, line"
    first, second = ("one", "1"), ("two", "2")
    assert pairs == [
        ChatPair(*first, True, f"{at} 1, message 2"),
        ChatPair(*second, True, f"{at} 1, message 4", (first,)),
        ChatPair("three", "3", True, f"{at} 1, message 6", (first, second)),
        ChatPair("Be kind.\n\nhi", "Hello.", True, f"{at} 2"),
        ChatPair("Be kind.\n\nhi", "Hello.", True, f"{at} 3"),
        ChatPair("a\nb", "c", False, f"{at} 4"),
        ChatPair(*second, True, f"{at} 5, message 4", (first,))]
    # The row is what `tilelli chat` presents, and only the reply counts in the loss.
    text = "USER: one\nTILELLI: 1\nUSER: two\nTILELLI: 2\nUSER: three\nTILELLI:"
    batch = pack_rows(pairs[2:3], 80, pack=False).gather(np.array([0]))
    assert bytes(batch.bytes[0]).rstrip(b"\0").decode() == text + " 3\nUSER:"
    assert bytes(batch.bytes[0, 1:][batch.response[0] == 1]) == b" 3\nUSER:"
    assert np.flatnonzero(batch.last[0]).tolist() == [len(text) - 1]
    np.testing.assert_allclose(batch.prompt[0, :len(text)], 1 / len(text))
    packed = pack_rows(pairs, 160, pack=True)
    rows = packed.gather(np.arange(len(packed)))
    for row, members in zip(rows.bytes, packed.rows, strict=True):
        pieces = [pairs[i].given + pairs[i].continuation.removesuffix("USER:") for i in members]
        assert bytes(row).rstrip(b"\0").decode() == "".join(pieces) + "USER:"


def test_a_conversation_is_in_one_split(tmp_path: Path) -> None:
    """By its first prompt; later turns may share their text, and change the fingerprint."""
    rows = [chat_line(f"q{i}", "a", "thanks", "b", "bye", "c") for i in range(10)]
    splits = open_pairs(ChatConfig(source=str(written(tmp_path / "a.jsonl", rows)), valid_fraction=0.3))
    openings = [{pair.opening for pair in part} for part in splits]
    assert [len(part) for part in splits] == [21, 9] and len(openings[1]) == 3
    assert not openings[0] & openings[1]
    without = ChatSplits(*([pair._replace(context=()) for pair in part] for part in splits))
    assert without.fingerprint() != splits.fingerprint()


def messages(*roles_and_texts: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in roles_and_texts]} | more


U, A = ("user", "a"), ("assistant", "b")


@pytest.mark.parametrize(("row", "message"), [
    (messages(), "messages: expected messages, found an empty list"),
    ({"messages": {}}, "messages: expected messages, found an object"),
    ({"messages": ["hi"]}, "message 1: expected role and content, found text"),
    (messages(U), "messages: expected the assistant's reply at the end, found none"),
    (messages(U, A, U), "messages: expected the assistant's reply at the end, found none"),
    (messages(("system", "s")), "messages: expected the assistant's reply at the end, found none"),
    (messages(A, U), "message 1: role: expected system or user, found 'assistant'"),
    (messages(U, U), "message 2: role: expected assistant, found 'user'"),
    (messages(U, A, ("system", "s")), "message 3: role: expected user, found 'system'"),
    (messages(U, A, ("tool", "s")), "message 3: role: expected user, found 'tool'"),
    (messages(("agent", "a"), A), "message 1: role: expected system or user, found 'agent'"),
    ({"messages": [{"content": "a"}]}, "message 1: role: expected system or user, found None"),
    (messages(U, ("assistant", None)), "message 2: content: expected text, found None"),
    (messages(U, ("assistant", " ")), "message 2: content: expected text, found ' '"),
    ({"messages": [{"role": "user"}]}, "message 1: content: expected text, found none"),
    (messages(("user", [{"type": "image_url"}]), A),
     "message 1: content: expected parts of type 'text', found 'image_url'"),
    (messages(("user", ["a"]), A), "message 1: content: expected parts of type 'text', found text"),
    (messages(U, ("assistant", "x\nUSER: y")), "message 2: content: expected no line that begins with USER:"),
    ({"messages": [messages(U)["messages"][0], {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
     "message 2: tool_calls: expected none, as turns have text only, found some"),
    (messages(U, A, tools=[{"type": "function"}]), "tools: expected none, as turns have text only"),
    ({"messages": [messages(U)["messages"][0], {"role": "assistant", "content": "b", "weight": 0.5}]},
     "message 2: weight: expected 0 or 1, found 0.5"),
    ({"messages": [messages(U)["messages"][0], {"role": "assistant", "content": "b", "weight": 0}]},
     "messages: expected a reply of weight 1, found none"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]},
     "message 2: from: expected assistant, found 'bing'"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]},
     "message 2: value: expected text, found none"),
    (messages(U, A, prompt="a"), "messages: expected no prompt with it, found one"),
    ({"instruction": "a", "output": "b"},
     "line 1: expected prompt and response, messages, conversations or text, found instruction, output")])
def test_invalid_conversations(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", [row])
    with pytest.raises(InputError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}, line 1") and message in str(error.value)
    assert "\n" not in str(error.value)
