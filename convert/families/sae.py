"""TopK sparse autoencoders: `.pt` files of fm-difficulty-probe, directories of SAELens and sparsify."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.io.files import new_directory, write_json
from tilelli_jax.io.tensors import Tensor, in_memory, write_file
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Names, Theirs, transposed

from ..plan import Family, Plan, configured, key_of, make_plan
from ..source import AUTOENCODERS, Source
from .common import cannot_infer, shape_of

HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out)")  # TransformerLens
UNIT_NORM_TOLERANCE = 1e-2  # a norm counts as 1 within this; bfloat16 needs it
NAMES: Names = {"encoder.kernel": Theirs("W_enc"), "encoder.bias": Theirs("b_enc"),
                "decoder.kernel": Theirs("W_dec"), "bias": Theirs("b_dec")}
SPARSIFY: Names = {"encoder.kernel": transposed("encoder.weight"), "encoder.bias": Theirs("encoder.bias"),
                   "decoder.kernel": Theirs("W_dec"), "bias": Theirs("b_dec")}

# Keys of cfg.json that affect the outputs, and the values that are supported; a missing key is accepted.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "architecture": ("topk",), "activation": ("topk",), "activation_fn": ("topk",),
    "activation_fn_str": ("topk",), "signed": (False,), "transcode": (False,),
    "skip_connection": (False,), "apply_b_dec_to_input": (True,), "normalize_activations": ("none", None),
    "rescale_acts_by_decoder_norm": (False,), "reshape_activations": ("none", None),
    "normalize_io": (False,), "multi_topk": (False, True), "finetuning_scaling_factor": (False,),
    "noise_scale": (0, None), "hook_head_index": (None,), "seqpos_slice": (None, [None], [])}
# Keys that do not affect the outputs, or are checked in `_plan`.
IGNORED_KEYS = {
    "k", "activation_fn_kwargs", "d_in", "d_sae", "num_latents", "expansion_factor", "normalize_decoder",
    "dtype", "device", "metadata", "model_name", "model_class_name", "hook_name", "hook_layer", "hook_point",
    "hook_point_layer", "prepend_bos", "dataset_path", "dataset_trust_remote_code", "context_size",
    "model_from_pretrained_kwargs", "sae_lens_version", "sae_lens_training_version", "neuronpedia_id", "name",
    "sae_id", "release"}


def _plan(source: Source, overrides: Sequence[str]) -> Plan:
    for key, values in SUPPORTED_VALUES.items():
        if key in source.config and source.config[key] not in values:
            raise InputError(f"{source.path}: {key}: expected {' or '.join(map(repr, values))}, "
                             f"found {source.config[key]!r}")
    if "encoder.weight" in source.tensors and "W_enc" not in source.tensors:
        names = SPARSIFY
        n_latents, d_model = shape_of(source, source.tensors, "encoder.weight", 2)
    else:
        names = NAMES
        d_model, n_latents = shape_of(source, source.tensors, "W_enc", 2)
    unknown = sorted(source.config.keys() - SUPPORTED_VALUES.keys() - IGNORED_KEYS)
    if source.is_directory and unknown:
        raise InputError(f"{source.path}: {unknown[0]}: unknown key, which might affect the outputs; if it "
                         "does not, remove it from cfg.json")
    inferred: dict[str, Any] = {"family": "sae", "d_model": d_model, "n_latents": n_latents,
                                **_activation_settings(source)}
    for keys, size in ((("d_in",), d_model), (("d_sae", "num_latents"), n_latents)):
        for key in keys:
            if source.config.get(key, size) != size:
                raise InputError(f"{source.path}: {key}: expected {size}, the size in the tensors, found "
                                 f"{source.config[key]!r}")
    k = _k(source)
    if k is not None:
        inferred["k"] = k
    elif "k" not in map(key_of, overrides):  # at most the name of such a file gives k
        raise cannot_infer(source, "k")
    config = configured(SAEConfig, inferred, overrides, str(source.path))
    if k is not None and config.k != k:
        raise InputError(f"--set: k: expected {k}, the value in {source.path}, found {config.k}")
    return make_plan("sae", TopKSAE, config, names, source, {})


def _k(source: Source) -> Any:
    """The number of active latents, from one of two keys of the configuration; None if it has neither."""
    nested = source.config.get("activation_fn_kwargs")
    nested = {} if nested is None else nested
    if not isinstance(nested, dict) or nested.keys() - {"k"}:
        raise InputError(f"{source.path}: activation_fn_kwargs: expected only k, found {nested!r:.60}")
    k_values = [tree["k"] for tree in (source.config, nested) if "k" in tree]
    if len(k_values) == 2 and k_values[0] != k_values[1]:
        raise InputError(f"{source.path}: activation_fn_kwargs.k: expected {k_values[0]!r}, the value of k, "
                         f"found {k_values[1]!r}")
    return k_values[0] if k_values else None


def _activation_settings(source: Source) -> dict[str, Any]:
    """Settings on the decoder's unit norm (from its tensor) and on the activations (model, layer, hook)."""
    tree = source.config
    metadata: Any = tree.get("metadata") if isinstance(tree.get("metadata"), dict) else tree
    inferred: dict[str, Any] = {"unit_norm": "none"}
    if "W_dec" in source.tensors and len(source.tensors["W_dec"].shape) == 2:
        with np.errstate(over="ignore"):  # an overflow means that the norm is not 1
            squares = np.square(source.tensors["W_dec"].read(), dtype=np.float32)
        for name, axis in (("columns", 0), ("rows", 1)):
            if np.abs(np.sqrt(squares.sum(axis=axis)) - 1).max() < UNIT_NORM_TOLERANCE:
                inferred["unit_norm"] = name
    for ours, theirs, kind in (("source_model", "model_name", str), ("layer", "hook_layer", int)):
        if isinstance(metadata.get(theirs), kind):
            inferred[ours] = metadata[theirs]
    if hook := HOOK.fullmatch(str(metadata.get("hook_name"))):
        inferred |= {"layer": int(hook[1]), "hook": hook[2]}
    elif isinstance(metadata.get("hook_name"), str):
        inferred["hook"] = metadata["hook_name"]
    return inferred


