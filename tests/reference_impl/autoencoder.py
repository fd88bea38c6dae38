"""Reference implementations of TopK autoencoders: loss over dense codes, and published PyTorch training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.estimators.sae import SAEConfig


def by_name(tree: Any) -> dict[str, Any]:
    return {"W_enc": tree["encoder"]["kernel"], "b_enc": tree["encoder"]["bias"],
            "W_dec": tree["decoder"]["kernel"], "b_dec": tree["bias"]}


def dense_loss(params: Any, x: np.ndarray, config: SAEConfig, prefixes: tuple[int, ...]) -> jax.Array:
    """Fraction of variance unexplained with dense codes selected by sorting, averaged over the prefixes."""
    w = by_name(params)
    codes = jnp.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    detached = np.asarray(jax.lax.stop_gradient(codes))
    if config.activation == "batch_topk":
        order = np.argsort(-detached.ravel())[:len(x) * config.k]
        chosen = np.isin(np.arange(detached.size), order).reshape(detached.shape)
    else:
        chosen = detached >= -np.sort(-detached, axis=1)[:, config.k - 1:config.k]
    codes = jnp.where(chosen, codes, 0)
    errors = [((codes[:, :n] @ w["W_dec"][:n] + w["b_dec"] - x)**2).mean()
              for n in (*prefixes, config.n_latents)]
    return sum(errors) / len(errors) / ((x - x.mean(axis=0))**2).mean()


class Restated(NamedTuple):
    """The published training loop in PyTorch: parameters, and the loss of each step."""

    params: dict[str, np.ndarray]
    losses: list[float]


def reference_training(start: dict[str, np.ndarray], batches: list[np.ndarray], k: int, aux_k: int,
                      dead_after: int) -> Restated:
    import torch
    p = {name: torch.tensor(array).requires_grad_() for name, array in start.items()}
    rule = torch.optim.Adam(p.values(), lr=3e-3)
    silent, losses = torch.zeros(p["b_enc"].shape[0]), []
    for step, batch in enumerate(batches):
        for group in rule.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 10)
        x, dead = torch.from_numpy(batch), silent > dead_after
        before = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        values, indices = before.topk(k, dim=-1)
        codes = torch.zeros_like(before).scatter(-1, indices, values.relu())
        reconstruction = codes @ p["W_dec"] + p["b_dec"]
        loss = ((reconstruction - x)**2).mean()
        if dead.any():
            values, indices = before[:, dead].topk(min(aux_k, int(dead.sum())), dim=-1)
            others = torch.zeros_like(before[:, dead]).scatter(-1, indices, values.relu()) @ p["W_dec"][dead]
            loss = loss + ((others - (x - reconstruction.detach()))**2).mean()
        rule.zero_grad()
        loss.backward()
        rule.step()
        with torch.no_grad():
            p["W_dec"] /= p["W_dec"].norm(dim=0, keepdim=True).clamp_min(1e-12)
        silent = torch.where((codes > 0).any(dim=0), 0.0, silent + 1)
        losses.append(loss.item())
    return Restated({name: array.detach().numpy() for name, array in p.items()}, losses)
