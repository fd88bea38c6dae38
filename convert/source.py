"""What there is to convert: a `.pt` file or a directory, opened but not yet read."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import yaml_text
from tilelli_jax.errors import InputError
from tilelli_jax.files import check_regular, read_bytes
from tilelli_jax.json_text import check_fetched, check_text, read_json
from tilelli_jax.pretrained.hugging_face import CONFIG, read_config
from tilelli_jax.tensors import (
    INDEX,
    TENSORS,
    Tensor,
    in_memory,
    read_directory,
    read_file,
    read_weight_map,
)

from . import checkpoint

TORCH_TENSORS = "pytorch_model.bin"
# Directories of autoencoders: cfg.json, and this file.
AUTOENCODERS = {"sparsify": "sae.safetensors", "saelens": "sae_weights.safetensors"}
AUTOENCODER_CONFIG = "cfg.json"
STATE_KEYS = ("state_dict", "model", "model_state_dict")
CONFIG_KEYS = ("base_model_cfg", "model_cfg", "config", "cfg")
# Files that belong to the network's user and not to the network; carried along both ways.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja",
              "chat_template.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        tree: its configuration, as far as it says one.
        tensors: its tensors by name.
        called: what the file calls tensors that have been renamed since.
        rest: what else a `.pt` file holds beside tensors and configuration.
        left_behind: keys of it under which there are tensors, of an optimiser perhaps.
        state_key, config_key: where a `.pt` file keeps them; "" for the file itself or nowhere.
        companions: files that are carried along.
    """

    path: Path
    tree: dict[str, Any]
    tensors: dict[str, Tensor]
    called: dict[str, str] = dataclasses.field(default_factory=dict)
    rest: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_behind: tuple[str, ...] = ()
    state_key: str = ""
    config_key: str = ""
    companions: tuple[Path, ...] = ()

    @property
    def is_directory(self) -> bool:
        return self.path.is_dir()

    def with_names(self, name_of: Callable[[str], str | None]) -> Source:
        """With its tensors renamed; those that come to have no name are left out.

        Raises:
            InputError: two tensors come to have one name.
        """
        tensors: dict[str, Tensor] = {}
        called: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            new = name_of(name)
            if new is None:
                continue
            if new in tensors:
                raise InputError(f"{self.path}: two tensors come to be called '{new}': "
                                 f"{called[new]} and {self.called.get(name, name)}")
            tensors[new], called[new] = tensor, self.called.get(name, name)
        return dataclasses.replace(self, tensors=tensors, called=called)

    def renamed(self, names: Mapping[str, str | None]) -> Source:
        """With the names of a user's map, which may map to nothing what is to be left out.

        Raises:
            InputError: an entry makes no sense or matches no tensor, or two tensors come to have one name.
        """
        patterns = {theirs: _pattern(theirs, ours) for theirs, ours in names.items()}
        used = set()

        def name_of(name: str) -> str | None:
            for theirs, pattern in patterns.items():
                if match := pattern.fullmatch(name):
                    used.add(theirs)
                    ours = names[theirs]
                    return ours and re.sub(r"\{(\w)\}", lambda slot: match[slot[1]], ours)
            return name

        found = self.with_names(name_of)
        if unused := set(names) - used:
            raise InputError(f"--map: no tensor is called '{min(unused)}'")
        return found


