"""The objects of replies, as OpenAI's API has them, with `knows` besides."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

from tilelli_jax.generation.engine import Token

from .knowledge import Knowledge, Knows
from .requests import Completion
from .streams import Backend, Choice, Prompt, Stream
from .text import Piece

Tree = dict[str, Any]
KINDS = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}  # types of errors


class Replies:
    """Makes the objects of one request's reply."""

    def __init__(self, backend: Backend, name: str, completion: Completion, prompts: list[Prompt],
                 streams: list[Stream]) -> None:
        self._backend, self._completion = backend, completion
        self._prompts, self._streams = prompts, streams
        self._is_chat = completion.is_chat
        self._head: Tree = {"id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
                            "created": int(time.time()), "model": name}
        self._offsets = dict.fromkeys((stream.index for stream in streams), 0)  # characters so far
        utf8 = codecs.getincrementaldecoder("utf-8")
        self._decoders = {stream.index: utf8("replace") for stream in streams}

    def whole(self, choices: Sequence[Choice]) -> Tree:
        """The reply with all choices."""
        return {**self._head, "object": "chat.completion" if self._is_chat else "text_completion",
                "choices": [self._choice(stream, choice)
                            for stream, choice in zip(self._streams, choices, strict=True)],
                "usage": self._usage(), **self._knows()}

    def first(self, stream: Stream) -> Tree | None:
        """The chunk before the first text of a stream; None if there is nothing to say."""
        if self._is_chat:
            content: Tree = {"delta": {"role": "assistant", "content": ""}}
        elif self._backend.knows is not None:
            content = {"text": ""}
        else:
            return None
        choice = {"index": stream.index, **content, "logprobs": None, "finish_reason": None}
        return self._chunk([choice]) | self._knows()

    def next(self, stream: Stream, piece: Piece | Choice) -> Tree:
        """The chunk with a piece of text."""
        content: Tree = {"text": piece.text}
        tokens = _with_end(piece) if isinstance(piece, Choice) else piece.tokens
        if self._is_chat:
            content = {"delta": {"content": piece.text} if piece.text or isinstance(piece, Piece) else {}}
        return self._chunk([{
            "index": stream.index, **content,
            "logprobs": self._logprobs(stream, tokens) if tokens else None,
            "finish_reason": piece.reason if isinstance(piece, Choice) else None}])

    def last(self) -> Tree | None:
        """The chunk with the usage; None unless it was asked for."""
        return self._chunk([]) | {"usage": self._usage()} if self._completion.include_usage else None

    def _chunk(self, choices: list[Tree]) -> Tree:
        usage = {"usage": None} if self._completion.include_usage else {}
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **usage}

    def _choice(self, stream: Stream, choice: Choice) -> Tree:
        content: Tree = {"text": choice.text}
        if self._is_chat:
            content = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {"index": stream.index, **content, "logprobs": self._logprobs(stream, _with_end(choice)),
                "finish_reason": choice.reason}

    def _logprobs(self, stream: Stream, tokens: Sequence[Token]) -> Tree | None:
        if self._completion.n_top is None:
            return None
        if self._is_chat:
            tokens = [token for token in tokens if token.id not in self._backend.engine.end_ids]

            def entry(id: int, log_prob: float) -> Tree:
                return {"token": self._text(id), "logprob": log_prob, "bytes": list(self._bytes(id))}
            return {"content": [entry(token.id, token.log_prob) | {
                "top_logprobs": [entry(*pair) for pair in token.top]} for token in tokens], "refusal": None}
        texts, offsets = [self._text(token.id) for token in tokens], []
        for token, text in zip(tokens, texts, strict=True):
            offsets.append(self._offsets[stream.index])
            is_added = (not self._offsets[stream.index] and text in self._backend.language.tokenizer.special
                        and not stream.prompt.text.startswith(text))  # a BOS token, which the text has not
            if not is_added:
                self._offsets[stream.index] += len(self._decoders[stream.index].decode(self._bytes(token.id)))
        known = [not math.isnan(token.log_prob) for token in tokens]  # not that of a prompt's first token
        top = [{self._text(id): log_prob for id, log_prob in token.top} if is_known else None
               for token, is_known in zip(tokens, known, strict=True)]
        return {"tokens": texts, "text_offset": offsets,
                "token_logprobs": [token.log_prob if is_known else None
                                   for token, is_known in zip(tokens, known, strict=True)],
                "top_logprobs": top if self._completion.n_top else None}

    def _text(self, id: int) -> str:
        """The text of a token; of a part of a character, its bytes as OpenAI's API writes them."""
        data = self._bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, id: int) -> bytes:
        return self._backend.language.tokenizer.token_bytes(id)

    def _usage(self) -> dict[str, int]:
        n_prompt = sum(len(prompt.ids) for prompt in self._prompts)
        n_new = sum(stream.n_new for stream in self._streams)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}

    def _knows(self) -> Tree:
        """The field `knows`: an object, or a list of them for several prompts."""
        knows = self._backend.knows
        if knows is None:
            return {}
        of_prompts = [None if stream.knowledge is None else
                      knows_object(knows, stream.knowledge, stream.prompt.located.calibrated)
                      for stream in self._streams[::self._completion.n]]
        return {"knows": of_prompts if len(self._prompts) > 1 else of_prompts[0]}


def _with_end(choice: Choice) -> list[Token]:
    """The tokens of a completion; with its end token, as benchmark harnesses expect."""
    return choice.tokens if choice.end is None else [*choice.tokens, choice.end]


def knows_object(knows: Knows, knowledge: Knowledge, calibrated: bool) -> Tree:
    """P(knows) as replies have it."""
    return {"p": knowledge.p, "verdict": knowledge.verdict, "strongest_layer": knowledge.strongest_layer,
            "estimator": knows.estimator, "calibrated_on": knows.calibrated_on,
            "prompt": "calibrated" if calibrated else "other"}


def error_object(status: int, message: str, field: str | None = None, code: str | None = None) -> Tree:
    """An error as OpenAI's API replies it."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def error_reply(status: int, message: str, field: str | None = None, code: str | None = None) -> JSONResponse:
    """`error_object` as a response."""
    return JSONResponse(error_object(status, message, field, code), status)
