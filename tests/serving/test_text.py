"""Text from tokens: the same as `stream_text` gives, whatever the boundaries of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.generation.engine import Token
from tilelli_jax.loading.language import ByteTokenizer
from tilelli_jax.serving.text import TextBuilder


class Words:
    """A tokenizer of few tokens, one of them half a character."""

    TOKENS = (b"a", b"b", b"ab", b" a", b"\xc3", b"\xa9", b"\n", b"abab")
    def decode(self, ids: list[int], special: bool = True) -> str:
        return b"".join(self.TOKENS[id] for id in ids).decode("utf-8", errors="replace")


def built(ids: Sequence[int], stop: Sequence[str], is_byte_level: bool) -> tuple[str, bool, list[int]]:
    """The text, whether a stop string ended it, and the tokens that were passed on."""
    tokenizer = ByteTokenizer() if is_byte_level else Words()
    builder, text, passed = TextBuilder(tokenizer, [0], is_byte_level, stop), "", list[int]()
    for id in ids:
        piece = builder.add(Token(id, 0.0, []))
        text, passed = text + piece.text, [*passed, *(token.id for token in piece.tokens)]
        assert piece.text or not piece.tokens or piece.stopped, "tokens come with their text"
        if piece.stopped:
            return text, True, passed
    piece = builder.end()
    return text + piece.text, piece.stopped, [*passed, *(token.id for token in piece.tokens)]


@given(st.lists(st.integers(0, len(Words.TOKENS) - 1), max_size=12),
       st.lists(st.sampled_from(["ab", "ba", "é", "\n", "aab a"]), max_size=2))
def test_token_level_text(ids: list[int], stop: list[str]) -> None:
    whole = b"".join(Words.TOKENS[id] for id in ids).decode("utf-8", errors="replace")
    ends = [at for at in map(whole.find, stop) if at >= 0]
    text, stopped, passed = built(ids, stop, False)
    assert (text, stopped) == (whole[:min(ends, default=len(whole))], bool(ends))
    assert passed == (ids[:len(passed)] if stopped else ids)


@given(st.text(max_size=12), st.lists(st.sampled_from(["a", "é", "\n", "ab"]), max_size=2),
       st.binary(max_size=2))
def test_byte_level_text(start: str, stop: list[str], rest: bytes) -> None:
    data = start.encode() + rest
    whole = data.decode("utf-8", errors="replace")
    ends = [at for at in map(whole.find, stop) if at >= 0]
    text, stopped, _ = built(list(data), stop, True)
    assert (text, stopped) == (whole[:min(ends, default=len(whole))], bool(ends))


@pytest.mark.parametrize(("ids", "pieces"), [
    ([4, 5], ["", "é"]), ([0, 1], ["", ""]), ([1, 1], ["b", "b"]), ([0, 0, 1], ["", "a", ""])])
def test_what_is_held_back(ids: list[int], pieces: list[str]) -> None:
    """Half a character, and a possible start of the stop string "ab"."""
    builder = TextBuilder(Words(), [0], False, ["ab"])
    assert [builder.add(Token(id, 0.0, [])).text for id in ids] == pieces
