"""The TopK sparse autoencoders of fm-difficulty-probe: a `.pt` file that is a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.families.stated import cannot_be_told, shape_of
from convert.plan import Family, Plan, configured, make_plan
from convert.source import Source
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.pretrained.mapping import Theirs

NAMES = {"encoder.kernel": Theirs("W_enc"), "encoder.bias": Theirs("b_enc"),
         "decoder.kernel": Theirs("W_dec"), "bias": Theirs("b_dec")}


def _plan(source: Source, settings: Mapping[str, Any]) -> Plan:
    d_model, n_latents = shape_of(source, source.tensors, "W_enc", 2)
    said: dict[str, Any] = {"family": "sae", "d_model": d_model, "n_latents": n_latents}
    if "k" in source.tree:
        said["k"] = source.tree["k"]
    elif "k" not in settings:  # the file does not hold it; its name sometimes does
        raise cannot_be_told(source, "k")
    config = configured(SAEConfig, said, settings, str(source.path))
    return make_plan("sae", TopKSAE, config, NAMES, source, {})


SAE = Family("sae", lambda source: "W_enc" in source.tensors and not source.is_directory, _plan)
