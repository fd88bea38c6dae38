"""Hugging Face directories: config.json and safetensors, as transformers reads and writes them."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.files import as_json
from tilelli_jax.json_text import kind, object_under, read_json
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Names, Shape
from tilelli_jax.tensors import CODES, Tensor, blocks, write_directory

CONFIG = "config.json"
WRAPPED = re.compile(r"^(?:module\.|_orig_mod\.)+")
GENERATION = "generation_config.json"
QUANTIZED = "quantization_config"
END = "eos_token_id"
# Ids that config.json states, and what our configurations call them.
IDS = {"bos_token_id": ("bos_id",), "decoder_start_token_id": ("start_id",), END: ("end_id", "end_ids")}
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of networks stands in such directories.

    Attributes:
        family: what our configuration says under that key.
        model_types: what their config.json may say under `model_type`; the first is what we write.
        config_of: their configuration and tensors → the settings of ours; may raise InputError and KeyError.
        tree_of: our configuration → theirs.
        names: our names → theirs.
        renamed: patterns in names of other versions → what stands there now.
        ignored: our configuration → patterns of tensors that are not needed, with the reason.
    """

    family: str
    model_types: tuple[str, ...]
    config_of: Callable[[Tree, Mapping[str, Tensor]], Tree]
    tree_of: Callable[[Any], Tree]
    names: Names
    renamed: Mapping[str, str]
    ignored: Callable[[Any], Mapping[str, str]]

    def present_name(self, name: str) -> str:
        """What a tensor of another version, or of a wrapped network (DDP, torch.compile), is called now."""
        name = WRAPPED.sub("", name)
        for pattern, now in self.renamed.items():
            name = re.sub(pattern, now, name)
        return name


def read_config(path: Path) -> Tree:
    """config.json of a directory, with what ends a text from generation_config.json, as in transformers.

    Raises:
        InputError: there is none, or one of the two cannot be read.
    """
    if not os.path.lexists(path / CONFIG):
        raise InputError(f"{path}: no Hugging Face directory: it has no {CONFIG}")
    tree = read_json(path / CONFIG)
    if os.path.lexists(path / GENERATION):
        ends = read_json(path / GENERATION).get(END)
        if ends is not None:
            text = tree.get("text_config")  # of a multimodal network
            _check_ids(END, ends, (text if isinstance(text, dict) else tree).get("vocab_size"),
                       f"{path / GENERATION}: ")
            tree[END] = ends
    return tree


def _check_ids(key: str, ids: Any, vocab_size: Any, where: str = "") -> None:
    """Raises InputError where what a key says is no id, or is outside the vocabulary."""
    for one in several_ids(ids):
        if isinstance(one, bool) or not isinstance(one, int):
            raise InputError(f"{where}{key}: expected ids, found {one!r:.40}")
        if isinstance(vocab_size, int) and not 0 <= one < vocab_size:
            raise InputError(f"{where}{key}: expected ids of the vocabulary, 0 to {vocab_size - 1}, "
                             f"found {one}")


