"""Packed codes: exact round trips, the size of the format, and damaged bytes."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilelli_jax.errors import InputError
from tilelli_jax.io.packing import GROUPS, Levels, pack, packed_size, unpack

LEVELS: tuple[Levels, ...] = get_args(Levels)


@given(levels=st.sampled_from(LEVELS), data=st.data())
def test_codes_come_back(levels: Levels, data: Any) -> None:
    codes = np.array(data.draw(st.lists(st.sampled_from(GROUPS[levels].values), max_size=300)), np.int8)
    packed = pack(codes, levels)
    assert packed.dtype == np.uint8 and len(packed) == packed_size(len(codes), levels)
    np.testing.assert_array_equal(unpack(packed, len(codes), levels), codes)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_group_is_a_whole_number(levels: Levels) -> None:
    """Against Python's own integers, at the smallest and the largest numbers too."""
    group, rng = GROUPS[levels], np.random.default_rng(0)
    for codes in (np.full(group.codes, group.values[0]), np.full(group.codes, group.values[-1]),
                  rng.choice(group.values, group.codes)):
        number = sum(group.values.index(code) * len(group.values)**i for i, code in enumerate(codes.tolist()))
        assert pack(codes.astype(np.int8), levels).tobytes() == number.to_bytes(group.bytes, "little")


def test_bits_per_code() -> None:
    n = 94 * 5 * 1000
    assert 8 * packed_size(n, "ternary") / n == 1.6
    assert 8 * packed_size(n, "power3") / n == pytest.approx(2.8085, abs=1e-4)


def test_any_shape_and_row_major_order() -> None:
    codes = np.array([[-1, 0, 1], [1, 1, 0]], np.int8)
    np.testing.assert_array_equal(unpack(pack(codes, "ternary"), 6, "ternary"), codes.reshape(-1))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_other_values_are_refused(levels: Levels, value: int) -> None:
    with pytest.raises(ValueError, match="codes: expected"):
        pack(np.array([0, value], np.int8), levels)


@pytest.mark.parametrize(("packed", "n", "levels", "message"), [
    (np.zeros(2, np.uint8), 3, "ternary", r"expected 1 bytes of 3 packed codes, found shape \(2,\)"),
    (np.zeros((1, 1), np.uint8), 3, "ternary", r"found shape \(1, 1\)"),
    (np.array([243], np.uint8), 5, "ternary", "found bytes that are none"),
    (np.array([255], np.uint8), 5, "ternary", "found bytes that are none"),
    (np.array([0], np.uint8), 3, "ternary", "found bytes that are none"),  # codes after the last are not 0
    (np.full(33, 255, np.uint8), 94, "power3", "found bytes that are none"),
])
def test_damaged_bytes_are_refused(packed: Any, n: int, levels: Levels, message: str) -> None:
    with pytest.raises(InputError, match=message):
        unpack(packed, n, levels)
