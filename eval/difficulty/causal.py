"""Do the latents that predict difficulty also cause it? Ablation of single latents in the reconstruction.

The effect of a latent is the change of the network's loss (the NLL of the right answer in nats, or the CRPS
of a forecast) when the reconstruction omits that latent alone: Δ = loss(ablated) − loss(reconstructed). The
null hypothesis of its p is a mean change of 0 over the items. Random latents of similar activation frequency
serve as controls: an effect that the controls share is not specific to the chosen latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from ..checks import Floats
from ..probes import Block, ProbeOptions, make_probe
from ..stats import Interval, bootstrap_mean, bootstrap_p


def rank_latents(codes: Block, labels: ArrayLike, number: int, *, c_value: float = 0.1,
                 options: ProbeOptions | None = None) -> list[int]:
    """Returns the latents with the largest absolute weights in an L1 probe, largest first.

    Args:
        codes: `[train items, n_latents]`.
        number: maximum number of latents.
        c_value: C of the probe.

    Returns:
        Latents with nonzero weight only, so possibly fewer than `number` (fm-difficulty-probe then fills
        the list with latents of weight 0).
    """
    sparse = scipy.sparse.issparse(codes)
    probe = make_probe(c_value, sparse, options or ProbeOptions()).fit(codes, np.asarray(labels))
    weight = np.abs(probe[-1].coef_[0])
    order = np.argsort(-weight)[:number]
    return [int(latent) for latent in order if weight[latent] > 0]


def frequency_matched_controls(active: ArrayLike, chosen: Sequence[int], number: int, *, seed: int = 42,
                               neighbors: int = 20) -> dict[int, list[int]]:
    """Draws control latents of similar activation frequency for each chosen latent.

    The chosen latents take turns. Each draw picks at random one of the `neighbors` latents closest in
    frequency, among those that are active at least once, not drawn before and not chosen.

    Args:
        active: `[n_latents]`, the number of rows in which each latent is active, at the positions to patch.
        number: controls per chosen latent; fewer if no latents remain.

    Returns:
        chosen latent → its controls.
    """
    rng = np.random.default_rng(seed)
    active = np.asarray(active)
    free = active > 0
    free[list(chosen)] = False
    drawn: dict[int, list[int]] = {latent: [] for latent in chosen}
    for _ in range(number):
        for latent in chosen:
            candidates = np.flatnonzero(free)
            if not len(candidates):
                return drawn
            gap = np.abs(active[candidates] - active[latent])
            pick = int(rng.choice(candidates[np.argsort(gap, kind="stable")[:neighbors]]))
            drawn[latent].append(pick)
            free[pick] = False
    return drawn


@dataclasses.dataclass(frozen=True)
class Effect:
    """The effect of ablating one latent.

    Attributes:
        change: mean change of the loss over the items.
        p: p-value of the mean change, before Holm's correction (`measures.effects`).
        items_changed: number of items whose loss changed at all; 0 for a latent that is never active at the
            patched positions.
    """

    change: Interval
    p: float
    items_changed: int

    @property
    def never_active(self) -> bool:
        """Whether the ablation changed no item's loss: the latent is not active at the patched positions."""
        return self.items_changed == 0


@dataclasses.dataclass(frozen=True)
class Effects:
    """The effects of patching on the loss, in nats or CRPS.

    Attributes:
        natural: mean loss of the unpatched network.
        reconstructed: mean loss with the reconstruction.
        reconstruction: mean change of the loss by the reconstruction.
        chosen, controls: latent → the effect of ablating it.
        matched: chosen latent → its controls.
    """

    natural: float
    reconstructed: float
    reconstruction: Interval
    chosen: Mapping[int, Effect]
    controls: Mapping[int, Effect]
    matched: Mapping[int, Sequence[int]]

    def controls_as_large(self, latent: int) -> int:
        """Returns how many controls of a chosen latent have at least as large an absolute mean change."""
        size = abs(self.chosen[latent].change.point)
        return sum(abs(self.controls[other].change.point) >= size for other in self.matched[latent])


def effects(table: NDArray[np.floating], chosen: Sequence[int],
            matched: Mapping[int, Sequence[int]] | None = None, *, groups: ArrayLike | None = None,
            replicates: int = 2000, seed: int = 42) -> Effects:
    """Computes means, intervals and p-values from a table of losses.

    Args:
        table: `[items, 2 + chosen + controls]`: unpatched, reconstructed, and with each latent ablated.
        matched: chosen latent → its controls, in the order of the table's columns; None: no controls.
        groups: `[items]`, the group of each item; the bootstrap resamples whole groups.

    Raises:
        ValueError: the table has another shape, or a loss is not finite.
    """
    table, matched = np.asarray(table, float), matched or {latent: [] for latent in chosen}
    controls = [other for latent in chosen for other in matched[latent]]
    if table.ndim != 2 or table.shape[1] != 2 + len(chosen) + len(controls) or not len(table):
        raise ValueError(f"table: expected [items, {2 + len(chosen) + len(controls)}], found {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError(f"table: item {int(np.argwhere(~np.isfinite(table))[0, 0])} has no finite loss")

    def effects_of(latents: Sequence[int], changes: Floats) -> dict[int, Effect]:
        return {latent: Effect(bootstrap_mean(change, replicates=replicates, seed=seed, groups=groups),
                               bootstrap_p(change, seed=seed, groups=groups), int((change != 0).sum()))
                for latent, change in zip(latents, changes.T, strict=True)}
    changes = table[:, 2:] - table[:, 1:2]
    return Effects(float(table[:, 0].mean()), float(table[:, 1].mean()),
                   bootstrap_mean(table[:, 1] - table[:, 0], replicates=replicates, seed=seed, groups=groups),
                   effects_of(chosen, changes[:, :len(chosen)]),
                   effects_of(controls, changes[:, len(chosen):]), matched)
