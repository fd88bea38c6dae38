"""A threshold beyond which a network declines to answer, and what it says then: MODEL/abstain.json.

`tilelli abstention calibrate` chooses it; `chat` and `generate` keep to it with --abstain. It is
of use to the very network that it was chosen for: with other weights a signal has other values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.files import fingerprint, write_json
from tilelli_jax.json_text import read_json
from tilelli_jax.signals.names import LENS
from tilelli_jax.signals.prompts import Prompt
from tilelli_jax.signals.uncertainty import UncertaintyReader, by_name, names

FILE = "abstain.json"
TEMPLATE = "I don't know."
NEVER: Literal["never"] = "never"  # the threshold beyond which nothing lies
REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class AbstainRule(Section):
    """What abstain.json holds.

    Raises:
        InputError: a number is out of range, or the template is no line of text.
    """

    signal: str = setting(REQUIRED, "a name of `signals.uncertainty.by_name`")
    direction: Literal[1, -1] = setting(REQUIRED, "1 where the signal rises with not knowing, or -1")
    threshold: float | Literal["never"] = setting(
        REQUIRED, "of the signal as it is measured: what lies beyond, in the direction, is declined")
    template: str = setting(REQUIRED, "what is said then")
    target_fpr: float = setting(REQUIRED, "share of answerable prompts that may be declined", above=0,
                                below=1)
    prompts: int = setting(REQUIRED, "answerable ones, by which the threshold was chosen", min=1)
    measured_fpr: float = setting(REQUIRED, "share of them that is declined", min=0, max=1)
    expected_fpr: tuple[float, ...] = setting(
        REQUIRED, "of others of their kind: on average over calibrations, and from where to where")
    network: str = setting(REQUIRED, "fingerprint of its configuration and weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template)

    @property
    def rule(self) -> str:
        """What is declined: "where abstain_p is above 0.731", or "nothing"."""
        if isinstance(self.threshold, str):
            return "nothing"
        side = "above" if self.direction == 1 else "below"
        return f"where {self.signal} is {side} {self.threshold:.4g}"

    @property
    def answer(self) -> str:
        """The template as the continuation of a prompt: what a network says begins with a space."""
        return f" {self.template}"

    def abstains(self, reader: UncertaintyReader, prompts: Sequence[str | bytes]) -> list[bool]:
        """Which of the prompts, `[prompts]`, the network of the reader should not answer.

        Args:
            reader: see `reader_of`; it makes one pass of the network, batch by batch.
            prompts: all that the network is given before it answers.

        Raises:
            InputError: the signal of one is no number, of which nothing can be said.
        """
        if not prompts:
            return []
        line = self.direction * math.inf if isinstance(self.threshold, str) else self.threshold
        values = self.direction * measured(reader, prompts, self.signal)
        if np.isnan(values).any():
            raise InputError(f"{self.signal}: expected a number, found NaN for the prompt "
                             f"{prompts[int(np.isnan(values).argmax())]!r:.60}: the network is broken there")
        return (values > self.direction * line).tolist()


def reader_of(model: Any, signal: str) -> UncertaintyReader:
    """What reads a signal: the lens is left out where that is none of it, for the sake of compiling."""
    return UncertaintyReader(model, lens=signal in LENS)


def measured(reader: UncertaintyReader, prompts: Sequence[str | bytes], signal: str) -> np.ndarray:
    """A signal of each prompt, f64 `[prompts]`, in one pass of the network.

    Of a prompt longer than the network reads the end is read, as where it is continued.
    """
    texts = [prompt.encode() if isinstance(prompt, str) else prompt for prompt in prompts]
    ends = [text if reader.most is None else text[-reader.most:] for text in texts]
    return by_name(reader.read([Prompt(list(text), 0, 0) for text in ends]))[signal]


def check_template(template: str) -> None:
    """Raises InputError where a template is no line of text: a turn would not end where it ends."""
    try:
        template.encode()
        fits = bool(template.strip()) and template.splitlines() == [template]
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise InputError(f"template: expected one line of text, found {template!r:.60}")


def of_network(path: Path) -> str:
    """A fingerprint of the configuration and the weights in a model directory.

    Raises:
        InputError: they cannot be read.
    """
    try:
        return fingerprint([path / store.CONFIG, *path.glob("*.safetensors")])
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None


def write(path: str | Path, abstain_rule: AbstainRule) -> None:
    """Into a model directory, in place of the one that is there.

    Raises:
        InputError: it cannot be written.
    """
    file = Path(path) / FILE
    try:
        write_json(file, config_lib.to_dict(abstain_rule))
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from None


def read(path: str | Path, model: Any) -> AbstainRule:
    """Of a model directory.

    Args:
        model: the network that was read from there.

    Raises:
        InputError: there is none, it is none that `write` has written, or it was made for other weights.
    """
    path = Path(path)
    file = path / FILE
    makes = f"`tilelli abstention calibrate --model {path} --on FILE` makes one"
    if not file.exists():
        raise InputError(f"{path}: has no {FILE}, the threshold that --abstain keeps to; {makes}")
    tree = read_json(file)
    if missing := [field.name for field in dataclasses.fields(AbstainRule) if field.name not in tree]:
        raise InputError(f"{file}: {missing[0]}: expected it, found nothing")
    abstain_rule = config_lib.from_dict(AbstainRule, tree, str(file))
    if abstain_rule.network != of_network(path):
        raise InputError(f"{file}: network: expected one made for the weights of {path}, found one made "
                         f"for others; {makes}")
    if abstain_rule.signal not in (known := names(model)):
        raise InputError(f"{file}: signal: expected one of {', '.join(known)}, found "
                         f"{abstain_rule.signal!r:.60}")
    return abstain_rule
