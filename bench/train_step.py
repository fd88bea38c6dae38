"""One training step beside PyTorch's: python -m bench.train_step [--rounds N].

The same network and batch (forward, backward, clipping, AdamW), in turn:

    scanned   our step as it comes: one compiled block, scanned over the layers
    unrolled  our step with compute.scan_layers=false
    written   eager PyTorch as the formulas read: masked attention, the state as a convolution
    eager     eager PyTorch in the form that PyTorch runs fastest
    compiled  the same through torch.compile

Shares are of the machine's matrix-product limit, and MFU of its data sheet's, where that is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from bench.measure import (
    Candidate,
    arguments,
    in_turn,
    machine,
    matmul_limit,
    milliseconds,
    on_torch_device,
    peak_memory,
    print_peak,
    ratio,
    told,
    torch_wait,
)
from tilelli_jax import config as config_lib
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models import ModelConfig
from tilelli_jax.sharding import MeshConfig, make_mesh
from tilelli_jax.tables import table
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.flops import peak_flops, train_flops_per_token
from tilelli_jax.training.losses import next_byte_loss
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import make_training

BATCH, TIME = 8, 256
CONFIGS = {"atome": "atome-944k", "Lite": "tilelli-lite-fp32", "Lite ternary": "tilelli-lite-ternary",
           "parent": "tilelli-fp32", "vanilla": "vanilla-fp32"}


def load(name: str) -> ModelConfig:
    model = config_lib.load(ExperimentConfig, f"configs/{CONFIGS[name]}.yaml").model
    assert not isinstance(model, SAEConfig)
    return model


def ours(config: ModelConfig, scan_layers: bool = True) -> Candidate:
    """Our step; XLA keeps its state on the device."""
    from tilelli_jax.models.decoder import ComputeConfig
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        training = make_training(config, ComputeConfig(scan_layers=scan_layers), OptimizerConfig(),
                                 steps=1000, loss=next_byte_loss(0.0), seed=0, mesh=mesh)
    batch = {"bytes": jax.device_put(token_rows()[None])}
    held = [training.make_state()]

    def run() -> None:
        with jax.set_mesh(mesh):
            held[0], metrics = training.update(held[0], batch, np.int32(held[0].step))
            jax.block_until_ready((held[0], metrics))
    return run


def torchs(config: ModelConfig, who: str) -> Candidate:
    """PyTorch's step on the same network."""
    import torch
    from tilelli_jax.convert.torch_networks import build
    form: Literal["written", "fast"] = "written" if who == "written" else "fast"
    model, data = on_torch_device(build(config_lib.to_dict(config), form),
                                  torch.from_numpy(token_rows().astype(np.int64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def forward(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    loss = torch.compile(forward) if who == "compiled" else forward

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(data[:, :-1], data[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch_wait()
    return run


def token_rows() -> np.ndarray:
    """The same letters for everybody, uint8 `[batch, time + 1]`."""
    return np.random.default_rng(0).integers(97, 123, (BATCH, TIME + 1)).astype(np.uint8)


def candidate(name: str, who: str) -> Candidate:
    config = load(name)
    match who:
        case "scanned" | "unrolled":
            return ours(config, who == "scanned")
        case "scanned, fp32":
            return ours(dataclasses.replace(config, quantizer="none"))
    return torchs(config, who)


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--networks", nargs="*", default=["atome", "Lite", "Lite ternary"], choices=CONFIGS)
    parser.add_argument("--memory-of", nargs=2, metavar=("NETWORK", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        run = candidate(*options.memory_of)
        for _ in range(3):
            run()
        print_peak()
        return
    with told(options.out) as tell:
        compare(options.networks, options.rounds, tell)


def compare(networks: Sequence[str], rounds: int, tell: Callable[[str], None]) -> None:
    tell(f"{machine()}; batch {BATCH} × {TIME}, f32, {rounds} rounds in turn")
    limit, peak = matmul_limit(), peak_flops(jax.devices()[0])
    tell(f"matrix-product limit {limit / 1e9:.0f} GFLOP/s")
    others = ["written", "eager", "compiled"]
    rows = [("network", "who", "ms a step (range)", *(f"of {other}" for other in others),
             "of the limit", *(["MFU (bf16 peak)"] if peak else []), "peak MiB")]
    ternary = ""
    for name in networks:
        whos = ["scanned", "unrolled", *others]
        if name == "Lite ternary":
            whos.insert(1, "scanned, fp32")
        seconds = in_turn({who: candidate(name, who) for who in whos}, rounds)
        flops = train_flops_per_token(load(name)) * BATCH * TIME
        for who, times in seconds.items():
            rows.append((name, who, milliseconds(times),
                         *(f"{ratio(times, seconds[other]):.2f}" for other in others),
                         *(f"{flops / statistics.median(times) / most:.0%}"
                           for most in (limit, peak) if most),
                         f"{peak_memory('bench.train_step', '--memory-of', name, who):.0f}"))
        if name == "Lite ternary":
            ternary = f"{ratio(seconds['scanned'], seconds['scanned, fp32']):.3f}"
    tell(table(rows))
    if ternary:
        tell(f"Lite, a ternary step / an fp32 step: {ternary}")


if __name__ == "__main__":
    main()
