"""Networks with their tokenizers, from any source: our directories, Hugging Face's, GGUF files, the hub."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from tilelli_jax import extras
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import check_regular
from tilelli_jax.io.json_text import GIT_LFS, check_fetched, read_json, read_text
from tilelli_jax.loading import store
from tilelli_jax.loading.sources import local_path
from tilelli_jax.models import FAMILIES
from tilelli_jax.models.arrays import ParamType
from tilelli_jax.models.causal_lm import CausalLM, ComputeConfig
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.pretrained.gguf import GGUF, read_gguf
from tilelli_jax.pretrained.gguf_file import UNQUANTISED, is_gguf
from tilelli_jax.pretrained.gguf_tokenizer import TOKENIZER, TOKENIZER_CONFIG, tokenizer_files

SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


class Encoding(NamedTuple):
    """Token ids of a text, and the span `[start, stop)` of each in the text, in characters."""

    ids: list[int]
    spans: list[tuple[int, int]]


# How byte-level BPE (GPT-2) writes bytes: printable ones of Latin-1 as themselves, the others from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte


class Tokenizer(Protocol):
    """Converts text to tokens and back; only `encode_with_spans` can add BOS and EOS tokens."""

    @property
    def special(self) -> tuple[str, ...]:
        """The special tokens, as text."""

    def encode(self, text: str) -> list[int]: ...

    def encode_with_spans(self, text: str, special: bool = False) -> Encoding:
        """Token ids with their spans. `special`: add BOS and EOS tokens, whose span is (0, 0)."""

    def decode(self, ids: list[int], special: bool = True) -> str:
        """The text; invalid UTF-8 becomes replacement characters. `special`: include special tokens."""

    def token(self, text: str) -> int | None:
        """The id of the token with this text; None if there is none."""

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token, which may be a part of a character; of a special token those of its text."""


class ByteTokenizer:
    """Tokenizer whose tokens are UTF-8 bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    @property
    def special(self) -> tuple[str, ...]:
        return ()

    def encode_with_spans(self, text: str, special: bool = False) -> Encoding:
        spans = [(i, i + 1) for i, letter in enumerate(text) for _ in letter.encode()]
        return Encoding(self.encode(text), spans)

    def decode(self, ids: list[int], special: bool = True) -> str:
        return bytes(id for id in ids if id < 256).decode("utf-8", errors="replace")

    def token(self, text: str) -> int | None:
        encoded = text.encode()
        return encoded[0] if len(encoded) == 1 else None

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b""


class HuggingFaceTokenizer:
    """Tokenizer from a tokenizer.json.

    Args:
        path: the file, or a directory that contains it.

    Raises:
        InputError: the file does not exist or cannot be read, or the required extra is not installed.
    """

    def __init__(self, path: Path) -> None:
        file = path / TOKENIZER if path.is_dir() else path
        if not os.path.lexists(file):
            raise InputError(f"{file}: no such file: expected the network's tokenizer")
        check_regular(file)
        with file.open("rb") as content:
            check_fetched(file, content.read(len(GIT_LFS)))
        self._read(lambda library: library.from_file(str(file)), str(file))

    @classmethod
    def from_json(cls, text: str, source: str) -> HuggingFaceTokenizer:
        """The tokenizer from the content of a tokenizer.json; `source` is for error messages."""
        tokenizer = cls.__new__(cls)
        tokenizer._read(lambda library: library.from_str(text), source)
        return tokenizer

    def _read(self, read: Callable[[Any], Any], source: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise extras.missing("tokenizers", f"{source}: reading the tokenizer") from None
        try:
            self._tokenizer = read(tokenizers.Tokenizer)
        except Exception as error:  # the library raises Exception itself
            raise InputError(f"{source}: not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()  # the file may enable truncation and padding
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def special(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._tokenizer.get_added_tokens_decoder().values()
                     if token.special)

    def encode_with_spans(self, text: str, special: bool = False) -> Encoding:
        encoding = self._tokenizer.encode(text, add_special_tokens=special)
        return Encoding(encoding.ids, encoding.offsets)

    def decode(self, ids: list[int], special: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=not special)

    def token(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def token_bytes(self, id: int) -> bytes:
        text = self._tokenizer.id_to_token(id)
        if text is None:
            return b""
        if id in self._tokenizer.get_added_tokens_decoder():
            return text.encode()
        if self._is_byte_level:
            return bytes(BYTE_OF[letter] for letter in text if letter in BYTE_OF)
        if (byte := BYTE_TOKEN.fullmatch(text)) is not None:
            return bytes([int(byte[1], 16)])
        return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        """Whether tokens are written in the letters of BYTE_OF."""
        return '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template (Jinja) of a tokenizer.

    Attributes:
        template: the Jinja template.
        special: special tokens that the template may use, such as bos_token → text.
        source: the file of the template, for error messages.
    """

    template: str
    special: dict[str, str]
    source: str

    def format_prompt(self, text: str, *, thinking: bool = False) -> str:
        """Formats one user turn and the beginning of the assistant's turn; see `format_messages`."""
        return self.format_messages([{"role": "user", "content": text}], thinking=thinking)

    def format_messages(self, messages: Sequence[Mapping[str, str]], *, thinking: bool | None = False,
                        continue_last: bool = False) -> str:
        """Formats a conversation and the beginning of the assistant's next turn.

        Args:
            messages: role ("user" or "assistant") and content of each.
            thinking: enable thinking before the answer; templates without this option ignore it. None: the
                template's default.
            continue_last: leave the last message open instead of beginning a turn.

        Raises:
            InputError: the template raises an error, or the required extra is not installed.
        """
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError:
            raise extras.missing("transformers", f"{self.source}: rendering the chat template") from None
        render: Any = render_jinja_template  # its annotations do not match its behaviour
        try:
            options = {} if thinking is None else {"enable_thinking": thinking}
            texts, _ = render([list(messages)], chat_template=self.template,
                              add_generation_prompt=not continue_last, continue_final_message=continue_last,
                              **options, **self.special)
        except Exception as error:  # templates may raise any exception
            raise InputError(f"{self.source}: the template raises an error: {error}") from None
        return texts[0]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal network, its tokenizer, and its chat template if the tokenizer has one.

    Attributes:
        bos_id, eos_id: the tokens that begin and end a text, as the tokenizer's files name them, or else the
            network's configuration; None: there is none.
    """

    model: Any
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None
    bos_id: int | None = None
    eos_id: int | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without BOS and EOS tokens."""
        return self.tokenizer.encode(text)


