"""Chronos on many time series: encoder activations, forecasts, and the effect of patching.

The random numbers of a series depend on its index, not on its position in a batch. They are the same for
every batch size, after an interruption, and under each patch (common random numbers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from tilelli_jax.cli import progress
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import TopKSAE
from tilelli_jax.models.chronos import Chronos, crps
from tilelli_jax.nn.hooks import MakeTap, Tap, check_hook
from tilelli_jax.parallel.sharding import Mesh, replicated
from tilelli_jax.signals.batching import batches, on_devices
from tilelli_jax.signals.patching import NOTHING, Patch, check_patch, reconstructed

HOOK = "encoder.resid_post"
ALL_POSITIONS = 2**30  # all positions: more than any series has


def encoder_activations(chronos: Chronos, series: np.ndarray, *, hook: str = HOOK, layers: Sequence[int],
            batch_size: int = 16, mesh: Mesh | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each series' encoder activations, in order: (index, f32 `[layers, time + 1, d_model]`).

    The last position is the end token. At most context_length values of a series are encoded. The decoder
    is not run. Shows progress.

    Args:
        series: f32 `[windows, time]`; NaN marks missing values.
        hook: a hook in the encoder's blocks.
        layers: layers of the encoder, in the order of the result.
        mesh: devices that share each batch; batch_size is rounded up to a multiple of their number.

    Raises:
        InputError: the series are not a table.
        ValueError: the encoder has no such hook or layer, or layers is empty.
    """
    series = _table("series", series)
    network = chronos.network
    if not layers:
        raise ValueError("layers: expected at least one")
    for layer in layers:
        check_hook(network, hook, layer, network.encoder_hooks)
    recorded_layers = tuple(sorted(set(layers)))
    order = [recorded_layers.index(layer) for layer in layers]
    graph, params = nnx.split(network)
    run = _encoder(graph, hook, recorded_layers, mesh)
    for indices, padded in _batches(len(series), batch_size, mesh, "encoding"):
        tokens = chronos.tokenizer.encode(series[padded])
        values = np.asarray(jax.device_get(run(params, *on_devices((tokens.ids, tokens.mask), mesh))),
                            np.float32)
        for row, i in enumerate(indices.tolist()):
            yield i, values[order, row]


