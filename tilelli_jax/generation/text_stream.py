"""Continuations as text, piece by piece while they are decoded, for byte-level and token-level networks."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from tilelli_jax.generation import decoding
from tilelli_jax.loading.language import Tokenizer
from tilelli_jax.models.causal_lm import CausalLM
from tilelli_jax.models.sampling import Sampling

CONTEXT = 64  # tokens of the prompt that are decoded with the new ones, which may join them
INCOMPLETE = "\ufffd"  # what an incomplete character is decoded to


def stream_text(model: CausalLM, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling, *,
                stop: Sequence[str] = (), chunk: int = 1,
                keep_partial: bool = True) -> Generator[str, None, bool]:
    """Yields the continuation of a prompt in pieces of whole characters, one piece for each chunk.

    A piece may be empty, which gives the caller a chance to stop. The text ends before the first stop string
    or end token; the generator returns whether there was one.

    Args:
        ids: the prompt, at least one token.
        stop: strings that end the text.
        chunk: number of tokens decoded between two pieces.
        keep_partial: if `max_new` ends the text, yield an incomplete character, as a replacement character,
            and a possible start of a stop string at its end; false: leave them out.

    Raises:
        InputError: an id is outside the vocabulary, or there is none.
    """
    pieces = (_byte_pieces if model.is_byte_level else _token_pieces)(model, tokenizer, ids, sampling, chunk)
    pending = ""  # text not yet yielded, as it may contain the start of a stop string
    for piece, is_end, is_rest in pieces:
        if is_rest and not keep_partial:
            return False
        pending += piece
        positions = [position for position in map(pending.find, stop) if position >= 0]
        if positions or is_end:
            yield pending[:min(positions, default=len(pending))]
            return True
        n_kept = 0 if is_rest else max((n for text in stop for n in range(len(text))
                                        if pending.endswith(text[:n])), default=0)
        yield pending[:len(pending) - n_kept]
        pending = pending[len(pending) - n_kept:]
    return False


def text_after(tokenizer: Tokenizer, ids: Sequence[int], new: Sequence[int]) -> str:
    """Returns the text of new tokens after those of a prompt.

    They are decoded with the prompt's end, as many tokenizers drop the space before a text's first token.
    """
    context = list(ids[-CONTEXT:])
    return tokenizer.decode([*context, *new])[len(tokenizer.decode(context)):]


# ---------------------------------------------------------------------------------------------

# Text, whether an end token follows it, and whether it is the incomplete rest at the end.
Pieces = Iterator[tuple[str, bool, bool]]


def _byte_pieces(model: CausalLM, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling,
                 chunk: int) -> Pieces:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    prompt = np.array(ids, np.uint8)
    for new in decoding.stream(model, [prompt], chunk=chunk, **dataclasses.asdict(sampling)):
        yield decoder.decode(new.new[0].tobytes()), False, False
    yield decoder.decode(b"", final=True), False, True


def _token_pieces(model: Any, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling,
                  chunk: int) -> Pieces:
    new: list[int] = []
    text, n_yielded = "", 0
    for continued in decoding.stream_ids(model, list(ids), chunk=chunk, **dataclasses.asdict(sampling)):
        new += continued.ids.tolist()
        text = text_after(tokenizer, ids, new)
        complete = text if continued.ended else text.rstrip(INCOMPLETE)
        yield complete[n_yielded:], continued.ended, False
        n_yielded = max(n_yielded, len(complete))
    yield text[n_yielded:], False, True
