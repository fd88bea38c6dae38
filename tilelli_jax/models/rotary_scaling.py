"""Rotary frequencies for contexts longer than those of pretraining."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RotaryScaling(Section):
    """Scaling of the rotary frequencies, for contexts longer than those of pretraining.

    linear  divides all frequencies by `factor` (Chen et al. 2023, arXiv:2306.15595)
    llama3  divides those of wavelengths above original_max_len / low_freq_factor by `factor`, keeps those
            below original_max_len / high_freq_factor, and interpolates between them (Llama 3.1,
            arXiv:2407.21783)
    yarn    interpolates between divided and unchanged frequencies by the number of full rotations within
            original_max_len, and scales queries and keys (Peng et al. 2023, arXiv:2309.00071)
    """

    kind: Literal["linear", "llama3", "yarn"] = setting("linear", "scaling rule")
    factor: float = setting(1.0, "factor by which the context grows", above=0)
    original_max_len: int = setting(
        8192, "longest context of pretraining, in tokens (llama3, yarn)", min=1)
    low_freq_factor: float = setting(
        1.0, "full rotations within original_max_len below which a frequency is divided (llama3)", above=0)
    high_freq_factor: float = setting(
        4.0, "full rotations within original_max_len above which a frequency is kept (llama3)", above=0)
    beta_fast: float = setting(
        32.0, "full rotations within original_max_len above which a frequency is kept (yarn)", above=0)
    beta_slow: float = setting(
        1.0, "full rotations within original_max_len below which a frequency is divided (yarn)", above=0)
    attention_factor: float = setting(1.0, "factor of rotated queries and of rotated keys (yarn)", above=0)
    truncate: bool = setting(True, "round the bounds of the interpolated channels to whole channels (yarn)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise InputError(f"high_freq_factor: expected more than low_freq_factor {self.low_freq_factor}, "
                             f"found {self.high_freq_factor}")

    def __call__(self, inverse_frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The changed frequencies, f32 `[n]`, from `frequencies(2 n, theta)`."""
        divided = inverse_frequencies / np.float32(self.factor)
        if self.kind == "linear":
            return divided
        if self.kind == "llama3":
            turns = self.original_max_len / (2 * math.pi / inverse_frequencies)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            kept = 1 - self._ramp(2 * len(inverse_frequencies), theta)
        kept = np.clip(kept, 0, 1).astype(np.float32)
        return (1 - kept) * divided + kept * inverse_frequencies

    def _ramp(self, width: int, theta: float) -> np.ndarray:
        """0 for the channel pairs up to that of beta_fast, 1 from that of beta_slow on."""
        low, high = (width * math.log(self.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(theta))
                     for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return (np.arange(width // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
