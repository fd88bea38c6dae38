"""What a study asks of a kind of data: its items, and how a network is measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.estimators.sae import TopKSAE

from ..checks import Floats
from ..folds import Folds
from ..inputs.networks import NetworkConfig

Positions = Literal["all", "boundary"]
Numbers = dict[str, np.ndarray]  # name → [items, …]


class Measured(NamedTuple):
    """Of some items: numbers `[items, …]`, and activations, layer → for each item `[positions, d_model]`.

    Among the numbers are `amount` `[items]` f64, what difficulty is measured by, in the subject's unit;
    where the data say what is wrong, `wrong` `[items]`, 0 or 1.
    """

    numbers: Numbers
    activations: dict[int, list[np.ndarray]]


class Block(NamedTuple):
    """Features that need no activations: names `[features]`, values f64 `[items, features]`."""

    names: tuple[str, ...]
    values: Floats


class Subject(Protocol):
    """A kind of data. Networks are what `open` gives; items are told by their numbers.

    Attributes:
        unit: of `amount`.
        groups: `[items]`, what belongs together: resampled together, never on both sides of a split.
        about: columns for the table of items: `[items]` each.
        fingerprint: of the data.
    """

    unit: str
    groups: NDArray[np.str_]
    about: Mapping[str, Sequence[Any]]
    fingerprint: str

    def __len__(self) -> int: ...

    def open(self, config: NetworkConfig, path: str) -> Any:
        """Raises InputError where the network is none that can be asked this."""

    def measure(self, network: Any, items: Sequence[int], layers: Sequence[int]) -> Measured:
        """One jitted pass in batches; what was compiled is kept for the next call."""

    def split(self, numbers: Numbers) -> NDArray[np.str_]:
        """`[items]`: train, test or purge."""

    def blocks(self, numbers: Numbers, split: NDArray[np.str_]) -> dict[str, Block]:
        """`cheap` needs no network; `surprise` its output at the prompt; `length` is a control."""

    def folds(self, labels: NDArray[np.integer], train: NDArray[np.intp], most: int) -> Folds:
        """Of the training rows, for cross-validation."""

    def rows(self, network: Any, items: Sequence[int], layer: int,
             positions: Positions = "all") -> Iterator[np.ndarray]:
        """Activations of items in random order, `[positions, d_model]` each, for an autoencoder.

        Args:
            positions: all, or the one that a patch at the boundary changes.
        """

    def patched(self, network: Any, sae: TopKSAE, items: Sequence[int], latents: Sequence[int], layer: int,
                positions: Positions) -> Floats:
        """Losses `[items, 2 + latents]`: as it is, reconstructed, and with each latent left out."""
