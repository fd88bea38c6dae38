"""Train small language models in JAX, and predict from their activations whether they answer correctly.

    model = tilelli_jax.load("runs/mine/model")
    logits = model(ids)                                   # [batch, time] → [batch, time, vocab]
    tilelli_jax.generate(model, "Once upon a time", max_new=100)
    tilelli_jax.save(model, "elsewhere")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tilelli_jax.cli import interrupts

if TYPE_CHECKING:
    from tilelli_jax.errors import InputError
    from tilelli_jax.generation.decoding import generate, generate_ids
    from tilelli_jax.loading.language import load, load_with_tokenizer
    from tilelli_jax.loading.store import build, save

__all__ = ["InputError", "build", "generate", "generate_ids", "load", "load_with_tokenizer", "save"]

# Imported on first use: `doctor` has to run where jax fails to import, and `data` does not need jax.
_MODULES = {"InputError": "errors", "build": "loading.store", "generate": "generation.decoding",
            "generate_ids": "generation.decoding", "load": "loading.language",
            "load_with_tokenizer": "loading.language", "save": "loading.store"}


interrupts.handle_from_start(__name__)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
