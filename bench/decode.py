"""Greedy decoding: python -m bench.decode [--rounds N].

Cached decoding of one text beside reading the whole window again for every byte (ours jitted; PyTorch
eager in the form it runs fastest, that through torch.compile, and eager as the formulas read). What a
byte costs is the difference between continuing by 192 bytes and by 64: the prompt and the calls'
fixed price are not in it. The memory limit is the time to read every parameter once. Ternary networks
are decoded as all others are, from float32 weights that were quantised once.
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
    told,
    torch_wait,
)
from bench.train_step import CONFIGS, load
from tilelli_jax import config as config_lib
from tilelli_jax import decoding
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.store import build
from tilelli_jax.tables import table

PROMPT, FEW, MANY, AGAIN = 64, 64, 192, 8  # bytes: of the prompt, decoded with caches, and without
REREADING = {"ours": "ours", "eager": "PyTorch eager", "compiled": "compiled", "written": "as written"}


def cached(model: Decoder, new: int) -> Candidate:
    return lambda: decoding.generate(model, b"a" * PROMPT, max_new=new, temperature=0.0)


def rereading(model: Decoder) -> Candidate:
    window = jnp.full((1, PROMPT + MANY), 97)
    forward = jax.jit(lambda ids: jnp.argmax(model(ids)[:, -1], -1))
    return lambda: [np.asarray(forward(window)) for _ in range(AGAIN)]


def torch_rereading(config: ModelConfig, who: str) -> Candidate:
    import torch
    from tilelli_jax.convert.torch_networks import build as build_torch
    model, window = on_torch_device(
        build_torch(config_lib.to_dict(config), "written" if who == "written" else "fast").eval(),
        torch.full((1, PROMPT + MANY), 97))
    forward = torch.compile(model) if who == "compiled" else model

    def run() -> None:
        with torch.inference_mode():
            for _ in range(AGAIN):
                forward(window)[:, -1].argmax(-1)
        torch_wait()
    return run


def candidate(name: str, who: str) -> Candidate:
    config = load(name)
    match who:
        case "few" | "many":
            return cached(build(config), FEW if who == "few" else MANY)
        case "ours":
            return rereading(build(config))
    return torch_rereading(config, who)


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
    with told(options.out) as tell:
        compare(options.networks, options.rounds, tell)


def compare(networks: Sequence[str], rounds: int, tell: Callable[[str], None]) -> None:
    tell(f"{machine()}; prompt {PROMPT}, batch 1, f32, {rounds} rounds in turn")
    copied = copy_limit()
    tell(f"memory is copied at {copied / 1e9:.1f} GB/s, read and written")
    rows = [("network", "ms a byte", "bytes/s", f"with the prompt, {MANY} bytes",
             *(f"× {name} rereading" for name in REREADING.values()), "of the memory limit",
             "of copying's", "peak MiB, ours", "PyTorch eager")]
    for name in networks:
        seconds = in_turn({who: candidate(name, who) for who in ("few", "many", *REREADING)}, rounds)
        size = sum(kernel.nbytes for kernel in jax.tree.leaves(nnx.state(build(load(name)), nnx.Param)))
        each = [(many - few) / (MANY - FEW)
                for few, many in zip(seconds["few"], seconds["many"], strict=True)]
        rate = 1 / statistics.median(each)
        rows.append((name, milliseconds(each), f"{rate:,.0f}",
                     f"{MANY / statistics.median(seconds['many']):,.0f}/s",
                     *(f"{ratio(seconds[who], each) / AGAIN:.0f}" for who in REREADING),
                     f"{rate * size / read_limit(size):.0%}", f"{rate * size / copied:.0%}",
                     *(f"{peak_memory('bench.decode', '--memory-of', name, who):.0f}"
                       for who in ("many", "eager"))))
    tell(table(rows))


if __name__ == "__main__":
    main()
