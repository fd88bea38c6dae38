"""Rotary positions in config.json: the base, and the scaling for longer contexts."""

from __future__ import annotations

import math
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io.json_text import object_under
from tilelli_jax.pretrained.hugging_face import Tree, positive, value_or

TYPES = ("default", "linear", "llama3", "yarn")


def rope_section(tree: Tree) -> tuple[Tree, str]:
    """The rotary settings of config.json, and their key: rope_scaling (before transformers 5) if it has
    values, as transformers chooses, otherwise rope_parameters."""
    key = "rope_scaling" if object_under(tree, "rope_scaling") else "rope_parameters"
    return object_under(tree, key), key


def rope_type(rope: Tree) -> Any:
    """The kind of scaling in the rotary settings of a config.json, of new or old files."""
    return rope.get("rope_type", rope.get("type", "default"))


def rotary_of(rope: Tree, key: str, *, theta: Any, max_len: Any,
              original_len: Any = None) -> tuple[float, Tree | None]:
    """The base of the rotary frequencies, and our settings of their scaling; None: no scaling.

    Args:
        rope: a section of rotary settings.
        key: its key, for error messages.
        theta: the base where the section has none.
        max_len: value of max_position_embeddings.
        original_len: value of original_max_position_embeddings outside the section, which transformers takes
            before the one inside.

    Raises:
        InputError: the section asks for something else.
    """
    kind = rope_type(rope)
    if kind not in TYPES:
        raise InputError(f"{key}.rope_type: expected {', '.join(TYPES)}, found {kind!r:.40}")
    if (part := value_or(rope, "partial_rotary_factor", 1)) != 1:
        raise InputError(f"{key}.partial_rotary_factor: expected 1, found {part!r:.40}")
    theta = positive(value_or(rope, "rope_theta", theta), f"{key}.rope_theta")
    if kind == "default":
        return theta, None

    def number(name: str, default: Any = None) -> float:
        value = value_or(rope, name, default)
        if value is None:
            raise InputError(f"expected the key {key}.{name}")
        return positive(value, f"{key}.{name}")

    length = original_len
    if length is None:
        length = value_or(rope, "original_max_position_embeddings", max_len)
    if kind == "linear":
        return theta, {"kind": kind, "factor": number("factor")}
    if kind == "llama3":
        return theta, {"kind": kind, "factor": number("factor"), "original_max_len": length,
                       "low_freq_factor": number("low_freq_factor"),
                       "high_freq_factor": number("high_freq_factor")}
    factor = number("factor", max_len / length)
    return theta, {"kind": kind, "factor": factor, "original_max_len": length,
                   "beta_fast": number("beta_fast", 32), "beta_slow": number("beta_slow", 1),
                   "attention_factor": number("attention_factor", _attention_factor(rope, factor)),
                   "truncate": rope.get("truncate", True)}


def rope_of(theta: float, scaling: Any) -> Tree:
    """The inverse of `rotary_of`: a section of rotary settings from the base and our scaling."""
    rope: Tree = {"rope_type": "default" if scaling is None else scaling.kind, "rope_theta": theta}
    if scaling is None:
        return rope
    rope["factor"] = scaling.factor
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_len
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow,
                 "attention_factor": scaling.attention_factor, "truncate": scaling.truncate}
    return rope


def _attention_factor(rope: Tree, factor: float) -> float:
    """The factor of rotated queries and keys that YaRN proposes (equation 22), or DeepSeek's quotient."""
    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1
    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    return growth(numerator) / growth(denominator) if numerator and denominator else growth(1)