def open_source(path: Path) -> Source:
    """A `.pt` file, a Hugging Face directory, or one of an autoencoder.

    Raises:
        InputError: it is none of these, or cannot be read.
    """
    if is_there(path / AUTOENCODER_CONFIG) and not is_there(path / CONFIG):
        found = [name for name in AUTOENCODERS.values() if is_there(path / name)]
        if not found:
            raise InputError(f"{path}: expected {' or '.join(AUTOENCODERS.values())} beside "
                             f"{AUTOENCODER_CONFIG}")
        return Source(path, read_json(path / AUTOENCODER_CONFIG), read_file(path / found[0]))
    if path.is_dir():
        return Source(path, read_config(path), _directory(path), companions=companions_of(path))
    if not is_there(path):
        raise InputError(f"{path}: no such file or directory")
    check_regular(path)
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: expected its directory, with {CONFIG} beside it, or a .pt file")
    tree = checkpoint.read(path)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a dict of tensors, found a {type(tree).__name__}")
    state_key = next((key for key in STATE_KEYS if isinstance(tree.get(key), dict)), "")
    config_key = next((key for key in CONFIG_KEYS if isinstance(tree.get(key), dict)), "")
    state = tree[state_key] if state_key else tree
    tensors = {str(name): value if isinstance(value, Tensor) else in_memory(value)
               for name, value in state.items() if isinstance(value, Tensor) or (
                   state_key and isinstance(value, np.ndarray))}
    rest = {str(key): value for key, value in tree.items() if key not in {state_key, config_key} - {""}
            and not isinstance(value, Tensor)}
    left_behind = tuple(str(key) for key, value in tree.items() if state_key and _holds_tensors(value)
                        and key not in (state_key, config_key))
    if not tensors:
        raise InputError(f"{path}: holds no tensors where a state dict would be "
                         f"({', '.join(STATE_KEYS)}, or the file itself)")
    config = _plain(tree[config_key]) if config_key else {}
    kept = {key: _plain(value) for key, value in rest.items() if key not in left_behind}
    check_text([config, kept, *tensors, *left_behind], str(path))
    return Source(path, config, {**tensors, **dict(_arrays(rest))}, {}, kept, left_behind, state_key,
                  config_key)


def companions_of(path: Path) -> tuple[Path, ...]:
    """Files of a directory that are carried along."""
    return tuple(path / name for name in COMPANIONS if is_there(path / name))


def read_companions(paths: Iterable[Path]) -> dict[str, bytes]:
    """Names and contents.

    Raises:
        InputError: one cannot be read, or is a git-lfs pointer.
    """
    contents = {}
    for path in paths:
        contents[path.name] = read_bytes(path)
        check_fetched(path, contents[path.name])
    return contents


def is_there(path: Path) -> bool:
    """Whether something has this name; what cannot be read of it, reading says."""
    return os.path.lexists(path)


def read_map(path: Path) -> dict[str, str | None]:
    """A user's map: a YAML file of `their name: known name`; `{i}` and `{h}` stand for numbers.

    Raises:
        InputError: it cannot be read, or is no such mapping.
    """
    tree = yaml_text.read(path)
    if not all(isinstance(key, str) and isinstance(value, str | None) for key, value in tree.items()):
        raise InputError(f"{path}: expected lines of 'their name: known name' (no name for tensors to "
                         "ignore)")
    return tree


def _directory(path: Path) -> dict[str, Tensor]:
    if is_there(path / TENSORS) or is_there(path / INDEX):
        return read_directory(path)
    index = path / f"{TORCH_TENSORS}.index.json"
    if is_there(index) and not is_there(path / TORCH_TENSORS):  # the single file first, as of safetensors
        names = sorted(set(read_weight_map(index).values()))
    else:
        names = [TORCH_TENSORS]
    if missing := [name for name in names if not is_there(path / name)]:
        raise InputError(f"{path}: {missing[0] if is_there(index) else TENSORS} is missing")
    found: dict[str, Tensor] = {}
    for name in names:
        tree = checkpoint.read(path / name)
        if not isinstance(tree, dict):
            raise InputError(f"{path / name}: expected a dict of tensors, found a {type(tree).__name__}")
        found |= {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}
    return found


def _arrays(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """NumPy arrays in nested dicts, by dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _arrays(value, f"{prefix}{key}.")
        elif isinstance(value, np.ndarray):
            yield f"{prefix}{key}", in_memory(value)


def _holds_tensors(tree: Any) -> bool:
    if isinstance(tree, dict | list):
        return any(map(_holds_tensors, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, Tensor)


def _plain(tree: Any) -> Any:
    """What JSON can hold of it."""
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()
                if not isinstance(value, np.ndarray | Tensor)}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return tree if isinstance(tree, str | int | float | bool | None) else repr(tree)


def _pattern(theirs: str, ours: str | None) -> re.Pattern[str]:
    slots, wanted = re.findall(r"\{(\w?)\}", theirs), re.findall(r"\{(\w?)\}", ours or "")
    plain = re.sub(r"\{\w\}", "", theirs + (ours or ""))
    if len(set(slots)) < len(slots) or set(wanted) - set(slots) or set("{}") & set(plain):
        raise InputError(f"--map: '{theirs}: {ours}': expected {{i}}, {{h}} or the like for a number, each "
                         "once in their name, and in ours only those")
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(theirs)))
