"""The tokenizer of a GGUF file, as the files of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilelli_jax import extras
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Names of pre-tokenizers whose vocabulary is tried before its merges, and to whose texts llama.cpp adds BOS.
LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # theirs → llama.cpp's


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json from the metadata of a GGUF file; none if it has no tokenizer.

    transformers builds the tokenizer.

    Raises:
        InputError: transformers is not installed, or cannot build this kind of tokenizer.
    """
    key = "tokenizer.ggml."
    tokens, kind = metadata.get(f"{key}tokens"), metadata.get(f"{key}model")
    if tokens is None or kind in (None, "none"):
        return {}
    try:
        import tokenizers
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:
        raise extras.missing("transformers", f"{source}: its tokenizer") from None
    pre = metadata.get(f"{key}pre")
    described = {ours: metadata[f"{key}{theirs}"] for theirs, ours in {
        "model": "tokenizer_type", "pre": "pre_tokenizer_type", "tokens": "tokens", "scores": "scores",
        "token_type": "token_type", "merges": "merges"}.items() if f"{key}{theirs}" in metadata}
    special = {f"{ours}_token": tokens[index] for ours, theirs in _SPECIAL.items()
               if (index := metadata.get(f"{key}{theirs}_token_id")) is not None}
    try:
        tokenizer, _ = convert_gguf_tokenizer(metadata["general.architecture"], described)
        if pre == "smollm":  # single digits
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
        if kind == "gpt2" and pre in LLAMA3:
            tokenizer.model.ignore_merges = True
        added = [(special[f"{end}_token"], metadata[f"{key}{end}_token_id"])
                 if metadata.get(f"{key}add_{end}_token", end == "bos" and (kind == "llama" or pre in LLAMA3))
                 and f"{end}_token" in special else None for end in ("bos", "eos")]
        bos, eos = added
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=" ".join([*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]),
            special_tokens=[token for token in added if token])
    except Exception as error:  # the libraries raise many kinds
        raise InputError(f"{source}: its tokenizer ({kind}, {pre}) cannot be built: {error!s:.200}") from None
    settings = {**special, "add_bos_token": bos is not None, "add_eos_token": eos is not None,
                "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return {TOKENIZER: tokenizer.to_str().encode(), TOKENIZER_CONFIG: as_json(settings)}
