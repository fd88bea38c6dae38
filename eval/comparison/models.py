"""The models of a comparison: training configurations, sizes, and checks that they are comparable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.loading.store import build
from tilelli_jax.models import weights
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.step import parameter_count, split_params

from ..inputs.networks import NetworkConfig
from .config import ComparisonConfig

CODES = {"ternary": 3, "power3": 7}  # number of values of a quantised weight
FLOAT_BITS = 32  # of a float32 weight
# Keys that the study sets for each run.
SET_HERE = ("run_dir", "seed", "data.source", "data.shuffle_seed", "train.eval_bytes", "train.export")
# Keys that must be equal, so that runs of one seed see the same batches and are evaluated on the same bytes.
MUST_MATCH = ("data.", "train.", "optimizer.name")


class ComparedModel(NamedTuple):
    """A model under comparison.

    Attributes:
        name: the name in reports.
        network: how it is trained, with the overrides for all models.
    """

    name: str
    network: NetworkConfig

    def overrides(self, text: str, seed: int, rate: float | None = None) -> list[str]:
        """Returns the settings of one run that the study makes, without its directory.

        Args:
            rate: the learning rate; None: that of the configuration.
        """
        return [f"data.source={text}", f"seed={seed}", f"data.shuffle_seed={seed}",
                # The loss is that of the whole validation split after the last update.
                "train.eval_bytes=0", "train.export=last",
                *([] if rate is None else [f"optimizer.learning_rate={rate!r}"])]

    def experiment(self, text: str, seed: int, rate: float | None = None) -> ExperimentConfig:
        """Returns the configuration of one run, as `tilelli train` loads it.

        Raises:
            InputError: the configuration does not exist or is not valid.
        """
        try:
            return self.network.experiment(self.overrides(text, seed, rate))
        except InputError as error:
            raise InputError(f"models.{self.name}: {error}") from None


class Size(NamedTuple):
    """The size of a network.

    Attributes:
        parameters: number of trainable parameters.
        quantised: number of those that are quantised in the forward pass.
        bits_per_weight: bits of a quantised weight, log₂ of its number of values; 32 if none is quantised.
        bits_per_parameter: mean over all parameters, unquantised ones at 32 bits; scales are not counted.
    """

    parameters: int
    quantised: int
    bits_per_weight: float
    bits_per_parameter: float


def models(config: ComparisonConfig) -> list[ComparedModel]:
    """Returns the models in the order of the configuration, but the reference first."""
    compared = [ComparedModel(name, dataclasses.replace(network, set=(*network.set, *config.set)))
                for name, network in config.models.items()]
    return sorted(compared, key=lambda model: model.name != (config.reference or compared[0].name))


def size(model: Any) -> Size:
    """Returns the size of a network from its configuration; uses shapes only and allocates no array."""
    network = nnx.eval_shape(lambda: build(model, 0))
    parameters = parameter_count(split_params(network)[1])
    quantised = {name: weight for name, weight in weights(network).items() if weight.quantizer.levels}
    sizes = [math.prod(weight.kernel.shape) for weight in quantised.values()]
    bits = [math.log2(CODES[str(weight.quantizer.levels)]) for weight in quantised.values()]
    total_bits = sum(size * each for size, each in zip(sizes, bits, strict=True))
    count = sum(sizes)
    return Size(parameters, count, total_bits / count if count else FLOAT_BITS,
                (total_bits + FLOAT_BITS * (parameters - count)) / parameters)


def check(compared: Sequence[ComparedModel], text: str, seed: int, tolerance: float) -> dict[str, Size]:
    """Checks that the models are comparable, and returns model name → size.

    Raises:
        InputError: a configuration does not exist, does not train a network on text, sets a time budget or a
            key that the study sets, differs from the reference (the first model) in updates or batches, or
            has a number of parameters that differs from the reference's by more than `tolerance`.
    """
    sizes: dict[str, Size] = {}
    reference = compared[0]
    reference_config = reference.experiment(text, seed)
    for model in compared:
        for setting in model.network.set:
            if (key := setting.partition("=")[0]) in SET_HERE:
                raise InputError(f"models.{model.name}: expected no {key}, which the study itself sets, "
                                 f"found '{setting}'")
        config = model.experiment(text, seed)
        if isinstance(config.model, SAEConfig) or config.chat or config.train.init_from:
            raise InputError(f"models.{model.name}: expected the configuration of a network trained on text "
                             f"from random weights, found {model.network.train}")
        if config.train.minutes is not None:
            raise InputError(f"models.{model.name}: train.minutes: expected none, because all models make "
                             f"the same number of updates, found {config.train.minutes:g}")
        for key, (expected, value) in config_lib.differences(reference_config, config).items():
            if key.startswith(MUST_MATCH):
                raise InputError(f"models.{model.name}: {key}: expected {expected}, the value of "
                                 f"{reference.name}, found {value}")
        sizes[model.name] = size(config.model)
    expected_count = sizes[reference.name].parameters
    for name, model_size in sizes.items():
        deviation = model_size.parameters / expected_count - 1
        if abs(deviation) > tolerance:
            raise InputError(
                f"models.{name}: expected the number of parameters of {reference.name} ({expected_count:,}) "
                f"within {tolerance:.1%} (tolerance), found {model_size.parameters:,} ({deviation:+.1%})")
    return sizes
