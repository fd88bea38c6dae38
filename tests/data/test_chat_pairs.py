"""Files of pairs: held-out prompts, invalid lines, and pairs that are longer than a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.chat_files import written
from tilelli_jax.data.chat_pairs import ChatConfig, ChatPair, fit_pairs, open_pairs, read_pairs
from tilelli_jax.data.chat_rows import pack_rows
from tilelli_jax.errors import InputError


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
    # A prompt that is too long is truncated on the left; a short response stays whole.
    pair = cut(40, "".join(map(str, range(10))) * 4, "yes")
    assert (pair.response, pair.complete) == ("yes", True)
    assert pair.prompt == ("0123456789" * 4)[-(40 - given - len(" yes\nUSER:") + 1):] and pair.seq_len == 40
    # Both are too long: each has half.
    pair = cut(40, "a" * 60, "b" * 60)
    assert (len(pair.prompt), len(pair.response), pair.complete) == (20 - given, 20, False)
    # No character is cut in two.
    pair = cut(40, "€" * 20, "€" * 20)
    assert (pair.prompt, pair.response) == ("€", "€" * 7) and pair.seq_len == 39
    # Text outside any turn is truncated on the right.
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
