"""Conversations as lists of messages: OpenAI's `messages`, ShareGPT's `conversations`.

    {"messages": [{"role": "system", "content": "…"}, {"role": "user", "content": "…"},
                  {"role": "assistant", "content": "…"}, …]}
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}

`content` is text or a list of `{"type": "text", "text": "…"}`, which are joined as lines.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tilelli_jax.data.turns import turn_text
from tilelli_jax.errors import InputError
from tilelli_jax.io.json_text import kind

KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}
TOOLS = ("tools", "functions")  # of a line; a conversation without them would mean something else
CALLS = ("tool_calls", "function_call")  # of a message


class Exchange(NamedTuple):
    """The user's message and the assistant's reply.

    Attributes:
        in_loss: false if the reply has `"weight": 0`: it is read as context only.
        number: number of the reply in the list, from 1.
    """

    prompt: str
    response: str
    in_loss: bool
    number: int


def read_messages(row: dict[str, Any], key: str, where: str) -> list[Exchange]:
    """Returns the exchanges of a conversation, in order. System text begins the first prompt.

    Args:
        key: one of KEYS.
        where: the line's location, for error messages.

    Raises:
        InputError: the messages are not an optional system text and then user and assistant in alternation,
            each with text; or they use tools; or no reply counts in the loss.
    """
    role_key, text_key = KEYS[key]
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: {key}: expected messages, found "
                         + ("an empty list" if messages == [] else kind(messages)))
    _check_no_tools(row, TOOLS, where)
    system, prompt = "", None
    exchanges: list[Exchange] = []
    for number, message in enumerate(messages, 1):
        at = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise InputError(f"{at}: expected {role_key} and {text_key}, found {kind(message)}")
        role = ROLES.get(str(message.get(role_key)))
        expected = "user" if prompt is None else "assistant"
        if role != expected and not (role == "system" and number == 1):
            allowed = f"system or {expected}" if number == 1 else expected
            raise InputError(f"{at}: {role_key}: expected {allowed}, found {message.get(role_key)!r:.40}")
        _check_no_tools(message, CALLS, at)
        text = turn_text(_with_text(message, text_key, at), text_key, at)
        if role == "system":
            system = f"{text}\n\n"
        elif prompt is None:
            prompt = text if exchanges else system + text
        else:
            weight = message.get("weight", 1)
            if weight not in (0, 1):
                raise InputError(f"{at}: weight: expected 0 or 1, found {weight!r:.40}")
            exchanges.append(Exchange(prompt, text, bool(weight), number))
            prompt = None
    if prompt is not None or not exchanges:
        raise InputError(f"{where}: {key}: expected the assistant's reply at the end, found none")
    if not any(exchange.in_loss for exchange in exchanges):
        raise InputError(f"{where}: {key}: expected a reply of weight 1, found none")
    return exchanges


# ---------------------------------------------------------------------------------------------


def _check_no_tools(values: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if values.get(key):
            raise InputError(f"{where}: {key}: expected none, as turns have text only, found some")


def _with_text(message: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Returns the message with its text parts joined."""
    parts = message.get(key)
    if not isinstance(parts, list):
        return message
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = repr(part.get("type")) if isinstance(part, dict) else kind(part)
            raise InputError(f"{where}: {key}: expected parts of type 'text', found {found:.40}")
    return message | {key: "\n".join(part["text"] for part in parts)}
