"""From a sidecar's score to a probability and a word, and the file that keeps both: SIDECAR/verdict.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit, logit

from tilelli_jax import config as config_lib
from tilelli_jax.files import write_atomically
from tilelli_jax.json_text import as_expected, read_json
from tilelli_jax.models.decoder import ComputeConfig

from ..calibration import Calibrator, Temperature, calibrator_from_dict
from ..checks import Floats
from ..tables import as_json
from ..thresholds import Thresholds, Verdict, guaranteed_thresholds, precision_thresholds, verdict
from .config import PromptConfig, VerdictConfig

FILE = "verdict.json"


@dataclasses.dataclass(frozen=True)
class VerdictRule:
    """What stands beside a sidecar.

    Attributes:
        calibrator: of its log odds.
        green, red: thresholds of its own, uncalibrated chance σ(log odds): from green on it likely knows,
            below red it likely does not; None: that is said of nothing. A guarantee needs a score that was
            not fitted to the questions it is given on, and the calibrator was.
        aim: how the thresholds were chosen: `precision`, `guarantee`, `confidence`.
        network: what it was learned on: `name`, `contents` (a fingerprint), `n_layers`.
        prompt, rounded, dtype: how that was asked, read and run.
    """

    calibrator: Calibrator = Temperature(1.0)
    green: float | None = None
    red: float | None = None
    aim: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: PromptConfig = PromptConfig()
    rounded: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def probabilities(self, scores: Floats) -> Floats:
        """Log odds → P(knows)."""
        return self.calibrator(scores)

    def word(self, score: float) -> Verdict | None:
        """None where there are no thresholds at all."""
        if self.green is None and self.red is None:
            return None
        return verdict(float(expit(score)), self.green, self.red)

    @property
    def thresholds(self) -> Thresholds:
        """Green and red as P(knows)."""
        return Thresholds(*(None if at is None else float(self.calibrator(logit(at)))
                            for at in (self.green, self.red)))

    def to_dict(self) -> dict[str, Any]:
        """A tree for JSON."""
        return {"calibrator": self.calibrator.to_dict(), "green": self.green, "red": self.red,
                "aim": dict(self.aim), "network": dict(self.network),
                "prompt": config_lib.to_dict(self.prompt), "rounded": self.rounded,
                "dtype": self.dtype}


def thresholds(known: np.ndarray, scores: Floats, group: np.ndarray, options: VerdictConfig) -> Thresholds:
    """Of the uncalibrated chance σ(score), on the questions to calibrate on: `[questions]` each.

    With a guarantee one question of each group is heard: those that belong together are no new draws.
    """
    chance = expit(scores)
    if not options.guarantee:
        return precision_thresholds(known, chance, options.precision)
    first = np.unique(group, return_index=True)[1]
    return guaranteed_thresholds(known[first], chance[first], options.precision, options.confidence)


def write(path: Path, rule: VerdictRule) -> None:
    """Into a sidecar's directory."""
    write_atomically(path / FILE, as_json(rule.to_dict()))


def read(path: Path) -> VerdictRule:
    """Of a sidecar's directory; one that has none (a converted one) says P(knows) as it is, and no word.

    Raises:
        InputError: the file is none that `write` has written.
    """
    file = path / FILE
    if not file.is_file():
        return VerdictRule()
    with as_expected(file):
        return from_dict(read_json(file), str(file))


def from_dict(tree: Mapping[str, Any], source: str = "") -> VerdictRule:
    """What `to_dict` gave. Raises ValueError, KeyError or InputError where it is not."""
    for name in ("green", "red"):
        found = tree[name]
        if found is not None and not (isinstance(found, int | float) and 0 <= found <= 1):
            raise ValueError(f"{name}: expected a chance or null, found {found!r:.40}")
    aim, network = dict(tree["aim"]), dict(tree["network"])
    if network and [type(network.get(key)) for key in ("name", "contents", "n_layers")] != [str, str, int]:
        raise ValueError("network: expected its name, contents and n_layers, or nothing")
    if not all(isinstance(aim.get(key, 0.5), int | float) for key in ("precision", "confidence")):
        raise ValueError("aim: expected numbers under precision and confidence")
    return VerdictRule(calibrator_from_dict(tree["calibrator"]), tree["green"], tree["red"], aim, network,
                 config_lib.from_dict(PromptConfig, tree["prompt"], source), bool(tree["rounded"]),
                 ComputeConfig(dtype=tree["dtype"]).dtype)