def load(path: str | Path, compute: ComputeConfig | None = None, *, param_dtype: ParamType | None = None,
         mesh: Mesh | None = None) -> Any:
    """Loads a network of any source and family.

    Args:
        path: a model directory, a Hugging Face directory of a supported family, a GGUF file, or an id of the
            Hugging Face hub (`owner/name`).
        param_dtype: type of the weights in memory; "stored" keeps the types of the file, and decodes blocks
            of a GGUF file to float32. By default float32, or, if the network is computed in bfloat16, the
            stored types with blocks in bfloat16.
        mesh: devices over which each weight is sharded as it is read (see `sharding.RULES`).

    Raises:
        InputError: it is none of these, or cannot be read.
    """
    return _open(local_path(path), compute, param_dtype, mesh)[0]


def _open(path: Path, compute: ComputeConfig | None, param_dtype: ParamType | None,
          mesh: Mesh | None) -> tuple[Any, GGUF | None]:
    """The network at a local path, and the file's content if it is a GGUF file."""
    in_bfloat16 = param_dtype is None and compute is not None and compute.dtype == "bfloat16"
    if param_dtype is None:
        param_dtype = "stored" if in_bfloat16 else "float32"
    if is_gguf(path):
        file = read_gguf(path)
        network = _network_of(file.config["model_type"], str(path))
        tensors = {name: tensor.astype(np.dtype(ml_dtypes.bfloat16))
                   if in_bfloat16 and file.formats[name] not in UNQUANTISED else tensor
                   for name, tensor in file.tensors.items()}
        return network.from_checkpoint(file.config, tensors, str(path), compute, param_dtype, mesh), file
    tree = read_json(path / store.CONFIG) if os.path.lexists(path / store.CONFIG) else {}
    model_type = tree.get("model_type")
    if "family" in tree or model_type is None:
        return store.load(path, compute, param_dtype=param_dtype, mesh=mesh), None
    network = _network_of(model_type, str(path / store.CONFIG))
    return network.from_pretrained(path, compute, param_dtype=param_dtype, mesh=mesh), None


