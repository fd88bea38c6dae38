"""Compares the trigram baseline with counts in dicts."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilelli_jax.data.corpus import ByteCorpus
from tilelli_jax.data.synthetic import stories
from tilelli_jax.errors import InputError
from tilelli_jax.models import trigram
from tilelli_jax.models.trigram import STRENGTHS, fit_trigram


def corpus_of(text, parts=2):
    return ByteCorpus(np.array_split(np.frombuffer(text, np.uint8), parts))


class Brute:
    """The same formula, one byte at a time, on dicts."""

    def __init__(self, text, strengths):
        self.after = [defaultdict(Counter) for _ in range(3)]
        for i in range(2, len(text)):
            for n in range(3):
                self.after[n][text[i - n:i]][text[i]] += 1
        self.strengths = strengths

    def probability(self, context, byte):
        p = 1 / 256
        for n in range(len(context) + 1):
            counts = self.after[n].get(context[len(context) - n:], {})
            weight = self.strengths[n] * max(1, len(counts))
            p = (counts.get(byte, 0) + weight * p) / (sum(counts.values()) + weight)
        return p

    def nats_per_byte(self, text):
        return -sum(math.log(self.probability(text[max(0, i - 2):i], text[i]))
                    for i in range(1, len(text))) / (len(text) - 1)


TEXT = stories.generate(6000)
VALID = stories.generate(500, 0, "valid") + bytes(range(256))


@pytest.mark.parametrize("chunk", [1000, 5397])  # 5397: the last chunk counts a single triple
def test_equals_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(trigram, "CHUNK", chunk)  # so that there are several chunks
    model = fit_trigram(corpus_of(TEXT))
    brute = Brute(TEXT, model.strengths)
    assert model.nats_per_byte(corpus_of(VALID, 3)) == pytest.approx(
        brute.nats_per_byte(VALID), rel=1e-12)
    assert model.nats_per_byte(corpus_of(VALID), max_bytes=77) == pytest.approx(
        brute.nats_per_byte(VALID[:77]), rel=1e-12)
    long = stories.generate(2500, 3)
    assert model.nats_per_byte(corpus_of(long)) == pytest.approx(
        brute.nats_per_byte(long), rel=1e-12)


def test_strengths_minimise_the_nll_on_the_end_of_training():
    model = fit_trigram(corpus_of(TEXT))
    counts, held_out = TEXT[:5400], TEXT[5400:]

    def nats(strengths):
        brute = Brute(counts, strengths)
        return -sum(math.log(brute.probability(held_out[i - 2:i], held_out[i]))
                    for i in range(2, len(held_out)))
    best = nats(model.strengths)
    for n in range(3):
        for strength in STRENGTHS:
            others = list(model.strengths)
            others[n] = strength
            assert nats(others) >= best - 1e-9


@settings(max_examples=10, deadline=None)
@given(st.binary(max_size=60), st.binary(min_size=2, max_size=2))
def test_probabilities_sum_to_one(text, context):
    model = fit_trigram(corpus_of(text))
    every = np.arange(256)
    for n_context in range(3):
        given_ = [np.full(256, byte) for byte in context[:n_context]]
        p = model.probability(*given_, every)
        assert p.shape == (256,) and p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_closed_forms():
    nothing = fit_trigram(corpus_of(b""))
    assert nothing.nats_per_byte(corpus_of(b"anything")) == pytest.approx(math.log(256))
    one_byte = fit_trigram(corpus_of(b"a" * 100_000))
    assert one_byte.nats_per_byte(corpus_of(b"a" * 100)) < 0.01
    alternating = fit_trigram(corpus_of(b"ab" * 50_000))
    assert alternating.nats_per_byte(corpus_of(b"ab" * 50)) < 0.01


def test_more_context_helps_on_text():
    """The trigram NLL is below the bigram NLL, which is below the unigram NLL."""
    model = fit_trigram(corpus_of(stories.generate(300_000)))
    valid = stories.generate(30_000, 0, "valid")
    text = np.frombuffer(valid, np.uint8)
    unigram = -np.log(model.probability(text)).mean()
    bigram = -np.log(model.probability(text[:-1], text[1:])).mean()
    assert model.nats_per_byte(corpus_of(valid)) < bigram - 0.3 < unigram - 0.6


def test_only_the_first_bytes_are_counted():
    assert all(np.array_equal(a.counts, b.counts) for a, b in zip(
        fit_trigram(corpus_of(TEXT), max_bytes=1000).orders,
        fit_trigram(corpus_of(TEXT[:1000])).orders, strict=True))


def test_nothing_to_predict():
    with pytest.raises(InputError, match="corpus: expected at least 2 bytes to predict, found 1"):
        fit_trigram(corpus_of(TEXT)).nats_per_byte(corpus_of(b"x"))
