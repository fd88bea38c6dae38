"""Turns of a conversation as text: "USER: …" and "TILELLI: …", a line each."""

from __future__ import annotations

USER, MODEL = "USER: ", "TILELLI:"
STOP = "\n" + USER.rstrip()  # the model's turn ends where the next one begins


def asked(prompt: str) -> str:
    """What the model is given: the user's turn, and the beginning of its own."""
    return f"{USER}{prompt}\n{MODEL}"


def answered(response: str) -> str:
    """What it is to go on with: its turn to the end, of which the next turn's beginning is a part."""
    return f" {response}{STOP}"
