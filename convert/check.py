"""Runs source and result on the same input and reports their largest difference (`--check`).

transformers runs its own architectures. `torch_networks.py` implements Tilelli's networks again in PyTorch,
filled with the source's tensors in their original layout, so the check detects a kernel that was wrongly
transposed. Both sides use the same map of names, so the check does not detect an error in that map.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import extras
from tilelli_jax.loading import store
from tilelli_jax.models.arrays import to_arrays

from .plan import Plan
from .source import Source

ROWS, TIME = 2, 32


class Outputs(NamedTuple):
    """Outputs of both networks for one input, f32 of equal shape, and the program that ran the source."""

    converted: np.ndarray
    original: np.ndarray
    runner: str


def require_packages(source: Source) -> None:
    """Raises InputError where a package that the check needs is not installed."""
    by_transformers = (source.is_directory or source.is_gguf) and "model_type" in source.config
    packages = (("torch", "transformers") if by_transformers else ("torch",)) + (
        ("accelerate",) if source.is_gguf else ())
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise extras.missing(name, "--check")


def compare(source: Source, plan: Plan, out: Path) -> Outputs:
    """Runs both networks in f32 on the same random input."""
    rng = np.random.default_rng(0)
    run: Callable[..., Outputs] = {
        "t5": _seq2seq, "sae": _sae, "lrd": _lrd, "gpt_neox": _causal, "llama": _causal, "gemma3": _causal,
        "gemma4": _causal}.get(plan.family, _routed)
    return run(source, plan, store.load(out), rng)


def format_difference(outputs: Outputs) -> str:
    """One line: the largest difference, and the fraction of outputs that differ by over 0.001."""
    difference = np.abs(outputs.converted - outputs.original)
    largest_output = np.abs(outputs.original).max()
    return (f"largest difference from {outputs.runner}: {difference.max():.3g}, with outputs up to "
            f"{largest_output:.3g}; {(difference > 1e-3).mean():.2%} of the outputs differ by over 0.001")


def pytorch_network(plan: Plan, config: Any, form: Literal["fast", "exact"]) -> Any:
    """A Tilelli network in PyTorch: this configuration, the source's tensors in their original layout."""
    import torch

    from . import torch_networks
    network = torch_networks.build(config_lib.to_dict(config), form).eval()
    parameters = torch_networks.named_tensors(network)
    for link in plan.links:
        if link.ours not in parameters:  # the abstain head does not affect the logits
            continue
        tensor = parameters[link.ours][1]
        parts = [torch.from_numpy(np.array(plan.tensors[name].read(), np.float32)) for name in link.theirs]
        tensor.data.copy_((torch.stack(parts) if link.by_head else parts[0]).reshape(tensor.shape))
    return network


def _ids(rng: np.random.Generator, plan: Plan) -> np.ndarray:
    time = min(TIME, getattr(plan.config, "max_seq_len", TIME))
    return rng.integers(0, plan.config.vocab_size, (ROWS, time))


def _causal(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    import transformers
    ids = _ids(rng, plan)
    place = {"gguf_file": source.path.name} if source.is_gguf else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source.path.parent if place else source.path, dtype=torch.float32, **place).eval()
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
    return Outputs(np.asarray(model(ids)), logits, f"transformers {transformers.__version__}")


def _seq2seq(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    import transformers
    ids, decoded = _ids(rng, plan), _ids(rng, plan)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(source.path, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = theirs(input_ids=torch.from_numpy(ids), decoder_input_ids=torch.from_numpy(decoded))
    return Outputs(np.asarray(model(ids, decoded)), outputs.logits.numpy(),
                   f"transformers {transformers.__version__}")


def _routed(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    ids = _ids(rng, plan)
    # Both sides run without quantisation: for a weight half way between two levels, the last bit of a mean
    # decides the rounding, and in a network of few levels that changes the outputs a lot.
    plain = dataclasses.replace(plan.config, quantizer="none")
    model = store.from_arrays(plain, to_arrays(model))
    theirs = pytorch_network(plan, plain, "exact")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).numpy()
    return Outputs(np.asarray(model(ids)), logits, "the PyTorch implementation, weights not quantised"
                   if plan.config.quantizer != "none" else "the PyTorch implementation")


def _sae(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    config = plan.config
    x = torch.from_numpy(rng.standard_normal((ROWS * TIME, config.d_model)).astype(np.float32))
    arrays = {name: torch.from_numpy(np.array(tensor.read(), np.float32))
              for name, tensor in plan.arrays().items()}
    z, mean, deviation = x, torch.zeros(1), torch.ones(1)
    if config.input_norm == "layer_norm":
        mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        z = (x - mean) / (deviation + 1e-5)
    pre = (z - arrays["bias"]) @ arrays["encoder.kernel"] + arrays["encoder.bias"]
    values, latents = (pre if config.activation == "topk" else pre * (pre > arrays["threshold"])).topk(
        config.n_codes)
    codes = torch.zeros(len(x), config.n_latents).scatter(1, latents, values.relu())
    theirs = (codes @ arrays["decoder.kernel"] + arrays["bias"]) * deviation + mean
    return Outputs(np.asarray(model(x.numpy())), theirs.numpy(), "its formula in PyTorch")


def _lrd(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    config = plan.config
    tensors = {name: torch.from_numpy(np.array(tensor.read(), np.float32))
               for name, tensor in plan.tensors.items()}
    mean, std = tensors["fscaler.mean"], tensors["fscaler.std"]
    features = mean + std * torch.from_numpy(
        rng.standard_normal((ROWS * TIME, 9, config.n_features)).astype(np.float32))
    globals_ = tensors["gscaler.mean"] + tensors["gscaler.scale"] * torch.from_numpy(
        rng.standard_normal((ROWS * TIME, config.n_prompt_features)).astype(np.float32))
    gru = torch.nn.GRU(config.n_features, config.d_hidden, batch_first=True)
    gru.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in tensors.items()
                         if name.startswith("gru.")})
    with torch.no_grad():
        states, _ = gru((features - mean) / std)
        pooled = torch.cat([states.mean(1), states[:, -1],
                            (globals_ - tensors["gscaler.mean"]) / tensors["gscaler.scale"]], 1)
        hidden = torch.relu(pooled @ tensors["head.0.weight"].T + tensors["head.0.bias"])
        logits = (hidden @ tensors["head.3.weight"].T + tensors["head.3.bias"])[:, 0]
        theirs = torch.sigmoid(logits / tensors["T"]).numpy()
    return Outputs(np.asarray(model(features.numpy(), globals_.numpy())), theirs, "its formula in PyTorch")
