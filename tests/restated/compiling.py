"""Compiling quickly instead of well: in tests of formulas nearly all time goes into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` without optimisation, unless XLA_FLAGS asks for it (as one pass of CI does)."""
    quick = jax.default_backend() == "cpu" and "optimization_level=0" in os.environ["XLA_FLAGS"]
    return jax.jit(function, compiler_options=_OPTIONS if quick else None)
