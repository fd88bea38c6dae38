"""Order of windows over epochs, processes and resuming; and every validation byte is predicted once."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilelli_jax.data.corpus import ByteCorpus
from tilelli_jax.data.windows import training_batches, validation_batches
from tilelli_jax.errors import InputError


def corpus_of(size, parts=3):
    """A corpus in which neighbouring 4-byte words differ, in several segments."""
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return ByteCorpus(np.array_split(data, parts))


def take(dataset, n):
    return list(itertools.islice(iter(dataset), n))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


few = settings(max_examples=25)


@few
@given(st.integers(2, 200), st.integers(1, 9), st.integers(0, 2**31))
def test_an_epoch_reads_each_stratum_once(size, seq_len, seed):
    if size <= seq_len:
        return
    corpus = corpus_of(size)
    n_starts = size - seq_len
    n = max(1, n_starts // seq_len)
    batches = take(training_batches(corpus, batch_size=n, seq_len=seq_len, seed=seed), 3)
    for batch in batches:  # a batch is an epoch here
        assert sorted(np.minimum(batch.starts // seq_len, n - 1)) == list(range(n))
        assert batch.starts.dtype == np.int64 and batch.bytes.dtype == np.uint8
        assert batch.starts.min() >= 0 and batch.starts.max() < n_starts
        assert np.array_equal(batch.bytes, corpus.gather(batch.starts, seq_len + 1))


@pytest.mark.exhaustive
def test_an_epoch_of_many_windows():
    """From 2 ** 16 windows on, the order is Grain's own shuffle."""
    n = (1 << 16) + 100
    *parts, second = (batch.starts for batch in take(training_batches(
        corpus_of(n + 1), batch_size=n // 4, seq_len=1, seed=2), 5))
    first = np.concatenate(parts)
    assert (np.sort(first) == np.arange(n)).all() and len(np.unique(second)) == n // 4
    assert (first[:n // 4] != second).mean() > 0.99 and (first != np.arange(n)).mean() > 0.99


def test_epochs_differ_in_order_and_jitter_and_so_do_seeds():
    def epochs(seed):
        return np.stack([batch.starts for batch in take(training_batches(
            corpus_of(2000), batch_size=199, seq_len=10, seed=seed), 2)])
    first, second = epochs(0)
    assert (first // 10 != second // 10).mean() > 0.9  # another order
    assert (np.sort(first) % 10 != np.sort(second) % 10).mean() > 0.7  # another jitter
    assert (epochs(0) == [first, second]).all()
    assert (epochs(1)[0] != first).mean() > 0.9


def test_every_start_is_reached_and_jitter_is_even():
    size, seq_len = 47, 5  # 42 starts in 8 strata, the last of 7
    starts = np.concatenate([batch.starts for batch in take(training_batches(
        corpus_of(size), batch_size=8, seq_len=seq_len, seed=3), 2000)])
    counts = np.bincount(starts, minlength=size - seq_len)
    assert len(counts) == 42
    expected = np.array([2000 / 5] * 35 + [2000 / 7] * 7)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@few
@given(st.integers(0, 12), st.integers(0, 3), st.integers(1, 12))
def test_rows_of_the_processes_make_up_the_global_batch(position, prefetch, batch_size):
    corpus = corpus_of(300)
    options = {"seq_len": 7, "seed": 5, "prefetch": prefetch}
    batches = take(training_batches(corpus, batch_size=batch_size, start=position * batch_size, **options), 2)
    for n in (1, 2, 4):
        shares = [list(range(batch_size))[i::n] for i in range(n)]
        if n <= batch_size:
            shares[0], shares[-1] = shares[-1], shares[0]  # any rows, in any order
        parts = [take(training_batches(corpus, batch_size=batch_size, rows=np.array(rows, int),
                                       start=position * batch_size, **options), 2)
                 for rows in shares]
        for at, batch in enumerate(batches):
            for rows, part in zip(shares, parts, strict=True):
                assert equal(part[at], (batch.bytes[rows], batch.starts[rows]))
    half = take(training_batches(corpus, batch_size=batch_size, rows=slice(0, batch_size // 2),
                                 start=position * batch_size, **options), 1)[0]
    assert equal(half, (batches[0].bytes[:batch_size // 2], batches[0].starts[:batch_size // 2]))


@few
@given(st.integers(0, 40), st.integers(0, 5), st.sampled_from([0, 1, 2, 5]),
       st.sampled_from([0, 3]))
def test_resuming_continues_bit_for_bit(position, ahead, prefetch, start):
    corpus = corpus_of(150)

    def batches(**options):
        return training_batches(corpus, batch_size=4, seq_len=6, seed=1, **options)

    iterator = iter(batches(prefetch=prefetch, start=start))
    for _ in range(position):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(3)]
    # Into an iterator at another position, with another start, that has read ahead.
    other = iter(batches())
    for _ in range(ahead):
        next(other)
    other.set_state(state)
    assert all(equal(a, b) for a, b in zip(expected, [next(other) for _ in range(3)], strict=True))
    # The state counts windows from the beginning, for any `start`.
    begun = take(batches(start=start + 4 * position), 3)
    assert all(equal(a, b) for a, b in zip(expected, begun, strict=True))
    # The state also applies to a process that reads other rows.
    half = iter(batches(rows=slice(2, 4)))
    half.set_state(state)
    assert equal(next(half), (expected[0].bytes[2:], expected[0].starts[2:]))


@few
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), max_size=4))
def test_another_batch_size_resumes_with_the_next_window(sizes):
    """No window is skipped or read twice, for any division into batches."""
    corpus, state, starts = corpus_of(150), None, []
    for size, n in sizes:
        iterator = iter(training_batches(corpus, batch_size=size, seq_len=6, seed=1, prefetch=0))
        if state:
            iterator.set_state(state)
        starts += [start for _ in range(n) for start in next(iterator).starts]
        state = iterator.get_state()
    singles = iter(training_batches(corpus, batch_size=1, seq_len=6, seed=1, prefetch=0))
    assert starts == [next(singles).starts[0] for _ in starts]


def test_another_length_resumes_after_the_same_number_of_bytes():
    corpus = corpus_of(150)
    state = {"examples": 5, "size": 6}  # 30 bytes, which are 3.75 windows of 8
    iterator = iter(training_batches(corpus, batch_size=2, seq_len=8, seed=1))
    iterator.set_state(state)
    assert iterator.get_state() == {"examples": 4, "size": 8}
    begun = iter(training_batches(corpus, batch_size=2, seq_len=8, seed=1, start=4))
    assert equal(next(iterator), next(begun))


def test_the_state_is_small_and_far_positions_are_fast():
    iterator = iter(training_batches(corpus_of(150), batch_size=4, seq_len=6, seed=1,
                                     start=10**12))
    next(iterator)
    assert len(json.dumps(iterator.get_state())) < 60


def test_a_too_short_corpus():
    take(training_batches(corpus_of(9), batch_size=2, seq_len=8, seed=0), 2)
    with pytest.raises(InputError, match=r"8 needs 9 bytes to train on, found 8"):
        training_batches(corpus_of(8), batch_size=2, seq_len=8, seed=0)
    with pytest.raises(InputError, match="expected at least 2 bytes, found 1"):
        validation_batches(corpus_of(1), batch_size=2, seq_len=8)


@few
@given(st.integers(2, 150), st.integers(1, 12), st.integers(1, 7),
       st.none() | st.integers(2, 200), st.sampled_from([0, 2]))
def test_validation_predicts_each_byte_but_the_first_once(size, seq_len, batch_size, most,
                                                          prefetch):
    corpus = corpus_of(size)
    text = corpus.read(0, size)[:most]
    predicted, inputs = [], []
    for batch in validation_batches(corpus, batch_size=batch_size, seq_len=seq_len, max_bytes=most,
                                    prefetch=prefetch):
        assert batch.bytes.shape == (batch_size, seq_len + 1) and batch.bytes.dtype == np.uint8
        assert batch.mask.shape == (batch_size, seq_len) and batch.mask.dtype == np.bool_
        predicted.append(batch.bytes[:, 1:][batch.mask])
        inputs.append(batch.bytes[:, :-1][batch.mask])
        assert not batch.bytes[:, 1:][~batch.mask].any() and batch.mask.any()
    assert np.array_equal(np.concatenate(predicted), text[1:])
    assert np.array_equal(np.concatenate(inputs), text[:-1])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_validation_rows_make_up_the_global_batch(n):
    corpus = corpus_of(333)
    global_batches = list(validation_batches(corpus, batch_size=8, seq_len=10))
    parts = [list(validation_batches(corpus, batch_size=8, seq_len=10,
                                     rows=slice(i * 8 // n, (i + 1) * 8 // n))) for i in range(n)]
    assert len(global_batches) == 5
    for batch, *shares in zip(global_batches, *parts, strict=True):
        assert equal(batch, [np.concatenate(column) for column in zip(*shares, strict=True)])
