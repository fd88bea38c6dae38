"""Taps: the named places where values can be read from a network, or changed in it.

A network offers its values at named places, `value = tap("router", value, seen)`. With the tap
`OFF` that is the value itself, and the compiled program is the same as without it. A tap made to
`record` some places puts their values into `seen`, which the network hands back with its result.
"""

from __future__ import annotations

import dataclasses

import jax

Recorded = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Tap:
    """Which places to record. Values are arrays of the trace: use them inside the same jit."""

    record: tuple[str, ...] = ()

    def __call__(self, place: str, value: jax.Array, seen: Recorded) -> jax.Array:
        if place in self.record:
            seen[place] = value
        return value


OFF = Tap()
