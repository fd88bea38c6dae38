"""Where in a network signals look: places inside its blocks, at layers that there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OUTSIDE = ("embed", "hidden", "abstain", "logits")  # the blocks: no layer is asked there


def check_place(model: Any, place: str, layer: int, among: Sequence[str] | None = None) -> None:
    """Raises ValueError where a network has no such place inside its blocks, or no such layer.

    Args:
        among: the places that will do; by default all that the network has.
    """
    inside = [name for name in among or model.places if name not in OUTSIDE]
    if place not in inside:
        raise ValueError(f"place: expected one of {', '.join(inside)}, found '{place}'")
    config = model.config
    n_layers = config.n_decoder_layers if place.startswith("decoder.") else config.n_layers
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer: expected 0 to {n_layers - 1}, found {layer}")
