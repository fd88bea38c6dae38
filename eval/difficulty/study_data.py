"""The interface between a study and a kind of data: its items, and how a network is measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import TopKSAE
from tilelli_jax.nn.hooks import check_hook

from ..checks import Floats
from ..folds import Folds
from ..inputs.networks import NetworkConfig

Positions = Literal["all", "boundary"]
Numbers = dict[str, np.ndarray]  # name → [items, …]


class Measurements(NamedTuple):
    """Results of one network on some items.

    Attributes:
        numbers: name → `[items, …]`. Always contains `loss` `[items]` f64, the measure of difficulty, in
            the unit of the data; for data with wrong answers also `wrong` `[items]`, 0 or 1.
        activations: layer → one array `[positions, d_model]` for each item.
    """

    numbers: Numbers
    activations: dict[int, list[np.ndarray]]


class FeatureBlock(NamedTuple):
    """Features that need no activations: names `[features]`, values f64 `[items, features]`."""

    names: tuple[str, ...]
    values: Floats


class StudyData(Protocol):
    """A kind of data. Methods identify items by their index, and take networks that `open` returned.

    Attributes:
        unit: the unit of `loss`.
        groups: `[items]`. A group is resampled as a whole, and never in both train and test.
        planned_split: `[items]`, "train", "test" or "purge" as far as known before a network runs.
        metadata: columns of the table of items, `[items]` each.
        fingerprint: hash of the data.
    """

    unit: str
    groups: NDArray[np.str_]
    planned_split: NDArray[np.str_]
    metadata: Mapping[str, Sequence[Any]]
    fingerprint: str

    def __len__(self) -> int: ...

    def open(self, config: NetworkConfig, path: str) -> Any:
        """Loads a network. Raises InputError if it is of another kind than the data need."""

    def measure(self, network: Any, items: Sequence[int], layers: Sequence[int]) -> Measurements:
        """Runs the network on the items, in jitted batches; later calls reuse the compilation."""

    def split(self, numbers: Numbers) -> NDArray[np.str_]:
        """Returns "train", "test" or "purge" for each item: `[items]`."""

    def blocks(self, numbers: Numbers, split: NDArray[np.str_]) -> dict[str, FeatureBlock]:
        """Returns features: `cheap` needs no network, `nll` is the prompt's NLL, `length` is a control."""

    def folds(self, labels: NDArray[np.integer], train: NDArray[np.intp], max_folds: int) -> Folds:
        """Returns the cross-validation folds of the train items."""

    def activation_rows(self, network: Any, items: Sequence[int], layer: int,
                        positions: Positions = "all") -> Iterator[np.ndarray]:
        """Yields the activations of the items in random order, `[positions, d_model]` each, for an
        autoencoder.

        Args:
            positions: all positions, or the one that a patch at the boundary changes.
        """

    def patched_losses(self, network: Any, sae: TopKSAE, items: Sequence[int], latents: Sequence[int],
                       layer: int, positions: Positions) -> Floats:
        """Returns losses `[items, 2 + latents]`: unpatched, reconstructed, and with each latent ablated."""


def check_layers(network: Any, hook: str, layers: Sequence[int],
                 allowed: Sequence[str] | None = None) -> None:
    """Raises InputError if a network lacks the hook or a layer of the section extract.

    Args:
        allowed: accepted hooks; by default all hooks of the network.
    """
    try:
        for layer in layers:
            check_hook(network, hook, layer, allowed)
    except ValueError as error:
        raise InputError(f"extract.{error}".replace("extract.layer:", "extract.layers:")) from None


def stored(values: np.ndarray, dtype: DTypeLike, item: int, layer: int) -> np.ndarray:
    """Returns the activations of an item in the number format on disk.

    Raises:
        InputError: an activation is not finite, or not in this format.
    """
    with np.errstate(over="ignore"):  # the check below reports overflow
        converted = values.astype(dtype)
    if not np.isfinite(converted).all():
        raise InputError(f"item {item}, layer {layer}: activations are not finite as {converted.dtype}; "
                         "extract.dtype=float32 has a larger range")
    return converted
