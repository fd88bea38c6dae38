"""One training step compared with PyTorch: python -m bench.train_step [--rounds N].

Times a step (forward, backward, clipping, AdamW) on the same network and batch, in alternating rounds:

    scanned   our default step: one compiled block, scanned over the layers
    unrolled  our step with compute.scan_layers=false
    written   eager PyTorch, direct implementation: masked attention, the state pathway as a convolution
    eager     eager PyTorch in its fastest form
    compiled  the eager form through torch.compile

Reports the fraction of the machine's measured matrix-product limit and, where the data sheet is known, model
FLOP/s utilisation (MFU).
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
    tee,
    torch_synchronize,
)
from tilelli_jax import config as config_lib
from tilelli_jax.cli.tables import table
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models import ModelConfig
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.flops import peak_flops, train_flops_per_token
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import make_training
from tilelli_jax.training.tasks.text_loss import NextByteLoss

BATCH, TIME = 8, 256
CONFIGS = {"atome": "atome-944k", "Lite": "tilelli-lite-fp32", "Lite ternary": "tilelli-lite-ternary",
           "parent": "tilelli-fp32", "vanilla": "vanilla-fp32"}


def load(name: str) -> ModelConfig:
    model = config_lib.load(ExperimentConfig, f"configs/{CONFIGS[name]}.yaml").model
    assert not isinstance(model, SAEConfig)
    return model


def our_step(config: ModelConfig, scan_layers: bool = True) -> Candidate:
    """Our step; the state stays on the device."""
    from tilelli_jax.models.causal_lm import ComputeConfig
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        training = make_training(config, ComputeConfig(scan_layers=scan_layers), OptimizerConfig(),
                                 steps=1000, loss=NextByteLoss(0.0), seed=0, mesh=mesh)
    batch = {"bytes": jax.device_put(token_rows()[None])}
    state = [training.make_state()]

    def run() -> None:
        with jax.set_mesh(mesh):
            state[0], metrics = training.update(state[0], batch, np.int32(state[0].step))
            jax.block_until_ready((state[0], metrics))
    return run


def torch_step(config: ModelConfig, variant: str) -> Candidate:
    """PyTorch's step on the same network."""
    import torch

    from tilelli_jax.convert.torch_networks import build
    form: Literal["written", "fast"] = "written" if variant == "written" else "fast"
    model, data = on_torch_device(build(config_lib.to_dict(config), form),
                                  torch.from_numpy(token_rows().astype(np.int64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def forward(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    loss = torch.compile(forward) if variant == "compiled" else forward

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(data[:, :-1], data[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch_synchronize()
    return run


def token_rows() -> np.ndarray:
    """Random letters, the same for all variants, uint8 `[batch, time + 1]`."""
    return np.random.default_rng(0).integers(97, 123, (BATCH, TIME + 1)).astype(np.uint8)


def candidate(name: str, variant: str) -> Candidate:
    config = load(name)
    match variant:
        case "scanned" | "unrolled":
            return our_step(config, variant == "scanned")
        case "scanned, fp32":
            return our_step(dataclasses.replace(config, quantizer="none"))
    return torch_step(config, variant)


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
    with tee(options.out) as print_line:
        compare(options.networks, options.rounds, print_line)


def compare(networks: Sequence[str], rounds: int, print_line: Callable[[str], None]) -> None:
    print_line(f"{machine()}; batch {BATCH} × {TIME}, f32, {rounds} alternating rounds")
    limit, peak = matmul_limit(), peak_flops(jax.devices()[0])
    print_line(f"matrix-product limit {limit / 1e9:.0f} GFLOP/s")
    others = ["written", "eager", "compiled"]
    rows = [("network", "variant", "ms/step (range)", *(f"× {other}" for other in others),
             "of matmul limit", *(["MFU (bf16 peak)"] if peak else []), "peak MiB")]
    ternary_ratio = ""
    for name in networks:
        variants = ["scanned", "unrolled", *others]
        if name == "Lite ternary":
            variants.insert(1, "scanned, fp32")
        seconds = in_turn({variant: candidate(name, variant) for variant in variants}, rounds)
        flops = train_flops_per_token(load(name)) * BATCH * TIME
        for variant, times in seconds.items():
            rows.append((name, variant, milliseconds(times),
                         *(f"{ratio(times, seconds[other]):.2f}" for other in others),
                         *(f"{flops / statistics.median(times) / limit_flops:.0%}"
                           for limit_flops in (limit, peak) if limit_flops),
                         f"{peak_memory('bench.train_step', '--memory-of', name, variant):.0f}"))
        if name == "Lite ternary":
            ternary_ratio = f"{ratio(seconds['scanned'], seconds['scanned, fp32']):.3f}"
    print_line(table(rows))
    if ternary_ratio:
        print_line(f"Lite, ternary step / fp32 step: {ternary_ratio}")


if __name__ == "__main__":
    main()
