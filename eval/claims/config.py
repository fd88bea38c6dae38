"""What is claimed of a network: every key of configs/claims-*.yaml. What is left out is not claimed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError

from ..abstention.config import AnswersConfig
from ..abstention.decision import BLOCK

Area = float | tuple[float, ...] | None  # an AUROC, or the lowest and the highest


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig(Section):
    """What the network is, by its configuration, and how large by its tensors."""

    family: str | None = setting(None, "which network: routed or vanilla")
    pathways: tuple[str, ...] | None = setting(None, "of a block, in the router's order; []: no router")
    d_model: int | None = setting(None, "width of the residual stream", min=1)
    n_layers: int | None = setting(None, "number of blocks", min=1)
    vocab_size: int | None = setting(None, "number of tokens", min=1)
    parameters: int | None = setting(None, "numbers that training may change", min=1)


@dataclasses.dataclass(frozen=True)
class CrossRegimeConfig(Section):
    """AUROC of in_domain against all other regimes, of each signal: a number, or [lowest, highest].

    As `eval.abstention.decision` has them: above ½ where a signal points the way that is said there.
    """

    max_softmax_last: Area = setting(None, "largest probability of the next token, after the prompt")
    max_softmax_mean: Area = setting(None, "the same, mean over the prompt's positions")
    abstain_p: Area = setting(None, "chance that the abstain head gives to there being no answer")
    router_conf: Area = setting(None, "1 − router_entropy")
    router_entropy: Area = setting(None, "of the pathways' weights, mean over blocks and positions")
    router_entropy_var: Area = setting(None, "its variance over blocks and positions")
    router_entropy_b: tuple[float, ...] = setting((), "of single blocks, from the first; a number each")
    lens_entropy: Area = setting(None, "of what the logit lens says at the last position")
    lens_settling: Area = setting(None, "how late it settles on what it says")
    lens_margin: Area = setting(None, "by how much it prefers that")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (low, high) in self.ranges.items():
            if not 0 <= low <= high <= 1:
                raise InputError(f"{name}: expected an AUROC from 0 to 1, or the lowest and the highest "
                                 f"in a list, found {self._written(name)!r}")

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Signal → lowest and highest AUROC, of those that are claimed; NaN where there are not two."""
        found: dict[str, tuple[float, float]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == BLOCK:
                found |= {f"{BLOCK}{i}": (area, area) for i, area in enumerate(value)}
            elif isinstance(value, tuple):
                found[field.name] = value if len(value) == 2 else (math.nan, math.nan)
            elif value is not None:
                found[field.name] = value, value
        return found

    def _written(self, name: str) -> Any:
        value = getattr(self, BLOCK if name.startswith(BLOCK) else name)
        return list(value) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class AskedConfig(Section):
    """Prompts of one regime that are answered."""

    prompts: int = setting(10, "how many are asked, the first of them", min=1)
    file: str = setting("", "a directory or file of them; empty: those of --prompts")

    def _check(self, *counts: str) -> None:
        for name in counts:
            if (count := getattr(self, name)) is not None and count > self.prompts:
                raise InputError(f"{name}: expected {self.prompts} at most, as many as are asked, "
                                 f"found {count}")


@dataclasses.dataclass(frozen=True)
class HeldOutConfig(AskedConfig):
    """Prompts of ood_topic, which nobody can answer: how many are declined."""

    at_least: int | None = setting(None, "refusals among the answers, by the stated detector", min=0)
    templates: tuple[str, ...] = setting((), "how answers begin by which it was taught to decline")
    template_at_least: int | None = setting(None, "answers that begin with one of them", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("at_least", "template_at_least")
        if not all(template.strip() for template in self.templates):
            raise InputError("templates: expected texts that are not empty")
        if self.template_at_least is not None and not self.templates:
            raise InputError("template_at_least: expected templates beside it, found none")


@dataclasses.dataclass(frozen=True)
class FalseInabilityConfig(AskedConfig):
    """Prompts of neo_false_inability, which ought to be answered: how many are declined."""

    prompts: int = setting(20, "how many are asked, the first of them", min=1)
    refused: int | None = setting(None, "refusals among the answers, by the stated detector", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("refused")


@dataclasses.dataclass(frozen=True)
class ClaimsConfig(Section):
    """The four claims, and how a network is asked."""

    of: str = setting("", "in words, what the numbers were found of")
    architecture: ArchitectureConfig = setting(ArchitectureConfig(), "what the network is")
    cross_regime: CrossRegimeConfig = setting(CrossRegimeConfig(), "what its signals tell")
    held_out: HeldOutConfig = setting(HeldOutConfig(), "what it declines rightly")
    false_inability: FalseInabilityConfig = setting(FalseInabilityConfig(), "what it declines wrongly")
    answers: AnswersConfig = setting(AnswersConfig(), "how answers are made")

