"""TopK sparse autoencoders: fm-difficulty-probe's `.pt` files, directories of SAELens and sparsify."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.files import new_directory, write_json
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Names, Theirs, turned
from tilelli_jax.tensors import Tensor, in_memory, write_file

from ..plan import Family, Plan, configured, make_plan
from ..source import AUTOENCODERS, Source
from .stated import cannot_be_told, shape_of

HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out)")  # of TransformerLens
NEARLY = 1e-2  # a length of 1, in bfloat16
NAMES: Names = {"encoder.kernel": Theirs("W_enc"), "encoder.bias": Theirs("b_enc"),
                "decoder.kernel": Theirs("W_dec"), "bias": Theirs("b_dec")}
SPARSIFY: Names = {"encoder.kernel": turned("encoder.weight"), "encoder.bias": Theirs("encoder.bias"),
                   "decoder.kernel": Theirs("W_dec"), "bias": Theirs("b_dec")}

# What a configuration may say, as far as it changes the numbers; absent is as good.
UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "architecture": ("topk",), "activation": ("topk",), "activation_fn": ("topk",),
    "activation_fn_str": ("topk",), "signed": (False,), "transcode": (False,),
    "skip_connection": (False,), "apply_b_dec_to_input": (True,), "normalize_activations": ("none", None),
    "rescale_acts_by_decoder_norm": (False,), "reshape_activations": ("none", None),
    "normalize_io": (False,), "multi_topk": (False, True), "finetuning_scaling_factor": (False,),
    "noise_scale": (0, None), "hook_head_index": (None,), "seqpos_slice": (None, [None], [])}
# And what changes none, or is checked below.
HARMLESS = {
    "k", "activation_fn_kwargs", "d_in", "d_sae", "num_latents", "expansion_factor", "normalize_decoder",
    "dtype", "device", "metadata", "model_name", "model_class_name", "hook_name", "hook_layer", "hook_point",
    "hook_point_layer", "prepend_bos", "dataset_path", "dataset_trust_remote_code", "context_size",
    "model_from_pretrained_kwargs", "sae_lens_version", "sae_lens_training_version", "neuronpedia_id", "name",
    "sae_id", "release"}


def _plan(source: Source, settings: Mapping[str, Any]) -> Plan:
    for key, values in UNDERSTOOD.items():
        if key in source.tree and source.tree[key] not in values:
            raise InputError(f"{source.path}: {key}: expected {' or '.join(map(repr, values))}, "
                             f"found {source.tree[key]!r}")
    if "encoder.weight" in source.tensors and "W_enc" not in source.tensors:
        names = SPARSIFY
        n_latents, d_model = shape_of(source, source.tensors, "encoder.weight", 2)
    else:
        names = NAMES
        d_model, n_latents = shape_of(source, source.tensors, "W_enc", 2)
    if source.is_directory and (unknown := sorted(source.tree.keys() - UNDERSTOOD.keys() - HARMLESS)):
        raise InputError(f"{source.path}: {unknown[0]}: not known here, and might change the numbers; if it "
                         "does not, take it out of cfg.json")
    said: dict[str, Any] = {"family": "sae", "d_model": d_model, "n_latents": n_latents, **_about(source)}
    for keys, size in ((("d_in",), d_model), (("d_sae", "num_latents"), n_latents)):
        for key in keys:
            if source.tree.get(key, size) != size:
                raise InputError(f"{source.path}: {key}: expected {size}, as the tensors have it, found "
                                 f"{source.tree[key]!r}")
    found = _k(source)
    if found is None and "k" not in settings:  # the file does not hold it; its name sometimes does
        raise cannot_be_told(source, "k")
    if found is not None:
        said["k"] = found
        if settings.get("k", found) != found:
            raise InputError(f"--set k: expected {found}, as {source.path} says, found {settings['k']!r}")
    config = configured(SAEConfig, said, settings, str(source.path))
    return make_plan("sae", TopKSAE, config, names, source, {})


def _k(source: Source) -> Any:
    """How many latents are active, where the configuration says it, in one of two places; None elsewhere."""
    nested = source.tree.get("activation_fn_kwargs")
    nested = {} if nested is None else nested
    if not isinstance(nested, dict) or nested.keys() - {"k"}:
        raise InputError(f"{source.path}: activation_fn_kwargs: expected k alone, found {nested!r:.60}")
    found = [tree["k"] for tree in (source.tree, nested) if "k" in tree]
    if len(found) == 2 and found[0] != found[1]:
        raise InputError(f"{source.path}: k is {found[0]!r}, and activation_fn_kwargs.k {found[1]!r}")
    return found[0] if found else None


def _about(source: Source) -> dict[str, Any]:
    """What of the decoder has length 1, and what the activations are of, as far as the source says."""
    tree = source.tree
    metadata: Any = tree.get("metadata") if isinstance(tree.get("metadata"), dict) else tree
    said: dict[str, Any] = {"unit_norm": "none"}
    if "W_dec" in source.tensors and len(source.tensors["W_dec"].shape) == 2:
        with np.errstate(over="ignore"):  # whose length is not 1
            squares = np.square(source.tensors["W_dec"].read(), dtype=np.float32)
        for name, axis in (("columns", 0), ("rows", 1)):
            if np.abs(np.sqrt(squares.sum(axis=axis)) - 1).max() < NEARLY:
                said["unit_norm"] = name
    for ours, theirs, kind in (("of_model", "model_name", str), ("layer", "hook_layer", int)):
        if isinstance(metadata.get(theirs), kind):
            said[ours] = metadata[theirs]
    if hook := HOOK.fullmatch(str(metadata.get("hook_name"))):
        said |= {"layer": int(hook[1]), "place": hook[2]}
    elif isinstance(metadata.get("hook_name"), str):
        said["place"] = metadata["hook_name"]
    return said


def write_directory(layout: str, config: SAEConfig, arrays: Mapping[str, Tensor], out: Path) -> None:
    """Writes the directory that SAELens or sparsify reads.

    SAELens keeps a BatchTopK as what it is after training: a JumpReLU with one threshold for all latents.
    What `most_active` leaves out has no place there.

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
            "metadata": {"model_name": config.of_model, "hook_layer": config.layer, "hook_name": (
                f"blocks.{config.layer}.hook_{config.place}" if config.layer >= 0 else config.place)}}
    tensors = mapping.to_theirs(links, arrays)
    if threshold:
        tensors["threshold"] = in_memory(np.full(config.n_latents, threshold.read()))
    with new_directory(out) as path:
        write_file(path / AUTOENCODERS[layout], tensors, writer="pt")
        write_json(path / "cfg.json", tree)


def _recognises(source: Source) -> bool:
    if source.is_directory:
        return "W_dec" in source.tensors and "model_type" not in source.tree
    return "W_enc" in source.tensors


SAE = Family("sae", _recognises, _plan)
