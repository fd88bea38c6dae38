"""Where a network is: a local path, or an id of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tilelli_jax import extras
from tilelli_jax.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What is downloaded: configuration, tokenizer and safetensors, but no second copies of the weights.
FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "merges.txt")
OTHER_FILES = ("*/*", "consolidated*")


def local_path(path: str | Path) -> Path:
    """The local path of a network.

    A path that exists is returned as it is. `owner/name` is looked up in the cache of `huggingface_hub`, and
    downloaded into it, unless `owner` is a local directory.

    Raises:
        InputError: there is nothing at the path, and no such network that can be downloaded.
    """
    text = str(path)
    if os.path.lexists(text):
        return Path(path)
    if not HUB_ID.fullmatch(text) or text.endswith(".gguf") or Path(text).parent.exists():
        hint = "" if "/" in text or text.endswith(".gguf") else " (a Hugging Face id has the form owner/name)"
        raise InputError(f"{path}: no such file or directory{hint}")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise extras.missing("huggingface_hub",
                             f"{path}: no such file or directory; the Hugging Face hub") from None
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=list(FILES),
                                                      ignore_patterns=list(OTHER_FILES)))
    except errors.GatedRepoError:
        raise InputError(f"{path}: is gated: accept its terms on its page of the Hugging Face hub, then run "
                         "`hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{path}: no such file or directory, and no Hugging Face repository that you can "
                         "access") from None
    except errors.HFValidationError as error:
        raise InputError(f"{path}: no such file or directory, nor an id of the Hugging Face hub: "
                         f"{error}") from None
    except Exception as error:  # offline, or anything that the transport raises
        raise InputError(f"{path}: no such file or directory, not in the Hugging Face cache, and the hub "
                         f"cannot be reached ({type(error).__name__})") from None
