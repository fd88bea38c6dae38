"""A Chronos on many time series: its encoder's activations, its forecasts, and what patching does.

A series' random numbers go with its own number, not with its place in a batch: they are the same in batches
of any size, after an interruption, and under each patch (common random numbers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from tilelli_jax import progress
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import TopKSAE
from tilelli_jax.models.chronos import Chronos, crps
from tilelli_jax.nn.tap import Tap, TapOf
from tilelli_jax.sharding import Mesh, place_rows, replicated, whole_batch
from tilelli_jax.signals.patching import NOTHING, Patch, check_patch, reconstructed
from tilelli_jax.signals.places import check_place

PLACE = "encoder.resid_post"
EVERY = 2**30  # positions, more than any series has


def encoded(chronos: Chronos, series: np.ndarray, *, place: str = PLACE, layers: Sequence[int],
            batch_size: int = 16, mesh: Mesh | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Each series' activations in the encoder, in order: (index, f32 `[layers, time + 1, d_model]`).

    The last position is the end token's; of the series' time, at most context_length is left. The
    decoder is not run. Shows progress.

    Args:
        series: f32 `[windows, time]`, NaN where a value is missing.
        place: in the encoder's blocks.
        layers: of the encoder, in the order in which they are wanted.
        mesh: devices to share each batch; batch_size is rounded up to a multiple of their number.

    Raises:
        InputError: the series are no table.
        ValueError: the encoder has no such place or layer, or no layer is asked for.
    """
    series = _table("series", series)
    network, rows = chronos.network, whole_batch(batch_size, mesh)
    if not layers:
        raise ValueError("layers: expected at least one")
    for layer in layers:
        check_place(network, place, layer, network.encoder_places)
    kept = tuple(sorted(set(layers)))
    order = [kept.index(layer) for layer in layers]
    graph, params = nnx.split(network)
    run = _looking(graph, place, kept, mesh)
    for found, chosen in _batches(len(series), rows, "encoding"):
        tokens = chronos.tokenizer.encode(series[chosen])
        placed = (array if mesh is None else place_rows(array, mesh, rows)
                  for array in (tokens.ids, tokens.mask))
        values = np.asarray(jax.device_get(run(params, *placed)), np.float32)
        for row, i in enumerate(found.tolist()):
            yield i, values[order, row]


