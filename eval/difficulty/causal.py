"""Do the latents that foretell difficulty also cause it? What leaving them out of a reconstruction does.

The effect of a latent is how much the network's loss (surprise at the right answer in nats, or the CRPS of
a forecast) changes when that latent alone is left out of the reconstruction: Δ = (left out) −
(reconstructed). Its p is of the mean
over the items being 0, corrected for the number of latents; beside it stand latents drawn at random among
those as often active: an effect that they have, too, is none of the chosen ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from eval.metrics import Floats
from eval.probes import Block, ProbeOptions, make_probe
from eval.stats import Interval, bootstrap_mean, bootstrap_p, holm


def rank_latents(codes: Block, labels: ArrayLike, most: int, *, strength: float = 0.1,
                 options: ProbeOptions | None = None, fill: bool = False) -> list[int]:
    """The latents on which an L1 probe leans most, the first first.

    Args:
        codes: `[training rows, n_latents]`.
        fill: where the probe uses fewer than `most`, add others as NumPy's sort happens to leave them,
            as the published study did (W12): only the compatibility mode asks for it. By default the list is
            shorter then.
    """
    sparse = scipy.sparse.issparse(codes)
    probe = make_probe(strength, sparse, options or ProbeOptions()).fit(codes, np.asarray(labels))
    weight = np.abs(probe[-1].coef_[0])
    found = np.argsort(-weight)[:most]
    return [int(latent) for latent in found if fill or weight[latent] > 0]


def as_often_active(codes: Block, chosen: Sequence[int], number: int, *, seed: int = 42,
                    near: int = 20) -> list[int]:
    """Latents drawn at random among those that are about as often active as the chosen ones.

    For each chosen latent in turn, one of the `near` nearest to it in how many rows it is active in, that
    is active at all, has not been drawn yet, and is not chosen itself.
    """
    rng = np.random.default_rng(seed)
    active = np.asarray((codes > 0).sum(axis=0)).ravel()
    free = np.ones(len(active), bool)
    free[list(chosen)] = False
    free &= active > 0
    drawn: list[int] = []
    for i in range(number):
        left = np.flatnonzero(free)
        if not len(left) or not len(chosen):
            break
        gap = np.abs(active[left] - active[chosen[i % len(chosen)]])
        pick = int(rng.choice(left[np.argsort(gap, kind="stable")[:near]]))
        drawn.append(pick)
        free[pick] = False
    return drawn


@dataclasses.dataclass(frozen=True)
class Effect:
    """Of one latent: its mean change, p alone and corrected, and in how many items it changed anything."""

    change: Interval
    p: float
    p_holm: float
    items_changed: int

    @property
    def is_sure(self) -> bool:
        """At 5 %, corrected."""
        return self.p_holm < 0.05


@dataclasses.dataclass(frozen=True)
class Effects:
    """What patching did: means in nats or CRPS, and an Effect for each latent, chosen ones and controls."""

    natural: float
    reconstructed: float
    reconstruction: Interval
    chosen: Mapping[int, Effect]
    controls: Mapping[int, Effect]

    def beyond_controls(self, latent: int) -> float:
        """The share of controls whose mean change is at least as large, this latent counted: a p of rank."""
        size = abs(self.chosen[latent].change.point)
        others = [abs(effect.change.point) >= size for effect in self.controls.values()]
        return (sum(others) + 1) / (len(others) + 1)


def effects(table: NDArray[np.floating], chosen: Sequence[int], controls: Sequence[int] = (), *,
            groups: ArrayLike | None = None, replicates: int = 2000, seed: int = 42) -> Effects:
    """Means, intervals and p-values of a table of losses.

    Args:
        table: `[items, 2 + chosen + controls]`: as it is, reconstructed, and with each latent left out.
        groups: `[items]`, what the bootstrap draws together.
    """
    table = np.asarray(table, float)
    if table.ndim != 2 or table.shape[1] != 2 + len(chosen) + len(controls) or not len(table):
        raise ValueError(f"table: expected [items, {2 + len(chosen) + len(controls)}], found {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError(f"table: item {int(np.argwhere(~np.isfinite(table))[0, 0])} has no finite loss")

    def each(latents: Sequence[int], changes: Floats) -> dict[int, Effect]:
        p = [bootstrap_p(change, seed=seed, groups=groups) for change in changes.T]
        return {latent: Effect(bootstrap_mean(change, replicates=replicates, seed=seed, groups=groups), raw,
                               float(corrected), int((change != 0).sum()))
                for latent, change, raw, corrected in zip(latents, changes.T, p, holm(p), strict=True)}
    changes = table[:, 2:] - table[:, 1:2]
    return Effects(float(table[:, 0].mean()), float(table[:, 1].mean()),
                   bootstrap_mean(table[:, 1] - table[:, 0], replicates=replicates, seed=seed, groups=groups),
                   each(chosen, changes[:, :len(chosen)]), each(controls, changes[:, len(chosen):]))
