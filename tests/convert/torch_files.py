"""PyTorch checkpoints as others write them, made of our arrays without the converter's help."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from tilelli_jax.convert.command import main

import tilelli_jax
from tests.restated.random_weights import random_weights
from tilelli_jax.models import FAMILIES
from tilelli_jax.models.arrays import outline, to_arrays
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.store import from_arrays, load_config
from tilelli_jax.tensors import TENSORS

LITE = RoutedConfig(vocab_size=11, d_model=8, n_layers=2, max_seq_len=6, n_heads=2, d_head=4, top_k=3,
                    dense_expand=2)
PARENT = RoutedConfig(vocab_size=11, d_model=8, n_layers=2, positions="none", n_heads=1, d_head=3, top_k=3,
                      dense_expand=2, local_kernel=3, wide_kernel=7,
                      pathways=("local", "wide", "state", "sparse", "dense"))
ATOME = RoutedConfig(vocab_size=11, d_model=8, n_layers=2, positions="none", n_heads=1, d_head=3, top_k=3,
                     pathways=("local", "state", "sparse"), quantizer="ternary",
                     quantize=("conv", "attention", "router", "embed", "unembed"))
NUMPY = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# What atome's authors call everything; `{h}` is a head. A layout says what it calls otherwise.
NAMES = {
    "prefix": "", "embed": "embed.weight", "positions": "pos_embed.weight", "final_norm": "final_norm",
    "unembed": "unembed.weight", "block": "blocks", "norm": "norm", "norm2": "norm2",
    "router": "router.proj", "local": "local", "wide": "wide", "state": "state", "sparse": "sparse",
    "dense": "dense", "bank": "{path}", "head": "heads.{h}.", "query": "Wq", "key": "Wk", "value": "Wv",
    "up": "up", "down": "down", "a_raw": "a_raw", "b": "b", "c": "c_out"}
ORDER = ("embed", "positions", "blocks", "norm", "local", "wide", "state", "sparse", "dense", "router",
         "norm2", "final_norm", "unembed", "abstain")  # in which a network's modules are made


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@functools.cache
def weights(config: Any, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random weights of a network of this configuration, in that type."""
    if dtype != "float32":
        return {name: array.astype(NUMPY[dtype]) for name, array in weights(config).items()}
    found = outline(FAMILIES[config.family][1], config)
    return random_weights({name: leaf.shape for name, leaf in found.items()}, 0)


@functools.cache
def network(config: Any) -> Any:
    """The network that has them."""
    return from_arrays(config, weights(config))


def assert_holds(path: Path, config: Any, dtype: str = "float32", loaded: bool = False) -> None:
    """A model directory is that network: its configuration, and its weights to the last bit.

    Loading it as well takes a tenth of a second.
    """
    stored = safetensors.numpy.load_file(path / TENSORS)
    assert load_config(path) == config
    assert stored.keys() == weights(config).keys()
    for name, array in weights(config, dtype).items():
        assert (stored[name].dtype, stored[name].shape) == (array.dtype, array.shape), name
        assert stored[name].tobytes() == array.tobytes(), name
    if loaded:
        found = tilelli_jax.load(path)
        assert found.config == config
        for name, array in to_arrays(found).items():
            assert array.tobytes() == np.float32(weights(config, dtype)[name]).tobytes(), name


def state_of(arrays: Mapping[str, np.ndarray], **renamed: str) -> dict[str, np.ndarray]:
    """A routed network's arrays under their names, turned as PyTorch has them."""
    called, state = NAMES | renamed, {}
    for name in sorted(arrays, key=_place):
        array, (first, *rest) = arrays[name], name.split(".")
        if first == "abstain":  # a head beside the network, outside of what wraps that
            state[name.replace("kernel", "weight")] = array.T
        elif first == "blocks":
            block = f"{called['prefix']}{called['block']}.{rest[0]}."
            state |= {block + theirs: part for theirs, part in _in_block(called, rest[1:], array)}
        elif first == "final_norm":
            state[f"{called['prefix']}{called[first]}.{_weight(rest[0])}"] = array
        else:
            state[called["prefix"] + called[first]] = array.T if first == "unembed" else array
    return state


def _in_block(called: Mapping[str, str], ours: list[str], array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    first, *_, last = ours
    if first in ("norm", "norm2"):
        return [(f"{called[first]}.{_weight(last)}", array)]
    if first == "router":
        return [(f"{called[first]}.{_weight(last)}", array.T)]  # of a bias, itself
    kind, _, bank = first.partition("_")
    path = called["bank"].format(path=called[kind], bank=bank or 0)
    if kind in ("local", "wide"):
        return [(f"{path}.{_weight(last)}", array if last == "bias" else array.T[:, None])]
    if kind == "state":
        return [(f"{path}.{called[last]}", array)]
    if kind == "dense":
        return [(f"{path}.{called[ours[1]]}.weight", array.T)]
    letter, heads = called[ours[1]], [head.T for head in array]
    if called["head"]:
        return [(f"{path}.{called['head'].format(h=h)}{letter}.weight", head) for h, head in enumerate(heads)]
    return [(f"{path}.{letter}.weight", np.concatenate(heads))]


def _weight(name: str) -> str:
    return "bias" if name == "bias" else "weight"


def _place(name: str) -> tuple[list[tuple[int, int]], str]:
    places = []
    for part in name.split("."):
        match = re.fullmatch(r"(\w+?)(?:_(\d+))?", part)
        assert match is not None
        rank = ORDER.index(match[1]) if match[1] in ORDER else len(ORDER)
        places.append((int(part), 0) if part.isdigit() else (int(match[2] or 0), rank))
    return places, name


def said_of(config: RoutedConfig) -> dict[str, Any]:
    """The configuration that Tilelli's files have."""
    return {key: getattr(config, key) for key in
            ("vocab_size", "d_model", "n_layers", "n_heads", "top_k", "dense_expand", "max_seq_len")} | {
        "quantize": False if config.quantizer == "none" else config.quantizer} | (
        {"n_banks": config.n_banks} if config.n_banks > 1 else {})


def save_pt(path: Path, tree: Any) -> Path:
    """A `.pt` file of this tree, its NumPy arrays as tensors."""
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
    """Of files that the tests have made or the project ships: it unpickles."""
    import torch
    return torch.load(path, map_location="cpu", weights_only=False)


def assert_same_tree(found: Any, expected: Any, where: str = "") -> None:
    """The same names, and the same tensors and values in them to the last bit."""
    import torch
    if isinstance(expected, dict):
        assert isinstance(found, dict), (where, found)
        assert set(found) == set(expected), (where, sorted(map(str, set(found) ^ set(expected))))
        for key, value in expected.items():
            assert_same_tree(found[key], value, f"{where}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), (where, found)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        one, other = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (found, expected))
        assert one.equal(other), where
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray), (where, found)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert found.tobytes() == expected.tobytes(), where
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected), (where, found, expected)
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_tree(one, other, f"{where}/{i}")
    else:
        plain = expected.item() if isinstance(expected, np.generic) else expected
        assert type(found) is type(plain) and found == plain, (where, found, expected)
