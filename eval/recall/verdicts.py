"""From a sidecar's score to a probability and a word, and the file that keeps both: SIDECAR/verdict.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from eval.calibration import Calibrator, Temperature, calibrator_from_dict
from eval.metrics import Floats
from eval.recall.config import PromptConfig, RecallConfig
from eval.recall.fit import SIDECAR, Fitted
from eval.recall.table import Table
from eval.tables import as_json
from eval.thresholds import Thresholds, Verdict, guaranteed_thresholds, precision_thresholds, verdict
from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.files import write_atomically

FILE = "verdict.json"


@dataclasses.dataclass(frozen=True)
class Judge:
    """What stands beside a sidecar.

    Attributes:
        calibrator: of its log odds.
        green, red: thresholds of its own chance σ(log odds), which no calibrator moves: from green on it
            likely knows, below red it likely does not. None: that is said of nothing.
        aim: how the thresholds were chosen: `precision`, `guarantee`, `confidence`.
        network: what it was learned on: `name`, `contents` (a fingerprint), `n_layers`.
        prompt, rounded: how that was asked and read.
    """

    calibrator: Calibrator = Temperature(1.0)
    green: float | None = None
    red: float | None = None
    aim: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: PromptConfig = PromptConfig()
    rounded: bool = False

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
                "prompt": config_lib.to_dict(self.prompt), "rounded": self.rounded}


def learn(table: Table, fitted: Fitted, run: int, config: RecallConfig,
          network: Mapping[str, Any]) -> Judge:
    """Thresholds of one run of the sidecar, on the questions to calibrate on.

    With a guarantee one question of each group is heard: those that belong together are no new draws.
    """
    rows, options = table.rows("calibrate"), config.verdict
    chance = expit(fitted.methods[SIDECAR].scores[run])
    if options.guarantee:
        rows = rows[np.unique(table.group[rows], return_index=True)[1]]
        found = guaranteed_thresholds(table.known[rows], chance[rows], options.precision, options.confidence)
    else:
        found = precision_thresholds(table.known[rows], chance[rows], options.precision)
    return Judge(fitted.calibrators[SIDECAR][run], found.green, found.red, config_lib.to_dict(options),
                 network, config.prompt, config.signals.rounded)


def write(path: Path, judge: Judge) -> None:
    """Into a sidecar's directory."""
    write_atomically(path / FILE, as_json(judge.to_dict()))


def read(path: Path) -> Judge:
    """Of a sidecar's directory; one that has none (a converted one) says P(knows) as it is, and no word.

    Raises:
        InputError: the file is none that `write` has written.
    """
    file = path / FILE
    if not file.is_file():
        return Judge()
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return from_dict(tree, str(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: cannot be read: {type(error).__name__}: {error}") from None


def from_dict(tree: Mapping[str, Any], source: str = "") -> Judge:
    """What `to_dict` gave. Raises ValueError, KeyError or InputError where it is not."""
    for name in ("green", "red"):
        if tree[name] is not None and not 0 <= float(tree[name]) <= 1:
            raise ValueError(f"{name}: expected a chance or null, found {tree[name]!r}")
    return Judge(calibrator_from_dict(tree["calibrator"]), tree["green"], tree["red"], dict(tree["aim"]),
                 dict(tree["network"]), config_lib.from_dict(PromptConfig, tree["prompt"], source),
                 bool(tree["rounded"]))
