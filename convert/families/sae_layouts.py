"""How other projects store autoencoders: SAELens, sparsify, Gemma Scope, dictionary_learning, openai, and
fm-difficulty-probe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.io.json_text import read_json
from tilelli_jax.io.tensors import Tensor, check_fit, check_floats, read_file
from tilelli_jax.pretrained.mapping import Names, Theirs, transposed

from ..source import Source, lexists
from .common import shape_of
from .sae_folding import Folding

# Hooks of TransformerLens, and their names there that differ from ours.
HEAD_OUTPUTS = re.compile(r".*\.hook_z")
HOOK = re.compile(r"(blocks|encoder|decoder)\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
THEIR_HOOKS = {"mlp_write": "mlp_out"}
OUR_HOOKS = {theirs: ours for ours, theirs in THEIR_HOOKS.items()}
GEMMA_HOOK = re.compile(r"model\.layers\.(\d+)\.(output|post_feedforward_layernorm\.output)")
GEMMA_HOOKS = {"output": "resid_post", "post_feedforward_layernorm.output": "mlp_write"}
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"  # in SAELens's checkpoints

NAMES: Names = {"encoder.kernel": Theirs("W_enc"), "encoder.bias": Theirs("b_enc"),
                "decoder.kernel": Theirs("W_dec"), "bias": Theirs("b_dec"), "threshold": Theirs("threshold")}
SPARSIFY: Names = {"encoder.kernel": transposed("encoder.weight"), "encoder.bias": Theirs("encoder.bias"),
                   "decoder.kernel": Theirs("W_dec"), "bias": Theirs("b_dec")}
GEMMA_SCOPE: Names = {**NAMES, "encoder.kernel": Theirs("w_enc"), "decoder.kernel": Theirs("w_dec")}
OPENAI: Names = {"encoder.kernel": transposed("encoder.weight"), "encoder.bias": Theirs("latent_bias"),
                 "decoder.kernel": transposed("decoder.weight"), "bias": Theirs("pre_bias")}
DICTIONARY: Names = {**SPARSIFY, "decoder.kernel": transposed("decoder.weight"),
                     "threshold": Theirs("threshold")}

# Keys of cfg.json that affect the outputs, and the values that are supported; a missing key is accepted.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "architecture": ("topk", "jumprelu", "standard", "batchtopk", "matryoshka_batchtopk"),
    "activation": ("topk", "relu"), "activation_fn": ("topk", "relu"), "activation_fn_str": ("topk", "relu"),
    "signed": (False,), "transcode": (False,), "skip_connection": (False,),
    "apply_b_dec_to_input": (True, False), "rescale_acts_by_decoder_norm": (True, False),
    "normalize_activations": ("none", None, False, True, "expected_average_only_in", "covariance_whitening",
                              "layer_norm"),
    "reshape_activations": ("none", None), "normalize_io": (False,), "multi_topk": (False, True),
    "finetuning_scaling_factor": (False,), "noise_scale": (0, None), "hook_head_index": (None,),
    "hook_point_head_index": (None,),
    "seqpos_slice": (None, [None], [])}
# Keys that do not affect the outputs, or are checked elsewhere.
IGNORED_KEYS = {
    "k", "activation_fn_kwargs", "d_in", "d_sae", "num_latents", "expansion_factor", "normalize_decoder",
    "dtype", "device", "metadata", "model_name", "model_class_name", "hook_name", "hook_layer", "hook_point",
    "hook_point_layer", "prepend_bos", "dataset_path", "dataset_trust_remote_code", "context_size",
    "model_from_pretrained_kwargs", "sae_lens_version", "sae_lens_training_version", "neuronpedia_id", "name",
    "sae_id", "release"}
# Keys of training; before version 6, SAELens wrote the whole configuration of the run.
TRAINING_KEYS = {
    "adam_beta1", "adam_beta2", "autocast", "autocast_lm", "aux_loss_coefficient", "b_dec_init_method",
    "cached_activations_path", "checkpoint_path", "compile_llm", "compile_sae", "dead_feature_threshold",
    "dead_feature_window", "decoder_heuristic_init", "decoder_init_norm", "decoder_orthogonal_init",
    "eval_batch_size_prompts", "eval_every_n_wandb_logs", "feature_sampling_method",
    "feature_sampling_window", "finetuning_method", "finetuning_tokens", "from_pretrained_path",
    "hook_eval", "init_encoder_as_decoder_transpose", "is_dataset_tokenized", "jumprelu_bandwidth",
    "jumprelu_init_threshold", "jumprelu_sparsity_loss_mode", "jumprelu_ste_to_input",
    "jumprelu_tanh_scale", "l0_coefficient", "l0_warm_up_steps", "l1_coefficient", "l1_warm_up_steps",
    "log_to_wandb", "lp_norm", "lr", "lr_decay_steps", "lr_end", "lr_scheduler_name", "lr_warm_up_steps",
    "matryoshka_widths", "model_kwargs", "mse_loss_normalization", "n_batches_in_buffer", "n_checkpoints",
    "n_eval_batches", "n_restart_cycles", "normalize_sae_decoder", "output_path",
    "pre_act_loss_coefficient", "run_name", "scale_sparsity_penalty_by_decoder_norm", "seed",
    "store_batch_size", "store_batch_size_prompts", "streaming", "target_l0", "tokens_per_buffer",
    "topk_threshold_lr", "train_batch_size", "train_batch_size_tokens", "training_tokens",
    "use_cached_activations", "use_ghost_grads", "use_matryoshka_aux_loss", "use_sparse_activations",
    "verbose", "wandb_entity", "wandb_id", "wandb_log_frequency", "wandb_project"}
# Keys in the metadata of version 6 that change what the autoencoder reads or writes.
SUPPORTED_METADATA: dict[str, tuple[Any, ...]] = {
    "hook_head_index": (None,), "seqpos_slice": (None, [None], []), "hook_name_out": (None,),
    "hook_head_index_out": (None,)}
# Classes of dictionary_learning.
DICTIONARY_CLASSES = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE",
                      "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")


class SAELayout(NamedTuple):
    """How a project stores an autoencoder.

    Attributes:
        names: its tensors.
        settings: settings of our configuration that the source states.
        folding: how its formula differs from ours.
        ignored: patterns of tensor names that are not converted, with the reason.
        remarks: notes for the user.
    """

    names: Names
    settings: dict[str, Any]
    folding: Folding = Folding()
    ignored: Mapping[str, str] = {}
    remarks: tuple[str, ...] = ()


def layout_of(source: Source) -> SAELayout:
    """Recognises the project of a checkpoint.

    Raises:
        InputError: its configuration asks for something that is not supported.
    """
    if "pre_bias" in source.tensors:
        return _openai(source)
    if "w_enc" in source.tensors:
        return _gemma_scope(source)
    if source.is_directory and isinstance(source.config.get("trainer"), dict):
        return _dictionary_learning(source)
    return _saelens(source)


def sizes(source: Source, encoder: Theirs) -> tuple[int, int]:
    """Returns d_model and the number of latents."""
    shape = shape_of(source, source.tensors, encoder.name, 2)
    return (shape[1], shape[0]) if encoder.how == "transposed" else (shape[0], shape[1])


# -- SAELens, sparsify and fm-difficulty-probe --


def _saelens(source: Source) -> SAELayout:
    tree = source.config
    metadata: Any = tree.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    for prefix, stated, supported in (("", tree, SUPPORTED_VALUES),
                                      ("metadata.", metadata, SUPPORTED_METADATA)):
        for key, values in supported.items():
            if key in stated and stated[key] not in values:
                raise InputError(f"{source.path}: {prefix}{key}: expected "
                                 f"{' or '.join(map(repr, values))}, found {stated[key]!r}")
        if HEAD_OUTPUTS.fullmatch(str(name := stated.get("hook_name", stated.get("hook_point")))):
            raise InputError(f"{source.path}: {prefix}hook_name: expected a hook of the residual stream or "
                             f"of what is added to it, not of attention heads, found {name!r}")
    is_sparsify = "encoder.weight" in source.tensors and "W_enc" not in source.tensors
    names = dict(SPARSIFY if is_sparsify else NAMES)
    d_model, n_latents = sizes(source, names["encoder.kernel"])
    unknown = sorted(tree.keys() - SUPPORTED_VALUES.keys() - IGNORED_KEYS - TRAINING_KEYS)
    if source.is_directory and unknown:
        raise InputError(f"{source.path}: {unknown[0]}: unknown key, which might affect the outputs; if it "
                         "does not, remove it from cfg.json")
    for key, size in (("d_in", d_model), ("d_sae", n_latents), ("num_latents", n_latents)):
        if tree.get(key, size) != size:
            raise InputError(f"{source.path}: {key}: expected {size}, the size in the tensors, found "
                             f"{tree[key]!r}")
    settings = {"activation": _activation(source), **_provenance(source)}
    if settings["activation"] != "jumprelu" and (k := _k(source)) is not None:
        is_mean = settings["activation"] == "batch_topk" and isinstance(k, float) and 0 < k <= n_latents
        settings["k"] = max(1, round(k)) if is_mean else k
    if settings["activation"] == "batch_topk":
        names["threshold"] = Theirs("topk_threshold")
        settings["max_active"] = n_latents
    elif tree.get("architecture") != "jumprelu":
        names.pop("threshold", None)
    rescaled = bool(tree.get("rescale_acts_by_decoder_norm", False))
    if rescaled and settings["activation"] == "jumprelu":
        raise InputError(f"{source.path}: rescale_acts_by_decoder_norm: expected False with architecture "
                         f"{tree.get('architecture', 'standard')}, found True")
    folding = Folding(subtract_decoder_bias=bool(tree.get("apply_b_dec_to_input", True)),
                      rescale_by_decoder_norm=rescaled)
    match tree.get("normalize_activations"):
        case "layer_norm":
            settings["input_norm"] = "layer_norm"
        case "expected_average_only_in" | True:
            folding = dataclasses.replace(folding, scale=_scale(source))
        case "covariance_whitening":
            folding = dataclasses.replace(folding, whitening=_whitening(source, d_model))
    ignored = {}
    if (factor := source.tensors.get("scaling_factor")) is not None and (factor.read() == 1).all():
        ignored["^scaling_factor$"] = "all ones"
    return SAELayout(names, settings, folding, ignored,
                     (*_weight_changes("", tree), *_weight_changes("metadata.", metadata)))


def _weight_changes(prefix: str, stated: Mapping[str, Any]) -> list[str]:
    """Notes on changes of the network's weights (by TransformerLens) before its activations were recorded."""
    key = "model_from_pretrained_kwargs"
    options = stated.get(key)
    return [f"{prefix}{key}.{name}: the activations were those of a network whose weights TransformerLens "
            "had changed; without that change they differ"
            for name, value in (options if isinstance(options, dict) else {}).items()
            if value is True and name.startswith(("center_", "fold_", "refactor_"))]


