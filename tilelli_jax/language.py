"""Language models with what turns text into their symbols, from our directories or Hugging Face's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.models import FAMILIES
from tilelli_jax.models.decoder import CausalLM, ComputeConfig
from tilelli_jax.models.pretrained import Pretrained
from tilelli_jax.sharding import Mesh
from tilelli_jax.tensors import read_json

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Language:
    """A causal network, and `encode(text) -> token ids` without any that mark the beginning or the end."""

    model: Any
    encode: Callable[[str], list[int]]


def open_network(path: str | Path, compute: ComputeConfig | None = None, mesh: Mesh | None = None) -> Any:
    """The network of a model directory, or of a Hugging Face directory of a family that is known here.

    Raises:
        InputError: it is neither, or cannot be read.
    """
    path = Path(path)
    tree = read_json(path / store.CONFIG) if (path / store.CONFIG).is_file() else {}
    kind = tree.get("model_type")
    if "family" in tree or kind is None:
        return store.load(path, compute, mesh=mesh)
    known = {name: network for _, network in FAMILIES.values()
             if isinstance(network, type) and issubclass(network, Pretrained)
             for name in network.hugging_face.model_types}
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{path / store.CONFIG}: model_type: expected one of {', '.join(known)}, "
                         f"found {kind!r}")
    return known[kind].from_pretrained(path, compute, mesh=mesh)


def open_language(path: str | Path, tokenizer: str | Path = "", compute: ComputeConfig | None = None,
                  mesh: Mesh | None = None) -> Language:
    """A causal network and its encoder: bytes for networks that read them, otherwise tokenizer.json.

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
        return Language(model, lambda text: list(text.encode()))
    return Language(model, open_tokenizer(Path(tokenizer or path)))


def open_tokenizer(path: Path) -> Callable[[str], list[int]]:
    """Raises InputError: there is none, or the extra to read it is missing."""
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file: expected the network's tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(f"{file}: reading it needs the extra 'hf': pip install -e '.[hf]'") from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise InputError(f"{file}: no tokenizer: {error}") from None
    tokenizer.no_truncation()  # which a file may ask for, as it may for padding
    tokenizer.no_padding()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
