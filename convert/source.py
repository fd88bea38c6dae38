"""Opens the checkpoint to convert, a `.pt` file or a directory, without reading its tensors."""

from __future__ import annotations

import dataclasses
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.io import yaml_text
from tilelli_jax.io.files import check_regular, read_bytes
from tilelli_jax.io.json_text import GIT_LFS, check_fetched, check_text, read_json
from tilelli_jax.io.tensors import (
    INDEX,
    TENSORS,
    Tensor,
    in_memory,
    read_directory,
    read_file,
    read_weight_map,
)
from tilelli_jax.pretrained.gguf import read_gguf
from tilelli_jax.pretrained.gguf_file import is_gguf
from tilelli_jax.pretrained.gguf_tokenizer import TOKENIZER, tokenizer_files
from tilelli_jax.pretrained.hugging_face import CONFIG, read_config

from . import checkpoint

TORCH_TENSORS = "pytorch_model.bin"
# Autoencoder directories hold cfg.json and this file.
AUTOENCODERS = {"sparsify": "sae.safetensors", "saelens": "sae_weights.safetensors"}
AUTOENCODER_CONFIG = "cfg.json"
# Files of autoencoders next to a config.json, if any: dictionary_learning, Gemma Scope 2, Gemma Scope.
DICTIONARY, GEMMA_SCOPE, GEMMA_SCOPE_NPZ = "ae.pt", "params.safetensors", "params.npz"
STATE_KEYS = ("state_dict", "model", "model_state_dict")
CONFIG_KEYS = ("base_model_cfg", "model_cfg", "config", "cfg")
# Files such as the tokenizer's, which are copied unchanged in both directions.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja",
              "chat_template.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        config: its configuration; empty if it has none.
        tensors: its tensors by name.
        original_names: current name → name in the file, for renamed tensors.
        other_entries: further plain values of a `.pt` file, besides tensors and configuration.
        ignored_keys: keys of a `.pt` file whose tensors are not converted, such as those of an optimiser.
        state_key: key of the state dict in a `.pt` file; "" if the file itself is the state dict.
        config_key: key of the configuration in a `.pt` file; "" if it has none.
        companions: files that are copied unchanged.
        generated: makes further files of the model directory: name → content; raises InputError if it cannot.
        formats: formats of the tensors of a GGUF file, by name in the file.
        architecture: architecture of a GGUF file.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    original_names: dict[str, str] = dataclasses.field(default_factory=dict)
    other_entries: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignored_keys: tuple[str, ...] = ()
    state_key: str = ""
    config_key: str = ""
    companions: tuple[Path, ...] = ()
    generated: Callable[[], Mapping[str, bytes]] = dict
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    architecture: str = ""

    @property
    def is_directory(self) -> bool:
        return self.path.is_dir()

    @property
    def is_gguf(self) -> bool:
        return bool(self.formats)

    def with_names(self, name_of: Callable[[str], str | None]) -> Source:
        """Returns the source with its tensors renamed; drops tensors whose new name is None.

        Raises:
            InputError: two tensors get the same name.
        """
        tensors: dict[str, Tensor] = {}
        original_names: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            new = name_of(name)
            if new is None:
                continue
            if new in tensors:
                raise InputError(f"{self.path}: expected unique tensor names, found '{new}' for "
                                 f"{original_names[new]} and {self.original_names.get(name, name)}")
            tensors[new], original_names[new] = tensor, self.original_names.get(name, name)
        return dataclasses.replace(self, tensors=tensors, original_names=original_names)

    def with_tokenizer(self, path: Path) -> Source:
        """Returns the source with the tokenizer of a directory, or of the one that contains tokenizer.json.

        Raises:
            InputError: there is none.
        """
        directory = path if path.is_dir() else path.parent
        if not (directory / TOKENIZER).is_file() or path not in (directory, directory / TOKENIZER):
            raise InputError(f"--tokenizer: expected {TOKENIZER} or a directory that contains it, found "
                             f"{path}")
        return dataclasses.replace(self, companions=companions_of(directory), generated=dict)

    def renamed(self, names: Mapping[str, str | None]) -> Source:
        """Returns the source renamed by a user's map; drops tensors that the map gives no name.

        Raises:
            InputError: an entry is invalid or matches no tensor, or two tensors get the same name.
        """
        patterns = {theirs: _pattern(theirs, ours) for theirs, ours in names.items()}
        matched = set()

        def name_of(name: str) -> str | None:
            for theirs, pattern in patterns.items():
                if match := pattern.fullmatch(name):
                    matched.add(theirs)
                    ours = names[theirs]
                    return ours and re.sub(r"\{(\w)\}", lambda slot: match[slot[1]], ours)
            return name

        renamed = self.with_names(name_of)
        if unused := set(names) - matched:
            raise InputError(f"--map: expected names of tensors, found '{min(unused)}', which matches none")
        return renamed


