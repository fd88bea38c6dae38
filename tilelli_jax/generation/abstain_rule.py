"""The rule by which a network abstains: a threshold on a signal, and the answer given instead (abstain.json).

`tilelli abstention calibrate` writes MODEL/abstain.json; `chat` and `generate` apply it with --abstain. It is
valid only for the network it was calibrated for: with other weights the signal has other values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import write_json
from tilelli_jax.io.json_text import read_json
from tilelli_jax.loading.fingerprint import ABSTAIN_RULE, network_fingerprint
from tilelli_jax.signals.names import LENS, signal_names
from tilelli_jax.signals.prompts import PromptIds
from tilelli_jax.signals.uncertainty import UncertaintyReader, signal_columns

FILE = ABSTAIN_RULE
TEMPLATE = "I don't know."
NEVER: Literal["never"] = "never"  # the threshold that no signal exceeds
REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class AbstainRule(Section):
    """The contents of abstain.json.

    Raises:
        InputError: a number is out of range, or the template is not one line of text.
    """

    signal: str = setting(REQUIRED, "name of the signal, one of `signals.names`")
    direction: Literal[1, -1] = setting(
        REQUIRED, "1 if the signal is higher when the network does not know, -1 if it is lower")
    threshold: float | Literal["never"] = setting(
        REQUIRED, "abstain if direction · signal exceeds direction · threshold; never: do not abstain")
    template: str = setting(REQUIRED, "answer given when abstaining")
    target_fpr: float = setting(
        REQUIRED, "target false-positive rate: fraction of answerable prompts on which to abstain", above=0,
        below=1)
    prompts: int = setting(
        REQUIRED, "number of answerable prompts that the threshold was calibrated on", min=1)
    measured_fpr: float = setting(
        REQUIRED, "fraction of the calibration prompts on which the rule abstains", min=0, max=1)
    expected_fpr: tuple[float, ...] = setting(
        REQUIRED, "expected false-positive rate on new prompts of the same kind: mean over calibrations, and "
        "the ends of its interval")
    network: str = setting(REQUIRED, "the network's `network_fingerprint`")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template)

    @property
    def rule(self) -> str:
        """When the rule abstains: "if abstain_p is above 0.731", or "never"."""
        if isinstance(self.threshold, str):
            return "never"
        side = "above" if self.direction == 1 else "below"
        return f"if {self.signal} is {side} {self.threshold:.4g}"

    @property
    def answer(self) -> str:
        """The template as the continuation of a prompt, which begins with a space."""
        return f" {self.template}"

    def abstains(self, reader: UncertaintyReader, prompts: Sequence[str | bytes]) -> list[bool]:
        """Returns on which of the prompts, `[prompts]`, to abstain.

        Args:
            reader: see `signal_reader`; it makes one pass of the network, batch by batch.
            prompts: the network's full inputs, as it gets them before it answers.

        Raises:
            InputError: the signal of a prompt is NaN.
        """
        if not prompts:
            return []
        threshold = self.direction * math.inf if isinstance(self.threshold, str) else self.threshold
        values = self.direction * measure_signal(reader, prompts, self.signal)
        if np.isnan(values).any():
            raise InputError(f"{self.signal}: expected a number, found NaN for the prompt "
                             f"{prompts[int(np.isnan(values).argmax())]!r:.60}: the network's output is NaN")
        return (values > self.direction * threshold).tolist()


def signal_reader(model: Any, signal: str) -> UncertaintyReader:
    """Returns the reader of a signal, without the logit lens unless the signal needs it, to compile less."""
    return UncertaintyReader(model, lens=signal in LENS)


def measure_signal(reader: UncertaintyReader, prompts: Sequence[str | bytes], signal: str) -> np.ndarray:
    """Measures a signal of each prompt, f64 `[prompts]`, in one pass of the network.

    Of a prompt longer than the network's window only the end is read, as in generation.
    """
    texts = [prompt.encode() if isinstance(prompt, str) else prompt for prompt in prompts]
    ends = [text if reader.max_tokens is None else text[-reader.max_tokens:] for text in texts]
    return signal_columns(reader.read([PromptIds(list(text), 0, 0) for text in ends]))[signal]


def check_template(template: str) -> None:
    """Raises InputError if a template is not one line of text, as a line break would end the turn early."""
    try:
        template.encode()
        fits = bool(template.strip()) and template.splitlines() == [template]
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise InputError(f"template: expected one line of text, found {template!r:.60}")


def write(path: str | Path, abstain_rule: AbstainRule) -> None:
    """Writes the rule to a model directory, replacing an existing one.

    Raises:
        InputError: it cannot be written.
    """
    file = Path(path) / FILE
    try:
        write_json(file, config_lib.to_dict(abstain_rule))
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from None


def read(path: str | Path, model: Any) -> AbstainRule:
    """Reads the rule of a model directory.

    Args:
        model: the network read from that directory.

    Raises:
        InputError: there is no rule, it is invalid, or it was calibrated for other weights.
    """
    path = Path(path)
    file = path / FILE
    remedy = f"`tilelli abstention calibrate --model {path} --on FILE` makes one"
    if not file.exists():
        raise InputError(f"{path}: expected {FILE}, the threshold for --abstain, found none; {remedy}")
    tree = read_json(file)
    if missing := [field.name for field in dataclasses.fields(AbstainRule) if field.name not in tree]:
        raise InputError(f"{file}: {missing[0]}: expected a value, found nothing")
    abstain_rule = config_lib.from_dict(AbstainRule, tree, str(file))
    if abstain_rule.network != network_fingerprint(path):
        raise InputError(f"{file}: network: expected a threshold made for the weights of {path}, found one "
                         f"made for others; {remedy}")
    if abstain_rule.signal not in (known := signal_names(model)):
        raise InputError(f"{file}: signal: expected one of {', '.join(known)}, found "
                         f"{abstain_rule.signal!r:.60}")
    return abstain_rule
