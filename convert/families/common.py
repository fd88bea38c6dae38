"""Shared by the families of Tilelli `.pt` files: settings and shapes read from a file."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Collection, Mapping
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.nn.quantize import QuantizerName
from tilelli_jax.pretrained.hugging_face import is_same

from ..plan import Assumption
from ..source import Source

PARTS = "quantized_parts"  # key in .pt files written by this library: which weights are quantised
_WRAPPERS = re.compile(r"^((module|_orig_mod|base|model)\.)+")


def stripped(source: Source) -> Source:
    """Removes the prefixes `base.`, `module.`, `_orig_mod.` and `model.` of wrappers from tensor names."""
    return source.with_names(lambda name: _WRAPPERS.sub("", name))


def tied_duplicates(tensors: Mapping[str, Tensor], table: str, unembed: str) -> dict[str, str]:
    """Maps the unembedding to the embedding table if both are stored with the same numbers, else empty."""
    return {unembed: table} if is_same(tensors, table, unembed) else {}


def shape_of(source: Source, tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """Returns the shape of a required tensor.

    Raises:
        InputError: the tensor is missing, does not have `rank` axes, or is an empty matrix.
    """
    if name not in tensors:
        raise InputError(f"{source.path}: missing: {name}")
    if len(tensors[name].shape) != rank:
        raise InputError(f"{source.path}: {name}: expected {rank} axes, found {tensors[name].shape}")
    if rank == 2 and 0 in tensors[name].shape:
        raise InputError(f"{source.path}: {name}: expected a matrix that is not empty, found "
                         f"{tensors[name].shape}")
    return tensors[name].shape


def quantizer_setting(source: Source) -> dict[str, Any]:
    """Returns the `quantizer` setting from the key `quantize` of the configuration; empty without that key.

    `quantize` is true, false, null or the name of a quantiser.

    Raises:
        InputError: `quantize` has another value.
    """
    if "quantize" not in source.config:
        return {}
    value = source.config["quantize"]
    names = typing.get_args(QuantizerName)
    name = {True: "ternary", False: "none", None: "none"}.get(value, value) if isinstance(
        value, bool | None) else str(value)
    if name not in names:
        raise InputError(f"{source.path}: config: quantize: expected true, false or one of "
                         f"{', '.join(names)}, found {value!r}")
    return {"quantizer": name}


def quantized_parts(config: Any, known: Collection[str]) -> list[Assumption]:
    """The assumption on which weights are quantised; empty if the source or the user specifies it.

    Attention and feed-forward weights are always among them; the alternatives differ in the other parts.

    Args:
        config: configuration of the network, with the assumed parts.
        known: keys of the settings that the source and the user specify.
    """
    if config.quantizer == "none" or "quantize" in known:
        return []
    hint = typing.get_type_hints(type(config))["quantize"]
    parts = typing.get_args(typing.get_args(hint)[0])
    present = {"conv": {"local", "wide"} & set(getattr(config, "pathways", ())),
               "router": len(getattr(config, "pathways", ())) * getattr(config, "n_banks", 1) > 1,
               "embed": True, "unembed": not config.tie_embeddings}
    optional = [part for part in parts if present.get(part)]
    others = [tuple(part for part in parts if (part in config.quantize) != (part in flipped))
              for n in range(len(optional)) for flipped in itertools.combinations(optional, n + 1)]
    return [Assumption("quantize", config.quantize, sorted(others, key=len),
                       f"the source does not specify which weights are quantised ({config.quantizer}); "
                       f"{', '.join(config.quantize)} are assumed")]


def cannot_infer(source: Source, key: str) -> InputError:
    """The error for a setting that neither the tensors nor the configuration determine."""
    return InputError(f"{source.path}: {key}: cannot be inferred from the tensors, and the configuration "
                      f"does not specify it; add --set {key}=…")


def has_library_settings(source: Source, family: str) -> bool:
    """Whether this library wrote the file, which then contains the complete configuration."""
    return source.config.get("family") == family and PARTS in source.config


def library_settings(cls: type, source: Source) -> dict[str, Any]:
    """The configuration in a file that this library wrote."""
    tree = {**source.config, "quantize": source.config[PARTS]}
    return {field.name: tree[field.name] for field in dataclasses.fields(cls) if field.name in tree}
