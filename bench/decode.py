"""Greedy decoding with and without caches: python -m bench.decode [--rounds N].

Compares cached decoding of one text with running the whole window through the network for every byte: ours
jitted; PyTorch eager in its fastest form ("fast" in `torch_networks.py`), the same through torch.compile, and
eager in the "written" form. The time per byte is the difference between decoding 192 and 64 bytes, divided by
128, which excludes the prompt and the fixed cost of a call. The memory limit is the time to read every
parameter once. Ternary networks are decoded like all others, from float32 weights that are quantised once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.measure import (
    Candidate,
    arguments,
    copy_limit,
    in_turn,
    machine,
    milliseconds,
    on_torch_device,
    peak_memory,
    print_peak,
    ratio,
    read_limit,
    tee,
    torch_synchronize,
)
from bench.train_step import CONFIGS, load
from tilelli_jax import config as config_lib
from tilelli_jax.cli.tables import table
from tilelli_jax.generation import decoding
from tilelli_jax.loading.store import build
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.decoder import Decoder

# Bytes of the prompt, decoded with caches (two lengths), and decoded without caches.
PROMPT, FEW, MANY, UNCACHED_BYTES = 64, 64, 192, 8
UNCACHED = {"ours": "ours", "eager": "PyTorch eager", "compiled": "compiled", "written": "as written"}


def cached(model: Decoder, new: int) -> Candidate:
    return lambda: decoding.generate(model, b"a" * PROMPT, max_new=new, temperature=0.0)


def uncached(model: Decoder) -> Candidate:
    window = jnp.full((1, PROMPT + MANY), 97)
    forward = jax.jit(lambda ids: jnp.argmax(model(ids)[:, -1], -1))
    return lambda: [np.asarray(forward(window)) for _ in range(UNCACHED_BYTES)]


def torch_uncached(config: ModelConfig, variant: str) -> Candidate:
    import torch

    from tilelli_jax.convert.torch_networks import build as build_torch
    model, window = on_torch_device(
        build_torch(config_lib.to_dict(config), "written" if variant == "written" else "fast").eval(),
        torch.full((1, PROMPT + MANY), 97))
    forward = torch.compile(model) if variant == "compiled" else model

    def run() -> None:
        with torch.inference_mode():
            for _ in range(UNCACHED_BYTES):
                forward(window)[:, -1].argmax(-1)
        torch_synchronize()
    return run


def candidate(name: str, variant: str) -> Candidate:
    config = load(name)
    match variant:
        case "few" | "many":
            return cached(build(config), FEW if variant == "few" else MANY)
        case "ours":
            return uncached(build(config))
    return torch_uncached(config, variant)


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--networks", nargs="*", choices=CONFIGS,
                        default=["atome", "Lite", "Lite ternary", "parent", "vanilla"])
    parser.add_argument("--memory-of", nargs=2, metavar=("NETWORK", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        run = candidate(*options.memory_of)
        run()
        run()
        print_peak()
        return
    with tee(options.out) as print_line:
        compare(options.networks, options.rounds, print_line)


def compare(networks: Sequence[str], rounds: int, print_line: Callable[[str], None]) -> None:
    print_line(f"{machine()}; prompt of {PROMPT} bytes, batch 1, f32, {rounds} alternating rounds")
    copy_speed = copy_limit()
    print_line(f"memory copy speed: {copy_speed / 1e9:.1f} GB/s, read plus written")
    rows = [("network", "ms/byte", "bytes/s", f"with prompt, {MANY} bytes",
             *(f"× {name}, no cache" for name in UNCACHED.values()), "of memory limit",
             "of copy limit", "peak MiB, ours", "PyTorch eager")]
    for name in networks:
        seconds = in_turn({variant: candidate(name, variant)
                           for variant in ("few", "many", *UNCACHED)}, rounds)
        size = sum(kernel.nbytes for kernel in jax.tree.leaves(nnx.state(build(load(name)), nnx.Param)))
        per_byte = [(many - few) / (MANY - FEW)
                    for few, many in zip(seconds["few"], seconds["many"], strict=True)]
        rate = 1 / statistics.median(per_byte)
        rows.append((name, milliseconds(per_byte), f"{rate:,.0f}",
                     f"{MANY / statistics.median(seconds['many']):,.0f}/s",
                     *(f"{ratio(seconds[variant], per_byte) / UNCACHED_BYTES:.0f}" for variant in UNCACHED),
                     f"{rate * size / read_limit(size):.0%}", f"{rate * size / copy_speed:.0%}",
                     *(f"{peak_memory('bench.decode', '--memory-of', name, variant):.0f}"
                       for variant in ("many", "eager"))))
    print_line(table(rows))


if __name__ == "__main__":
    main()
