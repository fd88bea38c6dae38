"""The abstain head of a network: put on, taken from one and put onto another."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.models.arrays import from_tensors, to_arrays
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.tensors import in_memory

KERNEL, BIAS = "abstain.kernel", "abstain.bias"


class Head(NamedTuple):
    """`kernel [d_model, 1]` and `bias [1]`, f32: the logit of abstaining, of the place `hidden`."""

    kernel: np.ndarray
    bias: np.ndarray


def blank_head(d_model: int) -> Head:
    """One that says 1/2 of everything: on frozen features its loss is convex, and any start will do."""
    return Head(np.zeros((d_model, 1), np.float32), np.zeros(1, np.float32))


def head_of(model: Any) -> Head:
    """Raises InputError where the model has none."""
    if getattr(model, "abstain", None) is None:
        raise InputError(f"expected a model with an abstain head, found one of family "
                         f"{model.config.family} without")
    return Head(np.asarray(model.abstain.kernel[...]), np.asarray(model.abstain.bias[...]))


def with_head(model: Decoder, head: Head) -> Decoder:
    """The model with this head, in place of its own if it has one; all else is the same to the bit.

    Raises:
        InputError: its family has no abstain heads, or the head is of another width.
    """
    if not hasattr(model.config, "abstain_head"):
        raise InputError(f"expected a family that can have an abstain head, found {model.config.family}")
    if head.kernel.shape != (model.config.d_model, 1):
        raise InputError(f"expected an abstain head of width {model.config.d_model}, found "
                         f"{head.kernel.shape[0]}")
    arrays = to_arrays(model) | {KERNEL: head.kernel, BIAS: head.bias}
    tensors = {name: in_memory(array) for name, array in arrays.items()}
    return from_tensors(type(model), dataclasses.replace(model.config, abstain_head=True), tensors,
                        model.compute, finite=False)
