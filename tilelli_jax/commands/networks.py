"""The options that name a network for `generate` and `chat`."""

from __future__ import annotations

import argparse

from tilelli_jax.errors import InputError
from tilelli_jax.loading.language import LanguageModel, load_with_tokenizer
from tilelli_jax.models.causal_lm import ComputeConfig


def add_network_options(parser: argparse.ArgumentParser, dtype: str | None = "float32") -> None:
    """Adds --model and --tokenizer, and how the network is computed.

    Args:
        dtype: default of --dtype; None: float32, or with a sidecar the type of its study.
    """
    parser.add_argument("--model", required=True, metavar="PATH", help=(
        "model directory, Hugging Face directory, GGUF file, or id of the Hugging Face hub (Llama, Mistral, "
        "Qwen, Gemma, Pythia)"))
    parser.add_argument("--tokenizer", default="", metavar="PATH", help=(
        "tokenizer.json, or a directory with it; byte-level networks need none [the network's]"))
    default = dtype or "float32; with a sidecar that of its study"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype, help=(
        f"type of the computation; with bfloat16 the weights keep the type of the file [{default}]"))


def open_network_options(options: argparse.Namespace) -> LanguageModel:
    """Loads the network of `add_network_options`. Raises InputError if it cannot continue text."""
    compute = None if options.dtype in (None, "float32") else ComputeConfig(dtype=options.dtype)
    language = load_with_tokenizer(options.model, options.tokenizer, compute)
    if options.tokenizer and language.model.is_byte_level:
        raise InputError(f"--tokenizer: expected none, as {options.model} is a byte-level network, found "
                         f"{options.tokenizer}")
    return language
