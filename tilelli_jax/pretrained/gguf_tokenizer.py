"""The tokenizer of a GGUF file, as the files of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilelli_jax import extras
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_KEY = "tokenizer.ggml."
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # theirs → llama.cpp's
# Ids of a sentencepiece tokenizer whose file does not state them, as in llama.cpp.
_DEFAULT_IDS = {"unknown": 0, "bos": 1, "eos": 2}
# Types of tokens.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# How texts are cut into words, by the name of the pre-tokenizer. The patterns are those of the networks'
# tokenizer.json; llama-vocab.cpp of llama.cpp says which names share one.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Names whose vocabulary is tried before its merges, and to whose texts llama.cpp adds BOS.
WHOLE_TOKENS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                "tekken")
SPLITS = {**dict.fromkeys((*WHOLE_TOKENS, "dbrx", "smaug-bpe"), _LLAMA3), "tekken": _TEKKEN,
          **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2)}
AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "trillion")
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")  # each cut off


def special_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """The id of a special token under llama.cpp's name, such as bos, eos, unknown; None: it has none."""
    default = _DEFAULT_IDS.get(name) if metadata.get(f"{_KEY}model") == "llama" else None
    return metadata.get(f"{_KEY}{name}_token_id", default)


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json from the metadata of a GGUF file; none if it has no tokenizer.

    Supports byte-level BPE ("gpt2") and sentencepiece's BPE ("llama").

    Raises:
        InputError: the tokenizer is of another kind or invalid, or the package tokenizers is not installed.
    """
    tokens, kind = metadata.get(f"{_KEY}tokens"), metadata.get(f"{_KEY}model")
    if tokens is None or kind in (None, "none"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{source}: {_KEY}model: expected gpt2 or llama, found {kind!r:.40}")
    try:
        from tokenizers import processors
    except ImportError:
        raise extras.missing("tokenizers", f"{source}: reading the tokenizer") from None
    try:
        special = {f"{ours}_token": tokens[index] for ours, theirs in _SPECIAL.items()
                   if (index := special_id(metadata, theirs)) is not None}
        tokenizer = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata, special)
        _add_tokens(tokenizer, metadata, special)
        begins = kind == "llama" or metadata.get(f"{_KEY}pre") in WHOLE_TOKENS
        bos, eos = ([f"{end}_token"] if metadata.get(f"{_KEY}add_{end}_token", default) and
                    f"{end}_token" in special else [] for end, default in (("bos", begins), ("eos", False)))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(special[name] for name in bos), "$A", *(special[name] for name in eos)],
            special_tokens=[(special[name], tokens.index(special[name])) for name in (*bos, *eos)])
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except Exception as error:  # the library raises many kinds
        text = " ".join(f"{error!s:.200}".split())
        raise InputError(f"{source}: its tokenizer cannot be built: {type(error).__name__}: {text}") from None
    settings = {**special, "add_bos_token": bool(bos), "add_eos_token": bool(eos),
                "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    return {TOKENIZER: tokenizer.to_str().encode(), TOKENIZER_CONFIG: as_json(settings)}


def _byte_level(metadata: Mapping[str, Any]) -> Any:
    """A tokenizer whose tokens are spelled in GPT-2's 256 letters for bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    pre = metadata.get(f"{_KEY}pre")
    if pre is None:
        raise InputError(f"expected the key {_KEY}pre, which old files lack; --tokenizer names a tokenizer "
                         "elsewhere")
    if pre not in (known := (*SPLITS, *AS_GPT2, *DIGITS)):
        raise InputError(f"{_KEY}pre: expected one of {', '.join(known)}, found {pre!r:.40}")
    if f"{_KEY}merges" not in metadata:
        raise InputError(f"expected the key {_KEY}merges")
    tokenizer = Tokenizer(models.BPE(
        {token: i for i, token in enumerate(metadata[f"{_KEY}tokens"])},
        [tuple(merge.split(" ")) for merge in metadata[f"{_KEY}merges"]], ignore_merges=pre in WHOLE_TOKENS))
    first: list[Any]
    if pre in SPLITS:
        first = [pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if pre in DIGITS else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], special: Mapping[str, str]) -> Any:
    """A tokenizer that merges neighbours into the token of the highest score; ▁ is a space.

    As in llama.cpp and sentencepiece, a space is added before each text and after each special token, unless
    the file says otherwise.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    tokens = metadata[f"{_KEY}tokens"]
    if gemma := metadata["general.architecture"].startswith("gemma"):
        # Runs of spaces are stored as such, and the order of the tokens is that of the merges.
        tokens = ["▁" * len(token) if token.isspace() and " " in token else token for token in tokens]
        scores: Any = range(0, -len(tokens), -1)
    elif len(scores := metadata[f"{_KEY}scores"]) != len(tokens):
        raise InputError(f"{_KEY}scores: expected {len(tokens)} scores, found {len(scores)}")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [(-scores[i], i, cut, (token[:cut], token[cut:])) for token, i in ids.items()
              for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids]
    tokenizer = Tokenizer(models.BPE(ids, [pair for *_, pair in sorted(merges)], fuse_unk=True,
                                     byte_fallback=True, unk_token=special.get("unk_token")))
    prefix = metadata.get(f"{_KEY}add_space_prefix", not gemma)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _add_tokens(tokenizer: Any, metadata: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Marks the tokens that are found in a text as a whole, before its words."""
    from tokenizers import AddedToken
    kinds = metadata.get(f"{_KEY}token_type", [])
    typed = list(zip(metadata[f"{_KEY}tokens"], kinds))
    control = [token for token, kind in typed if kind in (_UNKNOWN, _CONTROL)]
    whole = [token for token, kind in typed if kind == _USER_DEFINED]
    vocab = tokenizer.get_vocab()
    for names, is_special in ((dict.fromkeys((*control, *special.values())), True), (whole, False)):
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=is_special)
                              for name in names if name in vocab])
