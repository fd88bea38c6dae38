"""Sampling a token from logits: temperature, top-k and top-p."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError

MAX_NEW = 1 << 20  # limit on the new tokens of one continuation; buffers for all are allocated in advance


@dataclasses.dataclass(frozen=True)
class Sampling(Section):
    """How tokens are sampled, their maximum number, and the random seed.

    top_k is applied first, then top_p to the remaining tokens (Holtzman et al. 2020, arXiv:1904.09751).
    Tokens tied with the last accepted token are accepted too. Row i of a batch uses the random stream
    fold_in(seed, i).

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = setting(1.0, "softmax temperature; 0: take the most likely token", min=0, max=1e30)
    top_k: int = setting(0, "sample among the k most likely tokens; 0: among all", min=0)
    top_p: float = setting(
        1.0, "sample among the smallest set of most likely tokens with this total probability; 1: among all",
        above=0, max=1)
    max_new: int = setting(200, "maximum number of new tokens", min=0, max=MAX_NEW)
    seed: int = setting(0, "random seed of sampling", min=0, max=2**32 - 1)


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds the settings of `Sampling` as command-line options, such as `--max-new N`."""
    hints = typing.get_type_hints(Sampling)
    for field in dataclasses.fields(Sampling):
        default = defaults.get(field.name, field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=hints[field.name], default=default,
                            metavar="N" if hints[field.name] is int else "X",
                            help=f"{field.metadata['meaning']} (default {default})")


def from_options(options: argparse.Namespace) -> Sampling:
    """Returns the `Sampling` from the options of `add_options`.

    Raises:
        InputError: a value is out of range; the message names the option.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)}
    try:
        return Sampling(**values)
    except InputError as error:
        name, _, message = str(error).partition(":")
        raise InputError(f"--{name.replace('_', '-')}:{message}") from None


def sample(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_k: jax.Array,
           top_p: jax.Array) -> jax.Array:
    """Samples one token from logits `[vocab]`, int32; see `Sampling`. All arguments may be traced."""
    def draw() -> jax.Array:
        scaled = (logits - jnp.max(logits)) / temperature  # cannot overflow for small temperatures
        truncated = jax.lax.cond((top_k > 0) | (top_p < 1), lambda: _truncate(scaled, top_k, top_p),
                                 lambda: scaled)
        return jax.random.categorical(key, truncated).astype(jnp.int32)

    # Branches, so that unused steps cost nothing: sampling costs several times as much as the argmax,
    # and truncation several times as much as sampling.
    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits).astype(jnp.int32))


def _truncate(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits `[vocab]`, with -inf for the tokens that top_k and top_p exclude."""
    ranked = jnp.sort(scaled, descending=True)
    kth = ranked[jnp.clip(top_k, 1, len(ranked)) - 1]
    # Compares values, not ranks, so that ties with the last accepted token are accepted.
    accepted = (top_k <= 0) | (ranked >= kth)
    probabilities = jax.nn.softmax(ranked, where=accepted)
    mass_above = jnp.cumsum(probabilities) - probabilities
    # The sum over all but the last token may round to 1: top_p = 1 must not exclude the last token.
    accepted &= (top_p >= 1) | (mass_above < top_p) | (jnp.arange(len(ranked)) == 0)  # top_p may round to 0
    threshold = jnp.min(jnp.where(accepted, ranked, jnp.inf))
    return jnp.where(scaled >= threshold, scaled, -jnp.inf)
