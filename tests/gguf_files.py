"""GGUF files of tiny networks, written with the package `gguf` as llama.cpp's convert_hf_to_gguf.py does.

Two keys are more than that program writes: the second end token of a network, and Mistral's window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.reference_impl.random_weights import random_network
from tilelli_jax.io.json_text import read_json
from tilelli_jax.io.tensors import read_directory
from tilelli_jax.loading.store import from_arrays

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                 "gemma3_text": "gemma3"}
ROUNDED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def write_directory(path: Path, config: Any, format: str = "F32") -> Path:
    """A Hugging Face directory whose weights the format holds exactly, and whose scales are exact plus 1."""
    arrays = {}
    for name, array in random_network(config, 0)[1].items():
        if name.endswith("scale"):
            arrays[name] = np.round(array * 256) / 256
        elif name.endswith("bias"):
            arrays[name] = array
        else:
            arrays[name] = array.astype(ROUNDED[format]).astype(np.float32)
    from_arrays(config, arrays).save_pretrained(path)
    return path


def write_gguf(path: Path, source: Path, *, format: str = "F32", metadata: Mapping[str, Any] | None = None,
               tensors: Mapping[str, Any] | None = None, tokenizer: Mapping[str, Any] | None = None) -> Path:
    """Writes the network of a Hugging Face directory.

    Args:
        format: that of tables and matrices; vectors are stored as F32, as llama.cpp does.
        metadata: keys to add or change; None removes a key.
        tensors: arrays or (stored bytes, format) to add or change, by name in the file; None removes one.
        tokenizer: see `vocabularies`.
    """
    gguf = pytest.importorskip("gguf", reason="gguf (extra: gguf) is not installed")
    tree = read_json(source / "config.json")
    arrays = {name: tensor.read().astype(np.float32) for name, tensor in read_directory(source).items()}
    pairs = _metadata(gguf, tree) | dict(tokenizer or {}) | dict(metadata or {})
    stored = _tensors(gguf, tree, arrays) | dict(tensors or {})
    writer = gguf.GGUFWriter(path, pairs.pop("general.architecture", ""))
    for key, value in pairs.items():
        if value is not None:
            _add(gguf, writer, key, value)
    for name, value in stored.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=gguf.GGMLQuantizationType[value[1]])
        elif value is not None:
            kind = gguf.GGMLQuantizationType["F32" if value.ndim == 1 else format]
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])


def _metadata(gguf: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    architecture = ARCHITECTURES[tree["model_type"]]
    keys = gguf.Keys
    rope = tree["rope_parameters"]
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    pairs = {
        keys.LLM.BLOCK_COUNT: tree["num_hidden_layers"],
        keys.LLM.CONTEXT_LENGTH: tree["max_position_embeddings"],
        keys.LLM.EMBEDDING_LENGTH: tree["hidden_size"],
        keys.LLM.FEED_FORWARD_LENGTH: tree["intermediate_size"],
        keys.Attention.HEAD_COUNT: tree["num_attention_heads"],
        keys.Attention.HEAD_COUNT_KV: tree["num_key_value_heads"],
        keys.Attention.LAYERNORM_RMS_EPS: tree["rms_norm_eps"],
        keys.Attention.KEY_LENGTH: tree["head_dim"], keys.Attention.VALUE_LENGTH: tree["head_dim"],
        keys.Rope.FREQ_BASE: rope["rope_theta"],
        keys.Rope.FREQ_BASE_SWA: local.get("rope_theta")}
    if architecture == "llama":
        pairs |= {keys.LLM.VOCAB_SIZE: tree["vocab_size"], keys.Rope.DIMENSION_COUNT: tree["head_dim"]}
    if tree["model_type"] in ("mistral", "gemma3_text"):
        pairs[keys.Attention.SLIDING_WINDOW] = tree["sliding_window"]
    if rope["rope_type"] in ("linear", "yarn"):
        pairs |= {keys.Rope.SCALING_TYPE: rope["rope_type"], keys.Rope.SCALING_FACTOR: rope["factor"]}
    if rope["rope_type"] == "yarn":
        pairs |= {keys.Rope.SCALING_ORIG_CTX_LEN: rope["original_max_position_embeddings"],
                  keys.Rope.SCALING_YARN_ATTN_FACTOR: rope["attention_factor"],
                  keys.Rope.SCALING_YARN_BETA_FAST: rope["beta_fast"],
                  keys.Rope.SCALING_YARN_BETA_SLOW: rope["beta_slow"]}
    ends = tree["eos_token_id"] if isinstance(tree["eos_token_id"], list) else [tree["eos_token_id"]]
    return {"general.architecture": architecture,
            **{key.format(arch=architecture): value for key, value in pairs.items()},
            keys.Tokenizer.BOS_ID: tree["bos_token_id"],
            **dict(zip((keys.Tokenizer.EOS_ID, keys.Tokenizer.EOT_ID), ends))}


def _tensors(gguf: Any, tree: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    architecture = ARCHITECTURES[tree["model_type"]]
    name_map = gguf.get_tensor_name_map({name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[
        architecture], tree["num_hidden_layers"])
    stored = {}
    for name, array in arrays.items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
            array = permuted(array, tree["num_attention_heads"])
        elif architecture == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
            array = permuted(array, tree["num_key_value_heads"])
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        stored[name_map.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    if tree["rope_parameters"].get("rope_type") == "llama3":
        stored["rope_freqs.weight"] = divisors(tree["rope_parameters"], tree["head_dim"])
    return stored


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys."""
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def divisors(rope: Mapping[str, Any], d_head: int) -> np.ndarray:
    """The divisors of the rotary frequencies that llama.cpp stores for Llama 3.1's scaling."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    result = []
    for i in range(0, d_head, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / d_head)
        turns = 8192 / wavelength
        smooth = (turns - low) / (high - low)
        result.append(1 if turns > high else factor if turns < low else
                      1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)
