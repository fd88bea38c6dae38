"""Turns of a conversation as text: "USER: …" and "TILELLI: …", a line each."""

from __future__ import annotations

from tilelli_jax.errors import InputError

USER, MODEL = "USER: ", "TILELLI:"
STOP = "\n" + USER.rstrip()  # the model's turn ends where the next one begins


def asked(prompt: str) -> str:
    """What the model is given: the user's turn, and the beginning of its own."""
    return f"{USER}{prompt}\n{MODEL}"


def answered(response: str) -> str:
    """What it is to go on with: its turn to the end, of which the next turn's beginning is a part."""
    return f" {response}{STOP}"


def text_of(row: dict[str, object], key: str, where: str) -> str:
    """What a turn is to say, without the space around it, its lines ended by `\\n`.

    Args:
        where: names the row in an error.

    Raises:
        InputError: the row has no such text, or it would end the turn.
    """
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {key}: expected text, found "
                         + (f"{text!r:.40}" if key in row else "none"))
    for turn in (USER.rstrip(), MODEL):
        if any(line.startswith(turn) for line in text.strip().split("\n")):
            raise InputError(f"{where}: {key}: has a line that begins {turn}, as a turn does")
    return text.strip().replace("\r\n", "\n")