def _activation(source: Source) -> str:
    tree = source.config
    architecture = tree.get("architecture")
    functions = {key: tree[key] for key in ("activation", "activation_fn", "activation_fn_str")
                 if key in tree}
    only_topk = architecture == "topk" or "W_enc" not in source.tensors  # the latter: sparsify
    if only_topk or architecture == "jumprelu":
        expected = "topk" if only_topk else "relu"
        for key, function in functions.items():
            if function != expected:
                raise InputError(f"{source.path}: {key}: expected {expected!r}, found {function!r}")
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        return "batch_topk"
    if only_topk or "topk" in functions.values():  # in SAELens before 6, the architecture is then standard
        return "topk"
    if architecture is None and not functions and (not source.is_directory or _k(source) is not None):
        return "topk"  # fm-difficulty-probe
    return "jumprelu"


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


def _scale(source: Source) -> float:
    """The constant that activations are multiplied by, which SAELens stores next to a checkpoint."""
    path = source.path / SCALER
    value = source.config["normalize_activations"]
    if not lexists(path):
        raise InputError(f"{source.path}: normalize_activations: expected 'none', or the factor in {SCALER}, "
                         f"found {value!r} without one")
    factor = read_json(path).get("scaling_factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise InputError(f"{path}: scaling_factor: expected a number > 0, found {factor!r}")
    return float(factor)


def _whitening(source: Source, d_model: int) -> tuple[Tensor, Tensor, Tensor]:
    path = source.path / WHITENING
    if not lexists(path):
        raise InputError(f"{source.path}: normalize_activations: expected 'none', or the matrices in "
                         f"{WHITENING}, found 'covariance_whitening' without them")
    tensors = read_file(path)
    check_fit({"mean": (d_model,), "matrix": (d_model, d_model), "inverse_matrix": (d_model, d_model)},
              {name: tensor.shape for name, tensor in tensors.items()}, str(path))
    check_floats(tensors, str(path))
    return tensors["mean"], tensors["matrix"], tensors["inverse_matrix"]


def _provenance(source: Source) -> dict[str, Any]:
    """The source model, source hook and texts of the activations, from SAELens's metadata."""
    tree = source.config
    metadata: Any = tree.get("metadata") if isinstance(tree.get("metadata"), dict) else tree
    settings: dict[str, Any] = {}
    for ours, theirs, kind in (("source_model", "model_name", str), ("layer", "hook_layer", int),
                               ("prepend_bos", "prepend_bos", bool), ("context_size", "context_size", int),
                               ("dataset", "dataset_path", str)):
        if type(metadata.get(theirs)) is kind:
            settings[ours] = metadata[theirs]
    name = metadata.get("hook_name", metadata.get("hook_point"))
    if hook := HOOK.fullmatch(str(name)):
        part = "" if hook[1] == "blocks" else f"{hook[1]}."
        settings |= {"layer": int(hook[2]), "hook": part + OUR_HOOKS.get(hook[3], hook[3])}
    elif isinstance(name, str):
        settings["hook"] = name
    return settings


# -- other projects --


def _gemma_scope(source: Source) -> SAELayout:
    """Gemma Scope (params.npz, without configuration) and Gemma Scope 2 (params.safetensors, config.json)."""
    tree = source.config
    hook = str(tree.get("hf_hook_point_in"))
    for key, values in (("architecture", ("jump_relu",)), ("affine_connection", (False, None)),
                        ("hf_hook_point_out", (None, hook))):
        if key in tree and tree[key] not in values:
            raise InputError(f"{source.path}: {key}: expected {' or '.join(map(repr, values))}, found "
                             f"{tree[key]!r}")
    settings: dict[str, Any] = {"activation": "jumprelu"}
    if isinstance(tree.get("model_name"), str):
        settings["source_model"] = tree["model_name"]
    if place := GEMMA_HOOK.fullmatch(hook):
        settings |= {"layer": int(place[1]), "hook": GEMMA_HOOKS[place[2]]}
    elif "hf_hook_point_in" in tree:
        settings["hook"] = hook
    return SAELayout(GEMMA_SCOPE, settings, Folding(subtract_decoder_bias=False))


def _dictionary_learning(source: Source) -> SAELayout:
    """dictionary_learning (Marks, Karvonen, Mueller): ae.pt, and config.json with a section `trainer`."""
    tree: dict[str, Any] = source.config["trainer"]
    kind = tree.get("dict_class")
    if kind not in DICTIONARY_CLASSES:
        raise InputError(f"{source.path}: trainer.dict_class: expected {' or '.join(DICTIONARY_CLASSES)}, "
                         f"found {kind!r}")
    settings: dict[str, Any] = {"activation": {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batch_topk",
                                               "MatryoshkaBatchTopKSAE": "batch_topk"}.get(kind, "jumprelu")}
    names = dict(NAMES if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder") else DICTIONARY)
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        names["bias"] = Theirs("bias" if kind == "AutoEncoder" else "decoder.bias")
    if kind in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK"):
        del names["threshold"]
    d_model, n_latents = sizes(source, names["encoder.kernel"])
    for key, size in (("activation_dim", d_model), ("dict_size", n_latents)):
        if tree.get(key, size) != size:
            raise InputError(f"{source.path}: trainer.{key}: expected {size}, the size in the tensors, found "
                             f"{tree[key]!r}")
    ignored = {"^group_sizes$": "sizes of the groups in training"}
    if settings["activation"] != "jumprelu":
        if "k" in tree:
            settings["k"] = tree["k"]
        ignored["^k$"] = "k is in config.json"
        if (stored := source.tensors.get("k")) is not None and (
                stored.shape == () and np.issubdtype(stored.dtype, np.integer)):
            found = settings.setdefault("k", int(stored.read()))
            if found != int(stored.read()):
                raise InputError(f"{source.path}: trainer.k: expected {int(stored.read())}, the k in ae.pt, "
                                 f"found {found!r}")
    if kind == "AutoEncoderTopK":
        ignored["^threshold$"] = "used in place of k only on request"
    if settings["activation"] == "batch_topk":
        settings["max_active"] = n_latents
    for ours, theirs, type_ in (("source_model", "lm_name", str), ("layer", "layer", int)):
        if type(tree.get(theirs)) is type_:
            settings[ours] = tree[theirs]
    if "resid_post" in str(tree.get("submodule_name")):
        settings["hook"] = "resid_post"
    buffer = source.config.get("buffer")
    if isinstance(buffer, dict) and type(buffer.get("ctx_len")) is int:
        settings["context_size"] = buffer["ctx_len"]
    scales = kind == "JumpReluAutoEncoder"
    return SAELayout(names, settings, Folding(kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"), scales,
                                           scales), ignored)


def _openai(source: Source) -> SAELayout:
    """openai/sparse_autoencoder: a state dict with the name of the activation.

    Files with a TopK expect normalised rows, others do not.
    """
    entries = source.other_entries
    kind = entries.get("activation", "ReLU")
    if kind not in ("ReLU", "TopK"):
        raise InputError(f"{source.path}: activation: expected 'ReLU' or 'TopK', found {kind!r}")
    ignored = {r"^(stats_last_nonzero|latents_activation_frequency|latents_mean_square)$":
               "statistics of training"}
    if kind == "ReLU":
        return SAELayout(OPENAI, {"activation": "jumprelu"}, ignored=ignored)
    state: Any = entries.get("activation_state_dict")
    state = state if isinstance(state, dict) else {}
    if state.get("postact_fn", "ReLU") != "ReLU":
        raise InputError(f"{source.path}: activation_state_dict.postact_fn: expected 'ReLU', found "
                         f"{state['postact_fn']!r}")
    settings = {"activation": "topk", "input_norm": "layer_norm"}
    return SAELayout(OPENAI, settings | ({"k": state["k"]} if "k" in state else {}), ignored=ignored)
