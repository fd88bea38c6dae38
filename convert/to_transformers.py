"""Writes byte-level networks as Hugging Face directories that transformers loads.

A vanilla transformer is a GPT-2 whose biases are 0. A routed network needs code: the directory holds
`modeling_tilelli.py`, and is loaded with `trust_remote_code=True`. Quantised weights are stored as the values
that the forward pass uses. Both have a tokenizer whose ids are the 256 bytes.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json, new_directory
from tilelli_jax.io.tensors import Tensor, in_memory, write_directory
from tilelli_jax.loading import store
from tilelli_jax.models import freeze
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Names, Theirs, transposed

END = 0  # the byte that ends a text: NUL, which texts do not contain
CODE = "modeling_tilelli.py"
_OURS, _THEIRS = "blocks.{i}.", "transformer.h.{i}."
GPT2: Names = {
    "embed.kernel": Theirs("transformer.wte.weight"), "positions.table": Theirs("transformer.wpe.weight"),
    _OURS + "norm1.scale": Theirs(_THEIRS + "ln_1.weight"),
    _OURS + "norm1.bias": Theirs(_THEIRS + "ln_1.bias"),
    _OURS + "attention.qkv.kernel": Theirs(_THEIRS + "attn.c_attn.weight"),
    _OURS + "attention.out.kernel": Theirs(_THEIRS + "attn.c_proj.weight"),
    _OURS + "norm2.scale": Theirs(_THEIRS + "ln_2.weight"),
    _OURS + "norm2.bias": Theirs(_THEIRS + "ln_2.bias"),
    _OURS + "dense.up.kernel": Theirs(_THEIRS + "mlp.c_fc.weight"),
    _OURS + "dense.down.kernel": Theirs(_THEIRS + "mlp.c_proj.weight"),
    "final_norm.scale": Theirs("transformer.ln_f.weight"), "final_norm.bias": Theirs("transformer.ln_f.bias"),
    "unembed.kernel": transposed("lm_head.weight")}


FAMILIES = ("vanilla", "routed")


def write(source: Path, out: Path) -> str:
    """Converts a model directory of a vanilla or routed network, and returns a note for the user, or "".

    Raises:
        InputError: the network has no bytes as tokens; `out` exists or cannot be written.
    """
    config = store.load_config(source)
    if config.vocab_size != 256:
        raise InputError(f"--to hf: {source}: vocab_size: expected 256, the bytes, found {config.vocab_size}")
    arrays = to_arrays(freeze(store.load(source, param_dtype="stored")))
    dropped = [name for name in arrays if name.startswith("abstain.")]
    for name in dropped:
        del arrays[name]
    tensors, tree = (_gpt2 if config.family == "vanilla" else _routed)(config, arrays)
    stored = str(next(iter(tensors.values())).dtype)
    common = {"bos_token_id": END, "eos_token_id": END, "tie_word_embeddings": config.tie_embeddings,
              "dtype": stored, "torch_dtype": stored}
    files = {"config.json": as_json({**tree, **common}), **tokenizer_files(config.max_seq_len),
             "generation_config.json": as_json({"bos_token_id": END, "eos_token_id": END})}
    if config.family == "routed":
        code = importlib.resources.files(f"{__package__}.remote_code").joinpath(CODE)
        files[CODE] = code.read_bytes()
    with new_directory(out) as path:
        write_directory(path, tensors, files, writer="pt")
    return "the abstain head is not part of the written network" if dropped else ""


def _gpt2(config: Any, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    links = mapping.link(GPT2, {name: array.shape for name, array in arrays.items()})
    tensors = mapping.to_theirs(links, {name: in_memory(array) for name, array in arrays.items()})
    dtype, width = tensors["transformer.wte.weight"].dtype, config.d_model
    hidden = config.dense_expand * width
    if config.positions == "none":
        tensors["transformer.wpe.weight"] = in_memory(np.zeros((config.max_seq_len, width), dtype))
    for i in range(config.n_layers):
        for name, size in (("attn.c_attn", 3 * width), ("attn.c_proj", width), ("mlp.c_fc", hidden),
                           ("mlp.c_proj", width)):
            tensors[f"transformer.h.{i}.{name}.bias"] = in_memory(np.zeros(size, dtype))
    return tensors, {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len, "n_embd": width, "n_layer": config.n_layers,
        "n_head": config.n_heads, "n_inner": hidden, "activation_function": "gelu", "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}


def _routed(config: Any, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    settings = config_lib.to_dict(config)
    settings["attention_top_k"] = settings.pop("top_k")
    unused = ("family", "quantizer", "quantize", "abstain_head", "tie_embeddings")
    module = CODE.removesuffix(".py")
    return {name: in_memory(array) for name, array in arrays.items()}, {
        "architectures": ["TilelliForCausalLM"], "model_type": "tilelli_routed",
        "auto_map": {"AutoConfig": f"{module}.TilelliConfig",
                     "AutoModelForCausalLM": f"{module}.TilelliForCausalLM"},
        **{key: value for key, value in settings.items() if key not in unused}}


def tokenizer_files(max_len: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of the tokenizer whose 256 ids are the bytes of UTF-8."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    letters = byte_characters()
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "merges": [],
                  "vocab": {letter: byte for byte, letter in enumerate(letters)}}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_len,
                "bos_token": letters[END], "eos_token": letters[END], "clean_up_tokenization_spaces": False,
                # The letter of the end token may occur in a text, where it is an ordinary character.
                "split_special_tokens": True}
    return {"tokenizer.json": as_json(tokenizer), "tokenizer_config.json": as_json(settings)}


def byte_characters() -> list[str]:
    """The printable letter of each byte in byte-level tokenizers (Radford et al. 2019)."""
    printable = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
