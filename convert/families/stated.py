"""What the Tilelli `.pt` files say of themselves, in one place for the families among them."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Mapping
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.nn.quantize import QuantizerName
from tilelli_jax.pretrained.hugging_face import is_same
from tilelli_jax.tensors import Tensor

from ..plan import Assumption
from ..source import Source

PARTS = "quantized_parts"  # of a configuration of ours in a .pt file
_WRAPPERS = re.compile(r"^((module|_orig_mod|base|model)\.)+")


def stripped(source: Source) -> Source:
    """Without the prefixes that wrappers leave: `base.`, `module.`, `_orig_mod.`, `model.`."""
    return source.with_names(lambda name: _WRAPPERS.sub("", name))


def tied_twice(found: Mapping[str, Tensor], table: str, unembed: str) -> dict[str, str]:
    """The unembedding, where it is there and is the embedding table over again, as shared parameters are."""
    return {unembed: table} if is_same(found, table, unembed) else {}


def shape_of(source: Source, found: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that has to be there.

    Raises:
        InputError: it is not, or has another number of axes.
    """
    if name not in found:
        raise InputError(f"{source.path}: missing: {name}")
    if len(found[name].shape) != rank:
        raise InputError(f"{source.path}: {name}: expected {rank} axes, found {found[name].shape}")
    return found[name].shape


def quantizer_of(source: Source) -> dict[str, Any]:
    """Settings of the quantiser, as far as the configuration says them.

    `quantize` may be true or false, or a quantiser's name.

    Raises:
        InputError: it says something else.
    """
    if "quantize" not in source.tree:
        return {}
    said = source.tree["quantize"]
    known = typing.get_args(QuantizerName)
    name = {True: "ternary", False: "none", None: "none"}.get(said, said) if isinstance(
        said, bool | None) else str(said)
    if name not in known:
        raise InputError(f"{source.path}: config: quantize: expected true, false or one of "
                         f"{', '.join(known)}, found {said!r}")
    return {"quantizer": name}


def quantized_parts(config: Any, said: Mapping[str, Any]) -> list[Assumption]:
    """Which weights a quantiser takes, where nothing says it: feed-forward and attention, and what else?

    Args:
        config: of our network, with what is assumed.
        said: what the source and the user say.
    """
    if config.quantizer == "none" or "quantize" in said:
        return []
    hint = typing.get_type_hints(type(config))["quantize"]
    parts = typing.get_args(typing.get_args(hint)[0])
    there = {"conv": {"local", "wide"} & set(getattr(config, "pathways", ())),
             "router": len(getattr(config, "pathways", ())) * getattr(config, "n_banks", 1) > 1,
             "embed": True, "unembed": not config.tie_embeddings}
    open_ = [part for part in parts if there.get(part)]
    others = [tuple(part for part in parts if (part in config.quantize) != (part in flipped))
              for n in range(len(open_)) for flipped in itertools.combinations(open_, n + 1)]
    return [Assumption("quantize", config.quantize, sorted(others, key=len),
                       f"nothing says which weights are quantised ({config.quantizer}); "
                       f"{', '.join(config.quantize)} are assumed")]


def cannot_be_told(source: Source, key: str) -> InputError:
    return InputError(f"{source.path}: {key}: cannot be told from the tensors, and its configuration does "
                      f"not say it; add --set {key}=…")


def is_ours(source: Source, family: str) -> bool:
    """Whether the file was written here, and says everything of the network."""
    return source.tree.get("family") == family and PARTS in source.tree


def our_settings(cls: type, source: Source) -> dict[str, Any]:
    """The settings of our configuration in a file that was written here."""
    tree = {**source.tree, "quantize": source.tree[PARTS]}
    return {field.name: tree[field.name] for field in dataclasses.fields(cls) if field.name in tree}
