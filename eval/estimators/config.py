"""The settings of the estimators that learn."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.fit_sidecar import SidecarOptions


@dataclasses.dataclass(frozen=True)
class FitConfig(Section):
    """The sidecar and the other estimators that learn."""

    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of the estimators with random weights, one run each")
    sidecar: SidecarOptions = setting(SidecarOptions(), "training of the sidecar")
    c_values: tuple[float, ...] = setting((1e-3, 1e-2, 0.1, 1.0), "values of C (inverse regularisation) of "
                                           "the logistic probes; the validate split selects one")
    familiarity_depth: float = setting(0.6, "relative depth (0 to 1) of the layer whose residual stream "
                                       "gives the Mahalanobis familiarity", min=0, below=1)
    saplma_depths: tuple[float, ...] = setting(
        (0.5, 0.65, 0.8, 0.95), "relative depths (0 to 1) of the layers among which the validate split "
        "selects that of saplma")
    calibrate: Literal["platt", "isotonic", "temperature"] = setting(
        "platt", "how scores become probabilities; temperature, as in Recall, cannot correct a shift")
    jobs: int = setting(-1, "probes fitted in parallel; -1 uses every core", min=-1)
    cross_dataset: bool = setting(True, "with several data sets, also train on each alone and test on the "
                                  "others")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (not self.seeds or len(set(self.seeds)) != len(self.seeds)
                or not all(0 <= seed < 2**32 for seed in self.seeds)):
            raise InputError("seeds: expected at least one integer from 0 to 2³² − 1, each once, found "
                             f"{list(self.seeds)}")
        if not self.c_values or not all(0 < c_value < math.inf for c_value in self.c_values):
            raise InputError("c_values: expected at least one finite number above 0, found "
                             f"{list(self.c_values)}")
        if not self.saplma_depths or not all(0 <= depth < 1 for depth in self.saplma_depths):
            raise InputError("saplma_depths: expected at least one number from 0 to below 1, found "
                             f"{list(self.saplma_depths)}")
