"""A training step of a TopK autoencoder against the published study's loop in PyTorch.

    python -m bench.sae [--rounds N]

Width 1024, 4096 latents of which 32 are active, batches of 2048, Adam; at 8192 latents the forward pass
alone, too. The loop is the study's: six dense products over codes that are 99 % zero, columns of length
1, counters of silent latents, the loss read after every step. Ours is `tilelli train`'s
step in that compatibility mode and by default. With a GPU both sides run there, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench.measure import (
    Candidate,
    arguments,
    in_turn,
    machine,
    milliseconds,
    on_torch_device,
    ratio,
    told,
    torch_wait,
)
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.sharding import MeshConfig, make_mesh
from tilelli_jax.store import build
from tilelli_jax.tables import table
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.sae_loss import ObjectiveConfig, make_objective
from tilelli_jax.training.step import make_training, split_params

WIDTH, LATENTS, ACTIVE, BATCH, WIDE = 1024, 4096, 32, 2048, 8192
PUBLISHED = ObjectiveConfig(normalize=False, project=False, center="mean", aux_weight=1.0, aux_k=512)


def ours(unit_norm: str, objective: ObjectiveConfig, batch: np.ndarray) -> Candidate:
    """One update, its metrics read as the training loop reads them."""
    config = SAEConfig(d_model=WIDTH, n_latents=LATENTS, k=ACTIVE, unit_norm=unit_norm)  # type: ignore[arg-type]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loss, hooks = make_objective(config, objective, batch_size=BATCH, steps=10**6)
    adam = OptimizerConfig(learning_rate=5e-4, schedule="constant", b2=0.999, weight_decay=0, clip_norm=0)
    training = make_training(config, ComputeConfig(), adam, steps=10**6, loss=loss, seed=0, mesh=mesh,
                             hooks=hooks)
    with jax.set_mesh(mesh):
        held: dict[str, Any] = {"state": training.make_state(), "step": 0}
    placed = {"activations": jax.device_put(batch[None])}

    def run() -> None:
        with jax.set_mesh(mesh):
            held["state"], metrics = training.update(held["state"], placed, np.int32(held["step"]))
        held["step"] += 1
        jax.device_get(metrics)
    return run


def theirs(batch: np.ndarray) -> Candidate:
    """The published loop's step."""
    import torch
    from torch.nn import functional
    torch.manual_seed(0)
    shapes = {"enc": (WIDTH, LATENTS), "enc_bias": (LATENTS,), "dec": (LATENTS, WIDTH), "dec_bias": (WIDTH,)}
    p = {name: (torch.randn(shape) / WIDTH**0.5 if len(shape) == 2 else torch.zeros(shape))
         for name, shape in shapes.items()}
    p = {name: on_torch_device(tensor)[0].requires_grad_() for name, tensor in p.items()}
    x, silent = on_torch_device(torch.from_numpy(batch), torch.zeros(LATENTS))
    hooks = torch.optim.Adam(p.values(), lr=5e-4)

    def run() -> None:
        nonlocal silent
        before = (x - p["dec_bias"]) @ p["enc"] + p["enc_bias"]
        values, which = before.topk(ACTIVE, dim=-1)
        codes = torch.zeros_like(before).scatter(-1, which, functional.relu(values))
        loss = functional.mse_loss(codes @ p["dec"] + p["dec_bias"], x)
        hooks.zero_grad()
        loss.backward()
        hooks.step()
        with torch.no_grad():
            p["dec"].copy_(functional.normalize(p["dec"], p=2, dim=0))
            silent = torch.where((codes > 0).sum(0) > 0, 0.0, silent + 1)
        loss.item()
        torch_wait()
    return run


def forward(latents: int, batch: np.ndarray) -> dict[str, Candidate]:
    """Codes and reconstruction."""
    import torch
    sae = build(SAEConfig(d_model=WIDTH, n_latents=latents, k=ACTIVE), 0)
    network, params = split_params(sae)
    run = jax.jit(lambda params, x: network.merge(params)(x))
    x = jax.device_put(batch)
    enc, dec, t = on_torch_device(*(torch.from_numpy(np.array(array)) for array in (
        sae.encoder.kernel[...], sae.decoder.kernel[...], batch)))

    def original() -> None:
        with torch.no_grad():
            before = t @ enc
            values, which = before.topk(ACTIVE, dim=-1)
            torch.zeros_like(before).scatter(-1, which, values.relu()) @ dec
        torch_wait()
    return {"ours": lambda: run(params, x).block_until_ready(), "PyTorch": original}


def compare(rounds: int, tell: Callable[[str], None]) -> None:
    batch = np.random.default_rng(0).standard_normal((BATCH, WIDTH)).astype(np.float32)
    seconds = in_turn({"ours, compatible": ours("columns", PUBLISHED, batch),
                       "ours, by default": ours("rows", ObjectiveConfig(), batch),
                       "PyTorch, the published loop": theirs(batch)}, rounds)
    tell(_beside_the_last(f"step, {BATCH} × {WIDTH}, {LATENTS} latents", seconds))
    for latents in (LATENTS, WIDE):
        tell(_beside_the_last(f"forward, {latents} latents", in_turn(forward(latents, batch), rounds)))


def _beside_the_last(what: str, seconds: dict[str, list[float]]) -> str:
    last = list(seconds.values())[-1]
    rows = [(who, milliseconds(found), f"{ratio(found, last):.2f}") for who, found in seconds.items()]
    return table([(what, "ms", "× PyTorch's"), *rows])


def main() -> None:
    options = arguments(__doc__, rounds=7).parse_args()
    with told(options.out) as tell:
        tell(f"{machine()}; {options.rounds} rounds in turn")
        compare(options.rounds, tell)


if __name__ == "__main__":
    main()
