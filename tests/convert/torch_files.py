"""Writes PyTorch checkpoints in the layouts of other programs, from our arrays, without the converter."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

import tilelli_jax
from tests.reference_impl.random_weights import random_weights
from tilelli_jax.convert.command import main
from tilelli_jax.io.tensors import TENSORS
from tilelli_jax.loading.store import from_arrays, load_config
from tilelli_jax.models import FAMILIES
from tilelli_jax.models.arrays import abstract_arrays, to_arrays
from tilelli_jax.models.routed import RoutedConfig

LITE = RoutedConfig(vocab_size=11, d_model=8, n_layers=2, max_seq_len=6, n_heads=2, d_head=4, top_k=3,
                    dense_expand=2)
PARENT = RoutedConfig(vocab_size=11, d_model=8, n_layers=2, positions="none", n_heads=1, d_head=3, top_k=3,
                      dense_expand=2, local_kernel=3, wide_kernel=7,
                      pathways=("local", "wide", "state", "sparse", "dense"))
ATOME = RoutedConfig(vocab_size=11, d_model=8, n_layers=2, positions="none", n_heads=1, d_head=3, top_k=3,
                     pathways=("local", "state", "sparse"), quantizer="ternary",
                     quantize=("conv", "attention", "router", "embed", "unembed"))
NUMPY = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# Names in atome's files; `{h}` is a head. A layout overrides some of them.
NAMES = {
    "prefix": "", "embed": "embed.weight", "positions": "pos_embed.weight", "final_norm": "final_norm",
    "unembed": "unembed.weight", "block": "blocks", "norm": "norm", "norm2": "norm2",
    "router": "router.proj", "local": "local", "wide": "wide", "state": "state", "sparse": "sparse",
    "dense": "dense", "bank": "{path}", "head": "heads.{h}.", "query": "Wq", "key": "Wk", "value": "Wv",
    "up": "up", "down": "down", "a_raw": "a_raw", "b": "b", "c": "c_out"}
ORDER = ("embed", "positions", "blocks", "norm", "local", "wide", "state", "sparse", "dense", "router",
         "norm2", "final_norm", "unembed", "abstain")  # order in which a network creates its modules


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@functools.cache
def weights(config: Any, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random weights of a network of this configuration, in this type."""
    if dtype != "float32":
        return {name: array.astype(NUMPY[dtype]) for name, array in weights(config).items()}
    actual = abstract_arrays(FAMILIES[config.family][1], config)
    return random_weights({name: leaf.shape for name, leaf in actual.items()}, 0)


@functools.cache
def network(config: Any) -> Any:
    """The network with these weights."""
    return from_arrays(config, weights(config))


def assert_holds(path: Path, config: Any, dtype: str = "float32", loaded: bool = False) -> None:
    """Asserts that a model directory has this configuration and exactly these weights.

    Loading the model as well takes 0.1 s.
    """
    stored = safetensors.numpy.load_file(path / TENSORS)
    assert load_config(path) == config
    assert stored.keys() == weights(config).keys()
    for name, array in weights(config, dtype).items():
        assert (stored[name].dtype, stored[name].shape) == (array.dtype, array.shape), name
        assert stored[name].tobytes() == array.tobytes(), name
    if loaded:
        actual = tilelli_jax.load(path)
        assert actual.config == config
        for name, array in to_arrays(actual).items():
            assert array.tobytes() == np.float32(weights(config, dtype)[name]).tobytes(), name


def state_of(arrays: Mapping[str, np.ndarray], **renamed: str) -> dict[str, np.ndarray]:
    """A routed network's arrays under the file's names and in PyTorch's layout."""
    part_names, state = NAMES | renamed, {}
    for name in sorted(arrays, key=_order_key):
        array, (part, *rest) = arrays[name], name.split(".")
        if part == "abstain":  # the abstain head lies outside the wrapped network
            state[name.replace("kernel", "weight")] = array.T
        elif part == "blocks":
            block = f"{part_names['prefix']}{part_names['block']}.{rest[0]}."
            state |= {block + theirs: part for theirs, part in _in_block(part_names, rest[1:], array)}
        elif part == "final_norm":
            state[f"{part_names['prefix']}{part_names[part]}.{_weight(rest[0])}"] = array
        else:
            state[part_names["prefix"] + part_names[part]] = array.T if part == "unembed" else array
    return state


