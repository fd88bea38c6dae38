"""GGUF files of llama.cpp, read as the Hugging Face checkpoints that they were made from.

The package `gguf` decodes the block formats. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tilelli_jax import extras
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import check_regular
from tilelli_jax.io.json_text import check_fetched
from tilelli_jax.io.tensors import Tensor
from tilelli_jax.pretrained.hugging_face import Tree

SUFFIX = ".gguf"
MAGIC = b"GGUF"
# Architecture of a file → model_type of config.json.
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
PERMUTED = ("llama",)  # architectures whose query and key rows llama.cpp interleaves
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_BLOCK = 1 << 22  # numbers that are decoded at a time
# Names in the file → those in a Hugging Face directory; in a block after `blk.{i}.` and `model.layers.{i}.`.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
           "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
           "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
           "ffn_down": "mlp.down_proj"}
_GEMMA = _INSIDE | {"ffn_norm": "pre_feedforward_layernorm",
                    "post_attention_norm": "post_attention_layernorm",
                    "post_ffw_norm": "post_feedforward_layernorm"}
ROPE_FREQUENCIES = "rope_freqs.weight"


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


def is_gguf(path: Path) -> bool:
    """Whether a path is named like a GGUF file, or is a file that begins like one."""
    if path.suffix == SUFFIX:
        return not path.is_dir()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GGUF:
    """Opens a GGUF file without decoding its tensors.

    Raises:
        InputError: the file is no complete GGUF file, its architecture or a setting is not supported, or the
            package `gguf` is not installed.
    """
    reader = _reader(path)
    try:
        metadata = {name: field.contents() for name, field in reader.fields.items()
                    if not name.startswith("GGUF.")}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = metadata.get("general.architecture")
        if architecture not in MODEL_TYPES:
            raise InputError(f"general.architecture: expected one of {', '.join(MODEL_TYPES)}, "
                             f"found {architecture!r:.40}")
        if (parts := metadata.get("split.count", 1)) > 1:
            raise InputError("split.count: expected a file that holds the whole network, found one of "
                             f"{parts} parts; llama-gguf-split --merge joins them")
        config = _config(architecture, metadata, tensors)
        named, formats = {}, {}
        for name, tensor in tensors.items():
            if name != ROPE_FREQUENCIES:
                theirs = _their_name(name, architecture)
                named[theirs] = _tensor(tensor, architecture, config, f"{path}: {name}")
                formats[theirs] = tensor.tensor_type.name
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except KeyError as error:
        raise InputError(f"{path}: expected the key {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise InputError(f"{path}: invalid metadata: {error!s:.200}") from None
    return GGUF(config, named, metadata, formats)


def _reader(path: Path) -> Any:
    check_regular(path)
    with path.open("rb") as file:
        first = file.read(64)
    if not first.startswith(MAGIC):
        check_fetched(path, first)
        raise InputError(f"{path}: not a GGUF file: expected {MAGIC!r} at its start, found {first[:4]!r}")
    try:
        import gguf
    except ImportError:
        raise extras.missing("gguf", f"{path}: reading it") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            # Without this, an array longer than the file would be read for ever.
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends early")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(path)
    except Exception as error:  # the library raises many kinds
        raise InputError(f"{path}: not a complete GGUF file: {error!s:.200}") from None


def _their_name(name: str, architecture: str) -> str:
    """The name in a Hugging Face directory; an unknown name is kept."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    inside = _GEMMA if architecture == "gemma3" else _INSIDE
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in inside:
        return name
    return f"model.layers.{match[1]}.{inside[match[2]]}.{kind}"


def _tensor(tensor: Any, architecture: str, config: Tree, label: str) -> Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    convert: Callable[[np.ndarray], np.ndarray] = lambda array: array  # noqa: E731
    part = tensor.name.split(".")[-2]
    if architecture in PERMUTED and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        if shape[0] % (2 * heads):
            raise InputError(f"{tensor.name}: expected a multiple of {2 * heads} rows, found {shape[0]}")
        convert = lambda array: _half_split(array, heads)  # noqa: E731
    elif architecture == "gemma3" and tensor.name.endswith("norm.weight"):
        convert = lambda array: array - 1  # noqa: E731  # llama.cpp stores the factor 1 + scale

    def parts() -> Iterator[np.ndarray]:
        decoded = _decoded(tensor, shape, label)
        if architecture in PERMUTED and part in ("attn_q", "attn_k"):
            yield convert(np.concatenate(list(decoded)))
        else:
            yield from map(convert, decoded)

    return Tensor(shape, PLAIN.get(tensor.tensor_type.name, PLAIN["F32"]), parts, label=label)


