"""What the server needs to know about P(knows): the interface of a predictor that reads a prompt's pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from tilelli_jax.generation.programs import Signals
from tilelli_jax.loading.language import Encoding


class Knowledge(NamedTuple):
    """P(knows) of a prompt.

    Attributes:
        verdict: None without thresholds.
        strongest_layer: layer of the strongest MLP write, counted from 0; None if it is not computed.
    """

    p: float
    verdict: str | None
    strongest_layer: int | None


class Located(NamedTuple):
    """Where the question is in a prompt.

    Attributes:
        start, stop: its tokens; an empty span if they are not known.
        calibrated: whether the prompt is the one for which P(knows) was calibrated.
    """

    start: int
    stop: int
    calibrated: bool


class Knows(Protocol):
    """Predicts P(knows) from the signals of a prompt's pass.

    Attributes:
        signals, reads_questions: see `Engine`.
        estimator: its name; `calibrated_on`: the network and the study of its calibration.
    """

    @property
    def signals(self) -> Signals: ...

    @property
    def reads_questions(self) -> bool: ...

    @property
    def estimator(self) -> str: ...

    @property
    def calibrated_on(self) -> str: ...

    def locate(self, encoding: Encoding, text: str, question: str | None) -> Located:
        """Finds the question in a prompt; None: it is the whole prompt."""

    def prompt(self, question: str, where: str) -> tuple[Sequence[int], int, int]:
        """Returns the ids of the calibrated prompt of a question, and the question's span in them.

        Raises:
            InputError: the question is empty, too long, or has special tokens.
        """

    def predict(self, outputs: Any) -> Knowledge:
        """Returns P(knows) from a prompt's signals. Raises InputError if they are not finite."""
