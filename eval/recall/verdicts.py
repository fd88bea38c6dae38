"""Calibration and thresholds of a sidecar's scores, and the file that stores them: SIDECAR/verdict.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit, logit

from tilelli_jax import config as config_lib
from tilelli_jax.io.files import write_atomically
from tilelli_jax.io.json_text import as_expected, read_json
from tilelli_jax.models.causal_lm import ComputeConfig

from ..calibration import Calibrator, Temperature, calibrator_from_dict
from ..checks import Floats
from ..estimators.interface import LinearProbe
from ..tables import json_with_nulls
from ..thresholds import Thresholds, Verdict, guaranteed_thresholds, precision_thresholds, verdict
from .config import AnswersConfig, PromptConfig, VerdictConfig

FILE = "verdict.json"


@dataclasses.dataclass(frozen=True)
class CalibratedProbe:
    """A linear probe of the residual stream, and the map from its score to P(knows)."""

    probe: LinearProbe
    calibrator: Calibrator

    def probability(self, final: np.ndarray) -> float:
        """P(knows) from the residual stream at the prompt's last position, `[layers, d_model]`."""
        score = final[self.probe.layer].astype(float) @ self.probe.weight + self.probe.bias
        return float(self.calibrator(np.array([score]))[0])

    def to_dict(self) -> dict[str, Any]:
        return {"layer": self.probe.layer, "weight": [float(value) for value in self.probe.weight],
                "bias": self.probe.bias, "calibrator": self.calibrator.to_dict()}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> CalibratedProbe:
        """Reads what `to_dict` returned. Raises ValueError, KeyError or TypeError for another tree."""
        weight = np.array(tree["weight"], float)
        if weight.ndim != 1 or not np.isfinite([*weight, float(tree["bias"])]).all():
            raise ValueError("probes: expected finite numbers, found others")
        return cls(LinearProbe(int(tree["layer"]), weight, float(tree["bias"])),
                   calibrator_from_dict(tree["calibrator"]))


@dataclasses.dataclass(frozen=True)
class VerdictRule:
    """How a sidecar's score becomes P(knows) and a verdict.

    Attributes:
        calibrator: maps log odds to P(knows).
        knows_from, unknown_below: thresholds on the uncalibrated probability σ(log odds): from knows_from on
            "likely knows", below unknown_below "likely beyond its knowledge"; None: that verdict is never
            given. They are uncalibrated because a guarantee needs a score that was not fitted to the
            calibration questions, and the calibrator was.
        aim: how the thresholds were chosen: `precision`, `guarantee`, `confidence`.
        network: the network that the sidecar was trained on: `name`, `fingerprint`, `n_layers`.
        prompt, rounded, dtype: the prompt, the rounding of the logit lens and the data type used with it.
        examples: questions with answers in every prompt.
        answers: how the network's answers were generated and graded.
        probes: the linear probes of the study, by name.
        known_quantiles: 0, 1, … 100 % quantiles of P(knows) of the calibration questions that the network
            knows; empty if they are not stored.
    """

    calibrator: Calibrator = Temperature(1.0)
    knows_from: float | None = None
    unknown_below: float | None = None
    aim: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: PromptConfig = PromptConfig()
    rounded: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    examples: tuple[tuple[str, str], ...] = ()
    answers: AnswersConfig = AnswersConfig()
    probes: Mapping[str, CalibratedProbe] = dataclasses.field(default_factory=dict)
    known_quantiles: tuple[float, ...] = ()

    def probabilities(self, scores: Floats) -> Floats:
        """Maps log odds to P(knows)."""
        return self.calibrator(scores)

    def verdict(self, score: float) -> Verdict | None:
        """Returns the verdict for log odds, or None if there are no thresholds."""
        if self.knows_from is None and self.unknown_below is None:
            return None
        return verdict(float(expit(score)), self.knows_from, self.unknown_below)

    def threshold_at(self, rate: float) -> float:
        """The P(knows) below which this fraction of the known questions lies: the false positive rate of
        abstaining there. Raises ValueError if the quantiles are not stored."""
        if not self.known_quantiles:
            raise ValueError("known_quantiles: expected quantiles, found none")
        return float(np.interp(100 * rate, np.arange(len(self.known_quantiles)), self.known_quantiles))

    @property
    def thresholds(self) -> Thresholds:
        """knows_from and unknown_below on the scale of P(knows)."""
        return Thresholds(*(None if threshold is None else float(self.calibrator(logit(threshold)))
                            for threshold in (self.knows_from, self.unknown_below)))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON tree that `from_dict` reads."""
        return {"calibrator": self.calibrator.to_dict(), "knows_from": self.knows_from,
                "unknown_below": self.unknown_below,
                "aim": dict(self.aim), "network": dict(self.network),
                "prompt": config_lib.to_dict(self.prompt), "rounded": self.rounded,
                "dtype": self.dtype, "examples": [list(pair) for pair in self.examples],
                "answers": config_lib.to_dict(self.answers),
                "probes": {name: probe.to_dict() for name, probe in self.probes.items()},
                "known_quantiles": list(self.known_quantiles)}


def known_quantiles(known: np.ndarray, probabilities: Floats) -> tuple[float, ...]:
    """The quantiles of `VerdictRule`. Both inputs: `[calibration questions]`."""
    return tuple(np.quantile(probabilities[known == 1], np.arange(101) / 100).tolist())


def thresholds(known: np.ndarray, scores: Floats, group: np.ndarray, options: VerdictConfig) -> Thresholds:
    """Chooses thresholds on the uncalibrated probability σ(score). All inputs: `[calibration questions]`.

    A guarantee uses one question of each group, because questions of a group are not independent.
    """
    probabilities = expit(scores)
    if not options.guarantee:
        return precision_thresholds(known, probabilities, options.precision)
    first = np.unique(group, return_index=True)[1]
    return guaranteed_thresholds(known[first], probabilities[first], options.precision, options.confidence)


def write(path: Path, rule: VerdictRule) -> None:
    """Writes FILE into a sidecar's directory."""
    write_atomically(path / FILE, json_with_nulls(rule.to_dict()))


