"""Sparse autoencoders of other projects: SAELens, sparsify, Gemma Scope, dictionary_learning, openai, and
fm-difficulty-probe.

A `Layout` says how one of them stores an autoencoder. Where its formula differs from ours by constants, they
are folded into the weights, which changes nothing but rounding (`Folding`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.io.files import new_directory, write_json
from tilelli_jax.io.json_text import read_json
from tilelli_jax.io.tensors import Tensor, check_fit, check_floats, in_memory, read_file, write_file
from tilelli_jax.pretrained import mapping
from tilelli_jax.pretrained.mapping import Names, Theirs, transposed

from ..plan import Family, Plan, configured, key_of, make_plan
from ..source import AUTOENCODERS, Source, lexists
from .common import cannot_infer, shape_of

# Hooks of TransformerLens, and their names there that differ from ours.
HOOK = re.compile(r"(blocks|encoder|decoder)\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
THEIR_HOOKS = {"mlp_write": "mlp_out"}
OUR_HOOKS = {theirs: ours for ours, theirs in THEIR_HOOKS.items()}
GEMMA_HOOK = re.compile(r"model\.layers\.(\d+)\.(output|post_feedforward_layernorm\.output)")
GEMMA_HOOKS = {"output": "resid_post", "post_feedforward_layernorm.output": "mlp_write"}
SAELENS_VERSION = "6.54.0"  # the version whose format `write_directory` writes
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"  # in SAELens's checkpoints
UNIT_NORM_AXES: dict[Literal["rows", "columns"], int] = {"columns": 0, "rows": 1}  # rows take precedence
UNIT_NORM_TOLERANCE = 1e-2  # a norm counts as 1 within this; bfloat16 needs it
BLOCK = 64  # rows of a kernel that are converted to float64 at a time
SMALLEST_NORM = 1e-8  # of a row of the decoder, as in SAELens

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
# Classes of dictionary_learning.
DICTIONARY_CLASSES = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE",
                      "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")


@dataclasses.dataclass(frozen=True)
class Folding:
    """How a formula differs from ours: codes = activation((x − b_dec) · W_enc + b_enc).

    Attributes:
        bias_in_input: whether b_dec is subtracted from x.
        by_norm: whether the codes are multiplied by the lengths of the decoder's rows, before latents are
            selected, and divided by them before decoding.
        threshold_by_norm: whether, with `by_norm`, the thresholds are compared before that.
        scale: x is multiplied by it first, and x̂ divided by it.
        whitening: x is replaced by (x − mean) · matrix first, and x̂ by x̂ · inverse + mean: the mean
            `[d_model]`, the matrix and its inverse `[d_model, d_model]`.
    """

    bias_in_input: bool = True
    by_norm: bool = False
    threshold_by_norm: bool = False
    scale: float = 1.0
    whitening: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our arrays with the differences folded into them; computed on access, in at least float32."""
        dtype = np.dtype(np.float64 if any(array.dtype == np.float64 for array in arrays.values())
                         else np.float32)

        def stored(name: str) -> np.ndarray:
            return arrays[name].read().astype(dtype)

        def encoder() -> np.ndarray:
            kernel = stored("encoder.kernel") * (self.scale * norms()).astype(dtype)
            return kernel if whitening is None else (whitening[1] @ kernel).astype(dtype)

        def decoder() -> np.ndarray:
            kernel = stored("decoder.kernel") / (self.scale * norms())[:, None].astype(dtype)
            return kernel if whitening is None else (kernel @ whitening[2]).astype(dtype)

        def bias() -> np.ndarray:
            scaled = stored("bias").astype(np.float64) / self.scale
            return scaled if whitening is None else scaled @ whitening[2] + whitening[0]

        def encoder_bias() -> np.ndarray:
            own = stored("encoder.bias").astype(np.float64) * norms()
            # (x − c) · W + b = (x − b_dec) · W + b + (b_dec − c) · W, with c the center of x.
            if self.bias_in_input:
                return own
            shift, kernel = bias() - (0 if whitening is None else whitening[0]), encoder()
            return own + sum(shift[i:i + BLOCK] @ kernel[i:i + BLOCK] for i in range(0, len(shift), BLOCK))

        @functools.cache
        def norms() -> np.ndarray:
            n_latents = arrays["encoder.bias"].shape[0]
            if not self.by_norm:
                return np.ones(n_latents)
            squares = np.einsum("ij,ij->i", *[stored("decoder.kernel")] * 2, dtype=np.float64)
            return np.maximum(np.sqrt(squares), SMALLEST_NORM)

        def threshold() -> np.ndarray:
            return stored("threshold") * (norms() if self.threshold_by_norm else 1)

        whitening = None if self.whitening is None else tuple(
            tensor.read().astype(np.float64) for tensor in self.whitening)
        folded = {"encoder.kernel": encoder, "encoder.bias": encoder_bias, "decoder.kernel": decoder,
                  "bias": bias, "threshold": threshold}
        return {name: _computed(array.shape, dtype, folded[name]) for name, array in arrays.items()}