def _decoded(tensor: Any, shape: tuple[int, ...], label: str) -> Iterator[np.ndarray]:
    """The numbers of a tensor, some rows at a time."""
    from gguf import quants
    name = tensor.tensor_type.name
    if name in PLAIN:
        yield tensor.data.view(PLAIN[name]).reshape(shape)
        return
    rows = max(1, _BLOCK // math.prod(shape[1:]))
    for first in range(0, shape[0], rows):
        try:
            yield quants.dequantize(tensor.data[first:first + rows], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{label}: its format {name} cannot be decoded: {error}") from None


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads whose rotated channels are neighbours (2 i, 2 i + 1) → (i, i + n)."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _config(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Tree:
    """config.json of the checkpoint that the file was made from."""
    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def required(key: str) -> Any:
        if (found := value(key)) is None:
            raise InputError(f"expected the key {architecture}.{key}")
        return found

    for key in ("expert_count", "nextn_predict_layers"):
        if value(key, 0):
            raise InputError(f"{architecture}.{key}: expected 0, found {value(key)}")
    width, heads, kv_heads = (required("embedding_length"), required("attention.head_count"),
                              value("attention.head_count_kv", required("attention.head_count")))
    d_head = value("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, d_head) != d_head:
            raise InputError(f"{architecture}.{key}: expected {d_head}, the width of a head, "
                             f"found {value(key)}")
    tree: Tree = {
        "model_type": MODEL_TYPES[architecture], "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width, "num_hidden_layers": required("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": d_head,
        "intermediate_size": required("feed_forward_length"),
        "max_position_embeddings": required("context_length"),
        "rms_norm_eps": _short(required("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"), "eos_token_id": _ends(metadata),
        "attention_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    theta = _short(value("rope.freq_base", 10000.0))
    rope = {"rope_theta": theta, **_scaling(architecture, metadata, tensors, theta, d_head)}
    window = value("attention.sliding_window")
    if architecture == "gemma3":
        query_scale = width // heads if tree["num_hidden_layers"] == 62 else d_head  # 62 blocks: the 27B
        local = {"rope_type": "default", "rope_theta": _short(value("rope.freq_base_swa", 10000.0))}
        return tree | {"sliding_window": window, "query_pre_attn_scalar": query_scale,
                       "rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    if window and architecture == "llama":
        tree |= {"model_type": "mistral", "sliding_window": window}
    return tree | {"rope_parameters": rope}


def _ends(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end a text: of the end of a text, of a turn and of a message."""
    ids = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return list(dict.fromkeys(end for end in ids if end is not None))


def _scaling(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any], theta: float,
             d_head: int) -> Tree:
    prefix = f"{architecture}.rope.scaling."
    if ROPE_FREQUENCIES in tensors:
        return _llama3(np.asarray(tensors[ROPE_FREQUENCIES].data, np.float32), theta, d_head)
    kind = metadata.get(f"{prefix}type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise InputError(f"{prefix}type: expected none, linear or yarn, found {kind!r:.40}")
    factor = _short(metadata[f"{prefix}factor"])
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    rope = {"rope_type": "yarn", "factor": factor,
            "original_max_position_embeddings": metadata.get(
                f"{prefix}original_context_length", metadata.get(f"{architecture}.context_length"))}
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"{prefix}{theirs}" in metadata:
            rope[ours] = _short(metadata[f"{prefix}{theirs}"])
    if f"{prefix}attn_factor" in metadata:
        growth = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        rope["attention_factor"] = _short(metadata[f"{prefix}attn_factor"]) * growth
    return rope


def _llama3(divisors: np.ndarray, theta: float, d_head: int) -> Tree:
    """The settings of Llama 3.1's scaling, of which the file stores the divisors of the frequencies.

    Raises:
        InputError: they are not those of a published network (original length 8192, from 1 to 4 turns).
    """
    low, high, length, factor = 1.0, 4.0, 8192, float(divisors.max())
    turns = length * float(theta) ** (-np.arange(0, d_head, 2) / d_head) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if expected.shape != divisors.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{ROPE_FREQUENCIES}: expected the divisors of Llama 3.1's rotary scaling, "
                         "found others")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": length}


def _short(number: Any) -> float:
    """A float32 of the metadata as the shortest decimal that it is rounded from, such as 1e-05."""
    return float(str(np.float32(number)))
