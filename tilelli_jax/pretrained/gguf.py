"""GGUF files of llama.cpp, read as the Hugging Face checkpoints that they were made from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.pretrained.gguf_file import UNQUANTISED, StoredTensor, read_header
from tilelli_jax.pretrained.gguf_tokenizer import special_id
from tilelli_jax.pretrained.hugging_face import Tree

# Architecture of a file → model_type of config.json.
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
PERMUTED = ("llama",)  # architectures whose query and key rows llama.cpp interleaves
# Names in the file → those in a Hugging Face directory; in a block after `blk.{i}.` and `model.layers.{i}.`.
_TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
           "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
           "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
           "ffn_down": "mlp.down_proj"}
_GEMMA = _IN_BLOCK | {"ffn_norm": "pre_feedforward_layernorm",
                    "post_attention_norm": "post_attention_layernorm",
                    "post_ffw_norm": "post_feedforward_layernorm"}
# Settings that are read, or do not affect the outputs, by their names after `{architecture}.`. Any other one
# must be 0, false or the neutral value: with another value llama.cpp computes something else.
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.sliding_window_pattern",
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "tensor_data_layout"}
_NEUTRAL: dict[str, Any] = {"attention.causal": True, "logit_scale": 1, "embedding_scale": 1,
                            "residual_scale": 1}
# Control tokens that end a text, a turn or a message; llama.cpp finds them by their names, too.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>",
        "<|end|>")
CONTROL = 3  # the type of such tokens
EMBEDDING, ROPE_FREQUENCIES = "token_embd.weight", "rope_freqs.weight"


class GGUF(NamedTuple):
    """A GGUF file.

    Attributes:
        config: config.json of the Hugging Face checkpoint.
        tensors: its tensors by name, decoded as they are read.
        metadata: the file's own key-value pairs.
        formats: the format of each tensor, by the names of `tensors`.
    """

    config: Tree
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    formats: dict[str, str]


def read_gguf(path: Path) -> GGUF:
    """Opens a GGUF file without decoding its tensors.

    Raises:
        InputError: the file is no complete GGUF file, its architecture or a setting is not supported, or the
            package `gguf` is not installed.
    """
    metadata, stored = read_header(path)
    try:
        architecture = metadata.get("general.architecture")
        if architecture not in MODEL_TYPES:
            raise InputError(f"general.architecture: expected one of {', '.join(MODEL_TYPES)}, "
                             f"found {architecture!r:.40}")
        if (parts := metadata.get("split.count", 1)) > 1:
            raise InputError("split.count: expected a file that holds the whole network, found one of "
                             f"{parts} parts; llama-gguf-split --merge joins them")
        config = _config(architecture, metadata, stored)
        named, formats = {}, {}
        for name, tensor in stored.items():
            if name != ROPE_FREQUENCIES:
                theirs = _their_name(name, architecture)
                named[theirs] = _tensor(tensor, architecture, config)
                formats[theirs] = tensor.kind.name
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path}: invalid metadata: {error!s:.200}") from None
    return GGUF(config, named, metadata, formats)


def _their_name(name: str, architecture: str) -> str:
    """The name in a Hugging Face directory; an unknown name is kept."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_LEVEL:
        return f"{_TOP_LEVEL[stem]}.{kind}"
    inside = _GEMMA if architecture == "gemma3" else _IN_BLOCK
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in inside:
        return name
    return f"model.layers.{match[1]}.{inside[match[2]]}.{kind}"


def _tensor(tensor: StoredTensor, architecture: str, config: Tree) -> Tensor:
    part = tensor.name.split(".")[-2] if "." in tensor.name else ""
    d_head = 0
    if architecture in PERMUTED and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        if tensor.shape[0] % (2 * heads):
            raise InputError(f"{tensor.name}: expected a multiple of {2 * heads} rows, "
                             f"found {tensor.shape[0]}")
        d_head = tensor.shape[0] // heads
    # llama.cpp stores the factor 1 + scale.
    offset = 1 if architecture == "gemma3" and tensor.name.endswith("norm.weight") else 0

    def parts() -> Iterator[np.ndarray]:
        for array in tensor.read(d_head or 1):
            yield _half_split(array, d_head) if d_head else array - offset if offset else array

    return Tensor(tensor.shape, UNQUANTISED.get(tensor.kind.name, UNQUANTISED["F32"]), parts,
                  label=f"{tensor.path}: {tensor.name}")


