"""Language models with what turns text into their tokens and back, from directories of ours or others."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tilelli_jax import extras, store
from tilelli_jax.errors import InputError
from tilelli_jax.files import check_regular
from tilelli_jax.json_text import GIT_LFS, check_fetched, read_json, read_text
from tilelli_jax.models import FAMILIES
from tilelli_jax.models.arrays import ParamType
from tilelli_jax.models.decoder import CausalLM, ComputeConfig
from tilelli_jax.models.pretrained import Pretrained
from tilelli_jax.sharding import Mesh

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


class Placed(NamedTuple):
    """Tokens of a text, and where each stands in it: `[start, stop)` in characters."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer(Protocol):
    """Text to tokens, without any that mark the beginning or the end unless the text has them, and back."""

    @property
    def special(self) -> tuple[str, ...]:
        """How the tokens that steer the network are written."""

    def encode(self, text: str) -> list[int]: ...

    def place(self, text: str, special: bool = False) -> Placed:
        """Args: special: with the tokens that mark the beginning or the end, which stand nowhere: (0, 0)."""

    def decode(self, ids: list[int]) -> str:
        """Special tokens are written out; what is no text becomes a replacement character."""

    def token(self, text: str) -> int | None:
        """The one token that is written so; None where there is none."""


class Bytes:
    """Tokens are the bytes of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    @property
    def special(self) -> tuple[str, ...]:
        return ()

    def place(self, text: str, special: bool = False) -> Placed:
        spans = [(i, i + 1) for i, letter in enumerate(text) for _ in letter.encode()]
        return Placed(self.encode(text), spans)

    def decode(self, ids: list[int]) -> str:
        return bytes(id for id in ids if id < 256).decode("utf-8", errors="replace")

    def token(self, text: str) -> int | None:
        found = text.encode()
        return found[0] if len(found) == 1 else None


class Tokens:
    """Tokens are those of a tokenizer.json.

    Raises:
        InputError: there is none at the path (a file, or a directory that has it), or the extra to read it is
            missing.
    """

    def __init__(self, path: Path) -> None:
        file = path / TOKENIZER if path.is_dir() else path
        if not os.path.lexists(file):
            raise InputError(f"{file}: no such file: expected the network's tokenizer")
        check_regular(file)
        try:
            import tokenizers
        except ImportError:
            raise extras.missing("tokenizers", f"{file}: reading it") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            with file.open("rb") as content:
                check_fetched(file, content.read(len(GIT_LFS)))
            raise InputError(f"{file}: no tokenizer: {error}") from None
        self._tokenizer.no_truncation()  # which a file may ask for, as it may for padding
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def special(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._tokenizer.get_added_tokens_decoder().values()
                     if token.special)

    def place(self, text: str, special: bool = False) -> Placed:
        found = self._tokenizer.encode(text, add_special_tokens=special)
        return Placed(found.ids, found.offsets)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a network that was taught to chat expects to be asked: the Jinja template of its tokenizer.

    Attributes:
        special: what the template may call by name, such as bos_token.
    """

    template: str
    special: dict[str, str]
    source: str

    def ask(self, text: str, *, thinking: bool = False) -> str:
        """One user's turn and the beginning of the answer.

        Args:
            thinking: whether the network is to think first; templates that know no such thing ignore it.

        Raises:
            InputError: the template refuses, or the extra to read it is missing.
        """
        try:
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError:
            raise extras.missing("transformers", f"{self.source}: it") from None
        render: Any = render_jinja_template  # whose annotations are not what it takes and gives
        turns = [{"role": "user", "content": text}]
        try:
            found, _ = render([turns], chat_template=self.template, add_generation_prompt=True,
                              enable_thinking=thinking, **self.special)
        except Exception as error:  # whatever a template comes up with
            raise InputError(f"{self.source}: the template refuses: {error}") from None
        return found[0]


@dataclasses.dataclass(frozen=True)
class Language:
    """A causal network, its tokenizer, and how it is asked where it was taught to chat."""

    model: Any
    tokenizer: Tokenizer
    chat: Chat | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids without any that mark the beginning or the end."""
        return self.tokenizer.encode(text)


def open_network(path: str | Path, compute: ComputeConfig | None = None, mesh: Mesh | None = None) -> Any:
    """The network of a model directory, or of a Hugging Face directory of a family that is known here.

    Run in bfloat16 its weights are kept in the type that they are stored in, otherwise in float32.

    Raises:
        InputError: it is neither, or cannot be read.
    """
    path = Path(path)
    tree = read_json(path / store.CONFIG) if os.path.lexists(path / store.CONFIG) else {}
    kind = tree.get("model_type")
    kept: ParamType = "stored" if compute is not None and compute.dtype == "bfloat16" else "float32"
    if "family" in tree or kind is None:
        return store.load(path, compute, param_dtype=kept, mesh=mesh)
    known = {name: network for _, network in FAMILIES.values()
             if isinstance(network, type) and issubclass(network, Pretrained)
             for name in network.hugging_face.model_types}
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{path / store.CONFIG}: model_type: expected one of {', '.join(known)}, "
                         f"found {kind!r}")
    return known[kind].from_pretrained(path, compute, param_dtype=kept, mesh=mesh)


def open_language(path: str | Path, tokenizer: str | Path = "", compute: ComputeConfig | None = None,
                  mesh: Mesh | None = None) -> Language:
    """A causal network and its tokenizer: bytes for networks that read them, otherwise tokenizer.json.

    Args:
        tokenizer: the file, or a directory that has it; by default that of the network.

    Raises:
        InputError: no network, one that does not continue texts, or no tokenizer.
    """
    model = open_network(path, compute, mesh)
    if not isinstance(model, CausalLM):
        raise InputError(f"{path}: expected a network that continues texts, found family "
                         f"{model.config.family}")
    if model.reads_bytes:
        return Language(model, Bytes())
    beside = Path(tokenizer or path)
    return Language(model, Tokens(beside), read_chat(beside if beside.is_dir() else beside.parent))


def read_chat(path: Path) -> Chat | None:
    """The template of a Hugging Face directory; None where it has none.

    Raises:
        InputError: a file that may have one cannot be read.
    """
    settings = read_json(path / TOKENIZER_CONFIG) if os.path.lexists(path / TOKENIZER_CONFIG) else {}
    tokens = {name: value.get("content") if isinstance(value, dict) else value
              for name, value in settings.items() if name.endswith("_token")}
    special = {name: value for name, value in tokens.items() if isinstance(value, str) and value}
    template, source = settings.get("chat_template"), path / TOKENIZER_CONFIG
    for name in CHAT_TEMPLATES:
        if os.path.lexists(path / name):
            source = path / name
            template = (read_json(source).get("chat_template") if source.suffix == ".json" else
                        read_text(source))
            break
    if isinstance(template, list):  # several, of which one is for chats without tools
        template = next((t.get("template") for t in template if isinstance(t, dict)
                         and t.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise InputError(f"{source}: chat_template: expected text, found {template!r:.40}")
    return None if template is None else Chat(template, special, str(source))