class Layout(NamedTuple):
    """How a project stores an autoencoder.

    Attributes:
        names: its tensors.
        settings: settings of our configuration that the source states.
        folding: how its formula differs from ours.
        ignored: patterns of tensor names that are not converted, with the reason.
    """

    names: Names
    settings: dict[str, Any]
    folding: Folding = Folding()
    ignored: Mapping[str, str] = {}


def _plan(source: Source, overrides: Sequence[str]) -> Plan:
    layout = _layout(source)
    names = layout.names
    d_model, n_latents = _shape(source, names["encoder.kernel"])
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


def _layout(source: Source) -> Layout:
    if "pre_bias" in source.tensors:
        return _openai(source)
    if "w_enc" in source.tensors:
        return _gemma_scope(source)
    if source.is_directory and isinstance(source.config.get("trainer"), dict):
        return _dictionary_learning(source)
    return _saelens(source)


def _shape(source: Source, encoder: Theirs) -> tuple[int, int]:
    """Returns d_model and the number of latents."""
    shape = shape_of(source, source.tensors, encoder.name, 2)
    return (shape[1], shape[0]) if encoder.how == "transposed" else (shape[0], shape[1])


def _computed(shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], np.ndarray]) -> Tensor:
    def parts() -> Iterator[np.ndarray]:
        with np.errstate(all="ignore"):  # numbers that are not finite are rejected when the network is loaded
            array = compute().astype(dtype)
        yield array
    return Tensor(shape, dtype, parts)


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


# -- SAELens, sparsify and fm-difficulty-probe --


def _saelens(source: Source) -> Layout:
    tree = source.config
    for key, values in SUPPORTED_VALUES.items():
        if key in tree and tree[key] not in values:
            raise InputError(f"{source.path}: {key}: expected {' or '.join(map(repr, values))}, "
                             f"found {tree[key]!r}")
    is_sparsify = "encoder.weight" in source.tensors and "W_enc" not in source.tensors
    names = dict(SPARSIFY if is_sparsify else NAMES)
    d_model, n_latents = _shape(source, names["encoder.kernel"])
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
    folding = Folding(bias_in_input=bool(tree.get("apply_b_dec_to_input", True)), by_norm=rescaled)
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
    return Layout(names, settings, folding, ignored)


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
    """The network, hook and texts of the activations, from the metadata of SAELens."""
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


def _gemma_scope(source: Source) -> Layout:
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
    return Layout(GEMMA_SCOPE, settings, Folding(bias_in_input=False))


def _dictionary_learning(source: Source) -> Layout:
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
    d_model, n_latents = _shape(source, names["encoder.kernel"])
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
    return Layout(names, settings, Folding(kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"), scales,
                                           scales), ignored)


def _openai(source: Source) -> Layout:
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
        return Layout(OPENAI, {"activation": "jumprelu"}, ignored=ignored)
    state: Any = entries.get("activation_state_dict")
    state = state if isinstance(state, dict) else {}
    if state.get("postact_fn", "ReLU") != "ReLU":
        raise InputError(f"{source.path}: activation_state_dict.postact_fn: expected 'ReLU', found "
                         f"{state['postact_fn']!r}")
    settings = {"activation": "topk", "input_norm": "layer_norm"}
    return Layout(OPENAI, settings | ({"k": state["k"]} if "k" in state else {}), ignored=ignored)


# -- back --


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


def _recognises(source: Source) -> bool:
    names = source.tensors.keys()
    if source.is_directory:
        return "model_type" not in source.config and (
            "W_dec" in names or "w_dec" in names or isinstance(source.config.get("trainer"), dict))
    return bool({"W_enc", "w_enc"} & names) or {"pre_bias", "latent_bias"} <= names


SAE = Family("sae", _recognises, _plan)
