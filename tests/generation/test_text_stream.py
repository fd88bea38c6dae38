"""Continuations as text: whole characters, stop strings, end tokens, and the text after the prompt's end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.reference_impl.memorised_text import reciter
from tilelli_jax.generation import decoding
from tilelli_jax.generation.text_stream import stream_text, text_after
from tilelli_jax.loading.language import ByteTokenizer, HuggingFaceTokenizer
from tilelli_jax.models.sampling import Sampling

TEXT = "0123 Grüße, 🙂 and 日本 END."


def collected(pieces: Any) -> tuple[list[str], bool]:
    """Returns the pieces of a stream and what it returns."""
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


class ByteTokens(ByteTokenizer):
    """A tokenizer of bytes, for a network that is not known to read them."""


@pytest.mark.parametrize("chunk", [3, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 8, 100))])
@pytest.mark.parametrize("network", ["bytes", "tokens"])
def test_pieces_are_whole_characters(network: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk size gives the same text; an incomplete character at the end is replaced or left out."""
    script, prompt = TEXT.encode(), list(b"01")
    model: Any = reciter(script)
    if network == "tokens":
        model = SimpleNamespace(is_byte_level=False)
        recite(monkeypatch, list(script[len(prompt):]))

    def streamed(n: int, **options: Any) -> tuple[list[str], bool]:
        sampling = Sampling(temperature=0.0, max_new=n)
        return collected(stream_text(model, ByteTokens(), prompt, sampling, chunk=chunk, **options))

    for n in (0, 5, 6, 7, 13, 15, 16, len(script) - len(prompt)):  # 2 bytes from 6 on, 4 from 13 on
        expected = script[len(prompt):][:n]
        pieces, ended = streamed(n)
        assert "".join(pieces) == expected.decode(errors="replace") and not ended
        assert not any("\ufffd" in piece for piece in pieces[:-1])
        pieces, ended = streamed(n, keep_partial=False)
        assert "".join(pieces) == expected.decode(errors="ignore") and not ended
    for stop, left in ((["END"], "23 Grüße, 🙂 and 日本 "), (["🙂", "ß"], "23 Grü"), (["23"], ""),
                       (["x", "ENDS"], "23 Grüße, 🙂 and 日本 END.")):
        pieces, ended = streamed(len(script) - len(prompt), stop=stop)
        assert "".join(pieces) == left and ended == ("x" not in stop)
    # The start of a stop string at the end may be left out.
    cut = streamed(len(script) - len(prompt), stop=["D.X"], keep_partial=False)
    assert "".join(cut[0]) == "23 Grüße, 🙂 and 日本 EN" and not cut[1]


def recite(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int], end: int | None = None) -> None:
    """Makes `stream_ids` yield these ids, up to an end token."""
    def stream_ids(model: Any, prompt: Any, *, max_new: int, chunk: int,
                   **_: Any) -> Iterator[decoding.ContinuedIds]:
        new = list(ids[:max_new])
        ended = end in new
        new = new[:new.index(end)] if ended else new
        for i in range(0, len(new), chunk):
            is_last = i + chunk >= len(new)
            yield decoding.ContinuedIds(np.array(new[i:i + chunk], np.int32), ended and is_last)
    monkeypatch.setattr(decoding, "stream_ids", stream_ids)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_tokens_become_the_text_that_follows_the_prompt(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This tokenizer drops the space before a text's first token; the end token is not part of the text."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    vocab = {"<s>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁sat": 4, "</s>": 5}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    words.decoder = tokenizers.decoders.Metaspace()
    tokenizer = HuggingFaceTokenizer.__new__(HuggingFaceTokenizer)
    tokenizer._tokenizer = words
    assert tokenizer.decode([2, 3]) == "cats", "the case of this test"
    recite(monkeypatch, [2, 3, 4, 5, 1], end=5)
    stream = stream_text(SimpleNamespace(is_byte_level=False), tokenizer, [1], Sampling(max_new=5),
                         chunk=chunk)
    pieces, ended = collected(stream)
    assert "".join(pieces) == " cats sat" and ended and len(pieces) == -(-3 // chunk)
    assert text_after(tokenizer, [1], [2, 3, 4]) == " cats sat" and text_after(tokenizer, [1], []) == ""
    assert text_after(tokenizer, [1] * 200, [2]) == " cat"
