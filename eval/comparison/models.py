"""Who is compared: training configurations, their sizes, and that they differ in what they may."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models import weights
from tilelli_jax.store import build
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.step import parameter_count, split_params

from .config import ComparisonConfig

CODES = {"ternary": 3, "power3": 7}  # how many values a code can have
FULL = 32  # bits of a float32
# What the study itself sets, for each run.
SET_HERE = ("run_dir", "seed", "data.source", "data.shuffle_seed", "train.eval_bytes", "train.export")
# What has to be alike, so that runs of one seed see the same batches and are measured on the same bytes.
ALIKE = ("data.", "train.", "optimizer.name")


class ComparedModel(NamedTuple):
    """A way to train a network.

    Attributes:
        config: its training configuration.
        settings: key=value texts that take precedence over that file's.
    """

    name: str
    config: str
    settings: tuple[str, ...]

    def overrides(self, text: str, seed: int, rate: float | None = None) -> list[str]:
        """The settings of one run, its directory apart.

        Args:
            rate: its learning rate; None: that of its configuration.
        """
        return [*self.settings, f"data.source={text}", f"seed={seed}", f"data.shuffle_seed={seed}",
                # All of the validation part is compared, after the last update.
                "train.eval_bytes=0", "train.export=last",
                *([] if rate is None else [f"optimizer.learning_rate={rate!r}"])]

    def experiment(self, text: str, seed: int, rate: float | None = None) -> ExperimentConfig:
        """That run, as `tilelli train` would have it.

        Raises:
            InputError: its configuration is not there, or says what cannot be.
        """
        try:
            return config_lib.load(ExperimentConfig, self.config, self.overrides(text, seed, rate))
        except InputError as error:
            raise InputError(f"models: {self.name}: {error}") from None


class Size(NamedTuple):
    """Of a network.

    Attributes:
        parameters: how many numbers are trained.
        quantised: how many of them are seen through a quantiser.
        bits_per_weight: what one of those says, log₂ of its values; 32 where none is quantised.
        bits_per_parameter: the mean over all, those not quantised at 32; scales are not counted.
    """

    parameters: int
    quantised: int
    bits_per_weight: float
    bits_per_parameter: float


def models(config: ComparisonConfig) -> list[ComparedModel]:
    """In their order, the reference first."""
    found = [ComparedModel(name, path, (*settings, *config.overrides))
             for name, path, *settings in config.models]
    return sorted(found, key=lambda one: one.name != (config.reference or found[0].name))


def size(model: Any) -> Size:
    """Of a network's configuration, by shapes alone: no array is made."""
    outline = nnx.eval_shape(lambda: build(model, 0))
    parameters = parameter_count(split_params(outline)[1])
    quantised = {name: weight for name, weight in weights(outline).items() if weight.quantizer.levels}
    sizes = [math.prod(weight.kernel.shape) for weight in quantised.values()]
    bits = [math.log2(CODES[str(weight.quantizer.levels)]) for weight in quantised.values()]
    said = sum(size * each for size, each in zip(sizes, bits, strict=True))
    count = sum(sizes)
    return Size(parameters, count, said / count if count else FULL,
                (said + FULL * (parameters - count)) / parameters)


def check(found: Sequence[ComparedModel], text: str, seed: int, tolerance: float) -> dict[str, Size]:
    """The size of each model, by name.

    Raises:
        InputError: a configuration is not there, is none of a network that learns from text, sets what
            the study sets, has another budget or other batches than the reference (the first), or a
            number of parameters that differs from its by more than `tolerance`.
    """
    sizes: dict[str, Size] = {}
    first = found[0].experiment(text, seed)
    for one in found:
        for setting in one.settings:
            if (key := setting.partition("=")[0]) in SET_HERE:
                raise InputError(f"models: {one.name}: expected no {key}, which the study itself "
                                 f"sets, found '{setting}'")
        config = one.experiment(text, seed)
        if isinstance(config.model, SAEConfig) or config.chat or config.train.init_from:
            raise InputError(f"models: {one.name}: expected a network that learns from text, from "
                             f"random weights; {one.config} has none")
        for key, (theirs, its) in config_lib.differences(first, config).items():
            if key.startswith(ALIKE):
                raise InputError(f"models: {one.name}: {key}: expected {theirs}, as {found[0].name} "
                                 f"has it, found {its}")
        sizes[one.name] = size(config.model)
    of_first = sizes[found[0].name].parameters
    for name, one_size in sizes.items():
        apart = one_size.parameters / of_first - 1
        if abs(apart) > tolerance:
            raise InputError(
                f"models: {name}: expected as many parameters as {found[0].name} ({of_first:,}) "
                f"within {tolerance:.1%} (tolerance), found {one_size.parameters:,} ({apart:+.1%})")
    return sizes
