"""Greedy decoding: python -m bench.decode [--rounds N].

Cached decoding of one text beside reading the whole window again for every byte (ours jitted, and
eager PyTorch in the form it runs fastest and as the formulas read). What a byte costs is the difference
between continuing by 192 bytes and by 64: the prompt and the calls' fixed price are not in it. The
memory limit is the time to read every parameter once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.measure import Contender, in_turn, machine, milliseconds, ratio, read_limit
from bench.train_step import CONFIGS, load
from tilelli_jax import config as config_lib
from tilelli_jax import decoding
from tilelli_jax.models import ModelConfig, build
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.training.report import table

PROMPT, FEW, MANY, AGAIN = 64, 64, 192, 8  # bytes: of the prompt, decoded with caches, and without


def cached(model: Decoder, new: int) -> Contender:
    return lambda: decoding.generate(model, b"a" * PROMPT, max_new=new, temperature=0.0)


def rereading(model: Decoder) -> Contender:
    window = jnp.full((1, PROMPT + MANY), 97)
    forward = jax.jit(lambda ids: jnp.argmax(model(ids)[:, -1], -1))
    return lambda: [np.asarray(forward(window)) for _ in range(AGAIN)]


def torch_rereading(config: ModelConfig, form: Literal["fast", "written"]) -> Contender:
    import torch

    from tests.restated.torch_networks import build as build_torch
    model = build_torch(config_lib.to_dict(config), form).eval()
    window = torch.full((1, PROMPT + MANY), 97)

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
    print(f"{machine()}; prompt {PROMPT}, batch 1, f32, {options.rounds} rounds in turn")
    rows = [("network", "ms a byte", "bytes/s", f"with the prompt, {MANY} bytes", "× ours rereading",
             "× PyTorch rereading", "× the same as written", "of the memory limit")]
    for name in options.networks:
        config = load(name)
        model = build(config)
        seconds = in_turn({"few": cached(model, FEW), "many": cached(model, MANY), "ours": rereading(model),
                           "torch": torch_rereading(config, "fast"),
                           "written": torch_rereading(config, "written")}, options.rounds)
        size = sum(kernel.nbytes for kernel in jax.tree.leaves(nnx.state(model, nnx.Param)))
        each = [(many - few) / (MANY - FEW)
                for few, many in zip(seconds["few"], seconds["many"], strict=True)]
        rate = 1 / statistics.median(each)
        rows.append((name, milliseconds(each), f"{rate:,.0f}",
                     f"{MANY / statistics.median(seconds['many']):,.0f}/s",
                     *(f"{ratio(seconds[who], each) / AGAIN:.0f}" for who in ("ours", "torch", "written")),
                     f"{rate * size / read_limit(size):.0%}"))
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
