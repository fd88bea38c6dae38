"""Quantised linear layers, convolutions and embeddings in PyTorch, with weights in PyTorch's layout.

A weight is [..., out, in] (leading axes stack separate tensors), a table [entries, width], a depthwise kernel
(channels, 1, taps). Gradients pass every quantiser unchanged (straight-through estimator, STE).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Rounded(torch.autograd.Function):
    """The quantised weight forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantised: Tensor) -> Tensor:
        return quantised

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _LearnedScale(torch.autograd.Function):
    """Ternary weights with a learned scale (LSQ); the scale's gradient is eq. 3 of Esser et al. 2020."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor) -> Tensor:
        ratio = weight / alpha[..., None, None]
        level = ratio.round().clamp(-1, 1)
        ctx.save_for_backward(ratio, level)
        return level * alpha[..., None, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        ratio, level = ctx.saved_tensors
        slope = torch.where(ratio.abs() < 1, level - ratio, ratio.sign())
        per_tensor = ratio.shape[-1] * ratio.shape[-2]
        return grad, (grad * slope).sum((-2, -1)) / math.sqrt(per_tensor)


def absmean(weight: Tensor, per_row: bool = False) -> Tensor:
    """Mean magnitude of each tensor, or of each row (output feature); axes are kept for broadcasting."""
    return weight.abs().mean((-1,) if per_row else (-2, -1), keepdim=True).clamp_min(1e-5)


@torch.no_grad()
def ternary(weight: Tensor, per_row: bool = False) -> Tensor:
    """Rounds to -1, 0 or 1 times the mean magnitude; torch rounds half to even."""
    scale = absmean(weight, per_row)
    return (weight / scale).round().clamp(-1, 1) * scale


@torch.no_grad()
def power3(weight: Tensor, per_row: bool = False) -> Tensor:
    """Rounds to 0, ±1, ±3 or ±9 times the mean magnitude, with boundaries at 0.5, 2 and 6 times it."""
    scale = absmean(weight, per_row)
    size = weight.abs() / scale
    level = (size > 0.5).float() + 2 * (size > 2).float() + 6 * (size > 6).float()
    return level * weight.sign() * scale


def quantised(weight: Tensor, kind: str, alpha: Tensor | None = None) -> Tensor:
    """The quantised weight. For `hadamard` the caller rotates the weight first; it is then ternary."""
    if kind == "none":
        return weight
    if kind == "lsq":
        return _LearnedScale.apply(weight, alpha)
    name, _, row = kind.partition("_")
    levels = power3 if name == "power3" else ternary
    return _Rounded.apply(weight, levels(weight, per_row=row == "row"))


def sylvester(size: int) -> Tensor:
    """The symmetric orthonormal Hadamard matrix; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(size)


class Linear(nn.Module):
    """x -> x Wᵀ (+ b) with a quantised W [*heads, out, in]; the heads are fused in the product."""

    rotation: Tensor

    def __init__(self, size_in: int, size_out: int, kind: str = "none", bias: bool = False,
                 heads: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(*heads, size_out, size_in) / math.sqrt(size_in))
        self.bias = nn.Parameter(torch.zeros(size_out)) if bias else None
        self.alpha = nn.Parameter(absmean(self.weight.data)[..., 0, 0]) if kind == "lsq" else None
        if kind == "hadamard":
            stored = size_in & (size_in - 1) != 0  # no Sylvester matrix of this size
            rotation = nn.init.orthogonal_(torch.empty(size_in, size_in)) if stored \
                else sylvester(size_in)
            self.register_buffer("rotation", rotation, persistent=stored)

    def weights(self) -> Tensor:
        """The quantised weight, [*heads, out, in], to be multiplied with `rotated_input(x)`."""
        rotated = self.weight @ self.rotation if self.kind == "hadamard" else self.weight
        return quantised(rotated, self.kind, self.alpha)

    def rotated_input(self, x: Tensor) -> Tensor:
        return x @ self.rotation if self.kind == "hadamard" else x

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], or [..., heads * out] where there are heads."""
        return F.linear(self.rotated_input(x), self.weights().flatten(0, -2), self.bias)


class CausalConv(nn.Module):
    """Depthwise causal convolution: the last tap applies to the current position."""

    def __init__(self, width: int, taps: int, kind: str = "none", bias: bool = False) -> None:
        super().__init__()
        self.kind = "ternary" if kind == "hadamard" else kind  # no input axis to rotate
        self.weight = nn.Parameter(torch.randn(width, 1, taps) / math.sqrt(taps))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.alpha = nn.Parameter(absmean(self.weight.data[:, 0])[0, 0]) if kind == "lsq" else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, width] -> same shape."""
        width, _, taps = self.weight.shape
        weight = quantised(self.weight[:, 0], self.kind, self.alpha)[:, None]
        y = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=taps - 1, groups=width)
        return y[..., : x.shape[1]].transpose(1, 2)


class Embedding(nn.Module):
    """A quantised table [entries, width]; rows are entries, so per-row scales are per entry."""

    def __init__(self, entries: int, width: int, kind: str = "none") -> None:
        super().__init__()
        self.kind = "ternary" if kind == "hadamard" else kind
        self.weight = nn.Parameter(torch.randn(entries, width) / math.sqrt(width))
        self.alpha = nn.Parameter(absmean(self.weight.data)[0, 0]) if kind == "lsq" else None

    def table(self) -> Tensor:
        return quantised(self.weight, self.kind, self.alpha)

    def forward(self, ids: Tensor) -> Tensor:
        """Integers [...] -> [..., width]."""
        return F.embedding(ids, self.table())
