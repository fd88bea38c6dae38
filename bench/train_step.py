"""One training step beside PyTorch's: python -m bench.train_step [--rounds N].

The same network and batch (forward, backward, clipping, AdamW) as a jitted step, as eager PyTorch
and as compiled PyTorch, in turn. Shares are of the machine's matrix-product limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys

import jax
import numpy as np

from bench.measure import Contender, in_turn, machine, matmul_limit, milliseconds, peak_memory, ratio
from tilelli_jax import config as config_lib
from tilelli_jax.models import ModelConfig
from tilelli_jax.sharding import MeshConfig, make_mesh
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.flops import train_flops_per_token
from tilelli_jax.training.losses import next_byte_loss
from tilelli_jax.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from tilelli_jax.training.report import table
from tilelli_jax.training.step import init_state, make_train_step

BATCH, TIME = 8, 256
CONFIGS = {"atome": "atome-944k", "Lite": "tilelli-lite-fp32", "Lite ternary": "tilelli-lite-ternary",
           "parent": "tilelli-fp32", "vanilla": "vanilla-fp32"}


def load(name: str) -> ModelConfig:
    return config_lib.load(ExperimentConfig, f"configs/{CONFIGS[name]}.yaml").model


def ours(config: ModelConfig, scan_layers: bool = True) -> Contender:
    """Our step; XLA keeps its state on the device."""
    from tilelli_jax.models.decoder import ComputeConfig
    mesh = make_mesh(MeshConfig())
    settings = OptimizerConfig()
    optimizer = make_optimizer(settings, 1000)
    with jax.set_mesh(mesh):
        network, outline, make_state = init_state(config, ComputeConfig(scan_layers=scan_layers),
                                                  optimizer, 0, mesh)
        step = make_train_step(network, optimizer, next_byte_loss(0.0), make_schedule(settings, 1000),
                               jax.tree.map(lambda a: a.sharding, outline), mesh)
    batch = {"bytes": jax.device_put(_bytes()[None])}
    held = [make_state()]

    def run() -> None:
        with jax.set_mesh(mesh):
            held[0], metrics = step(held[0], batch, np.int32(held[0].step))
            jax.block_until_ready((held[0], metrics))
    return run


def torchs(config: ModelConfig, compiled: bool) -> Contender:
    """PyTorch's step on the same network."""
    import torch

    from tests.restated.torch_networks import build
    model = build(config_lib.to_dict(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    data = torch.from_numpy(_bytes().astype(np.int64))

    def forward(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    loss = torch.compile(forward) if compiled else forward

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(data[:, :-1], data[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return run


def _bytes() -> np.ndarray:
    return np.random.default_rng(0).integers(97, 123, (BATCH, TIME + 1)).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--networks", nargs="*", default=["atome", "Lite", "Lite ternary"], choices=CONFIGS)
    parser.add_argument("--memory-of", nargs=2, metavar=("NETWORK", "WHO"), help="run three steps and end")
    options = parser.parse_args()
    if options.memory_of:
        name, who = options.memory_of
        run = ours(load(name)) if who == "ours" else torchs(load(name), who == "compiled")
        for _ in range(3):
            run()
        return
    print(f"{machine()}; batch {BATCH} × {TIME}, f32, {options.rounds} rounds in turn")
    limit = matmul_limit()
    print(f"matrix-product limit {limit / 1e9:.0f} GFLOP/s")
    rows = [("network", "who", "ms a step (range)", "of eager", "of compiled", "of the limit", "peak MiB")]
    fp32: dict[str, list[float]] = {}
    for name in options.networks:
        config = load(name)
        contenders = {"ours": ours(config), "eager": torchs(config, False), "compiled": torchs(config, True)}
        if name == "Lite ternary":
            contenders["ours, fp32"] = ours(dataclasses.replace(config, quantizer="none"))
        seconds = in_turn(contenders, options.rounds)
        flops = train_flops_per_token(config) * BATCH * TIME
        for who, times in seconds.items():
            memory = ("" if who == "ours, fp32" else
                      f"{peak_memory('bench.train_step', '--memory-of', name, who):.0f}")
            rows.append((name, who, milliseconds(times), f"{ratio(times, seconds['eager']):.2f}",
                         f"{ratio(times, seconds['compiled']):.2f}",
                         f"{flops / statistics.median(times) / limit:.0%}", memory))
        if name == "Lite ternary":
            fp32["ternary / fp32"] = [ratio(seconds["ours"], seconds["ours, fp32"])]
    print(table(rows))
    for name, (value,) in fp32.items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    sys.exit(main())