def sample_forecasts(chronos: Chronos, series: np.ndarray, horizon: int, *, samples: int | None = None,
              seed: int = 0, stream_ids: Sequence[int] | None = None, batch_size: int = 16,
              mesh: Mesh | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields sampled forecasts in batches, in order: (indices `[batch]`, f32 `[batch, samples, horizon]`).

    The random numbers do not depend on the batches. The last bit of a token's probability may, but it
    rarely changes the sampled token. Shows progress.

    Args:
        series: f32 `[windows, time]`; NaN marks missing values.
        samples: number of samples per series; by default that of the network's configuration.
        stream_ids: int `[windows]`, index of each series in the random stream; by default its position. To
            resume an interrupted call, pass the remaining series and their indices.
        mesh: devices that share each batch; batch_size is rounded up to a multiple of their number.

    Raises:
        InputError: the series are not a table, or the horizon is less than 1.
        ValueError: stream_ids do not match the series.
    """
    series = _table("series", series)
    checked_ids = _stream_ids(stream_ids, len(series))
    for indices, padded in _batches(len(series), batch_size, mesh, "forecasting"):
        values = chronos.predict(series[padded], horizon, num_samples=samples, seed=seed,
                                 stream_ids=checked_ids[padded], mesh=mesh)
        yield indices, values[:len(indices)]


def patched_crps(chronos: Chronos, sae: TopKSAE, series: np.ndarray, futures: np.ndarray,
                 latents: Sequence[int], *, hook: str = HOOK, layer: int,
                 positions: Literal["all", "boundary"], samples: int | None = None, seed: int = 0,
                 stream_ids: Sequence[int] | None = None, batch_size: int = 16,
                 mesh: Mesh | None = None) -> np.ndarray:
    """Mean CRPS over the horizon: unpatched, reconstructed, and with each latent ablated.

    A window uses the same random numbers and the same position in its batch in all variants, so ablating
    a latent that is never active has exactly no effect. Beyond prediction_length, where the network reads
    its own median, that pass is patched too. Shows progress.

    Args:
        series: f32 `[windows, time]`; NaN marks missing values.
        futures: `[windows, horizon]`, the true continuations.
        hook: a hook in the encoder's blocks, at layer `layer`.
        positions: patched positions: all, or the boundary (the end token).
        samples, stream_ids, batch_size, mesh: see `sample_forecasts`.

    Returns:
        `[windows, 2 + latents]`, f64, in the unit of the series.

    Raises:
        InputError: the series or futures are not a table, or their numbers differ.
        ValueError: the encoder has no such hook or layer, the autoencoder has another width or no such
            latent, or stream_ids do not match the series.
    """
    series, futures = _table("series", series), np.asarray(futures, np.float64)
    if futures.ndim != 2 or len(futures) != len(series):
        raise InputError(f"futures: expected [{len(series)}, horizon], found {list(futures.shape)}")
    network, checked_ids = chronos.network, _stream_ids(stream_ids, len(series))
    check_hook(network, hook, layer, network.encoder_hooks)
    check_patch(sae, network.config.d_model, latents)
    if positions not in ("all", "boundary"):
        raise ValueError(f"positions: expected all or boundary, found {positions}")
    make_tap, n_last = patch_last_positions(hook, layer), ALL_POSITIONS if positions == "all" else 1
    variants = [(0, NOTHING), (n_last, NOTHING), *((n_last, latent) for latent in latents)]
    result = np.zeros((len(series), len(variants)))
    for indices, padded in _batches(len(series), batch_size, mesh, "patching"):
        for column, variant in enumerate(variants):
            values = chronos.predict(series[padded], futures.shape[1], num_samples=samples, seed=seed,
                                     stream_ids=checked_ids[padded], make_tap=make_tap, aux_model=sae,
                                     metadata=np.tile(variant, (len(padded), 1)), mesh=mesh)
            result[indices, column] = crps(values[:len(indices)], futures[indices]).mean(axis=-1)
    return result


@functools.cache  # returns the same function object for the same hook, so that it is compiled once
def patch_last_positions(hook: str, layer: int) -> MakeTap:
    """The tap that replaces the last positions by their reconstruction, for `continue_ids` and `predict`.

    metadata `[rows, 2]`: number of last positions (0: none; ALL_POSITIONS: all), and the latent to ablate or
    NOTHING.
    """
    def make_tap(sae: TopKSAE, metadata: jax.Array) -> Tap:
        def edit(value: jax.Array, at_layer: int | None) -> jax.Array:
            time = value.shape[1]
            patch = Patch(time - metadata[:, 0], 0 * metadata[:, 0] + time, metadata[:, 1])
            return reconstructed(sae, value, patch) if at_layer == layer else value
        return Tap(edit={hook: edit})
    return make_tap


# ---------------------------------------------------------------------------------------------


@functools.lru_cache(8)  # reuses the compiled program between calls
def _encoder(graph: Any, hook: str, layers: tuple[int, ...], mesh: Mesh | None) -> Callable:
    def run(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        tap = Tap(record=(hook,), layers=layers)
        return nnx.merge(graph, params).encode_tapped(ids, mask, tap)[1][hook]
    return jax.jit(run, out_shardings=None if mesh is None else replicated(mesh))


def _table(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.shape[1]:
        raise InputError(f"{name}: expected [windows, time], found {list(values.shape)}")
    return values


def _stream_ids(stream_ids: Sequence[int] | None, windows: int) -> np.ndarray:
    checked = np.arange(windows) if stream_ids is None else np.asarray(stream_ids, np.int64)
    if checked.shape != (windows,):
        raise ValueError(f"stream_ids: expected [{windows}], found {list(checked.shape)}")
    return checked


def _batches(windows: int, batch_size: int, mesh: Mesh | None,
             label: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the indices of each batch in order, and the window of each of its rows."""
    with progress.shown(windows, label, "window") as advance:
        for batch in batches([1] * windows, batch_size, mesh=mesh):  # equal lengths keep their order
            yield np.array(batch.indices), np.array(batch.filled)
            advance(len(batch.indices))
