"""Claims about a network: every key of configs/claims-*.yaml. Keys that are left out are not claimed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.signals.names import BLOCK, SIGNALS

from ..abstention.config import AnswersConfig

Auroc = float | tuple[float, ...] | None  # an AUROC, or [min, max]


def _signal(name: str) -> Any:
    return setting(None, SIGNALS[name].meaning)


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig(Section):
    """The architecture, from the model's configuration, and the number of parameters, from its tensors."""

    family: str | None = setting(None, "family of the network: routed or vanilla")
    pathways: tuple[str, ...] | None = setting(None, "pathways of a block, in the router's order; []: no "
                                                 "router")
    d_model: int | None = setting(None, "width of the residual stream", min=1)
    n_layers: int | None = setting(None, "number of blocks", min=1)
    vocab_size: int | None = setting(None, "number of tokens", min=1)
    parameters: int | None = setting(None, "number of trainable parameters", min=1)


@dataclasses.dataclass(frozen=True)
class CrossRegimeConfig(Section):
    """The AUROC of each signal, all other regimes against in_domain: a number, or [min, max].

    Above 0.5, a signal has the direction that `signals.names` expects.
    """

    max_softmax_last: Auroc = _signal("max_softmax_last")
    max_softmax_mean: Auroc = _signal("max_softmax_mean")
    abstain_p: Auroc = _signal("abstain_p")
    router_conf: Auroc = _signal("router_conf")
    router_entropy: Auroc = _signal("router_entropy")
    router_entropy_var: Auroc = _signal("router_entropy_var")
    router_entropy_b: tuple[float, ...] = setting((), "router_entropy of each block, first block first: one "
                                                  "number per block")
    lens_entropy: Auroc = _signal("lens_entropy")
    lens_settling: Auroc = _signal("lens_settling")
    lens_margin: Auroc = _signal("lens_margin")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (low, high) in self.ranges.items():
            if not 0 <= low <= high <= 1:
                raise InputError(f"{name}: expected an AUROC from 0 to 1, or [min, max], found "
                                 f"{self._value(name)!r}")

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Claimed signal → (min, max) of its AUROC; NaN where a list does not have two numbers."""
        ranges: dict[str, tuple[float, float]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == BLOCK:
                ranges |= {f"{BLOCK}{i}": (auroc, auroc) for i, auroc in enumerate(value)}
            elif isinstance(value, tuple):
                ranges[field.name] = value if len(value) == 2 else (math.nan, math.nan)
            elif value is not None:
                ranges[field.name] = value, value
        return ranges

    def _value(self, name: str) -> Any:
        value = getattr(self, BLOCK if name.startswith(BLOCK) else name)
        return list(value) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class AnsweredConfig(Section):
    """Prompts of one regime to which the network generates answers."""

    prompts: int = setting(10, "number of prompts, taken from the start of the file", min=1)
    file: str = setting("", "directory or file of these prompts; empty: those of --prompts")

    def _check(self, *counts: str) -> None:
        for name in counts:
            if (count := getattr(self, name)) is not None and count > self.prompts:
                raise InputError(f"{name}: expected at most {self.prompts}, the number of prompts, found "
                                 f"{count}")


@dataclasses.dataclass(frozen=True)
class HeldOutConfig(AnsweredConfig):
    """Unanswerable prompts (regime ood_topic): the number on which the network abstains."""

    at_least: int | None = setting(None, "minimum number of answers that the detector counts as refusals",
                                   min=0)
    templates: tuple[str, ...] = setting((), "texts with which the network was trained to begin when it "
                                               "abstains")
    template_at_least: int | None = setting(None, "minimum number of answers that begin with a template",
                                            min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("at_least", "template_at_least")
        if not all(template.strip() for template in self.templates):
            raise InputError(f"templates: expected non-empty texts, found {list(self.templates)}")
        if self.template_at_least is not None and not self.templates:
            raise InputError("template_at_least: expected templates to be set as well, found none")


@dataclasses.dataclass(frozen=True)
class FalseInabilityConfig(AnsweredConfig):
    """Answerable prompts (regime neo_false_inability): the number on which the network abstains."""

    prompts: int = setting(20, "number of prompts, taken from the start of the file", min=1)
    refused: int | None = setting(None, "number of answers that the detector counts as refusals", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("refused")


@dataclasses.dataclass(frozen=True)
class ClaimsConfig(Section):
    """The four claims, and how answers are generated."""

    source: str = setting("", "source of the numbers, in words")
    architecture: ArchitectureConfig = setting(ArchitectureConfig(), "architecture and size of the network")
    cross_regime: CrossRegimeConfig = setting(CrossRegimeConfig(), "cross-regime AUROC of its signals")
    held_out: HeldOutConfig = setting(HeldOutConfig(), "abstention on unanswerable prompts")
    false_inability: FalseInabilityConfig = setting(FalseInabilityConfig(),
                                                    "abstention on answerable prompts")
    answers: AnswersConfig = setting(AnswersConfig(), "how answers are generated")
