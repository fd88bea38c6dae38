"""Turns messages and texts of requests into prompts."""

from __future__ import annotations

from tilelli_jax.data.turns import format_turns, turn_text, user_turn
from tilelli_jax.loading.language import Encoding

from .knowledge import Located
from .requests import FieldError, Message
from .streams import Backend, Prompt


def chat_prompt(backend: Backend, messages: tuple[Message, ...]) -> Prompt:
    """Returns the prompt of a chat, in the network's turns.

    Raises:
        FieldError: the last message is not the user's, a message has a special token, which could begin a
            turn of another role, or the network knows no turns.
        InputError: the chat template raises an error.
    """
    language, last = backend.language, len(messages) - 1
    if messages[last].role != "user":
        raise FieldError(f"messages[{last}].role", f"expected user in the last message, found "
                         f"{messages[last].role}")
    question = messages[last].content.strip()
    if not question:
        raise FieldError(f"messages[{last}].content", "expected text, found none")
    if language.model.is_byte_level:
        text = _byte_turns(messages)
    else:
        for i, message in enumerate(messages):
            for token in language.tokenizer.special:
                if token in message.content:
                    raise FieldError(f"messages[{i}].content", f"expected no special tokens, found {token}")
        if language.chat_template is None:
            raise FieldError("messages", "expected a network with a chat template, found none; "
                             "POST /v1/completions continues text")
        text = language.chat_template.format_messages([
            {"role": message.role, "content": message.content} for message in messages])
    encoding = language.tokenizer.encode_with_spans(text)
    return Prompt(text, encoding.ids, _locate(backend, encoding, text, question))


def text_prompt(backend: Backend, prompt: str | tuple[int, ...], where: str) -> Prompt:
    """Returns the prompt of a completion: a text, or token ids.

    Args:
        where: the field, for errors.

    Raises:
        FieldError: it has no tokens, or tokens outside the vocabulary.
    """
    tokenizer, vocab_size = backend.language.tokenizer, backend.engine.vocab_size
    if isinstance(prompt, tuple):
        if max(prompt) >= vocab_size:
            raise FieldError(where, f"expected tokens below {vocab_size}, found {max(prompt)}")
        return Prompt(tokenizer.decode(list(prompt)), list(prompt), Located(0, len(prompt), False))
    encoding = tokenizer.encode_with_spans(prompt, special=True)
    if not encoding.ids:
        raise FieldError(where, "expected at least one token, found none")
    return Prompt(prompt, encoding.ids, _locate(backend, encoding, prompt, None))


# ---------------------------------------------------------------------------------------------


def _locate(backend: Backend, encoding: Encoding, text: str, question: str | None) -> Located:
    if backend.knows is None:
        return Located(0, 0, False)
    return backend.knows.locate(encoding, text, question)


def _byte_turns(messages: tuple[Message, ...]) -> str:
    """A chat as the turns on which byte-level networks are trained."""
    texts = []
    for i, message in enumerate(messages):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            raise FieldError(f"messages[{i}].role", f"expected {expected}, as this network has turns of user "
                             f"and assistant only, found {message.role}")
        texts.append(turn_text({"content": message.content}, "content", f"messages[{i}]"))
    return format_turns(zip(texts[:-1:2], texts[1::2], strict=True)) + user_turn(texts[-1])
