"""Hugging Face directories: config.json and safetensors, read and written as transformers does."""

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
from tilelli_jax.io.files import as_json
from tilelli_jax.io.json_text import kind, object_under, read_json
from tilelli_jax.io.tensors import CODES, Tensor, blocks, write_directory
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Names, Shape

CONFIG = "config.json"
WRAPPED = re.compile(r"^(?:module\.|_orig_mod\.)+")
GENERATION = "generation_config.json"
QUANTIZED = "quantization_config"
END = "eos_token_id"
# Token ids in config.json, and their names in our configurations.
IDS = {"bos_token_id": ("bos_id",), "decoder_start_token_id": ("start_id",), END: ("end_id", "end_ids")}
Tree = dict[str, Any]
# Activations of feed-forward networks: their names → ours.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
THEIR_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
# Tensors of multimodal networks: the text decoder's prefixes, and the parts that are not read.
TEXT_DECODER = {r"^model\.language_model\.": "model.", r"^language_model\.model\.": "model.",
                r"^language_model\.lm_head\.": "lm_head."}
NON_TEXT_PARTS = {r"^(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\.":
               "part of the image or audio encoder"}


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of networks is stored in Hugging Face directories.

    Attributes:
        family: value of `family` in our configuration.
        model_types: accepted values of `model_type` in config.json; the first is written.
        config_of: (their configuration, tensors) → our settings; may raise InputError and KeyError.
        tree_of: our configuration → theirs.
        names: our configuration → the map of our names to theirs.
        renamed: patterns in the tensor names of other versions → replacement.
        ignored: our configuration → patterns of tensors that are not needed, with the reason.
    """

    family: str
    model_types: tuple[str, ...]
    config_of: Callable[[Tree, Mapping[str, Tensor]], Tree]
    tree_of: Callable[[Any], Tree]
    names: Callable[[Any], Names]
    renamed: Mapping[str, str]
    ignored: Callable[[Any], Mapping[str, str]]

    def current_name(self, name: str) -> str:
        """The current name of a tensor of another version or a wrapped network (DDP, torch.compile)."""
        name = WRAPPED.sub("", name)
        for pattern, replacement in self.renamed.items():
            name = re.sub(pattern, replacement, name)
        return name


def read_config(path: Path) -> Tree:
    """Reads config.json of a directory; end tokens come from generation_config.json, as in transformers.

    Raises:
        InputError: there is no config.json, or one of the two files cannot be read.
    """
    if not os.path.lexists(path / CONFIG):
        raise InputError(f"{path}: not a Hugging Face directory: {CONFIG} is missing")
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
    """Raises InputError if the value of a key is not an id, or is outside the vocabulary."""
    for token_id in several_ids(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise InputError(f"{where}{key}: expected ids, found {token_id!r:.40}")
        if isinstance(vocab_size, int) and not 0 <= token_id < vocab_size:
            raise InputError(f"{where}{key}: expected ids of the vocabulary, 0 to {vocab_size - 1}, "
                             f"found {token_id}")


def current_names(family: Family, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors by their current names.

    Raises:
        InputError: two tensors have the same current name.
    """
    names = {name: family.current_name(name) for name in tensors}
    if duplicates := [name for name, count in collections.Counter(names.values()).items() if count > 1]:
        raise InputError(f"{source}: expected unique tensor names, found two tensors for '{min(duplicates)}'")
    return {names[name]: tensor for name, tensor in tensors.items()}


def is_same(tensors: Mapping[str, Tensor], table: str, other: str) -> bool:
    """Whether both tensors exist and are bit-identical."""
    if table not in tensors or other not in tensors:
        return False
    first, second = tensors[table], tensors[other]
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    arrays = [tensor.mapped() if tensor.mapped else tensor.read() for tensor in (first, second)]
    return all(a.tobytes() == b.tobytes() for a, b in zip(*map(blocks, arrays), strict=True))


def is_tied(tensors: Mapping[str, Tensor], table: str, other: str, flag: Any = True) -> bool:
    """Whether transformers ties `other` to `table`: the flag is true and the tensors do not differ.

    Raises:
        InputError: the flag, `tie_word_embeddings`, is neither true nor false.
    """
    if not isinstance(flag, bool):
        raise InputError(f"tie_word_embeddings: expected true or false, found {flag!r}")
    return flag and (other not in tensors or is_same(tensors, table, other))


