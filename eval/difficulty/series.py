"""Windows of a time series, their split in time, and the scores of forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from tilelli_jax.errors import InputError
from tilelli_jax.models.chronos import crps

from ..checks import Floats
from ..inputs.rows import columns_of, read_rows


def read_series(path: Path, column: str) -> Floats:
    """Reads one column of a CSV file with a header, or of another file of rows: `[time]`, f64.

    Raises:
        InputError: the file cannot be read, has no rows or no such column, or a cell is not a finite number
            (the message counts rows from 1, after the header).
    """
    rows = read_rows(path, None)
    if not any(column in row for row in rows):
        raise InputError(f"{path}: expected the column '{column}'; {columns_of(rows[0])}")
    cells = [row.get(column) for row in rows]
    values = np.array([_number(cell) for cell in cells])
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        raise InputError(f"{path}: row {bad[0] + 1}: {column}: expected a finite number, "
                         f"found {cells[bad[0]]!r:.60}")
    return values


class Windows(NamedTuple):
    """Windows of a series.

    Attributes:
        starts: int `[windows]`.
        contexts: f64 `[windows, context]`, the values that the network reads.
        futures: f64 `[windows, horizon]`, the values after them.
    """

    starts: NDArray[np.int64]
    contexts: Floats
    futures: Floats


def windows(values: ArrayLike, *, context: int = 512, horizon: int = 96, stride: int = 24) -> Windows:
    """Returns all windows of the values `[time]` that start at a multiple of `stride`.

    Raises:
        InputError: the series is shorter than one window, or a length is less than 1.
    """
    values = np.asarray(values, float)
    for name, length in (("context", context), ("horizon", horizon), ("stride", stride)):
        if length < 1:
            raise InputError(f"{name}: expected at least 1, found {length}")
    if values.ndim != 1 or len(values) < context + horizon:
        raise InputError(f"values: expected [time] with at least {context + horizon} values (context + "
                         f"horizon), found {list(values.shape)}")
    pieces = sliding_window_view(values, context + horizon)[::stride]
    starts = np.arange(len(pieces)) * stride
    return Windows(starts, pieces[:, :context].copy(), pieces[:, context:].copy())


def split_in_time(starts: Sequence[int] | NDArray[np.integer], span: int, length: int,
                  train: float = 0.7) -> NDArray[np.str_]:
    """Returns "train", "test" or "purge" for each window: `[windows]`.

    The cut is after the fraction `train` of the series. Train windows end before the cut. Test windows start
    at least one span after it, so that no test window is adjacent to training data.

    Args:
        span: length of a window, context and horizon.
        length: length of the series.
    """
    starts, cut = np.asarray(starts), int(train * length)
    return np.where(starts + span <= cut, "train", np.where(starts >= cut + span, "test", "purge"))


def scores(samples: ArrayLike, contexts: ArrayLike, futures: ArrayLike,
           season: int = 24) -> tuple[Floats, Floats]:
    """Returns the errors of forecasts: (CRPS, MASE), each `[batch]`, f64; lower is better.

    The CRPS is the mean over the horizon, in the unit of the series. The MASE (Hyndman & Koehler 2006) is the
    mean absolute error of the sample mean, divided by the mean absolute error of the seasonal naive forecast
    within the context. If the latter is 0 or undefined (the context is not longer than a season), the divisor
    is 1e-5.

    Args:
        samples: `[batch, samples, horizon]`.
        contexts: `[batch, time]`.
        futures: `[batch, horizon]`.

    Raises:
        InputError: the shapes do not fit, or the season is less than 1.
    """
    samples, contexts, futures = (np.asarray(part, float) for part in (samples, contexts, futures))
    if (samples.ndim, contexts.ndim, futures.ndim) != (3, 2, 2) or not samples.size or (
            samples.shape[::2] != futures.shape or len(contexts) != len(futures)):
        raise InputError(f"samples, contexts, futures: expected [batch, samples, horizon], [batch, time] and "
                         f"[batch, horizon], found {list(samples.shape)}, {list(contexts.shape)}, "
                         f"{list(futures.shape)}")
    if season < 1:
        raise InputError(f"season: expected at least 1, found {season}")
    error = np.abs(samples.mean(axis=1) - futures).mean(axis=1)
    naive = np.zeros(len(contexts))
    if contexts.shape[1] > season:
        naive = np.abs(contexts[:, season:] - contexts[:, :-season]).mean(axis=1)
    return crps(samples, futures).mean(axis=-1), error / np.where(naive > 0, naive, 1e-5)


# ---------------------------------------------------------------------------------------------


def _number(cell: Any) -> float:
    """Returns the cell as a number, or NaN if it is not one."""
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return np.nan
