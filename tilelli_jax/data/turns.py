"""The text format of chat turns: "USER: …" and "TILELLI: …", one line each."""

from __future__ import annotations

from collections.abc import Iterable

from tilelli_jax.errors import InputError

USER, MODEL = "USER: ", "TILELLI:"
STOP = "\n" + USER.rstrip()  # the start of the user's next turn ends the model's turn


def user_turn(prompt: str) -> str:
    """Returns the model's input: the user's turn and the start of the model's turn."""
    return f"{USER}{prompt}\n{MODEL}"


def model_turn(response: str) -> str:
    """Returns the expected continuation: the rest of the model's turn, up to the start of the next turn."""
    return f" {response}{STOP}"


def format_turns(turns: Iterable[tuple[str, str]]) -> str:
    """Returns complete turns, (prompt, response) each, as the text before the user's next turn."""
    return "".join(f"{user_turn(prompt)} {response}\n" for prompt, response in turns)


def turn_text(row: dict[str, object], key: str, where: str) -> str:
    """Returns a turn's text without surrounding space, with lines ended by `\\n`.

    Args:
        where: the row's location, for error messages.

    Raises:
        InputError: the row has no text under `key`, or a line of it would start another turn.
    """
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {key}: expected text, found "
                         + (f"{text!r:.40}" if key in row else "none"))
    for marker in (USER.rstrip(), MODEL):
        if any(line.startswith(marker) for line in text.strip().split("\n")):
            raise InputError(f"{where}: {key}: expected no line that begins with {marker}, found one")
    return text.strip().replace("\r\n", "\n")