def settings(family: Family, tree: Tree, tensors: Mapping[str, Tensor], source: str) -> Tree:
    """The settings of our configuration, from config.json (`tree`).

    Args:
        tensors: the tensors, by the names of `current_names`.

    Raises:
        InputError: the network is of another family, a key is missing, or an option is not supported.
    """
    if tree.get("model_type") not in family.model_types:
        raise InputError(f"{source}: model_type: expected {' or '.join(family.model_types)}, "
                         f"found {tree.get('model_type')!r}")
    try:
        config = {"family": family.family, **family.config_of(tree, tensors)}
        for section in (tree, object_under(tree, "text_config")):
            if section.get(QUANTIZED) is not None:
                method = object_under(section, QUANTIZED).get("quant_method")
                raise InputError(f"{QUANTIZED}: expected weights that are not quantised, found quant_method "
                                 f"{method!r:.40}")
        for key, ours in IDS.items():
            for name in ours:
                _check_ids(key, config.get(name), config["vocab_size"])
        return config
    except KeyError as error:
        raise InputError(f"{source}: expected the key {error}") from None
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{source}: invalid value: {error}") from None


def read(family: Family, config: Any, shapes: Mapping[str, Shape], tensors: Mapping[str, Tensor],
         source: str) -> dict[str, Tensor]:
    """Our arrays, read lazily.

    Args:
        shapes: shapes of all arrays of the network, by name.
        tensors: the tensors of the checkpoint, by the names of `current_names`.

    Raises:
        InputError: the tensors do not fit the configuration.
    """
    links = mapping.link(family.names(config), shapes, source)
    mapping.check(links, {name: tensor.shape for name, tensor in tensors.items()}, family.ignored(config),
                  source)
    return mapping.to_ours(links, tensors)


def write(family: Family, config: Any, arrays: Mapping[str, Tensor], path: Path,
          dtype: np.dtype | None = None, others: Mapping[str, bytes] | None = None,
          original_config: Tree | None = None) -> None:
    """Writes a directory that transformers can read.

    Args:
        arrays: our arrays by name.
        dtype: type of the tensors in the file; None keeps their type.
        others: additional files, name → content.
        original_config: the original config.json of the network, whose keys that we do not write are copied.

    Raises:
        OSError: the directory cannot be written.
    """
    links = mapping.link(family.names(config), {name: array.shape for name, array in arrays.items()})
    tensors = mapping.to_theirs(links, arrays)
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    stored = _dtype_name(tensor.dtype for tensor in tensors.values())
    # multimodal: the text decoder's section
    original = (original_config or {}).get("text_config", original_config or {})
    tree = {**original, **family.tree_of(config), "dtype": stored, "torch_dtype": stored}
    write_directory(path, tensors, {CONFIG: as_json(tree), **(others or {})}, writer="pt")


def several_ids(ids: Any) -> list[int]:
    """The ids of `eos_token_id`, which may be one number, a list, or null."""
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def text_config(tree: Tree) -> Tree:
    """The configuration of the text decoder: a section of a multimodal network's config.json, or all of it.

    Raises:
        InputError: the section is invalid, or contradicts the network on whether embeddings are tied.
    """
    if "text_config" not in tree:
        return tree
    ends, key = tree.get(END), "tie_word_embeddings"
    part = object_under(tree, "text_config")
    if (outer := tree.get(key, True)) != (inner := part.get(key, True)):
        raise InputError(f"text_config.{key}: expected {outer}, the value of {key}, found {inner}")
    return {**part, **({} if ends is None else {END: ends})}


def layer_types(tree: Tree, kinds: tuple[str, ...]) -> list[str] | None:
    """The kind of each layer, from layer_types: sliding or full; None without this key.

    Raises:
        InputError: there are other kinds than `kinds`, or another number of them than of layers.
    """
    theirs = tree.get("layer_types")
    if theirs is None:
        return None
    if not isinstance(theirs, list):
        raise InputError(f"layer_types: expected a list, found {kind(theirs)}")
    names = {f"{name}_attention": name for name in kinds}
    if unknown := [layer_type for layer_type in theirs if layer_type not in names]:
        raise InputError(f"layer_types: expected {' or '.join(names)}, found {unknown[0]}")
    if (n_layers := value_or(tree, "num_hidden_layers", len(theirs))) != len(theirs):
        raise InputError(f"num_hidden_layers: expected {len(theirs)}, the length of layer_types, "
                         f"found {n_layers}")
    return [names[layer_type] for layer_type in theirs]


def their_layer_types(kinds: Iterable[str]) -> list[str]:
    """The inverse of `layer_types`."""
    return [f"{kind}_attention" for kind in kinds]


def value_or(tree: Tree, key: str, default: Any) -> Any:
    """The value of a key, or the default if it is missing or null."""
    value = tree.get(key)
    return default if value is None else value


def positive(value: Any, key: str) -> float:
    """The value of a key as a float.

    Raises:
        InputError: the value is not a number above 0.
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
    """The dtype of config.json: one type for the whole network, its widest, as in transformers."""
    return str(max(set(dtypes), key=lambda dtype: (dtype.itemsize, CODES[dtype])))
