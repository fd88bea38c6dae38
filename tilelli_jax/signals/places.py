"""Checks places (hook points) inside a network's blocks, and layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OUTSIDE = ("embed", "hidden", "abstain", "logits")  # places outside the blocks, which have no layer


def check_place(model: Any, place: str, layer: int, allowed: Sequence[str] | None = None) -> None:
    """Raises ValueError if a network has no such place inside its blocks, or no such layer.

    Args:
        allowed: accepted places; by default all places of the network.
    """
    inside = [name for name in allowed or model.places if name not in OUTSIDE]
    if place not in inside:
        raise ValueError(f"place: expected one of {', '.join(inside)}, found '{place}'")
    config = model.config
    n_layers = config.n_decoder_layers if place.startswith("decoder.") else config.n_layers
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer: expected 0 to {n_layers - 1}, found {layer}")
