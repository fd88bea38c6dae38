"""Source and result on the same input: the largest difference of their outputs (`--check`).

transformers runs what it knows. Tilelli's networks are restated in `torch_networks.py` and filled
with the source's tensors as they are, so that a kernel turned the wrong way is seen; which tensor
is which, both sides have from the same map.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import extras, store
from tilelli_jax.models.arrays import to_arrays

from .plan import Plan
from .source import Source

ROWS, TIME = 2, 32


class Outputs(NamedTuple):
    """What both made of one input, f32 of the same shape, and who ran the source."""

    ours: np.ndarray
    theirs: np.ndarray
    by: str


def needs(source: Source) -> None:
    """Raises InputError where a package that the check needs is not installed."""
    wanted = ("torch", "transformers") if source.is_directory and "model_type" in source.tree else ("torch",)
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise extras.missing(name, "--check")


def compare(source: Source, plan: Plan, out: Path) -> Outputs:
    """Runs both, in f32."""
    rng = np.random.default_rng(0)
    run: Callable[..., Outputs] = {"t5": _seq2seq, "sae": _sae, "lrd": _lrd, "gpt_neox": _causal,
                                   "gemma4": _causal}.get(plan.family, _routed)
    return run(source, plan, store.load(out), rng)


def told(outputs: Outputs) -> str:
    """One line."""
    apart = np.abs(outputs.ours - outputs.theirs)
    return (f"largest difference from {outputs.by}: {apart.max():.3g}, of outputs up to "
            f"{np.abs(outputs.theirs).max():.3g}; {(apart > 1e-3).mean():.2%} of them differ by over 0.001")


def restated(plan: Plan, config: Any, form: Literal["fast", "exact"]) -> Any:
    """One of Tilelli's networks in PyTorch, with this configuration and the source's tensors as they are."""
    import torch

    from . import torch_networks
    network = torch_networks.build(config_lib.to_dict(config), form).eval()
    filled = torch_networks.named_tensors(network)
    for link in plan.links:
        if link.ours not in filled:  # the abstain head, which has no part in the logits
            continue
        tensor = filled[link.ours][1]
        parts = [torch.from_numpy(np.array(plan.found[name].read(), np.float32)) for name in link.theirs]
        tensor.data.copy_((torch.stack(parts) if link.by_head else parts[0]).reshape(tensor.shape))
    return network


def _ids(rng: np.random.Generator, plan: Plan) -> np.ndarray:
    time = min(TIME, getattr(plan.config, "max_seq_len", TIME))
    return rng.integers(0, plan.config.vocab_size, (ROWS, time))


def _causal(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    import transformers
    ids = _ids(rng, plan)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(ids)).logits.numpy()
    return Outputs(np.asarray(model(ids)), logits, f"transformers {transformers.__version__}")


def _seq2seq(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    import transformers
    ids, decoded = _ids(rng, plan), _ids(rng, plan)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(source.path, dtype=torch.float32).eval()
    with torch.no_grad():
        made = theirs(input_ids=torch.from_numpy(ids), decoder_input_ids=torch.from_numpy(decoded))
    return Outputs(np.asarray(model(ids, decoded)), made.logits.numpy(),
                   f"transformers {transformers.__version__}")


def _routed(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    ids = _ids(rng, plan)
    # As stored, before quantisation: a weight half way between two levels goes either way with the
    # last bit of a mean, and a network of few levels makes much of it.
    plain = dataclasses.replace(plan.config, quantizer="none")
    model = store.from_arrays(plain, to_arrays(model))
    theirs = restated(plan, plain, "exact")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).numpy()
    return Outputs(np.asarray(model(ids)), logits, "its restatement in PyTorch, of weights not quantised"
                   if plan.config.quantizer != "none" else "its restatement in PyTorch")


def _sae(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    x = rng.standard_normal((ROWS * TIME, plan.config.d_model)).astype(np.float32)
    found = {name: torch.from_numpy(np.array(tensor.read(), np.float32))
             for name, tensor in plan.found.items()}
    encoder = found["W_enc"] if "W_enc" in found else found["encoder.weight"].T
    encoder_bias = found["b_enc"] if "b_enc" in found else found["encoder.bias"]
    decoder, bias = found["W_dec"], found["b_dec"]
    values, latents = ((torch.from_numpy(x) - bias) @ encoder + encoder_bias).topk(plan.config.k)
    codes = torch.zeros(len(x), plan.config.n_latents).scatter(1, latents, values.relu())
    return Outputs(np.asarray(model(x)), (codes @ decoder + bias).numpy(), "its formula in PyTorch")


def _lrd(source: Source, plan: Plan, model: Any, rng: np.random.Generator) -> Outputs:
    import torch
    config = plan.config
    found = {name: torch.from_numpy(np.array(tensor.read(), np.float32))
             for name, tensor in plan.found.items()}
    mean, std = found["fscaler.mean"], found["fscaler.std"]
    features = mean + std * torch.from_numpy(
        rng.standard_normal((ROWS * TIME, 9, config.n_features)).astype(np.float32))
    whole = found["gscaler.mean"] + found["gscaler.scale"] * torch.from_numpy(
        rng.standard_normal((ROWS * TIME, config.n_globals)).astype(np.float32))
    gru = torch.nn.GRU(config.n_features, config.d_hidden, batch_first=True)
    gru.load_state_dict({name.removeprefix("gru."): tensor for name, tensor in found.items()
                         if name.startswith("gru.")})
    with torch.no_grad():
        states, _ = gru((features - mean) / std)
        pooled = torch.cat([states.mean(1), states[:, -1],
                            (whole - found["gscaler.mean"]) / found["gscaler.scale"]], 1)
        hidden = torch.relu(pooled @ found["head.0.weight"].T + found["head.0.bias"])
        logits = (hidden @ found["head.3.weight"].T + found["head.3.bias"])[:, 0]
        theirs = torch.sigmoid(logits / found["T"]).numpy()
    return Outputs(np.asarray(model(features.numpy(), whole.numpy())), theirs, "its formula in PyTorch")