def _in_block(part_names: Mapping[str, str], ours: list[str],
              array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Names within the block and arrays in PyTorch's layout, for one array of ours."""
    part, *_, last = ours
    if part in ("norm", "norm2"):
        return [(f"{part_names[part]}.{_weight(last)}", array)]
    if part == "router":
        return [(f"{part_names[part]}.{_weight(last)}", array.T)]  # a bias is its own transpose
    kind, _, bank = part.partition("_")
    path = part_names["bank"].format(path=part_names[kind], bank=bank or 0)
    if kind in ("local", "wide"):
        return [(f"{path}.{_weight(last)}", array if last == "bias" else array.T[:, None])]
    if kind == "state":
        return [(f"{path}.{part_names[last]}", array)]
    if kind == "dense":
        return [(f"{path}.{part_names[ours[1]]}.weight", array.T)]
    letter, heads = part_names[ours[1]], [head.T for head in array]
    if part_names["head"]:
        return [(f"{path}.{part_names['head'].format(h=h)}{letter}.weight", head)
                for h, head in enumerate(heads)]
    return [(f"{path}.{letter}.weight", np.concatenate(heads))]


def _weight(name: str) -> str:
    return "bias" if name == "bias" else "weight"


def _order_key(name: str) -> tuple[list[tuple[int, int]], str]:
    places = []
    for part in name.split("."):
        match = re.fullmatch(r"(\w+?)(?:_(\d+))?", part)
        assert match is not None
        rank = ORDER.index(match[1]) if match[1] in ORDER else len(ORDER)
        places.append((int(part), 0) if part.isdigit() else (int(match[2] or 0), rank))
    return places, name


def file_config(config: RoutedConfig) -> dict[str, Any]:
    """The configuration in the format of Tilelli's files."""
    return {key: getattr(config, key) for key in
            ("vocab_size", "d_model", "n_layers", "n_heads", "top_k", "dense_expand", "max_seq_len")} | {
        "quantize": False if config.quantizer == "none" else config.quantizer} | (
        {"n_banks": config.n_banks} if config.n_banks > 1 else {})


def save_pt(path: Path, tree: Any) -> Path:
    """Writes this tree to a `.pt` file, NumPy arrays as tensors."""
    import torch
    torch.save(as_torch(tree), path)
    return path


def as_torch(tree: Any) -> Any:
    import torch
    if isinstance(tree, dict):
        return {key: as_torch(value) for key, value in tree.items()}
    if not isinstance(tree, np.ndarray):
        return tree
    array = np.array(tree, order="C")
    if array.dtype == NUMPY["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def load_pt(path: Path) -> Any:
    """Loads by unpickling, so only for files from the tests or the project."""
    import torch
    return torch.load(path, map_location="cpu", weights_only=False)


def assert_same_tree(actual: Any, expected: Any, where: str = "") -> None:
    """Asserts equal names, and exactly equal tensors and values."""
    import torch
    if isinstance(expected, dict):
        assert isinstance(actual, dict), (where, actual)
        assert set(actual) == set(expected), (where, sorted(map(str, set(actual) ^ set(expected))))
        for key, value in expected.items():
            assert_same_tree(actual[key], value, f"{where}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), (where, actual)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        actual_bytes, expected_bytes = (tensor.detach().contiguous().view(-1).view(torch.uint8)
                                        for tensor in (actual, expected))
        assert actual_bytes.equal(expected_bytes), where
    elif isinstance(expected, np.ndarray):
        assert isinstance(actual, np.ndarray), (where, actual)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        assert actual.tobytes() == expected.tobytes(), where
    elif isinstance(expected, list | tuple):
        assert type(actual) is type(expected) and len(actual) == len(expected), (where, actual, expected)
        for i, (actual_item, expected_item) in enumerate(zip(actual, expected, strict=True)):
            assert_same_tree(actual_item, expected_item, f"{where}/{i}")
    else:
        plain = expected.item() if isinstance(expected, np.generic) else expected
        assert type(actual) is type(plain) and actual == plain, (where, actual, expected)
