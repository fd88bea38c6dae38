"""The data of a study of Chronos: windows of a time series."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import TopKSAE
from tilelli_jax.loading.language import load
from tilelli_jax.models.chronos import Chronos
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration
from tilelli_jax.parallel.sharding import Mesh
from tilelli_jax.signals.time_series import encoder_activations, patched_crps, sample_forecasts

from ..checks import Floats
from ..folds import Folds, forward, number_of_folds, usable
from ..inputs.networks import NetworkConfig
from . import cheap, series
from .config import DifficultyConfig, SeriesConfig
from .study_data import FeatureBlock, Measurements, Numbers, Positions, check_layers, stored

MIN_ROWS_PER_FOLD = 3  # train windows


class ChronosData:
    """See `study_data.StudyData`. Windows that start within the same span of the series form a group."""

    unit = "CRPS"

    def __init__(self, config: DifficultyConfig, mesh: Mesh | None = None) -> None:
        """Raises InputError if the series cannot be read or is too short."""
        assert isinstance(config.data, SeriesConfig)
        data = config.data
        self.config, self.data, self.mesh = config, data, mesh
        values = series.read_series(Path(data.source), data.column)
        self.span = data.context + data.horizon
        if len(values) < self.span:
            raise InputError(f"data.source: {data.source}: expected at least {self.span} values "
                             f"(data.context + data.horizon), found {len(values)}")
        windows = series.windows(values, context=data.context, horizon=data.horizon, stride=data.stride)
        self.windows = series.Windows(windows.starts[:data.items], windows.contexts[:data.items],
                                      windows.futures[:data.items])
        # The split in time divides the part of the series that the windows cover.
        self.length = len(values)
        if len(self) < len(windows.starts):
            self.length = int(self.windows.starts[-1]) + self.span
        if len(self) < 10:
            raise InputError(f"data.source: {data.source}: expected at least 10 windows, found {len(self)}")
        # Windows that start within the same span overlap, and are resampled together.
        self.groups = np.array([str(start // self.span) for start in self.windows.starts.tolist()])
        self.planned_split = series.split_in_time(self.windows.starts, self.span, self.length,
                                                  config.split.train)
        self.metadata: Mapping[str, Sequence[Any]] = {"start": self.windows.starts.tolist()}
        self.fingerprint = hashlib.sha256(values.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.windows.starts)

    def open(self, config: NetworkConfig, path: str) -> Chronos:
        network = load(path, self.config.compute, mesh=self.mesh)
        if not isinstance(network, FlaxT5ForConditionalGeneration):
            raise InputError(f"{path}: expected a Chronos model, found family {network.config.family}")
        if network.config.chronos is None:
            raise InputError(f"{path}: expected a Chronos model, found a T5 without Chronos settings in "
                             "its configuration")
        limit = network.config.chronos.context_length
        if self.data.context > limit:
            raise InputError(f"data.context: expected at most {limit}, the context length of {path}, found "
                             f"{self.data.context}")
        return Chronos(network)

    def measure(self, network: Chronos, items: Sequence[int], layers: Sequence[int]) -> Measurements:
        options, data, chosen = self.config.extract, self.data, np.asarray(items)
        contexts, futures = self.windows.contexts[chosen], self.windows.futures[chosen]
        loss, mase = np.zeros(len(chosen)), np.zeros(len(chosen))
        for rows, samples in sample_forecasts(network, contexts, data.horizon, samples=data.samples,
                                       seed=self.config.seed, stream_ids=items, batch_size=options.batch_size,
                                       mesh=self.mesh):
            loss[rows], mase[rows] = series.scores(samples, contexts[rows], futures[rows], data.season)
        activations: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
        if layers:
            check_layers(network.network, options.hook, layers, network.network.encoder_hooks)
            for i, values in encoder_activations(network, contexts, hook=options.hook, layers=layers,
                                                 batch_size=options.batch_size, mesh=self.mesh):
                for layer, array in zip(layers, values, strict=True):
                    activations[layer].append(stored(array, options.dtype, items[i], layer))
        return Measurements({"loss": loss, "mase": mase}, activations)

    def split(self, numbers: Numbers) -> NDArray[np.str_]:
        return self.planned_split

    def blocks(self, numbers: Numbers, split: NDArray[np.str_]) -> dict[str, FeatureBlock]:
        statistics = cheap.series_statistics(self.windows.contexts, self.data.season)
        # The autocorrelation of a constant window is undefined; 0 replaces it.
        return {"cheap": FeatureBlock(cheap.SERIES_STATISTICS, np.nan_to_num(statistics, nan=0.0))}

    def folds(self, labels: NDArray[np.integer], train: NDArray[np.intp], max_folds: int) -> Folds:
        if np.bincount(labels, minlength=2).min() < 2:  # too few for two folds
            return []
        starts = self.windows.starts[train]
        number = number_of_folds(labels, max_folds, MIN_ROWS_PER_FOLD)
        return usable(forward(starts, starts + self.span, number), labels)

    def activation_rows(self, network: Chronos, items: Sequence[int], layer: int,
                        positions: Positions = "all") -> Iterator[np.ndarray]:
        options = self.config.extract
        order = np.random.default_rng(self.config.seed).permutation(np.asarray(items))
        for i, values in encoder_activations(network, self.windows.contexts[order], hook=options.hook,
                                             layers=[layer], batch_size=options.batch_size, mesh=self.mesh):
            chosen = values[0] if positions == "all" else values[0, -1:]
            yield stored(chosen, options.dtype, int(order[i]), layer)

    def patched_losses(self, network: Chronos, sae: TopKSAE, items: Sequence[int], latents: Sequence[int],
                       layer: int, positions: Positions) -> Floats:
        options, chosen = self.config.causal, np.asarray(items)
        horizon = min(options.horizon, self.data.horizon)
        return patched_crps(network, sae, self.windows.contexts[chosen],
                            self.windows.futures[chosen, :horizon], latents,
                            hook=self.config.extract.hook, layer=layer,
                            positions=positions, samples=options.samples,
                            seed=self.config.seed, stream_ids=items,
                            batch_size=self.config.extract.batch_size,
                            mesh=self.mesh)
