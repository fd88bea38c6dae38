"""Drawing a symbol from logits: temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from tilelli_jax.errors import InputError

MOST_NEW = 1 << 20  # bytes of one continuation; buffers are made for all of them beforehand


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How bytes are drawn, how many, and from which random stream.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest byte.
        top_k: draw among so many likeliest bytes; 0 for all. Bytes as likely as the last of them
            are in as well.
        top_p: draw among the fewest likeliest bytes whose probabilities sum to at least this, of
            those that top_k left (Holtzman et al. 2020, arXiv:1904.09751); 1 for all. Bytes as
            likely as the last of them are in as well.
        max_new: most bytes to draw.
        seed: of the drawing; row i of a batch draws from fold_in(seed, i).

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature: expected 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k: expected 0 (all) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected a number above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.max_new <= MOST_NEW:
            raise InputError(f"max_new: expected a whole number from 0 to {MOST_NEW}, found {self.max_new}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: expected a whole number from 0 to 2^32 - 1, found {self.seed}")


def sample(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_k: jax.Array,
           top_p: jax.Array) -> jax.Array:
    """One of the symbols of logits `[vocab]`, int32; see `Sampling`. All arguments may be traced."""
    def draw() -> jax.Array:
        scaled = (logits - jnp.max(logits)) / temperature  # no overflow, however cold
        likely = jax.lax.cond((top_k > 0) | (top_p < 1), lambda: _likeliest(scaled, top_k, top_p),
                              lambda: scaled)
        return jax.random.categorical(key, likely).astype(jnp.int32)

    # Branches, so that nobody pays for what is not asked for: drawing costs several times as much
    # as taking the likeliest, and cutting several times as much as drawing.
    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits).astype(jnp.int32))


def _likeliest(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits `[vocab]` with those at -inf that top_k and top_p leave out."""
    above = scaled > scaled[:, None]  # [i, j]: symbol j is likelier than symbol i
    kept = (top_k <= 0) | (jnp.sum(above, 1) < top_k)
    probabilities = jax.nn.softmax(scaled, where=kept)
    mass_above = jnp.sum(jnp.where(above, probabilities, 0.0), 1)
    # The sum over all but the last symbol may round to 1: top_p = 1 must not leave that out.
    kept &= (top_p >= 1) | (mass_above < top_p)
    return jnp.where(kept, scaled, -jnp.inf)
