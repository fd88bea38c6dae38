"""GGUF files of llama.cpp, read as the Hugging Face checkpoints that they were made from.

The package `gguf` decodes the block formats. Its reader is not used: it takes seconds for a vocabulary, and
maps the whole file into memory. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
_MAX_HEADER = 100 * 2**20  # bytes; a vocabulary of 262,144 tokens takes 8 MB
VERSIONS = (2, 3)
# Types of metadata by their number in the file.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
            11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
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


class _Stored(NamedTuple):
    """A tensor in the file: its shape in our order, its offset in bytes, and the sizes of a block."""

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int
    block: int  # numbers
    block_bytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.block_bytes

    def read(self, step: int = 1) -> Iterator[np.ndarray]:
        """The numbers, some rows at a time; the number of rows is a multiple of `step`.

        Raises:
            InputError: the format cannot be decoded, or the file has become shorter.
        """
        from gguf import quants
        # A vector is one row; it may have blocks, too.
        rows, inside = (self.shape[0], self.shape[1:]) if len(self.shape) > 1 else (1, self.shape)
        row_bytes = math.prod(inside) // self.block * self.block_bytes
        many = max(1, _BLOCK // math.prod(inside) // step) * step
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for first in range(0, rows, many):
                content = file.read(min(many, rows - first) * row_bytes)
                if len(content) < min(many, rows - first) * row_bytes:
                    raise InputError(f"{self.path}: {self.name}: the file ends before it")
                stored = np.frombuffer(content, np.uint8).reshape(-1, row_bytes)
                if self.kind.name in PLAIN:
                    array = stored.view(PLAIN[self.kind.name])
                else:
                    with np.errstate(all="ignore"):  # the reader of the tensor checks for infinite numbers
                        array = quants.dequantize(stored, self.kind)
                yield array.reshape(-1, *self.shape[1:])


def is_gguf(path: Path) -> bool:
    """Whether a path is named like a GGUF file, or is a file that begins like one."""
    if path.suffix == SUFFIX:
        return not path.is_dir()
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # the reader of other formats reports it
        return False


def read_gguf(path: Path) -> GGUF:
    """Opens a GGUF file without decoding its tensors.

    Raises:
        InputError: the file is no complete GGUF file, its architecture or a setting is not supported, or the
            package `gguf` is not installed.
    """
    metadata, stored = _header(path)
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


class _Reader:
    """Reads the parts of a header, which must not be longer than the file."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left = file, min(size, _MAX_HEADER)

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("its header ends early" if self.left < _MAX_HEADER else "its header is too long")
        self.left -= count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode()

    def name(self) -> str:
        if not (name := self.string()).isprintable():
            raise ValueError(f"it has the name {name!r:.60}")
        return name

    def value(self) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self._scalars(kind, 1)[0]
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            if 8 * count > self.left:
                raise ValueError("its header ends early")
            return [self.string() for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"it has metadata of an unknown type ({kind})")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _header(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """The metadata and the tensors of a file."""
    size = check_regular(path)
    try:
        with path.open("rb") as file:
            first = file.read(64)
            if not first.startswith(MAGIC):
                check_fetched(path, first)
                raise InputError(f"{path}: not a GGUF file: expected {MAGIC!r} at its start, "
                                 f"found {first[:4]!r}")
            try:
                import gguf
                import gguf.quants
            except ImportError:
                raise extras.missing("gguf", f"{path}: reading it") from None
            file.seek(len(MAGIC))
            reader = _Reader(file, size - len(MAGIC))
            if (version := reader.number("<I")) not in VERSIONS:
                raise InputError(f"{path}: version: expected one of {', '.join(map(str, VERSIONS))}, "
                                 f"found {version}")
            n_tensors, n_pairs = reader.number("<Q"), reader.number("<Q")
            metadata: dict[str, Any] = {}
            for _ in range(n_pairs):
                key = reader.name()
                if key in metadata:
                    raise ValueError(f"two values of {key:.60}")
                metadata[key] = reader.value()
            stored: dict[str, _Stored] = {}
            for _ in range(n_tensors):
                tensor = _stored(path, reader, gguf)
                if tensor.name in stored:
                    raise ValueError(f"two tensors {tensor.name:.60}")
                stored[tensor.name] = tensor
            step, end = metadata.get("general.alignment", 32), file.tell()
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"general.alignment is {step!r:.40}")
        start = -(-end // step) * step
        placed = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in stored.items()}
        for tensor in placed.values():
            if tensor.offset + tensor.nbytes > size:
                raise ValueError(f"it ends before the end of {tensor.name:.60} (truncated?)")
    except InputError:
        raise
    except (ValueError, struct.error) as error:  # ValueError: also texts that are not UTF-8
        raise InputError(f"{path}: not a complete GGUF file: {error!s:.200}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return metadata, placed


def _stored(path: Path, reader: _Reader, gguf: Any) -> _Stored:
    """The description of one tensor; its offset is that from the start of all tensors."""
    name, n_axes = reader.name(), reader.number("<I")
    if not 1 <= n_axes <= 4:
        raise ValueError(f"{name:.60} has {n_axes} axes")
    shape = tuple(reader.number("<Q") for _ in range(n_axes))[::-1]
    kind, offset = reader.number("<I"), reader.number("<Q")
    try:
        kind = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in PLAIN:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise InputError(f"{path}: {name:.60}: its format {getattr(kind, 'name', kind)} cannot be decoded by "
                         "the installed version of gguf") from None
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"{name:.60} has the shape {shape}, and {kind.name} has blocks of {block}")
    return _Stored(path, name, shape, kind, offset, block, block_bytes)


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


