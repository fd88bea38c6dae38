"""Compile time at several depths: python -m bench.compile_time.

Measures the time to trace, lower and compile the training step of Lite at its full width, with batches of
8 × 256 bytes. With scanned layers it should not depend on the depth.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench.measure import arguments, machine, milliseconds, ratio, tee
from bench.train_step import load, token_rows
from tilelli_jax.cli.tables import table
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import make_training
from tilelli_jax.training.tasks.text_loss import NextByteLoss

CASES = {("scanned", 8): True, ("scanned", 32): True, ("unrolled", 8): False}


def seconds_to_compile(n_layers: int, scan_layers: bool) -> float:
    jax.clear_caches()
    mesh = make_mesh(MeshConfig())
    config = dataclasses.replace(load("Lite"), n_layers=n_layers)
    with jax.set_mesh(mesh):
        training = make_training(config, ComputeConfig(scan_layers=scan_layers), OptimizerConfig(),
                                 steps=1000, loss=NextByteLoss(0.0), seed=0, mesh=mesh)
        step: Any = training.update
        begin = time.perf_counter()
        step.lower(training.abstract_state, {"bytes": token_rows()[None]}, np.int32(0)).compile()
        return time.perf_counter() - begin


def compare(rounds: int, print_line: Callable[[str], None]) -> None:
    print_line(f"{machine()}; {rounds} alternating rounds")
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for (name, n_layers), scan in CASES.items():
            seconds[name, n_layers].append(seconds_to_compile(n_layers, scan))
    rows = [("layers", "blocks", "ms (range)")]
    rows += [(name, str(n_layers), milliseconds(times)) for (name, n_layers), times in seconds.items()]
    print_line(table(rows))
    print_line(f"32 blocks / 8 blocks, scanned: {ratio(seconds['scanned', 32], seconds['scanned', 8]):.2f}")


def main() -> None:
    options = arguments(__doc__, rounds=3).parse_args()
    with tee(options.out) as print_line:
        compare(options.rounds, print_line)


if __name__ == "__main__":
    main()
