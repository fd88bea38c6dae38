"""Losses and training of TopK autoencoders once more: over dense codes, and in PyTorch as was published."""

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
    """Dense codes, chosen by sorting; the mean over the prefixes of the fraction of variance unexplained."""
    w = by_name(params)
    codes = jnp.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    kept = np.asarray(jax.lax.stop_gradient(codes))
    if config.activation == "batch_topk":
        order = np.argsort(-kept.ravel())[:len(x) * config.k]
        chosen = np.isin(np.arange(kept.size), order).reshape(kept.shape)
    else:
        chosen = kept >= -np.sort(-kept, axis=1)[:, config.k - 1:config.k]
    codes = jnp.where(chosen, codes, 0)
    left = [((codes[:, :n] @ w["W_dec"][:n] + w["b_dec"] - x)**2).mean()
            for n in (*prefixes, config.n_latents)]
    return sum(left) / len(left) / ((x - x.mean(axis=0))**2).mean()


class Restated(NamedTuple):
    """The published training loop in PyTorch: parameters, and the loss of each step."""

    params: dict[str, np.ndarray]
    losses: list[float]


def restated_training(start: dict[str, np.ndarray], batches: list[np.ndarray], k: int, aux_k: int,
                      dead_after: int) -> Restated:
    import torch
    p = {name: torch.tensor(array).requires_grad_() for name, array in start.items()}
    rule = torch.optim.Adam(p.values(), lr=3e-3)
    silent, found = torch.zeros(p["b_enc"].shape[0]), []
    for step, batch in enumerate(batches):
        for group in rule.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 10)
        x, dead = torch.from_numpy(batch), silent > dead_after
        before = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        values, which = before.topk(k, dim=-1)
        codes = torch.zeros_like(before).scatter(-1, which, values.relu())
        made = codes @ p["W_dec"] + p["b_dec"]
        loss = ((made - x)**2).mean()
        if dead.any():
            values, which = before[:, dead].topk(min(aux_k, int(dead.sum())), dim=-1)
            others = torch.zeros_like(before[:, dead]).scatter(-1, which, values.relu()) @ p["W_dec"][dead]
            loss = loss + ((others - (x - made.detach()))**2).mean()
        rule.zero_grad()
        loss.backward()
        rule.step()
        with torch.no_grad():
            p["W_dec"] /= p["W_dec"].norm(dim=0, keepdim=True).clamp_min(1e-12)
        silent = torch.where((codes > 0).any(dim=0), 0.0, silent + 1)
        found.append(loss.item())
    return Restated({name: array.detach().numpy() for name, array in p.items()}, found)