def _network_of(model_type: Any, source: str) -> type[PretrainedModel]:
    """The class of networks with a `model_type` of transformers."""
    supported = {name: network for _, network in FAMILIES.values()
                 if isinstance(network, type) and issubclass(network, PretrainedModel)
                 for name in network.hugging_face.model_types}
    if not isinstance(model_type, str) or model_type not in supported:
        raise InputError(f"{source}: model_type: expected one of {', '.join(supported)}, "
                         f"found {model_type!r}")
    return supported[model_type]


def load_with_tokenizer(path: str | Path, tokenizer: str | Path = "", compute: ComputeConfig | None = None,
                  mesh: Mesh | None = None) -> LanguageModel:
    """Loads a causal network with its tokenizer: bytes for byte-level networks, otherwise the file's own.

    Args:
        path: see `load`.
        tokenizer: tokenizer.json, or a directory that contains it; by default the network's.

    Raises:
        InputError: the network or the tokenizer cannot be read, or the network is not causal.
    """
    path = local_path(path)
    model, file = _open(path, compute, None, mesh)
    if not isinstance(model, CausalLM):
        raise InputError(f"{path}: expected a network that continues texts, found family "
                         f"{model.config.family}")
    if model.is_byte_level:
        return LanguageModel(model, ByteTokenizer())
    if file is not None and not tokenizer:
        files = tokenizer_files(file.metadata, str(path))
        if TOKENIZER not in files:
            raise InputError(f"{path}: expected a tokenizer in its metadata, found none")
        settings = json.loads(files[TOKENIZER_CONFIG])
        from_file = HuggingFaceTokenizer.from_json(files[TOKENIZER].decode(), str(path))
        template = _chat_template(settings, settings.get("chat_template"), str(path))
        return LanguageModel(model, from_file, template, **_special_ids(settings, from_file, model.config))
    tokenizer_path = Path(tokenizer or path)
    directory = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    read = HuggingFaceTokenizer(tokenizer_path)
    settings = {key: value for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG)
                if os.path.lexists(directory / name) for key, value in read_json(directory / name).items()}
    return LanguageModel(model, read, read_chat_template(directory),
                         **_special_ids(settings, read, model.config))


def _special_ids(settings: Mapping[str, Any], tokenizer: Tokenizer, config: Any) -> dict[str, int | None]:
    """`bos_id` and `eos_id` of a LanguageModel, from the settings of its tokenizer."""
    def id_of(name: str, default: int | None) -> int | None:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return default if name not in settings else tokenizer.token(text) if isinstance(text, str) else None
    return {"bos_id": id_of("bos_token", getattr(config, "bos_id", None)),
            "eos_id": id_of("eos_token", next(iter(getattr(config, "end_ids", ())), None))}


def read_chat_template(path: Path) -> ChatTemplate | None:
    """Reads the chat template of a Hugging Face directory; None if it has none.

    Raises:
        InputError: a file that may contain the template cannot be read.
    """
    settings = read_json(path / TOKENIZER_CONFIG) if os.path.lexists(path / TOKENIZER_CONFIG) else {}
    template, source = settings.get("chat_template"), path / TOKENIZER_CONFIG
    for name in CHAT_TEMPLATES:
        if os.path.lexists(path / name):
            source = path / name
            template = (read_json(source).get("chat_template") if source.suffix == ".json" else
                        read_text(source))
            break
    return _chat_template(settings, template, str(source))


def _chat_template(settings: Mapping[str, Any], template: Any, source: str) -> ChatTemplate | None:
    """The chat template with the special tokens of tokenizer_config.json (`settings`)."""
    tokens = {name: value.get("content") if isinstance(value, dict) else value
              for name, value in settings.items() if name.endswith("_token")}
    special = {name: value for name, value in tokens.items() if isinstance(value, str) and value}
    if isinstance(template, list):  # several templates; "default" is the one without tools
        template = next((t.get("template") for t in template if isinstance(t, dict)
                         and t.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise InputError(f"{source}: chat_template: expected text, found {template!r:.40}")
    return None if template is None else ChatTemplate(template, special, source)