def read(path: Path) -> VerdictRule:
    """Reads FILE from a sidecar's directory.

    Without the file (a converted sidecar), returns uncalibrated probabilities and no thresholds.

    Raises:
        InputError: the content is not what `write` writes.
    """
    file = path / FILE
    if not file.is_file():
        return VerdictRule()
    with as_expected(file):
        return from_dict(read_json(file), str(file))


def from_dict(tree: Mapping[str, Any], source: str = "") -> VerdictRule:
    """Reads what `to_dict` returned. Raises ValueError, KeyError or InputError for another tree."""
    for name in ("knows_from", "unknown_below"):
        value = tree[name]
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ValueError(f"{name}: expected a probability or null, found {value!r:.40}")
    aim, network = dict(tree["aim"]), dict(tree["network"])
    if network and [type(network.get(key)) for key in ("name", "fingerprint", "n_layers")] != [str, str, int]:
        raise ValueError("network: expected its name, fingerprint and n_layers, or nothing")
    if not all(isinstance(aim.get(key, 0.5), int | float) for key in ("precision", "confidence")):
        raise ValueError("aim: expected numbers under precision and confidence")
    return VerdictRule(calibrator_from_dict(tree["calibrator"]), tree["knows_from"], tree["unknown_below"],
                       aim, network,
                       config_lib.from_dict(PromptConfig, tree["prompt"], source), bool(tree["rounded"]),
                       ComputeConfig(dtype=tree["dtype"]).dtype, _examples(tree["examples"]),
                       config_lib.from_dict(AnswersConfig, tree["answers"], source),
                       {str(name): CalibratedProbe.from_dict(probe)
                        for name, probe in dict(tree["probes"]).items()},
                       _quantiles(tree.get("known_quantiles", [])))


def _quantiles(values: Any) -> tuple[float, ...]:
    quantiles = np.array(values, float)
    if quantiles.shape not in ((0,), (101,)) or not (np.isfinite(quantiles).all()
                                                     and (np.diff(quantiles) >= 0).all()):
        raise ValueError(f"known_quantiles: expected 101 numbers that do not fall, found {values!r:.40}")
    return tuple(quantiles.tolist())


def _examples(pairs: Any) -> tuple[tuple[str, str], ...]:
    if not (isinstance(pairs, list) and all(
            isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs)):
        raise ValueError(f"examples: expected pairs of texts, found {pairs!r:.40}")
    return tuple((question, answer) for question, answer in pairs)
