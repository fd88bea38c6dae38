"""Byte-level routed language models in JAX, and what they know of what they know.

    model = tilelli_jax.load("runs/demo/model")
    logits = model(ids)                                   # [batch, time] → [batch, time, vocab]
    tilelli_jax.generate(model, "Once upon a time", max_new=100)
    tilelli_jax.save(model, "elsewhere")
"""

from tilelli_jax.decoding import generate
from tilelli_jax.errors import InputError
from tilelli_jax.models import build
from tilelli_jax.models.store import load, save

__all__ = ["InputError", "build", "generate", "load", "save"]
