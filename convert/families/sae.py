"""Sparse autoencoders of other projects; `sae_layouts` says how they store them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.io.tensors import check_floats, in_memory
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Theirs

from ..plan import Plan, SourceFamily, configured, key_of, make_plan
from ..source import Source
from .common import cannot_infer
from .sae_folding import Folding
from .sae_layouts import NAMES, SAELayout, layout_of, sizes

UNIT_NORM_AXES: dict[Literal["rows", "columns"], int] = {"columns": 0, "rows": 1}  # rows take precedence
UNIT_NORM_TOLERANCE = 1e-2  # a norm counts as 1 within this; bfloat16 needs it


def _plan(source: Source, overrides: Sequence[str]) -> Plan:
    layout = layout_of(source)
    plan = _plan_of(layout, source, overrides)
    return dataclasses.replace(plan, remarks=(*plan.remarks, *layout.remarks))


def _plan_of(layout: SAELayout, source: Source, overrides: Sequence[str]) -> Plan:
    names = layout.names
    d_model, n_latents = sizes(source, names["encoder.kernel"])
    inferred = {"family": "sae", "d_model": d_model, "n_latents": n_latents, **layout.settings}
    if inferred["activation"] == "jumprelu":
        inferred["k"] = 0
    k = inferred.get("k")
    if k is None and "k" not in map(key_of, overrides):  # at most the name of such a file gives k
        raise cannot_infer(source, "k")
    config = configured(SAEConfig, inferred, overrides, str(source.path))
    for key in ("k", "activation", "input_norm"):
        if inferred.get(key, getattr(config, key)) != getattr(config, key):
            raise InputError(f"--set: {key}: expected {inferred[key]}, the value in {source.path}, found "
                             f"{getattr(config, key)}")
    shapes = {"encoder.kernel": (d_model, n_latents), "encoder.bias": (n_latents,),
              "decoder.kernel": (n_latents, d_model), "bias": (d_model,)}
    if config.threshold_shape is not None:
        shapes["threshold"] = config.threshold_shape
    # A standard autoencoder has a ReLU, which is a JumpReLU with thresholds of 0.
    has_threshold = "threshold" in names and "threshold" in shapes
    stored = {name: shape for name, shape in shapes.items() if name != "threshold" or has_threshold}
    if layout.folding == Folding() and stored == shapes:
        config = _with_unit_norm(config, source, names["decoder.kernel"], overrides)
        return make_plan("sae", TopKSAE, config, names, source, layout.ignored)
    links = mapping.link(names, stored)
    mapping.check(links, {name: tensor.shape for name, tensor in source.tensors.items()}, layout.ignored,
                  str(source.path))
    check_floats({name: source.tensors[name] for link in links for name in link.theirs}, str(source.path))
    arrays = mapping.to_ours(links, source.tensors)
    if layout.folding != Folding():
        arrays = layout.folding(arrays)
    if stored != shapes:
        arrays["threshold"] = in_memory(np.zeros(shapes["threshold"], arrays["encoder.bias"].dtype))
    folded = dataclasses.replace(source, tensors={NAMES[name].name: array for name, array in arrays.items()},
                                 original_names={})
    config = _with_unit_norm(config, folded, NAMES["decoder.kernel"], overrides)
    return make_plan("sae", TopKSAE, config, NAMES, folded, {})


def _with_unit_norm(config: SAEConfig, source: Source, decoder: Theirs,
                    overrides: Sequence[str]) -> SAEConfig:
    """The configuration with the decoder's unit norm, which its tensor shows."""
    tensor = source.tensors.get(decoder.name)
    if "unit_norm" in map(key_of, overrides) or tensor is None or len(tensor.shape) != 2:
        return config
    with np.errstate(over="ignore"):  # an overflow means that the norm is not 1
        squares = np.square(tensor.read(), dtype=np.float32)
    squares = squares.T if decoder.how == "transposed" else squares
    unit_norm: Literal["rows", "columns", "none"] = "none"
    for name, axis in UNIT_NORM_AXES.items():
        if np.abs(np.sqrt(squares.sum(axis=axis)) - 1).max() < UNIT_NORM_TOLERANCE:
            unit_norm = name
    return dataclasses.replace(config, unit_norm=unit_norm)


def _recognises(source: Source) -> bool:
    names = source.tensors.keys()
    if source.is_directory:
        return "model_type" not in source.config and (
            "W_dec" in names or "w_dec" in names or isinstance(source.config.get("trainer"), dict))
    return bool({"W_enc", "w_enc"} & names) or {"pre_bias", "latent_bias"} <= names


SAE = SourceFamily("sae", _recognises, _plan)