def open_source(path: Path) -> Source:
    """Opens a `.pt` or `.npz` file, a Hugging Face directory, a GGUF file, or an autoencoder directory.

    Raises:
        InputError: the path is none of these, or cannot be read.
    """
    if lexists(path / AUTOENCODER_CONFIG) and not lexists(path / CONFIG):
        tensor_files = [name for name in AUTOENCODERS.values() if lexists(path / name)]
        if not tensor_files:
            raise InputError(f"{path}: expected {' or '.join(AUTOENCODERS.values())} next to "
                             f"{AUTOENCODER_CONFIG}")
        return Source(path, read_json(path / AUTOENCODER_CONFIG), read_file(path / tensor_files[0]))
    for name in (DICTIONARY, GEMMA_SCOPE, GEMMA_SCOPE_NPZ):
        if lexists(path / name):
            return _autoencoder(path, name)
    if path.is_dir():
        return Source(path, read_config(path), _directory(path), companions=companions_of(path))
    if not lexists(path):
        raise InputError(f"{path}: no such file or directory")
    check_regular(path)
    if is_gguf(path):
        file = read_gguf(path)
        return Source(path, file.config, file.tensors, formats=file.formats,
                      architecture=file.metadata["general.architecture"],
                      generated=lambda: tokenizer_files(file.metadata, str(path)))
    if path.suffix == ".npz":
        return Source(path, {}, _npz(path))
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: expected its directory, which contains {CONFIG}, or a .pt file")
    tree = checkpoint.read(path)
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a dict of tensors, found a {type(tree).__name__}")
    state_key = next((key for key in STATE_KEYS if isinstance(tree.get(key), dict)), "")
    config_key = next((key for key in CONFIG_KEYS if isinstance(tree.get(key), dict)), "")
    state = tree[state_key] if state_key else tree
    tensors = {str(name): value if isinstance(value, Tensor) else in_memory(value)
               for name, value in state.items() if isinstance(value, Tensor) or (
                   state_key and isinstance(value, np.ndarray))}
    other_entries = {str(key): value for key, value in tree.items()
                     if key not in {state_key, config_key} - {""} and not isinstance(value, Tensor)}
    ignored_keys = tuple(str(key) for key, value in tree.items() if state_key and _holds_tensors(value)
                         and key not in (state_key, config_key))
    if not tensors:
        raise InputError(f"{path}: expected tensors in a state dict "
                         f"({', '.join(STATE_KEYS)}, or the file itself), found none")
    config = _plain(tree[config_key]) if config_key else {}
    plain_entries = {key: _plain(value) for key, value in other_entries.items() if key not in ignored_keys}
    check_text([config, plain_entries, *tensors, *ignored_keys], str(path))
    return Source(path, config, {**tensors, **dict(_arrays(other_entries))}, {}, plain_entries, ignored_keys,
                  state_key, config_key)


def _autoencoder(path: Path, name: str) -> Source:
    """Opens a directory whose tensors are in the file `name`."""
    config = read_json(path / CONFIG) if lexists(path / CONFIG) else {}
    if name == GEMMA_SCOPE:
        return Source(path, config, read_file(path / name))
    if name == GEMMA_SCOPE_NPZ:
        return Source(path, config, _npz(path / name))
    if not config:
        raise InputError(f"{path}: expected {CONFIG} next to {name}")
    tree = checkpoint.read(path / name)
    if not isinstance(tree, dict):
        raise InputError(f"{path / name}: expected a dict of tensors, found a {type(tree).__name__}")
    return Source(path, config, {str(key): value for key, value in tree.items() if isinstance(value, Tensor)})


