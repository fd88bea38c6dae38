"""Turns the tokens of a request into text, in whole characters, up to the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from tilelli_jax.generation.engine import Token
from tilelli_jax.generation.text_stream import INCOMPLETE, text_after
from tilelli_jax.loading.language import Tokenizer


class Piece(NamedTuple):
    """Text that can be sent, the tokens that it ends, and whether a stop string ended the text."""

    text: str
    tokens: list[Token]
    stopped: bool


class TextBuilder:
    """The text of one continuation, token by token.

    Text that may be the start of a stop string, or an incomplete character, is held back.

    Args:
        ids: the prompt.
        is_byte_level: whether tokens are bytes.
        stop: strings that end the text before them.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], is_byte_level: bool,
                 stop: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._stop = tokenizer, ids, stop
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if is_byte_level else None
        self._ids: list[int] = []
        self._text, self._n_sent = "", 0  # of token-level networks: all text, and how much was passed on
        self._pending, self._tokens = "", list[Token]()

    def add(self, token: Token) -> Piece:
        """Returns the text that is complete after one more token."""
        self._tokens.append(token)
        if self._bytes is not None:
            self._pending += self._bytes.decode(bytes([token.id]))
        else:
            self._ids.append(token.id)
            self._text = text_after(self._tokenizer, self._prompt, self._ids)
            complete = self._text.rstrip(INCOMPLETE)
            self._pending += complete[self._n_sent:]
            self._n_sent = max(self._n_sent, len(complete))
        return self._piece(is_end=False)

    def end(self) -> Piece:
        """Returns what was held back, when no token follows."""
        if self._bytes is not None:
            self._pending += self._bytes.decode(b"", final=True)
        else:
            self._pending += self._text[self._n_sent:]
        return self._piece(is_end=True)

    def _piece(self, is_end: bool) -> Piece:
        found = [at for at in map(self._pending.find, self._stop) if at >= 0]
        if found:
            text, self._pending = self._pending[:min(found)], ""
            return Piece(text, self._take(), True)
        held = 0 if is_end else max((n for stop in self._stop for n in range(len(stop))
                                     if self._pending.endswith(stop[:n])), default=0)
        text = self._pending[:len(self._pending) - held]
        self._pending = self._pending[len(self._pending) - held:]
        return Piece(text, self._take() if text or is_end else [], False)

    def _take(self) -> list[Token]:
        tokens, self._tokens = self._tokens, []
        return tokens
