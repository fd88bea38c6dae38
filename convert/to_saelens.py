"""Autoencoders for SAELens and sparsify."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.io.files import new_directory, write_json
from tilelli_jax.io.tensors import Tensor, in_memory, write_file
from tilelli_jax.pretrained import mapping

from .families.sae_layouts import HOOK, NAMES, SPARSIFY, THEIR_HOOKS
from .source import AUTOENCODERS

SAELENS_VERSION = "6.54.0"  # the version whose format `write_directory` writes


def write_directory(layout: str, config: SAEConfig, arrays: Mapping[str, Tensor], out: Path) -> None:
    """Writes a directory for SAELens or sparsify.

    SAELens stores a trained BatchTopK SAE as a JumpReLU with one threshold for all latents; the limit
    `max_active` cannot be stored.

    Raises:
        InputError: `out` already exists, or cannot be written.
    """
    names = SPARSIFY if layout == "sparsify" else NAMES
    arrays = dict(arrays)
    if (threshold := arrays.get("threshold")) is not None and threshold.shape == ():
        arrays["threshold"] = in_memory(np.full(config.n_latents, threshold.read()))
    links = mapping.link(names, {name: array.shape for name, array in arrays.items()})
    if layout == "sparsify":
        tree: dict[str, Any] = {
            "activation": "topk", "expansion_factor": max(1, config.n_latents // config.d_model),
            "normalize_decoder": config.unit_norm == "rows", "num_latents": config.n_latents, "k": config.k,
            "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": config.d_model}
    else:
        tree = {
            **({"architecture": "jumprelu"} if threshold is not None else
               {"architecture": "topk", "k": config.k, "rescale_acts_by_decoder_norm": False}),
            "d_in": config.d_model, "d_sae": config.n_latents,
            "dtype": str(arrays["decoder.kernel"].dtype), "device": "cpu", "apply_b_dec_to_input": True,
            "normalize_activations": config.input_norm, "reshape_activations": "none",
            "metadata": _metadata(config)}
    with new_directory(out) as path:
        write_file(path / AUTOENCODERS[layout], mapping.to_theirs(links, arrays), writer="pt")
        write_json(path / "cfg.json", tree)


def _metadata(config: SAEConfig) -> dict[str, Any]:
    """The metadata of SAELens 6; without its version, SAELens would read them as those of version 5."""
    part, _, hook = config.hook.rpartition(".")
    name: str | None = f"{part or 'blocks'}.{config.layer}.hook_{THEIR_HOOKS.get(hook, hook)}"
    if config.layer < 0 or not HOOK.fullmatch(str(name)):
        name = config.hook or None
    return {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None,
            "model_name": config.source_model or None, "hook_name": name,
            "hook_layer": config.layer if config.layer >= 0 else None, "hook_head_index": None,
            "prepend_bos": config.prepend_bos, "context_size": config.context_size or None,
            "dataset_path": config.dataset or None}
