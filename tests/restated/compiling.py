"""Compiling quickly instead of well: in tests of formulas nearly all time goes into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from tilelli_jax import decoding

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    QUICK["xla_cpu_use_fusion_emitters"] = False


@contextlib.contextmanager
def decoding_compiled(options: dict[str, Any]) -> Iterator[None]:
    """Within it the jitted parts of `decoding` are compiled with these options."""
    parts: dict[str, dict[str, Any]] = {
        "_prefill": {"static_argnames": ("graph", "size")},
        "_decode": {"static_argnames": ("graph", "width", "symbols"), "donate_argnames": ("caches",)},
        "_slide": {"static_argnames": ("graph", "width", "symbols")}}
    with pytest.MonkeyPatch.context() as patch:
        for name, settings in parts.items():
            plain = getattr(decoding, name).__wrapped__
            patch.setattr(decoding, name, jax.jit(plain, compiler_options=options, **settings))
        yield


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` without optimisation, unless XLA_FLAGS asks for it (as one pass of CI does)."""
    quick = jax.default_backend() == "cpu" and "optimization_level=0" in os.environ["XLA_FLAGS"]
    return jax.jit(function, compiler_options=QUICK if quick else None)
