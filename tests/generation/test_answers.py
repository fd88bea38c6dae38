"""Answers with statistics: equal to one uncached pass of prompt and answer, for every kind of network."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

import tilelli_jax
from tests.generation.test_generate_ids import GEMMA, NEOX, VANILLA
from tests.models.test_llama import GEMMA3, LLAMA
from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax.errors import InputError
from tilelli_jax.generation import answers as answers_module
from tilelli_jax.generation import decoding
from tilelli_jax.generation.answers import Answer, generate_answers
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.nn.hooks import Tap

ROUTED = RoutedConfig(d_model=16, n_layers=2, max_seq_len=64)
CASES = {"gpt_neox": NEOX, "gemma4": GEMMA, "gemma3": GEMMA3, "llama": LLAMA, "vanilla": VANILLA,
         "routed": ROUTED}
PROMPTS = [np.arange(1, 10), np.array([60]), np.arange(50, 53)]
QUICK = ("gpt_neox", "llama")
# Sums below 30 in up to four layers, with and without caches; an entropy adds as many terms as tokens.
NOISE = noise(30, steps=8)


@functools.cache
def network(name: str) -> Any:
    return random_network(CASES[name], 0)[0]


def with_exhaustive(*names: str) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


def check_against_one_pass(model: Any, prompt: np.ndarray, answer: Answer, layers: list[int],
                           end: int | None = None) -> None:
    """The statistics and the stream of an answer, from one pass of the whole text in float64."""
    ids = np.concatenate([prompt, answer.ids, [end] * answer.ended]).astype(np.int32)
    logits, recorded = model.tapped(ids[None], Tap(record=("resid_post",)))
    logits = np.asarray(logits[0], np.float64)[len(prompt) - 1:][:len(answer.log_probs)]
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    tokens = ids[len(prompt):]
    stream = np.asarray(recorded["resid_post"])[layers, 0, len(prompt) + len(answer.ids) - 1]
    for found, expected in ((answer.log_probs, log_probs[np.arange(len(tokens)), tokens]),
                            (answer.entropies, -(np.exp(log_probs) * log_probs).sum(1)),
                            (answer.divergences, -log_probs.mean(1) - np.log(log_probs.shape[1])),
                            (answer.streams, stream if len(answer.ids) else 0 * stream)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=NOISE)


@pytest.mark.parametrize("name", with_exhaustive(*CASES))
def test_statistics_are_those_of_one_pass(name: str) -> None:
    model = network(name)
    n_layers = model.config.n_layers
    max_new = 6
    results = generate_answers(model, PROMPTS, n_samples=3, max_new=max_new, sample_layers=[1], batch_size=8,
                               temperature=1.5, end_ids=())
    greedy = tilelli_jax.generate_ids(model, PROMPTS, max_new=max_new, temperature=0, end_ids=())
    for prompt, answers, expected in zip(PROMPTS, results, greedy, strict=True):
        np.testing.assert_array_equal(answers.greedy.ids, expected.ids)
        assert answers.greedy.ids.dtype == np.int32 and len(answers.samples) == 3
        check_against_one_pass(model, prompt, answers.greedy, list(range(n_layers)))
        for answer in answers.samples:
            assert len(answer.ids) == max_new and not answer.ended
            check_against_one_pass(model, prompt, answer, [1])
        assert len({tuple(answer.ids.tolist()) for answer in answers.samples}) > 1


@pytest.mark.parametrize("name", with_exhaustive(*CASES))
def test_a_shared_prefix_is_processed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result; of two rows with more than the window, only the window is shared."""
    model, expected = network(name), {"gemma4": 4, "gemma3": 4, "routed": 0}.get(name, 6)
    shared = np.arange(1, 8)
    prompts = [np.concatenate([shared, rest]) for rest in ([30, 31, 32], [30], [40, 33])]
    kwargs: dict[str, Any] = {"n_samples": 2, "max_new": 6, "sample_layers": [1], "end_ids": ()}
    monkeypatch.setattr(answers_module, "PREFIX_STEP", 2)
    apart = generate_answers(model, prompts, **kwargs)
    monkeypatch.setattr(answers_module, "PREFIX_SAVES", 4)
    prefills = []
    prefill = decoding.prefill
    monkeypatch.setattr(decoding, "prefill", lambda graph, params, ids, *args, **kwargs: (
        prefills.append(ids.shape), prefill(graph, params, ids, *args, **kwargs))[1])
    together = generate_answers(model, prompts, **kwargs)
    assert [shape for shape in prefills if shape[0] == 1] == [(1, expected)] * (expected > 0)
    for prompt, one, other in zip(prompts, apart, together, strict=True):
        for a, b in zip([one.greedy, *one.samples], [other.greedy, *other.samples], strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
        check_against_one_pass(model, prompt, other.greedy, list(range(model.config.n_layers)))
        for answer in other.samples:
            check_against_one_pass(model, prompt, answer, [1])


def test_a_prefix_is_shared_where_it_saves_more_than_it_costs() -> None:
    model, prefix = network("llama"), np.arange(40)
    n = -(-answers_module.PREFIX_SAVES // 32)
    prompts = [np.append(prefix, i) for i in range(n + 1)]
    assert answers_module._shared_prefix(model, prompts) == 32  # a multiple of 16
    assert answers_module._shared_prefix(model, prompts[:-1]) == 0
    assert answers_module._shared_prefix(model, [prefix] * 1000) == 32  # one id at least is a prompt's own
    assert answers_module._shared_prefix(model, [prefix[:32]] * 1000) == 16
    assert answers_module._shared_prefix(model, []) == 0


def test_end_tokens_are_counted_and_end_an_answer() -> None:
    model = network("gpt_neox")
    free = generate_answers(model, PROMPTS, n_samples=2, max_new=8, end_ids=())
    end = int(free[0].greedy.ids[3])
    ended = generate_answers(model, PROMPTS, n_samples=2, max_new=8, end_ids=(end,), sample_layers=[0])
    for prompt, before, after in zip(PROMPTS, free, ended, strict=True):
        for full, cut in zip([before.greedy, *before.samples], [after.greedy, *after.samples], strict=True):
            first = np.flatnonzero(full.ids == end)
            n = int(first[0]) if len(first) else 8
            np.testing.assert_array_equal(cut.ids, full.ids[:n])
            assert cut.ended == bool(len(first)) and len(cut.log_probs) == n + cut.ended
            np.testing.assert_array_equal(cut.log_probs, full.log_probs[:n + cut.ended])
        check_against_one_pass(model, prompt, after.greedy, list(range(model.config.n_layers)), end)
    first, = (generate_answers(model, PROMPTS[:1], max_new=8, end_ids=(int(free[0].greedy.ids[0]),)))
    assert first.greedy.ended and not len(first.greedy.ids) and len(first.greedy.log_probs) == 1
    assert not first.greedy.streams.any()


def test_answers_do_not_depend_on_the_batch() -> None:
    model = network("llama")
    kwargs: dict[str, Any] = {"n_samples": 2, "max_new": 7, "seed": 5, "end_ids": ()}
    batched = generate_answers(model, PROMPTS, **kwargs)
    for size in (1, 6):
        separate = generate_answers(model, PROMPTS, **kwargs, batch_size=size)
        for a, b in zip(batched, separate, strict=True):
            for x, y in zip([a.greedy, *a.samples], [b.greedy, *b.samples], strict=True):
                np.testing.assert_array_equal(x.ids, y.ids)
    alone, = generate_answers(model, PROMPTS[2:], **kwargs, streams=[2])
    assert [s.ids.tolist() for s in alone.samples] == [s.ids.tolist() for s in batched[2].samples]
    more, = generate_answers(model, PROMPTS[2:], **kwargs | {"n_samples": 4}, streams=[2])
    assert [s.ids.tolist() for s in more.samples[:2]] == [s.ids.tolist() for s in batched[2].samples]
    other = generate_answers(model, PROMPTS, **kwargs | {"seed": 6})
    assert [s.ids.tolist() for s in other[2].samples] != [s.ids.tolist() for s in batched[2].samples]


def test_samples_have_the_distribution_of_the_network() -> None:
    """The frequencies of 4096 first tokens, and their sampled log-probability, at two temperatures."""
    model, n = network("llama"), 512
    logits = np.asarray(model(PROMPTS[0][None]))[0, -1].astype(np.float64)
    for temperature in (1.0, 0.5):
        probabilities = np.asarray(jax.nn.softmax(logits / temperature))
        counts = np.zeros(len(probabilities))
        for stream in range(8):
            answers, = generate_answers(model, PROMPTS[:1], n_samples=n, max_new=1, end_ids=(),
                                        temperature=temperature, streams=[stream], batch_size=n)
            counts += np.bincount([answer.ids[0] for answer in answers.samples], minlength=len(counts))
        total = counts.sum()
        deviation = (counts - total * probabilities) / np.sqrt(total * probabilities * (1 - probabilities))
        assert total == 8 * n and np.abs(deviation[total * probabilities > 5]).max() < 4.5


def test_a_full_context_ends_an_answer() -> None:
    model = network("vanilla")  # 16 learned positions
    prompts = [np.arange(1, 14), np.arange(1, 17), np.arange(3)]
    results = generate_answers(model, prompts, max_new=6, end_ids=())
    assert [len(answers.greedy.ids) for answers in results] == [4, 1, 6]
    for i in (0, 2):
        expected, = tilelli_jax.generate_ids(model, prompts[i:i + 1], max_new=len(results[i].greedy.ids),
                                             temperature=0, end_ids=())
        np.testing.assert_array_equal(results[i].greedy.ids, expected.ids)
    with pytest.raises(InputError, match="prompts: 0: expected at most 16 ids, found 17"):
        generate_answers(model, [np.arange(17)], max_new=2)


@pytest.mark.parametrize(("changes", "message"), [
    ({"n_samples": -1}, "n_samples: expected at least 0, found -1"),
    ({"max_new": 0}, "max_new: expected at least 1"), ({"batch_size": 0}, "batch_size: expected at least 1"),
    ({"temperature": 0.0}, "temperature: expected a number above 0, found 0")])
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_answers(network("llama"), PROMPTS, **changes)