def forecasts(chronos: Chronos, series: np.ndarray, horizon: int, *, samples: int | None = None,
              seed: int = 0, numbers: Sequence[int] | None = None, batch_size: int = 16,
              mesh: Mesh | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Drawn continuations, in batches and in order: (indices `[batch]`, f32 `[batch, samples, horizon]`).

    The random numbers do not depend on the batches; that a token depends on the last bit of its
    probability, which may, is rare. Shows progress.

    Args:
        series: f32 `[windows, time]`, NaN where a value is missing.
        samples: by default as many as the network's configuration says.
        numbers: int `[windows]`, the number of each series in the random stream, by default its index. To
            go on where an earlier call was cut off, give the series that are left and their numbers.
        mesh: devices to share each batch; batch_size is rounded up to a multiple of their number.

    Raises:
        InputError: the series are no table, or the horizon is less than 1.
        ValueError: numbers are not as many as the series.
    """
    series = _table("series", series)
    known = _numbers(numbers, len(series))
    for found, chosen in _batches(len(series), whole_batch(batch_size, mesh), "forecasting"):
        drawn = chronos.predict(series[chosen], horizon, num_samples=samples, seed=seed,
                                numbers=known[chosen], mesh=mesh)
        yield found, drawn[:len(found)]


def patched_crps(chronos: Chronos, sae: TopKSAE, series: np.ndarray, futures: np.ndarray,
                 latents: Sequence[int], *, place: str = PLACE, layer: int,
                 positions: Literal["all", "boundary"], samples: int | None = None, seed: int = 0,
                 numbers: Sequence[int] | None = None, batch_size: int = 16,
                 mesh: Mesh | None = None) -> np.ndarray:
    """Mean CRPS over the horizon as the network is, reconstructed, and with each latent left out.

    One window has the same random numbers in all of them, and the same place in its batch: a latent that
    is never active there changes exactly nothing. Past prediction_length, where the network reads its own
    median again, that reading is patched, too. Shows progress.

    Args:
        series: f32 `[windows, time]`, NaN where a value is missing.
        futures: `[windows, horizon]`, what came.
        place: in the encoder's blocks, at the layer `layer` of the encoder.
        positions: where the reconstruction stands: at all of them, or at the boundary, the end token's.
        samples, numbers, batch_size, mesh: see `forecasts`.

    Returns:
        `[windows, 2 + latents]`, f64, in the unit of the series.

    Raises:
        InputError: the series or futures are no table, or not as many.
        ValueError: the encoder has no such place or layer, the autoencoder is of another width or has no
            such latent, or numbers are not as many as the series.
    """
    series, futures = _table("series", series), np.asarray(futures, np.float64)
    if futures.ndim != 2 or len(futures) != len(series):
        raise InputError(f"futures: expected [{len(series)}, horizon], found {list(futures.shape)}")
    network, known = chronos.network, _numbers(numbers, len(series))
    check_place(network, place, layer, network.encoder_places)
    check_patch(sae, network.config.d_model, latents)
    if positions not in ("all", "boundary"):
        raise ValueError(f"positions: expected all or boundary, found {positions}")
    tap_of, last = patched_end(place, layer), EVERY if positions == "all" else 1
    variants = [(0, NOTHING), (last, NOTHING), *((last, latent) for latent in latents)]
    result = np.zeros((len(series), len(variants)))
    for found, chosen in _batches(len(series), whole_batch(batch_size, mesh), "patching"):
        for column, variant in enumerate(variants):
            drawn = chronos.predict(series[chosen], futures.shape[1], num_samples=samples, seed=seed,
                                    numbers=known[chosen], tap_of=tap_of, aux_model=sae,
                                    beside=np.tile(variant, (len(chosen), 1)), mesh=mesh)
            result[found, column] = crps(drawn[:len(found)], futures[found]).mean(axis=-1)
    return result


@functools.cache  # the same function for the same place: what is compiled for it serves the next call, too
def patched_end(place: str, layer: int) -> TapOf:
    """The tap that has the last positions as the autoencoder makes them, for `continue_ids` and `predict`.

    beside `[rows, 2]`: how many positions (0: none; EVERY), and the latent to leave out, or NOTHING.
    """
    def tap_of(sae: TopKSAE, beside: jax.Array) -> Tap:
        def edit(value: jax.Array, at: int | None) -> jax.Array:
            time = value.shape[1]
            patch = Patch(time - beside[:, 0], 0 * beside[:, 0] + time, beside[:, 1])
            return reconstructed(sae, value, patch) if at == layer else value
        return Tap(edit={place: edit})
    return tap_of


# ---------------------------------------------------------------------------------------------


@functools.lru_cache(8)  # what is compiled serves the next call, too
def _looking(graph: Any, place: str, kept: tuple[int, ...], mesh: Mesh | None) -> Callable:
    def look(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        tap = Tap(record=(place,), layers=kept)
        return nnx.merge(graph, params).encode_tapped(ids, mask, tap)[1][place]
    return jax.jit(look, out_shardings=None if mesh is None else replicated(mesh))


def _table(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.shape[1]:
        raise InputError(f"{name}: expected [windows, time], found {list(values.shape)}")
    return values


def _numbers(numbers: Sequence[int] | None, windows: int) -> np.ndarray:
    known = np.arange(windows) if numbers is None else np.asarray(numbers, np.int64)
    if known.shape != (windows,):
        raise ValueError(f"numbers: expected [{windows}], found {list(known.shape)}")
    return known


def _batches(windows: int, rows: int, what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices, and the same filled up to `rows` with the last one, so that no batch is smaller."""
    with progress.shown(windows, what, "window") as advance:
        for start in range(0, windows, rows):
            found = np.arange(start, min(start + rows, windows))
            yield found, np.pad(found, (0, rows - len(found)), mode="edge")
            advance(len(found))
