"""Recall's sidecar network, `lrd.pt`: a state dict, scalers as NumPy arrays, a temperature."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sidecar import Sidecar, SidecarConfig
from tilelli_jax.io.tensors import Tensor, in_memory
from tilelli_jax.pretrained.mapping import Theirs, transposed

from ..plan import Plan, SourceFamily, configured, make_plan
from ..source import Source
from .common import shape_of

NAMES = {
    "gru.input.kernel": transposed("gru.weight_ih_l0"), "gru.input.bias": Theirs("gru.bias_ih_l0"),
    "gru.state.kernel": transposed("gru.weight_hh_l0"), "gru.state.bias": Theirs("gru.bias_hh_l0"),
    "hidden.kernel": transposed("head.0.weight"), "hidden.bias": Theirs("head.0.bias"),
    "out.kernel": transposed("head.3.weight"), "out.bias": Theirs("head.3.bias"),
    "feature_scaler.mean": Theirs("fscaler.mean", "one row"),
    "feature_scaler.scale": Theirs("fscaler.std", "one row"),
    "prompt_scaler.mean": Theirs("gscaler.mean"), "prompt_scaler.scale": Theirs("gscaler.scale"),
    "temperature": Theirs("T")}


def _plan(source: Source, overrides: Sequence[str]) -> Plan:
    temperature = source.other_entries.get("T")
    if not isinstance(temperature, float):
        raise InputError(f"{source.path}: T: expected the temperature (a number), found {temperature!r}")
    source = dataclasses.replace(source, tensors={**source.tensors, "T": in_memory(np.array(temperature))})
    tensors = source.tensors
    gate_rows, n_features = shape_of(source, tensors, "gru.weight_ih_l0", 2)
    (n_prompt_features,) = shape_of(source, tensors, "gscaler.mean", 1)
    inferred = {"family": "lrd", "n_features": n_features, "n_prompt_features": n_prompt_features,
                "d_hidden": gate_rows // 3,
                "features": source.other_entries.get("feat_names", []),
                "prompt_features": source.other_entries.get("global_names", [])}
    config = configured(SidecarConfig, inferred, overrides, str(source.path))
    return make_plan("lrd", Sidecar, config, NAMES, source, {})


def tree_of(config: Any, state: Mapping[str, Tensor], other_entries: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of the `.pt` file in Recall's format; `state` holds tensors under Recall's names."""
    def scaler(name: str, *keys: str) -> dict[str, np.ndarray]:
        return {key: np.array(state[f"{name}.{key}"].read()) for key in keys}

    weights = {name: tensor for name, tensor in state.items() if name.startswith(("gru.", "head."))}
    return {**other_entries, "state_dict": weights, "fscaler": scaler("fscaler", "mean", "std"),
            "gscaler": scaler("gscaler", "mean", "scale"), "T": float(state["T"].read()),
            "n_feat": config.n_features, "n_global": config.n_prompt_features, "hidden": config.d_hidden,
            "feat_names": list(config.features), "global_names": list(config.prompt_features)}


LRD = SourceFamily("lrd", lambda source: "gru.weight_ih_l0" in source.tensors, _plan)
