"""A training step of a TopK sparse autoencoder (SAE), compared with fm-difficulty-probe's loop in PyTorch.

    python -m bench.sae [--rounds N]

Width 1024, 4096 latents of which 32 are active, batches of 2048, Adam. The forward pass alone is timed with
4096 and 8192 latents. The study's loop uses six dense products over codes that are 99 % zero, columns of unit
norm, counters of inactive latents, and reads the loss after every step. Ours is the step of `tilelli train`,
in the mode compatible with the study and by default. On a GPU both sides run there, in float32.
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
    tee,
    torch_synchronize,
)
from tilelli_jax.cli.tables import table
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.loading.store import build
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import make_training, split_params
from tilelli_jax.training.tasks.sae_loss import AutoencoderLoss, SAELossConfig

WIDTH, LATENTS, ACTIVE, BATCH, WIDE = 1024, 4096, 32, 2048, 8192
PUBLISHED = SAELossConfig(normalize=False, project_gradients=False, bias_init="mean", aux_weight=1.0,
                          aux_k=512)


def our_step(unit_norm: str, objective: SAELossConfig, batch: np.ndarray) -> Candidate:
    """One update; reads the metrics as the training loop does."""
    config = SAEConfig(d_model=WIDTH, n_latents=LATENTS, k=ACTIVE, unit_norm=unit_norm)  # type: ignore[arg-type]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loss = AutoencoderLoss(config, objective, batch_size=BATCH, steps=10**6)
    adam = OptimizerConfig(learning_rate=5e-4, schedule="constant", b2=0.999, weight_decay=0, clip_norm=0)
    training = make_training(config, ComputeConfig(), adam, steps=10**6, loss=loss, seed=0, mesh=mesh)
    with jax.set_mesh(mesh):
        run_state: dict[str, Any] = {"state": training.make_state(), "step": 0}
    device_batch = {"activations": jax.device_put(batch[None])}

    def run() -> None:
        with jax.set_mesh(mesh):
            run_state["state"], metrics = training.update(run_state["state"], device_batch,
                                                          np.int32(run_state["step"]))
        run_state["step"] += 1
        jax.device_get(metrics)
    return run


def published_step(batch: np.ndarray) -> Candidate:
    """One step of the published loop."""
    import torch
    from torch.nn import functional
    torch.manual_seed(0)
    shapes = {"enc": (WIDTH, LATENTS), "enc_bias": (LATENTS,), "dec": (LATENTS, WIDTH), "dec_bias": (WIDTH,)}
    p = {name: (torch.randn(shape) / WIDTH**0.5 if len(shape) == 2 else torch.zeros(shape))
         for name, shape in shapes.items()}
    p = {name: on_torch_device(tensor)[0].requires_grad_() for name, tensor in p.items()}
    x, steps_inactive = on_torch_device(torch.from_numpy(batch), torch.zeros(LATENTS))
    adam = torch.optim.Adam(p.values(), lr=5e-4)

    def run() -> None:
        nonlocal steps_inactive
        pre_activations = (x - p["dec_bias"]) @ p["enc"] + p["enc_bias"]
        values, indices = pre_activations.topk(ACTIVE, dim=-1)
        codes = torch.zeros_like(pre_activations).scatter(-1, indices, functional.relu(values))
        loss = functional.mse_loss(codes @ p["dec"] + p["dec_bias"], x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            p["dec"].copy_(functional.normalize(p["dec"], p=2, dim=0))
            steps_inactive = torch.where((codes > 0).sum(0) > 0, 0.0, steps_inactive + 1)
        loss.item()
        torch_synchronize()
    return run


def forward(latents: int, batch: np.ndarray) -> dict[str, Candidate]:
    """The forward pass (codes and reconstruction) of both sides."""
    import torch
    sae = build(SAEConfig(d_model=WIDTH, n_latents=latents, k=ACTIVE), 0)
    network, params = split_params(sae)
    run = jax.jit(lambda params, x: network.merge(params)(x))
    x = jax.device_put(batch)
    enc, dec, t = on_torch_device(*(torch.from_numpy(np.array(array)) for array in (
        sae.encoder.kernel[...], sae.decoder.kernel[...], batch)))

    def torch_forward() -> None:
        with torch.no_grad():
            pre_activations = t @ enc
            values, indices = pre_activations.topk(ACTIVE, dim=-1)
            torch.zeros_like(pre_activations).scatter(-1, indices, values.relu()) @ dec
        torch_synchronize()
    return {"ours": lambda: run(params, x).block_until_ready(), "PyTorch": torch_forward}


def compare(rounds: int, print_line: Callable[[str], None]) -> None:
    batch = np.random.default_rng(0).standard_normal((BATCH, WIDTH)).astype(np.float32)
    seconds = in_turn({"ours, compatible": our_step("columns", PUBLISHED, batch),
                       "ours, by default": our_step("rows", SAELossConfig(), batch),
                       "PyTorch, fm-difficulty-probe's loop": published_step(batch)}, rounds)
    print_line(_compared_with_last(f"step, {BATCH} × {WIDTH}, {LATENTS} latents", seconds))
    for latents in (LATENTS, WIDE):
        seconds = in_turn(forward(latents, batch), rounds)
        print_line(_compared_with_last(f"forward, {latents} latents", seconds))


def _compared_with_last(title: str, seconds: dict[str, list[float]]) -> str:
    """A table of times and their ratios to the last row, which is PyTorch."""
    reference = list(seconds.values())[-1]
    rows = [(name, milliseconds(times), f"{ratio(times, reference):.2f}") for name, times in seconds.items()]
    return table([(title, "ms", "× PyTorch's"), *rows])


def main() -> None:
    options = arguments(__doc__, rounds=7).parse_args()
    with tee(options.out) as print_line:
        print_line(f"{machine()}; {options.rounds} alternating rounds")
        compare(options.rounds, print_line)


if __name__ == "__main__":
    main()
