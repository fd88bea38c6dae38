"""Greedy decoding: python -m bench.decode [--rounds N].

Cached decoding of one text beside reading the whole window again for every byte (ours jitted, and
eager PyTorch). The memory limit is the time to read every parameter once.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

from bench.measure import Contender, in_turn, machine, ratio, read_limit
from bench.train_step import CONFIGS, load
from tilelli_jax import config as config_lib
from tilelli_jax import decoding
from tilelli_jax.models import ModelConfig, build
from tilelli_jax.training.report import table

PROMPT, NEW, AGAIN = 128, 128, 8  # bytes: of the prompt, decoded with caches, decoded without


def cached(config: ModelConfig) -> Contender:
    model, prompt = build(config), np.full(PROMPT, 97, np.uint8)
    return lambda: decoding.generate(model, prompt.tobytes(), max_new=NEW, temperature=0.0)


def rereading(config: ModelConfig) -> Contender:
    model, window = build(config), jnp.full((1, PROMPT + NEW), 97)
    forward = jax.jit(lambda ids: jnp.argmax(model(ids)[:, -1], -1))
    return lambda: [np.asarray(forward(window)) for _ in range(AGAIN)]


def torch_rereading(config: ModelConfig) -> Contender:
    import torch

    from tests.restated.torch_networks import build as build_torch
    model = build_torch(config_lib.to_dict(config)).eval()
    window = torch.full((1, PROMPT + NEW), 97)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(AGAIN):
                model(window)[:, -1].argmax(-1)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--networks", nargs="*", choices=CONFIGS,
                        default=["atome", "Lite", "parent", "vanilla"])
    options = parser.parse_args()
    print(f"{machine()}; prompt {PROMPT}, {NEW} new bytes, batch 1, f32, {options.rounds} rounds in turn")
    rows = [("network", "cached tokens/s", "× ours rereading", "× PyTorch rereading", "of the memory limit")]
    for name in options.networks:
        config = load(name)
        seconds = in_turn({"cached": cached(config), "ours": rereading(config),
                           "torch": torch_rereading(config)}, options.rounds)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.eval_shape(lambda c=config: _params(c))))
        rate = NEW / statistics.median(seconds["cached"])
        faster = {who: ratio(seconds[who], seconds["cached"]) * NEW / AGAIN for who in ("ours", "torch")}
        rows.append((name, f"{rate:,.0f}", f"{faster['ours']:.0f}", f"{faster['torch']:.0f}",
                     f"{rate * size / read_limit(size):.0%}"))
    print(table(rows))


def _params(config: ModelConfig) -> object:
    from tilelli_jax.training.step import take_apart
    return take_apart(build(config))[1]


if __name__ == "__main__":
    sys.exit(main())
