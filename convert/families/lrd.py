"""Recall's sidecar, `lrd.pt`: a state dict, the scalers as NumPy arrays, and a temperature."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sidecar import Sidecar, SidecarConfig
from tilelli_jax.pretrained.mapping import Theirs, turned
from tilelli_jax.tensors import Tensor, in_memory

from ..plan import Family, Plan, configured, make_plan
from ..source import Source
from .stated import shape_of

NAMES = {
    "gru.input.kernel": turned("gru.weight_ih_l0"), "gru.input.bias": Theirs("gru.bias_ih_l0"),
    "gru.state.kernel": turned("gru.weight_hh_l0"), "gru.state.bias": Theirs("gru.bias_hh_l0"),
    "hidden.kernel": turned("head.0.weight"), "hidden.bias": Theirs("head.0.bias"),
    "out.kernel": turned("head.3.weight"), "out.bias": Theirs("head.3.bias"),
    "feature_scaler.mean": Theirs("fscaler.mean", "one row"),
    "feature_scaler.scale": Theirs("fscaler.std", "one row"),
    "global_scaler.mean": Theirs("gscaler.mean"), "global_scaler.scale": Theirs("gscaler.scale"),
    "temperature": Theirs("T")}


def _plan(source: Source, settings: Mapping[str, Any]) -> Plan:
    temperature = source.rest.get("T")
    if not isinstance(temperature, float):
        raise InputError(f"{source.path}: T: expected the temperature, a number, found {temperature!r}")
    source = dataclasses.replace(source, tensors={**source.tensors, "T": in_memory(np.array(temperature))})
    found = source.tensors
    three, n_features = shape_of(source, found, "gru.weight_ih_l0", 2)
    (n_globals,) = shape_of(source, found, "gscaler.mean", 1)
    said = {"family": "lrd", "n_features": n_features, "n_globals": n_globals, "d_hidden": three // 3,
            "features": source.rest.get("feat_names", []), "globals": source.rest.get("global_names", [])}
    config = configured(SidecarConfig, said, settings, str(source.path))
    return make_plan("lrd", Sidecar, config, NAMES, source, {})


def tree_of(config: Any, state: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The file as Recall reads it."""
    def scaler(name: str, *keys: str) -> dict[str, np.ndarray]:
        return {key: np.array(state[f"{name}.{key}"].read()) for key in keys}

    weights = {name: tensor for name, tensor in state.items() if name.startswith(("gru.", "head."))}
    return {**rest, "state_dict": weights, "fscaler": scaler("fscaler", "mean", "std"),
            "gscaler": scaler("gscaler", "mean", "scale"), "T": float(state["T"].read()),
            "n_feat": config.n_features, "n_global": config.n_globals, "hidden": config.d_hidden,
            "feat_names": list(config.features), "global_names": list(config.globals)}


LRD = Family("lrd", lambda source: "gru.weight_ih_l0" in source.tensors, _plan)
