"""Codes of quantised weights as bytes: 5 codes of 3 levels in one byte, 94 of 7 levels in 33 bytes.

The codes of a group are the digits of one whole number, least significant first, which is stored in
little-endian order: 1.6 bits for a code of 3 levels (log2 3 = 1.585) and 2.809 for one of 7 (log2 7 = 2.807).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.errors import InputError

Levels = Literal["ternary", "power3"]


class Group(NamedTuple):
    """How many codes share how many bytes, and the values of the codes in increasing order."""

    codes: int
    bytes: int
    values: tuple[int, ...]


GROUPS: dict[Levels, Group] = {"ternary": Group(5, 1, (-1, 0, 1)),
                               "power3": Group(94, 33, (-9, -3, -1, 0, 1, 3, 9))}


def packed_size(n: int, levels: Levels) -> int:
    """Number of bytes of n packed codes."""
    group = GROUPS[levels]
    return -(-n // group.codes) * group.bytes


def pack(codes: NDArray[np.int8], levels: Levels) -> NDArray[np.uint8]:
    """Packs codes of any shape, in row-major order, `[n]` → uint8 `[packed_size(n)]`.

    Raises:
        ValueError: a number is not a value of a code.
    """
    group = GROUPS[levels]
    flat = np.asarray(codes).reshape(-1)
    digits = np.searchsorted(group.values, flat).astype(np.uint16)
    if not np.array_equal(np.take(group.values, digits, mode="clip"), flat):
        raise ValueError(f"codes: expected {group.values}")
    n_groups = packed_size(len(flat), levels) // group.bytes
    rows = np.full((n_groups, group.codes), len(group.values) // 2, np.uint16)
    rows.reshape(-1)[:len(flat)] = digits  # the rest of the last group is zeros
    packed = np.zeros((n_groups, group.bytes), np.uint16)
    for column in rows.T[::-1]:  # Horner's rule, byte by byte
        packed *= np.uint16(len(group.values))
        packed[:, 0] += column
        for i in range(group.bytes - 1):
            packed[:, i + 1] += packed[:, i] >> 8
            packed[:, i] &= 0xFF
    return packed.astype(np.uint8).reshape(-1)


def unpack(packed: NDArray[np.uint8], n: int, levels: Levels) -> NDArray[np.int8]:
    """The n codes of packed bytes, int8 `[n]`; the inverse of `pack`.

    Raises:
        InputError: the number of bytes is wrong, or they are not what `pack` writes.
    """
    group = GROUPS[levels]
    if packed.ndim != 1 or len(packed) != packed_size(n, levels):
        raise InputError(f"expected {packed_size(n, levels):,} bytes of {n:,} packed codes, found shape "
                         f"{packed.shape}")
    remaining, base = packed.reshape(-1, group.bytes).astype(np.uint16), np.uint16(len(group.values))
    digits = np.empty((len(remaining), group.codes), np.uint8)
    for column in range(group.codes):  # long division by the number of levels
        rest: NDArray[np.uint16] = np.zeros(len(remaining), np.uint16)
        for i in reversed(range(group.bytes)):
            remaining[:, i], rest = np.divmod((rest << np.uint16(8)) + remaining[:, i], base)
        digits[:, column] = rest
    if remaining.any() or (digits.reshape(-1)[n:] != len(group.values) // 2).any():
        raise InputError("expected packed codes, found bytes that are none")
    return np.array(group.values, np.int8)[digits.reshape(-1)[:n]]
