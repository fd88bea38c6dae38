"""Compile time against depth: python -m bench.compile_time. Scanned layers should not care."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax

from bench.measure import arguments, machine, told
from bench.train_step import load, ours
from tilelli_jax.tables import table


def seconds_to_first_step(n_layers: int, scan_layers: bool) -> float:
    jax.clear_caches()
    config = dataclasses.replace(load("Lite"), n_layers=n_layers, d_model=64, d_head=16)
    run = ours(config, scan_layers)
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    with told(arguments(__doc__).parse_args().out) as tell:
        compare(tell)


def compare(tell: Callable[[str], None]) -> None:
    tell(f"{machine()}; seconds of the first step (tracing, compiling, running), Lite at width 64")
    rows = [("layers", "blocks", "seconds")]
    medians: dict[tuple[bool, int], float] = {}
    for scan in (True, False):
        for n_layers in (8, 32) if scan else (8,):
            times = [seconds_to_first_step(n_layers, scan) for _ in range(3)]
            medians[scan, n_layers] = statistics.median(times)
            rows.append(("scanned" if scan else "unrolled", str(n_layers), f"{medians[scan, n_layers]:.1f}"))
    tell(table(rows))
    tell(f"32 blocks / 8 blocks, scanned: {medians[True, 32] / medians[True, 8]:.2f}")


if __name__ == "__main__":
    sys.exit(main())
