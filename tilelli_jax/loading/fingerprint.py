"""The fingerprint of a network: a hash of its configuration, weights and tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

from tilelli_jax.errors import InputError
from tilelli_jax.io.files import MAX_BYTES, check_regular, fingerprint
from tilelli_jax.io.tensors import CONFIG, read_file
from tilelli_jax.loading.language import CHAT_TEMPLATES, TOKENIZER, TOKENIZER_CONFIG
from tilelli_jax.loading.sources import local_path

SUFFIXES = (".json", ".safetensors", ".jinja")
ABSTAIN_RULE = "abstain.json"  # depends on the network, which it leaves as it is


def network_fingerprint(path: Path, tokenizer: str = "") -> str:
    """Returns a fingerprint of a network's configuration, weights and tokenizer; see `load` for the path.

    A stored abstention threshold or a model card does not change the fingerprint.

    Args:
        tokenizer: directory or file of a tokenizer outside the model directory; empty: none.

    Raises:
        InputError: a file cannot be read.
    """
    path = local_path(path)
    if path.is_dir() and not os.path.lexists(path / CONFIG):
        raise InputError(f"{path}: not a model directory: {CONFIG} is missing")
    try:
        files = [path] if path.is_file() else sorted({path / CONFIG, *(file for file in path.iterdir()
                                         if file.suffix in SUFFIXES and file.name != ABSTAIN_RULE)})
        if tokenizer:
            separate = Path(tokenizer)
            directory = separate if separate.is_dir() else separate.parent
            files += [separate / TOKENIZER if separate.is_dir() else separate, *(
                directory / name for name in (TOKENIZER_CONFIG, *CHAT_TEMPLATES)
                if (directory / name).is_file())]
        for file in files:  # checks headers and sizes first: hashing a corrupt sparse file could take hours
            if file.suffix == ".safetensors":
                read_file(file)
            elif file.suffix in (".json", ".jinja") and (size := check_regular(file)) > MAX_BYTES:
                raise InputError(f"{file}: cannot be read: expected at most {MAX_BYTES:,} bytes, found "
                                 f"{size:,}")
        return fingerprint(files)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