def _half_split(array: np.ndarray, d_head: int) -> np.ndarray:
    """Rows of heads whose rotated channels are neighbours (2 i, 2 i + 1) → (i, i + d_head / 2)."""
    return array.reshape(-1, d_head // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _config(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Tree:
    """config.json of the checkpoint that the file was made from."""
    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def number(key: str, default: Any = None) -> Any:
        if (found := value(key, default)) is None:
            raise InputError(f"expected the key {architecture}.{key}")
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
            raise InputError(f"{architecture}.{key}: expected a number > 0, found {found!r:.40}")
        return found

    for key, found in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name != key and name not in _READ and found and found != _NEUTRAL.get(name):
            raise InputError(f"{key}: expected {_NEUTRAL.get(name, 0)}, found {found!r:.40}")
        if name in _NEUTRAL and not found:
            raise InputError(f"{key}: expected {_NEUTRAL[name]}, found {found!r:.40}")
    if EMBEDDING not in tensors:
        raise InputError(f"expected the tensor {EMBEDDING}")
    n_tokens, tokens = tensors[EMBEDDING].shape[0], metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) > n_tokens:
        raise InputError(f"tokenizer.ggml.tokens: expected at most {n_tokens} tokens, the rows of "
                         f"{EMBEDDING}, found {len(tokens)}")
    width, heads = number("embedding_length"), number("attention.head_count")
    d_head = number("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, d_head) != d_head:
            raise InputError(f"{architecture}.{key}: expected {d_head}, the width of a head, "
                             f"found {value(key)!r:.40}")
    tree: Tree = {
        "model_type": MODEL_TYPES[architecture], "vocab_size": n_tokens, "hidden_size": width,
        "num_hidden_layers": number("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads), "head_dim": d_head,
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _shortest_decimal(number("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": special_id(metadata, "bos"), "eos_token_id": _end_ids(metadata),
        "attention_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    theta = _shortest_decimal(number("rope.freq_base", 10000.0))
    rope = {"rope_theta": theta, **_scaling(architecture, metadata, tensors, theta, d_head)}
    window = value("attention.sliding_window")
    if architecture == "gemma3":
        query_scale = width // heads if tree["num_hidden_layers"] == 62 else d_head  # 62 blocks: the 27B
        local = {"rope_type": "default",
                 "rope_theta": _shortest_decimal(number("rope.freq_base_swa", 10000.0))}
        tree |= _sliding_layers(architecture, metadata, window, tree["num_hidden_layers"])
        return tree | {"query_pre_attn_scalar": query_scale, "rope_parameters": {
            "full_attention": rope, "sliding_attention": local}}
    for key in ("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"):
        if value(key) and (architecture, key) != ("llama", "attention.sliding_window"):
            raise InputError(f"{architecture}.{key}: expected 0, found {value(key)!r:.40}")
    if window:
        tree |= {"model_type": "mistral", "sliding_window": window}
    return tree | {"rope_parameters": rope}


def _sliding_layers(architecture: str, metadata: Mapping[str, Any], window: Any, n_layers: int) -> Tree:
    """The window and the kinds of the layers; a file without a window has full layers only."""
    if not window:
        return {"sliding_window_pattern": 1}
    key = f"{architecture}.attention.sliding_window_pattern"
    pattern = metadata.get(key, 6)  # the number of layers up to a full one, or whether each is sliding
    if isinstance(pattern, list):
        if len(pattern) != n_layers or not all(isinstance(value, bool) for value in pattern):
            raise InputError(f"{key}: expected true or false for each of {n_layers} layers, "
                             f"found {pattern!r:.40}")
        return {"sliding_window": window, "layer_types": [
            "sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern]}
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
        raise InputError(f"{key}: expected a number ≥ 1 or a list, found {pattern!r:.40}")
    return {"sliding_window": window, "sliding_window_pattern": pattern}


def _end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end a text: those that the file names, then the control tokens in `ENDS`."""
    stated = (special_id(metadata, key) for key in ("eos", "eot", "eom"))
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    found = [i for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
             if kind == CONTROL and token in ENDS]
    return list(dict.fromkeys(end for end in (*stated, *found) if end is not None))


def _scaling(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor],
             theta: float, d_head: int) -> Tree:
    prefix = f"{architecture}.rope.scaling."
    # llama.cpp takes a factor without a type as that of linear scaling, and has an old name for it.
    factor = metadata.get(f"{prefix}factor", metadata.get(f"{architecture}.rope.scale_linear"))
    kind = metadata.get(f"{prefix}type", "linear" if factor else "none")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"{prefix}type: expected none, linear or yarn, found {kind!r:.40}")
    if ROPE_FREQUENCIES in tensors:
        if kind != "none":
            raise InputError(f"{prefix}type: expected none in a file with {ROPE_FREQUENCIES}, found {kind}")
        divisors = np.concatenate(list(tensors[ROPE_FREQUENCIES].read()))
        return _llama3(divisors.astype(np.float32), theta, d_head)
    if kind == "none":
        return {"rope_type": "default"}
    if factor is None:
        raise InputError(f"expected the key {prefix}factor")
    factor = _shortest_decimal(factor)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    for key, expected in (("yarn_ext_factor", 1), ("yarn_log_multiplier", 0)):
        if (found := metadata.get(prefix + key, expected)) != expected:
            raise InputError(f"{prefix}{key}: expected {expected}, found {found!r:.40}")
    rope = {"rope_type": "yarn", "factor": factor,
            "original_max_position_embeddings": metadata.get(
                f"{prefix}original_context_length", metadata.get(f"{architecture}.context_length"))}
    # The converter stores the whole factor of queries and keys, as in config.json.
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow"),
                         ("yarn_attn_factor", "attention_factor")):
        if prefix + theirs in metadata:
            rope[ours] = _shortest_decimal(metadata[prefix + theirs])
    if (more := metadata.get(f"{prefix}attn_factor")) is not None:  # multiplies it
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        rope["attention_factor"] = rope.get("attention_factor", usual) * _shortest_decimal(more)
    return rope


def _llama3(divisors: np.ndarray, theta: float, d_head: int) -> Tree:
    """The settings of Llama 3.1's scaling, of which the file stores the divisors of the frequencies.

    Raises:
        InputError: they are not those of a published network (original length 8192, from 1 to 4 turns).
    """
    low, high, length, factor = 1.0, 4.0, 8192, _shortest_decimal(divisors.max())
    turns = length * float(theta) ** (-np.arange(0, d_head, 2) / d_head) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept) if factor >= 1 else kept
    if expected.shape != divisors.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{ROPE_FREQUENCIES}: expected the divisors of Llama 3.1's rotary scaling, "
                         "found different values")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": length}


def _shortest_decimal(number: Any) -> float:
    """A float32 of the metadata as the shortest decimal that it is rounded from, such as 1e-05."""
    return float(str(np.float32(number)))