def _npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a NumPy archive, read lazily and without pickle."""
    check_regular(path)

    def lazy(entry: zipfile.ZipInfo, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        def parts() -> Iterator[np.ndarray]:
            with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
                yield np.lib.format.read_array(file, allow_pickle=False)
        return Tensor(shape, dtype, parts)

    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path}: expected an archive of numpy.savez, found a compressed one")
            if (damaged := archive.testzip()) is not None:
                raise InputError(f"{path}: cannot be read: {damaged} is damaged (its checksum differs)")
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    header = (np.lib.format.read_array_header_1_0 if version == (1, 0) else
                              np.lib.format.read_array_header_2_0)
                    shape, _, dtype = header(file)
                if dtype.hasobject:
                    raise InputError(f"{path}: {entry.filename}: expected numbers, found Python objects")
                tensors[entry.filename.removesuffix(".npy")] = lazy(entry, shape, dtype)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except Exception as error:  # zipfile and NumPy raise exceptions of many types for a damaged archive
        with path.open("rb") as file:
            check_fetched(path, file.read(len(GIT_LFS)))
        raise InputError(f"{path}: expected an archive of NumPy arrays, found: {error!s:.200}") from None
    return tensors


def companions_of(path: Path) -> tuple[Path, ...]:
    """Files of a directory that are copied unchanged."""
    return tuple(path / name for name in COMPANIONS if lexists(path / name))


def read_companions(paths: Iterable[Path]) -> dict[str, bytes]:
    """Returns the files' names and contents.

    Raises:
        InputError: a file cannot be read, or is a git-lfs pointer.
    """
    contents = {}
    for path in paths:
        contents[path.name] = read_bytes(path)
        check_fetched(path, contents[path.name])
    return contents


def lexists(path: Path) -> bool:
    """Whether the path exists, broken links included; reading it may still fail."""
    return os.path.lexists(path)


def read_map(path: Path) -> dict[str, str | None]:
    """Reads a user's map: a YAML file of `name in SOURCE: known name`; `{i}` and `{h}` stand for numbers.

    Raises:
        InputError: the file cannot be read, or is not such a mapping.
    """
    tree = yaml_text.read(path)
    if not all(isinstance(key, str) and isinstance(value, str | None) for key, value in tree.items()):
        raise InputError(f"{path}: expected lines of 'name in SOURCE: known name' (no known name for "
                         "tensors to ignore)")
    return tree


def _directory(path: Path) -> dict[str, Tensor]:
    if lexists(path / TENSORS) or lexists(path / INDEX):
        return read_directory(path)
    index = path / f"{TORCH_TENSORS}.index.json"
    if lexists(index) and not lexists(path / TORCH_TENSORS):  # a single file takes precedence
        names = sorted(set(read_weight_map(index).values()))
    else:
        names = [TORCH_TENSORS]
    if missing := [name for name in names if not lexists(path / name)]:
        raise InputError(f"{path}: {missing[0] if lexists(index) else TENSORS} is missing")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tree = checkpoint.read(path / name)
        if not isinstance(tree, dict):
            raise InputError(f"{path / name}: expected a dict of tensors, found a {type(tree).__name__}")
        tensors |= {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}
    return tensors


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
    """Converts to JSON types; drops arrays and tensors, and formats other objects with `repr`."""
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()
                if not isinstance(value, np.ndarray | Tensor)}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return tree if isinstance(tree, str | int | float | bool | None) else repr(tree)


def _pattern(theirs: str, ours: str | None) -> re.Pattern[str]:
    slots, used_slots = re.findall(r"\{(\w?)\}", theirs), re.findall(r"\{(\w?)\}", ours or "")
    plain = re.sub(r"\{\w\}", "", theirs + (ours or ""))
    if len(set(slots)) < len(slots) or set(used_slots) - set(slots) or set("{}") & set(plain):
        raise InputError(f"--map: '{theirs}: {ours}': expected {{i}}, {{h}} or similar for numbers, each "
                         "once in the name of SOURCE, and no others in the known name")
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(theirs)))