def _tensor(tensor: _Stored, architecture: str, config: Tree) -> Tensor:
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

    return Tensor(tensor.shape, PLAIN.get(tensor.kind.name, PLAIN["F32"]), parts,
                  label=f"{tensor.path}: {tensor.name}")


def _half_split(array: np.ndarray, d_head: int) -> np.ndarray:
    """Rows of heads whose rotated channels are neighbours (2 i, 2 i + 1) → (i, i + d_head / 2)."""
    return array.reshape(-1, d_head // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _config(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, _Stored]) -> Tree:
    """config.json of the checkpoint that the file was made from."""
    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def number(key: str, default: Any = None) -> Any:
        if (found := value(key, default)) is None:
            raise InputError(f"expected the key {architecture}.{key}")
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
            raise InputError(f"{architecture}.{key}: expected a number > 0, found {found!r:.40}")
        return found

    for key in ("expert_count", "nextn_predict_layers", "attn_logit_softcapping", "final_logit_softcapping"):
        if value(key, 0):
            raise InputError(f"{architecture}.{key}: expected 0, found {value(key)!r:.40}")
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
        "rms_norm_eps": _short(number("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"), "eos_token_id": _ends(metadata),
        "attention_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    theta = _short(number("rope.freq_base", 10000.0))
    rope = {"rope_theta": theta, **_scaling(architecture, metadata, tensors, theta, d_head)}
    window = value("attention.sliding_window")
    if architecture == "gemma3":
        query_scale = width // heads if tree["num_hidden_layers"] == 62 else d_head  # 62 blocks: the 27B
        local = {"rope_type": "default", "rope_theta": _short(number("rope.freq_base_swa", 10000.0))}
        # Files without a window have full layers only.
        pattern = {"sliding_window": window} if window else {"sliding_window_pattern": 1}
        return tree | pattern | {"query_pre_attn_scalar": query_scale, "rope_parameters": {
            "full_attention": rope, "sliding_attention": local}}
    if window and architecture == "llama":
        tree |= {"model_type": "mistral", "sliding_window": window}
    return tree | {"rope_parameters": rope}


def _ends(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end a text: of the end of a text, of a turn and of a message."""
    ids = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return list(dict.fromkeys(end for end in ids if end is not None))


def _scaling(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, _Stored], theta: float,
             d_head: int) -> Tree:
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
    factor = _short(factor)
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
            rope[ours] = _short(metadata[prefix + theirs])
    if (more := metadata.get(f"{prefix}attn_factor")) is not None:  # multiplies it
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        rope["attention_factor"] = rope.get("attention_factor", usual) * _short(more)
    return rope


def _llama3(divisors: np.ndarray, theta: float, d_head: int) -> Tree:
    """The settings of Llama 3.1's scaling, of which the file stores the divisors of the frequencies.

    Raises:
        InputError: they are not those of a published network (original length 8192, from 1 to 4 turns).
    """
    low, high, length, factor = 1.0, 4.0, 8192, _short(divisors.max())
    turns = length * float(theta) ** (-np.arange(0, d_head, 2) / d_head) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept) if factor >= 1 else kept
    if expected.shape != divisors.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{ROPE_FREQUENCIES}: expected the divisors of Llama 3.1's rotary scaling, "
                         "found others")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": length}


def _short(number: Any) -> float:
    """A float32 of the metadata as the shortest decimal that it is rounded from, such as 1e-05."""
    return float(str(np.float32(number)))
