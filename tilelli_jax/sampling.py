"""Drawing a token from logits: temperature, top-k and top-p."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError

MAX_NEW = 1 << 20  # tokens of one continuation; buffers are made for all of them beforehand


@dataclasses.dataclass(frozen=True)
class Sampling(Section):
    """How tokens are drawn, how many, and from which random stream.

    top_k is taken first, top_p of what it left (Holtzman et al. 2020, arXiv:1904.09751). Tokens as
    likely as the last one that either lets in are in as well. Row i of a batch draws from
    fold_in(seed, i).

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = setting(1.0, "of the softmax; 0 takes the likeliest token", min=0, max=1e30)
    top_k: int = setting(0, "draw among so many likeliest tokens; 0 for all", min=0)
    top_p: float = setting(
        1.0, "draw among the fewest likeliest tokens that make up this probability; 1 for all",
        above=0, max=1)
    max_new: int = setting(200, "most new tokens", min=0, max=MAX_NEW)
    seed: int = setting(0, "seed of the drawing", min=0, max=2**32 - 1)


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The settings of `Sampling` as options of a command: `--max-new N` and so on."""
    hints = typing.get_type_hints(Sampling)
    for field in dataclasses.fields(Sampling):
        default = defaults.get(field.name, field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=hints[field.name], default=default,
                            metavar="N" if hints[field.name] is int else "X",
                            help=f"{field.metadata['meaning']} (default {default})")


def from_options(options: argparse.Namespace) -> Sampling:
    """What the options of `add_options` say.

    Raises:
        InputError: a value is out of range; it names the option.
    """
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)}
    try:
        return Sampling(**given)
    except InputError as error:
        name, _, said = str(error).partition(":")
        raise InputError(f"--{name.replace('_', '-')}:{said}") from None


def sample(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_k: jax.Array,
           top_p: jax.Array) -> jax.Array:
    """One of the tokens of logits `[vocab]`, int32; see `Sampling`. All arguments may be traced."""
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
    ranked = jnp.sort(scaled, descending=True)
    kth = ranked[jnp.clip(top_k, 1, len(ranked)) - 1]
    # Those as likely as the k-th are in as well, here and below: hence values, not ranks.
    kept = (top_k <= 0) | (ranked >= kth)
    probabilities = jax.nn.softmax(ranked, where=kept)
    mass_above = jnp.cumsum(probabilities) - probabilities
    # The sum over all but the last token may round to 1: top_p = 1 must not leave that out.
    kept &= (top_p >= 1) | (mass_above < top_p)
    least = jnp.min(jnp.where(kept, ranked, jnp.inf))
    return jnp.where(scaled >= least, scaled, -jnp.inf)