def write_directory(layout: str, config: SAEConfig, arrays: Mapping[str, Tensor], out: Path) -> None:
    """Writes a directory for SAELens or sparsify.

    SAELens stores a trained BatchTopK SAE as a JumpReLU with one threshold for all latents; the limit
    `max_active` cannot be stored.

    Raises:
        InputError: `out` already exists, or cannot be written.
    """
    names = SPARSIFY if layout == "sparsify" else NAMES
    arrays = dict(arrays)
    threshold = arrays.pop("threshold", None)
    links = mapping.link(names, {name: array.shape for name, array in arrays.items()})
    if layout == "sparsify":
        tree: dict[str, Any] = {
            "activation": "topk", "expansion_factor": max(1, config.n_latents // config.d_model),
            "normalize_decoder": config.unit_norm == "rows", "num_latents": config.n_latents, "k": config.k,
            "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": config.d_model}
    else:
        tree = {
            **({"architecture": "jumprelu"} if threshold else {"architecture": "topk", "k": config.k}),
            "d_in": config.d_model, "d_sae": config.n_latents,
            "dtype": str(arrays["decoder.kernel"].dtype), "device": "cpu", "apply_b_dec_to_input": True,
            "normalize_activations": "none", "reshape_activations": "none",
            "rescale_acts_by_decoder_norm": False,
            "metadata": {"model_name": config.source_model, "hook_layer": config.layer, "hook_name": (
                f"blocks.{config.layer}.hook_{config.hook}" if config.layer >= 0 else config.hook)}}
    tensors = mapping.to_theirs(links, arrays)
    if threshold:
        tensors["threshold"] = in_memory(np.full(config.n_latents, threshold.read()))
    with new_directory(out) as path:
        write_file(path / AUTOENCODERS[layout], tensors, writer="pt")
        write_json(path / "cfg.json", tree)


def _recognises(source: Source) -> bool:
    if source.is_directory:
        return "W_dec" in source.tensors and "model_type" not in source.config
    return "W_enc" in source.tensors


SAE = Family("sae", _recognises, _plan)
