"""Chronos (Ansari et al. 2024, arXiv:2403.07815): time series as the tokens of a T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.models.t5 import ChronosConfig, FlaxT5ForConditionalGeneration, continue_ids
from tilelli_jax.nn.tap import TapOf
from tilelli_jax.sharding import Mesh, place_rows

PAD, END = 0, 1
FAR = np.float32(1e20)


class Tokens(NamedTuple):
    """Series as tokens; rows end with the end token, and missing values are masked."""

    ids: np.ndarray  # int32 [batch, time + 1]
    mask: np.ndarray  # bool, likewise
    scale: np.ndarray  # f32 [batch]


class MeanScaleUniformBins:
    """Values divided by the mean of their sizes, and put into bins of equal width.

    `centers [n_tokens − n_special_tokens − 1]` and `boundaries [one more]`, f32.
    """

    def __init__(self, config: ChronosConfig) -> None:
        n = config.n_tokens - config.n_special_tokens - 1
        self.config = config
        self.centers = _linspace(config.low_limit, config.high_limit, n)
        self.boundaries = np.concatenate(
            [[-FAR], (self.centers[1:] + self.centers[:-1]) / np.float32(2), [FAR]]).astype(np.float32)

    def encode(self, series: np.ndarray) -> Tokens:
        """series f32 `[batch, time]`, NaN where a value is missing (on the left: padding)."""
        values = np.asarray(series, np.float32)[:, -self.config.context_length:]
        there = ~np.isnan(values)
        count = there.sum(1)
        total = np.where(there, np.abs(values), 0).sum(1, dtype=np.float32)
        scale = (total / np.maximum(count, 1).astype(np.float32)).astype(np.float32)
        scale = np.where(scale > 0, scale, np.float32(1))  # of none, of zeros, or of numbers next to zero
        bins = np.searchsorted(self.boundaries, values / scale[:, None], side="right")
        ids = np.clip(bins + self.config.n_special_tokens, 0, self.config.n_tokens - 1)
        ids = np.where(there, ids, PAD)
        end = np.full((len(ids), 1), END)
        return Tokens(np.concatenate([ids, end], 1).astype(np.int32),
                      np.concatenate([there, np.ones_like(end, bool)], 1), scale)

    def decode(self, ids: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """ids `[batch, …]` → values f32, the centres of their bins times `scale [batch]`."""
        at = np.clip(np.asarray(ids) - self.config.n_special_tokens - 1, 0, len(self.centers) - 1)
        return self.centers[at] * np.asarray(scale).reshape(-1, *(1,) * (np.ndim(ids) - 1))


class Chronos:
    """A T5 with the tokenizer that it was trained with."""

    def __init__(self, network: FlaxT5ForConditionalGeneration) -> None:
        """Raises InputError: the network's configuration says nothing of series."""
        if getattr(network.config, "chronos", None) is None:
            raise InputError("chronos: expected a network whose configuration says how series become tokens")
        self.network, self.config = network, network.config.chronos
        self.tokenizer = MeanScaleUniformBins(self.config)

    @classmethod
    def from_pretrained(cls, path: str | Path, compute: ComputeConfig | None = None) -> Chronos:
        """Reads a Chronos-T5 directory, whose config.json holds `chronos_config`.

        Raises:
            InputError: it is none, or one of another kind (Chronos-Bolt has no bins).
        """
        network = FlaxT5ForConditionalGeneration.from_pretrained(path, compute)
        if network.config.chronos is None:
            raise InputError(f"{path}/config.json: expected the key 'chronos_config'")
        return cls(network)

    def predict(self, series: np.ndarray, length: int, *, num_samples: int | None = None,
                seed: int = 0, numbers: np.ndarray | None = None, tap_of: TapOf | None = None,
                aux_model: Any = None, beside: np.ndarray | None = None, mesh: Mesh | None = None) -> np.ndarray:
        """Drawn continuations: series f32 `[batch, time]` → f32 `[batch, samples, length]`.

        Past prediction_length, the median of the samples is appended to the series and read again.

        Args:
            numbers: int `[batch]`, the number of each series in the random stream: those of the same
                number draw with the same random numbers. By default 0, 1, ….
            tap_of, aid, beside: change what the encoder does, at each reading; see `t5.continue_ids`.
                beside `[batch, n]` holds for all samples of a series.
            mesh: devices to share the batch, whose size is a multiple of theirs.

        Raises:
            InputError: the series are no table of numbers, or there is nothing to draw.
            ValueError: numbers or beside are not as many as the series, or the encoder has no such place
                or layer.
        """
        series = np.asarray(series, np.float32)
        if series.ndim != 2 or not series.size:
            raise InputError(f"series: expected [batch, time], found {list(series.shape)}")
        if length < 1:
            raise InputError(f"length: expected at least 1, found {length}")
        numbers = np.arange(len(series)) if numbers is None else np.asarray(numbers)
        if numbers.shape != (len(series),):
            raise ValueError(f"numbers: expected [{len(series)}], found {list(numbers.shape)}")
        samples, parts = num_samples or self.config.num_samples, []
        rows = (samples * numbers[:, None] + np.arange(samples)).reshape(-1).astype(np.int32)
        beside = np.zeros((len(series), 0), np.int32) if beside is None else np.asarray(beside, np.int32)
        for part in range(-(-length // self.config.prediction_length)):
            drawn = self._draw(series, rows, beside, mesh, seed=(seed + 7919 * part) % 2**32, tap_of=tap_of,
                               aux_model=aux_model)
            parts.append(drawn)
            middle = np.sort(drawn, axis=1)[:, (samples - 1) // 2]  # of an even number, the lower of the two
            series = np.concatenate([series, middle], axis=1)
        return np.concatenate(parts, axis=2)[:, :, :length]

    def _draw(self, series: np.ndarray, rows: np.ndarray, beside: np.ndarray, mesh: Mesh | None,
              **drawing: Any) -> np.ndarray:
        tokens, config, samples = self.tokenizer.encode(series), self.config, len(rows) // len(series)
        ids, mask, numbers, known = (
            jnp.asarray(array) if mesh is None else place_rows(array, mesh, len(array))
            for array in (tokens.ids, tokens.mask, rows, beside))
        new = continue_ids(self.network, ids, mask, n=config.prediction_length, copies=samples, rows=numbers,
                           temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                           banned=(END,), beside=known, **drawing)
        return self.tokenizer.decode(np.asarray(new).reshape(len(series), samples, -1), tokens.scale)


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of an ensemble, in the unit of the values; less is better.

    mean_i |x_i − y| − ½ mean_ij |x_i − x_j|, the pairs i = j among them (Gneiting & Raftery 2007,
    eq. 21), in f64.

    Args:
        samples: `[…, samples, time]`.
        truth: `[…, time]`.

    Returns:
        `[…, time]`.
    """
    x, y = np.asarray(samples, np.float64), np.asarray(truth, np.float64)
    near = np.abs(x - y[..., None, :]).mean(-2)
    # Sorted, the sum over all pairs is one over the gaps between neighbours; the k-th lies in k(n − k) pairs.
    # Of equal samples it is 0, not what rounding leaves of it; no score is below 0.
    n = x.shape[-2]
    k = np.arange(1, n)
    spread = (np.diff(np.sort(x, axis=-2), axis=-2) * (k * (n - k) / n**2)[:, None]).sum(-2)
    return np.maximum(near - spread, 0)


def _linspace(low: float, high: float, n: int) -> np.ndarray:
    """n equal steps, f32, to the bit as PyTorch has them: counted from both ends, rounded once."""
    step = np.float64(np.float32(high) - np.float32(low)) / (n - 1)
    step = np.float64(np.float32(step))
    up = np.float32(low) + step * np.arange(n)
    down = np.float32(high) - step * np.arange(n - 1, -1, -1)
    return np.where(np.arange(n) < n // 2, up, down).astype(np.float32)
