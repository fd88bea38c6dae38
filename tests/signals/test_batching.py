"""Batches hold every text once, in few sizes, within the batch size, the context length and memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.signals.batching import RUN, Batch, batches, bucket, padded_ids


def test_padded_lengths() -> None:
    assert [bucket(n) for n in (0, 1, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 96, 97, 1000)] == [
        0, 16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 96, 96, 128, 1024]
    for n in range(17, 3000):
        assert n <= bucket(n) < 1.5 * n
    assert len({bucket(n) for n in range(1, 1025)}) == 13  # 64 multiples of 16
    assert [bucket(n, shortest=64) for n in (0, 1, 64, 65)] == [0, 64, 64, 96]
    # With learned positions no padded length exceeds the context; a longer text is an error elsewhere.
    assert [bucket(n, 40) for n in (3, 30, 33, 40, 41)] == [16, 32, 40, 40, 41]


@pytest.mark.parametrize(("n", "rows"), [(0, []), (1, [1]), (3, [4]), (8, [8]), (9, [8, 8]), (17, [8, 8, 8])])
@pytest.mark.parametrize("shrink", [False, True])
def test_each_text_is_in_one_batch(n: int, rows: list[int], shrink: bool) -> None:
    lengths = np.random.default_rng(n).integers(1, 100, n).tolist()
    result = list(batches(lengths, 8, shrink=shrink))
    rows = rows if shrink else [8] * len(rows)
    indices = list(itertools.chain.from_iterable(batch.indices for batch in result))
    assert sorted(indices) == list(range(n)) and [batch.rows for batch in result] == rows
    assert indices == sorted(range(n), key=lambda i: -lengths[i])
    for batch in result:
        assert batch.time == bucket(max(lengths[i] for i in batch.indices))
        assert len(batch.filled) == batch.rows and batch.filled[:len(batch.indices)] == batch.indices
        assert set(batch.filled) == set(batch.indices)


def test_widths_order_texts_of_equal_length() -> None:
    assert [batch.indices for batch in batches([5, 9, 5, 5], 2, widths=[1, 0, 3, 2])] == [[1, 2], [3, 0]]


def test_a_random_order_is_sorted_within_runs_only() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 5 * RUN).tolist()
    result = list(batches(lengths, 2, seed=3))
    assert result == list(batches(lengths, 2, seed=3)) != list(batches(lengths, 2, seed=4))
    sizes = [lengths[i] for batch in result for i in batch.indices]
    runs = [sizes[start:start + 2 * RUN] for start in range(0, len(sizes), 2 * RUN)]
    assert all(run == sorted(run, reverse=True) for run in runs) and sizes != sorted(sizes, reverse=True)


def test_memory_limits_the_rows() -> None:
    """Six rows fit in half of a batch size of 16: batches of four. One row is always computed."""
    lengths = [30] * 20
    limited = list(batches(lengths, 16, max_rows=lambda candidates: 6))
    assert [(len(batch.indices), batch.rows) for batch in limited] == [(4, 4)] * 5
    assert [batch.rows for batch in batches(lengths, 16, max_rows=lambda candidates: 0)] == [1] * 20
    few = batches(lengths[:3], 16, max_rows=lambda candidates: 6, shrink=True)
    assert [batch.rows for batch in few] == [4]
    by_longest = batches([90, 90, 10, 10], 2, max_rows=lambda candidates: 1 if 0 in candidates else 2)
    assert [(batch.indices, batch.rows) for batch in by_longest] == [([0], 1), ([1, 2], 2), ([3], 2)]
    rest = list(batches([90, 90, 90, 10], 4, max_rows=lambda candidates: 2 if 0 in candidates else 4))
    assert [(batch.indices, batch.rows) for batch in rest] == [([0, 1], 2), ([2, 3], 2)]


@pytest.mark.eight_devices
def test_devices_share_every_batch() -> None:
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    assert [batch.rows for batch in batches([3] * 9, 6, mesh=mesh)] == [8, 8]
    assert [batch.rows for batch in batches([3], 6, mesh=mesh, shrink=True)] == [4]
    assert [batch.rows for batch in batches([3] * 9, 8, mesh=mesh, max_rows=lambda candidates: 2)] == [4] * 3


def test_padded_ids() -> None:
    assert Batch([3, 1], 4, 16).filled == [3, 1, 1, 1]
    np.testing.assert_array_equal(padded_ids([[1, 2, 3], [4]], 4), [[1, 2, 3, 0], [4, 0, 0, 0]])
