"""Do the latents that predict difficulty also cause it? What leaving them out of a reconstruction does.

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

from ..checks import Floats
from ..probes import Block, ProbeOptions, make_probe
from ..stats import Interval, bootstrap_mean, bootstrap_p, holm


def rank_latents(codes: Block, labels: ArrayLike, most: int, *, strength: float = 0.1,
                 options: ProbeOptions | None = None) -> list[int]:
    """The latents on which an L1 probe leans most, the first first.

    Args:
        codes: `[training rows, n_latents]`.

    Returns:
        Those it uses: fewer than `most` where it uses fewer (W12: the published study took others then).
    """
    sparse = scipy.sparse.issparse(codes)
    probe = make_probe(strength, sparse, options or ProbeOptions()).fit(codes, np.asarray(labels))
    weight = np.abs(probe[-1].coef_[0])
    found = np.argsort(-weight)[:most]
    return [int(latent) for latent in found if weight[latent] > 0]


def as_often_active(active: ArrayLike, chosen: Sequence[int], number: int, *, seed: int = 42,
                    near: int = 20) -> dict[int, list[int]]:
    """For each chosen latent, others drawn at random among those that are about as often active.

    In turn, one of the `near` nearest in how often they are active, that is active at all, has not been
    drawn yet, and is not chosen itself.

    Args:
        active: `[n_latents]`, in how many rows each is active, where the patch will be.
        number: of controls for each; fewer where the latents run out.
    """
    rng = np.random.default_rng(seed)
    active = np.asarray(active)
    free = active > 0
    free[list(chosen)] = False
    drawn: dict[int, list[int]] = {latent: [] for latent in chosen}
    for _ in range(number):
        for latent in chosen:
            left = np.flatnonzero(free)
            if not len(left):
                return drawn
            gap = np.abs(active[left] - active[latent])
            pick = int(rng.choice(left[np.argsort(gap, kind="stable")[:near]]))
            drawn[latent].append(pick)
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
    def is_significant(self) -> bool:
        """At 5 %, corrected."""
        return self.p_holm < 0.05


@dataclasses.dataclass(frozen=True)
class Effects:
    """What patching did: means in nats or CRPS, and an Effect for each latent, chosen ones and controls.

    `matched`: chosen latent → its controls.
    """

    natural: float
    reconstructed: float
    reconstruction: Interval
    chosen: Mapping[int, Effect]
    controls: Mapping[int, Effect]
    matched: Mapping[int, Sequence[int]]

    def as_large(self, latent: int) -> int:
        """How many of a chosen latent's controls have a mean change that is at least as large."""
        size = abs(self.chosen[latent].change.point)
        return sum(abs(self.controls[other].change.point) >= size for other in self.matched[latent])


def effects(table: NDArray[np.floating], chosen: Sequence[int],
            matched: Mapping[int, Sequence[int]] | None = None, *, groups: ArrayLike | None = None,
            replicates: int = 2000, seed: int = 42) -> Effects:
    """Means, intervals and p-values of a table of losses.

    Args:
        table: `[items, 2 + chosen + controls]`: as it is, reconstructed, and with each latent left out.
        matched: chosen latent → its controls, which stand in the table in this order; None: there are none.
        groups: `[items]`, what the bootstrap draws together.
    """
    table, matched = np.asarray(table, float), matched or {latent: [] for latent in chosen}
    controls = [other for latent in chosen for other in matched[latent]]
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
                   each(chosen, changes[:, :len(chosen)]), each(controls, changes[:, len(chosen):]),
                   matched)
