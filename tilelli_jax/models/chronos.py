"""Chronos (Ansari et al. 2024, arXiv:2403.07815): time series as the tokens of a T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.t5 import ChronosConfig, FlaxT5ForConditionalGeneration
from tilelli_jax.models.t5_decoding import continue_ids
from tilelli_jax.nn.hooks import MakeTap
from tilelli_jax.parallel.sharding import Mesh, place_rows

PAD, END = 0, 1
FAR = np.float32(1e20)


class SeriesTokens(NamedTuple):
    """Tokenised series. Each row ends with the end token; missing values are masked."""

    ids: np.ndarray  # int32 [batch, time + 1]
    mask: np.ndarray  # bool [batch, time + 1]
    scale: np.ndarray  # f32 [batch]


class MeanScaleUniformBins:
    """Divides values by their mean absolute value and quantises them to bins of equal width.

    `centers [n_bins]` and `boundaries [n_bins + 1]`, f32; n_bins = n_tokens − n_special_tokens − 1.
    """

    def __init__(self, config: ChronosConfig) -> None:
        n = config.n_tokens - config.n_special_tokens - 1
        self.config = config
        self.centers = _linspace(config.low_limit, config.high_limit, n)
        self.boundaries = np.concatenate(
            [[-FAR], (self.centers[1:] + self.centers[:-1]) / np.float32(2), [FAR]]).astype(np.float32)

    def encode(self, series: np.ndarray) -> SeriesTokens:
        """series f32 `[batch, time]`; NaN marks missing values, including padding on the left."""
        values = np.asarray(series, np.float32)[:, -self.config.context_length:]
        present = ~np.isnan(values)
        count = present.sum(1)
        total = np.where(present, np.abs(values), 0).sum(1, dtype=np.float32)
        scale = (total / np.maximum(count, 1).astype(np.float32)).astype(np.float32)
        scale = np.where(scale > 0, scale, np.float32(1))  # no values, all zeros, or underflow
        bins = np.searchsorted(self.boundaries, values / scale[:, None], side="right")
        ids = np.clip(bins + self.config.n_special_tokens, 0, self.config.n_tokens - 1)
        ids = np.where(present, ids, PAD)
        end = np.full((len(ids), 1), END)
        return SeriesTokens(np.concatenate([ids, end], 1).astype(np.int32),
                      np.concatenate([present, np.ones_like(end, bool)], 1), scale)

    def decode(self, ids: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """ids `[batch, …]` → values f32, the bin centres times `scale [batch]`."""
        bins = np.clip(np.asarray(ids) - self.config.n_special_tokens - 1, 0, len(self.centers) - 1)
        return self.centers[bins] * np.asarray(scale).reshape(-1, *(1,) * (np.ndim(ids) - 1))


class Chronos:
    """A T5 network with its time-series tokenizer."""

    def __init__(self, network: FlaxT5ForConditionalGeneration) -> None:
        """Raises InputError if the network's configuration has no tokenizer for series."""
        if getattr(network.config, "chronos", None) is None:
            raise InputError("chronos: expected a network whose configuration has a tokenizer for series, "
                             "found none")
        self.network, self.config = network, network.config.chronos
        self.tokenizer = MeanScaleUniformBins(self.config)

    @classmethod
    def from_pretrained(cls, path: str | Path, compute: ComputeConfig | None = None) -> Chronos:
        """Reads a Chronos-T5 directory, whose config.json holds `chronos_config`.

        Raises:
            InputError: the directory holds no Chronos-T5 network (Chronos-Bolt has no bins).
        """
        network = FlaxT5ForConditionalGeneration.from_pretrained(path, compute)
        if network.config.chronos is None:
            raise InputError(f"{path}/config.json: expected the key 'chronos_config'")
        return cls(network)

    def predict(self, series: np.ndarray, length: int, *, num_samples: int | None = None,
                seed: int = 0, stream_ids: np.ndarray | None = None, make_tap: MakeTap | None = None,
                aux_model: Any = None, metadata: np.ndarray | None = None,
                mesh: Mesh | None = None) -> np.ndarray:
        """Samples forecasts: series f32 `[batch, time]` → f32 `[batch, samples, length]`.

        Beyond prediction_length, the median of the samples is appended to the series and the network reads
        the longer series again.

        Args:
            stream_ids: int `[batch]`, index of each series in the random stream; series with the same index
                use the same random numbers. Default: 0, 1, ….
            make_tap, aux_model, metadata: edit the encoder's activations in every pass; see
                `t5_decoding.continue_ids`. metadata `[batch, n]` applies to all samples of a series.
            mesh: devices that share the batch; the batch size is a multiple of their number.

        Raises:
            InputError: the series are not a table of numbers, or length is less than 1.
            ValueError: stream_ids or metadata do not match the series, or the encoder has no such hook or
                layer.
        """
        series = np.asarray(series, np.float32)
        if series.ndim != 2 or not series.size:
            raise InputError(f"series: expected [batch, time], found {list(series.shape)}")
        if length < 1:
            raise InputError(f"length: expected at least 1, found {length}")
        stream_ids = np.arange(len(series)) if stream_ids is None else np.asarray(stream_ids)
        if stream_ids.shape != (len(series),):
            raise ValueError(f"stream_ids: expected [{len(series)}], found {list(stream_ids.shape)}")
        samples, parts = num_samples or self.config.num_samples, []
        rows = (samples * stream_ids[:, None] + np.arange(samples)).reshape(-1).astype(np.int32)
        metadata = np.asarray(np.zeros((len(series), 0)) if metadata is None else metadata, np.int32)
        for part in range(-(-length // self.config.prediction_length)):
            values = self._sample(series, rows, metadata, mesh, seed=(seed + 7919 * part) % 2**32,
                                  make_tap=make_tap, aux_model=aux_model)
            parts.append(values)
            median = np.sort(values, axis=1)[:, (samples - 1) // 2]  # of an even number, the lower of the two
            series = np.concatenate([series, median], axis=1)
        return np.concatenate(parts, axis=2)[:, :, :length]

    def _sample(self, series: np.ndarray, rows: np.ndarray, metadata: np.ndarray, mesh: Mesh | None,
                **options: Any) -> np.ndarray:
        tokens, config, samples = self.tokenizer.encode(series), self.config, len(rows) // len(series)
        ids, mask, stream_ids, placed_metadata = (
            jnp.asarray(array) if mesh is None else place_rows(array, mesh, len(array))
            for array in (tokens.ids, tokens.mask, rows, metadata))
        new = continue_ids(self.network, ids, mask, n=config.prediction_length, copies=samples,
                           rows=stream_ids,
                           temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                           banned=(END,), metadata=placed_metadata, **options)
        return self.tokenizer.decode(np.asarray(new).reshape(len(series), samples, -1), tokens.scale)


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score (CRPS) of samples, in the unit of the values; lower is better.

    mean_i |x_i − y| − ½ mean_ij |x_i − x_j|, including the pairs i = j (Gneiting & Raftery 2007, eq. 21).
    Computed in f64.

    Args:
        samples: `[…, samples, time]`.
        truth: `[…, time]`.

    Returns:
        `[…, time]`.
    """
    x, y = np.asarray(samples, np.float64), np.asarray(truth, np.float64)
    error = np.abs(x - y[..., None, :]).mean(-2)
    # With sorted samples, the sum over all pairs is a sum over the gaps between neighbours: the k-th gap is
    # part of k(n − k) pairs. For equal samples it is exactly 0, without rounding error. Scores are ≥ 0.
    n = x.shape[-2]
    k = np.arange(1, n)
    spread = (np.diff(np.sort(x, axis=-2), axis=-2) * (k * (n - k) / n**2)[:, None]).sum(-2)
    return np.maximum(error - spread, 0)


def _linspace(low: float, high: float, n: int) -> np.ndarray:
    """n evenly spaced values, f32, bit-identical to PyTorch's: computed from both ends, rounded once."""
    step = np.float64(np.float32(high) - np.float32(low)) / (n - 1)
    step = np.float64(np.float32(step))
    from_low = np.float32(low) + step * np.arange(n)
    from_high = np.float32(high) - step * np.arange(n - 1, -1, -1)
    return np.where(np.arange(n) < n // 2, from_low, from_high).astype(np.float32)
