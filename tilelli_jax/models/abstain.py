"""The abstain head of a network: create it, read it from one network, attach it to another."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import in_memory
from tilelli_jax.models.arrays import from_tensors, to_arrays
from tilelli_jax.models.decoder import Decoder

KERNEL, BIAS = "abstain.kernel", "abstain.bias"


class Head(NamedTuple):
    """`kernel [d_model, 1]` and `bias [1]`, f32: the linear layer from `hidden` to the abstain logit."""

    kernel: np.ndarray
    bias: np.ndarray


def new_head(d_model: int) -> Head:
    """A head of zeros, which predicts 1/2. On frozen features the loss is convex, so any start works."""
    return Head(np.zeros((d_model, 1), np.float32), np.zeros(1, np.float32))


def get_head(model: Any) -> Head:
    """Returns the abstain head of a model. Raises InputError if it has none."""
    if getattr(model, "abstain", None) is None:
        raise InputError(f"expected a model with an abstain head, found one of family "
                         f"{model.config.family} without")
    return Head(np.asarray(model.abstain.kernel[...]), np.asarray(model.abstain.bias[...]))


def attach_head(model: Decoder, head: Head) -> Decoder:
    """Returns the model with this head, replacing an existing head. All other weights are bit-identical.

    Raises:
        InputError: the model's family has no abstain heads, or the head has another width.
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