def present(family: Family, found: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors under the names that they have now.

    Raises:
        InputError: two come to have one name.
    """
    names = {name: family.present_name(name) for name in found}
    if twice := [name for name, count in collections.Counter(names.values()).items() if count > 1]:
        raise InputError(f"{source}: two tensors come to be called '{min(twice)}'")
    return {names[name]: tensor for name, tensor in found.items()}


def is_same(found: Mapping[str, Tensor], table: str, other: str) -> bool:
    """Whether both are there, with the same numbers to the last bit."""
    if table not in found or other not in found:
        return False
    one, two = found[table], found[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    arrays = [tensor.mapped() if tensor.mapped else tensor.read() for tensor in (one, two)]
    return all(a.tobytes() == b.tobytes() for a, b in zip(*map(blocks, arrays), strict=True))


def is_tied(found: Mapping[str, Tensor], table: str, other: str, flag: Any = True) -> bool:
    """Whether transformers ties the other one to the table: where the flag says so and it does not differ.

    Raises:
        InputError: the flag, `tie_word_embeddings`, is neither true nor false.
    """
    if not isinstance(flag, bool):
        raise InputError(f"tie_word_embeddings: expected true or false, found {flag!r}")
    return flag and (other not in found or is_same(found, table, other))


def settings(family: Family, tree: Tree, found: Mapping[str, Tensor], source: str) -> Tree:
    """The settings of our configuration.

    Args:
        found: the tensors, as `present` names them.

    Raises:
        InputError: it is of another family, lacks a key, or asks for what we do not have.
    """
    if tree.get("model_type") not in family.model_types:
        raise InputError(f"{source}: model_type: expected {' or '.join(family.model_types)}, "
                         f"found {tree.get('model_type')!r}")
    try:
        said = {"family": family.family, **family.config_of(tree, found)}
        for place in (tree, object_under(tree, "text_config")):
            if place.get(QUANTIZED) is not None:
                method = object_under(place, QUANTIZED).get("quant_method")
                raise InputError(f"{QUANTIZED}: expected weights that are not quantised, found quant_method "
                                 f"{method!r:.40}")
        for key, ours in IDS.items():
            for name in ours:
                _check_ids(key, said.get(name), said["vocab_size"])
        return said
    except KeyError as error:
        raise InputError(f"{source}: expected the key {error}") from None
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{source}: a value makes no sense: {error}") from None


def read(family: Family, config: Any, wanted: Mapping[str, Shape], found: Mapping[str, Tensor],
         source: str) -> dict[str, Tensor]:
    """Our arrays, which are read when they are asked for.

    Args:
        wanted: names and shapes of all arrays of the network.
        found: the tensors of the checkpoint, as `present` names them.

    Raises:
        InputError: the tensors are not those of the configuration.
    """
    links = mapping.link(family.names, wanted, source)
    mapping.check(links, {name: tensor.shape for name, tensor in found.items()}, family.ignored(config),
                  source)
    return mapping.to_ours(links, found)


def write(family: Family, config: Any, arrays: Mapping[str, Tensor], path: Path,
          dtype: np.dtype | None = None, others: Mapping[str, bytes] | None = None,
          beside: Tree | None = None) -> None:
    """Writes a directory that transformers reads.

    Args:
        arrays: ours.
        dtype: what tensors are written in; None for the type they have.
        others: further files.
        beside: the config.json that the network came with: what it says that ours does not is kept.

    Raises:
        OSError: the directory cannot be written.
    """
    links = mapping.link(family.names, {name: array.shape for name, array in arrays.items()})
    tensors = mapping.to_theirs(links, arrays)
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    stored = _dtype_name(tensor.dtype for tensor in tensors.values())
    kept = (beside or {}).get("text_config", beside or {})  # of a multimodal network we have the text's part
    tree = {**kept, **family.tree_of(config), "dtype": stored, "torch_dtype": stored}
    write_directory(path, tensors, {CONFIG: as_json(tree), **(others or {})}, writer="pt")


def several_ids(ids: Any) -> list[int]:
    """`eos_token_id` may be one number, several, or nothing."""
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def stated(tree: Tree, key: str, default: Any) -> Any:
    """What is said under a key; the default where nothing is, or null."""
    found = tree.get(key)
    return default if found is None else found


def positive(value: Any, key: str) -> float:
    """A number, as a key says it.

    Raises:
        InputError: it is none, or not above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key}: expected a number > 0, found {kind(value)}")
    if not value > 0:
        raise InputError(f"{key}: expected a number > 0, found {value!r}")
    return float(value)


def one_or_several(ids: Iterable[int]) -> Any:
    """The inverse of `several_ids`."""
    ids = list(ids)
    return None if not ids else ids[0] if len(ids) == 1 else ids


def _dtype_name(dtypes: Iterable[np.dtype]) -> str:
    """As transformers has it: one type for a whole network, its widest."""
    return str(max(set(dtypes), key=lambda dtype: (dtype.itemsize, CODES[dtype])))
