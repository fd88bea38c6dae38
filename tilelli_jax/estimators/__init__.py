"""Small networks trained on activations or signals of other networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.estimators.sidecar import Sidecar, SidecarConfig

FAMILIES: dict[str, tuple[type, Callable[..., Any]]] = {
    "sae": (SAEConfig, TopKSAE),
    "lrd": (SidecarConfig, Sidecar),
}
