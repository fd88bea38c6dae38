"""Continuous batching: requests that share the batch get what each gets alone."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from tests.no_compilation import no_compilation
from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax.errors import InputError
from tilelli_jax.generation import decoding
from tilelli_jax.generation.engine import Engine, Finished, Full, Request, Token
from tilelli_jax.generation.programs import FinalStream
from tilelli_jax.models.gemma3 import Gemma3Config
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.sampling import Sampling
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.signals.prompts import PromptIds, PromptReader, PromptSignals, lens_hooks

TINY: dict[str, Any] = {"d_model": 16, "n_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(vocab_size=80, layers=("sliding", "full"), n_kv_heads=1, d_head=8, d_hidden=24,
                         window=20, model_type="mistral", end_ids=(7,), **TINY),
    "gemma3": Gemma3Config(vocab_size=80, layers=("sliding", "full"), n_kv_heads=1, d_head=8, d_hidden=24,
                           window=90, query_scale=8, end_ids=(7,), **TINY),
    "gemma4": Gemma4Config(vocab_size=80, vocab_per_layer=80, layers=("sliding", "full") * 3, n_kv_heads=1,
                           n_kv_heads_full=1, d_head=8, d_head_full=8, d_hidden=24, window=90, d_per_layer=4,
                           n_shared_layers=2, max_seq_len=256, end_ids=(7,), **TINY),
    "gpt_neox": GPTNeoXConfig(vocab_size=80, n_layers=2, d_hidden=24, end_ids=(7,), **TINY),
    "vanilla": VanillaConfig(n_layers=2, max_seq_len=150, **TINY),
    "routed": RoutedConfig(n_layers=2, max_seq_len=150, d_head=8, top_k=8, **TINY),
}
FEW = ("llama", "routed")  # the others are in the exhaustive tier
EACH = [name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive) for name in CONFIGS]
MAX_LEN, WAIT = 150, 120  # tokens, seconds


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return {}


def network(networks: dict[str, Any], name: str) -> tuple[Any, Engine]:
    """A network and its engine, compiled once; the engine reads the final stream."""
    if name not in networks:
        model = random_network(CONFIGS[name], 0)[0]
        engine = Engine(model, slots=3, max_len=MAX_LEN, signals=FinalStream(), reads_questions=False)
        engine.compile()
        networks[name] = model, engine
    return networks[name]


def restarted(engine: Engine) -> Engine:
    """The engine without its thread, so that it can run again."""
    engine._thread, engine._stopping = None, ""
    return engine


def some_requests(model: Any) -> list[Request]:
    """Greedy, sampled and truncated requests of different lengths, some longer than a cache at first."""
    rng, low = np.random.default_rng(0), 40 if model.is_byte_level else 8
    high = 120 if model.is_byte_level else 80
    return [Request(rng.integers(low, high, n).tolist(), Sampling(
        max_new=new, temperature=(0.0, 1.0, 0.7)[i % 3], top_k=(0, 0, 5)[i % 3], top_p=(1.0, 0.9, 1.0)[i % 3],
        seed=i), n_top=i % 4) for i, (n, new) in enumerate(
            ((3, 20), (70, 40), (5, 1), (30, 60), (64, 64), (9, 100), (64, 1), (100, 30), (1, 149)))]


@pytest.mark.parametrize("name", EACH)
def test_the_batch_does_not_change_a_continuation(networks: dict[str, Any], name: str) -> None:
    """Nine requests in three slots: each gets the ids that `generate_ids` gives it alone."""
    model, engine = network(networks, name)
    requests = some_requests(model)
    events: list[list[Any]] = [[] for _ in requests]
    with no_compilation(), restarted(engine).running():
        tickets = [engine.submit(request, found.append)
                   for request, found in zip(requests, events, strict=True)]
        assert all(ticket.wait(WAIT) for ticket in tickets)
    assert engine.load.active == engine.load.waiting == 0
    for request, found in zip(requests, events, strict=True):
        settings = dataclasses.asdict(request.sampling)
        if model.is_byte_level:
            data = decoding.generate(model, bytes(request.ids), **settings)[0].data
            expected, ended = list(data), False
        else:
            continued = decoding.generate_ids(model, [request.ids], **settings)[0]
            expected, ended = continued.ids.tolist(), continued.ended
        *tokens, last = found
        assert [token.id for token in tokens] == expected
        assert last._replace(token=None) == Finished("stop" if ended else "length")
        assert (last.token is not None) == ended
        assert all(len(token.top) == request.n_top for token in tokens)


def test_a_stream_of_events_ends_with_its_reader(networks: dict[str, Any]) -> None:
    """The same events as those delivered to a function; closing the iterator cancels the request."""
    engine, delivered = network(networks, "llama")[1], list[Any]()
    request = Request([20, 21], Sampling(max_new=20, seed=1), end_ids=())
    with restarted(engine).running():
        events = list(engine.stream(request))
        engine.submit(request, delivered.append).wait(WAIT)
        assert events == delivered and events[-1] == Finished("length")
        left = engine.stream(dataclasses.replace(request, sampling=Sampling(max_new=140)))
        next(left)
        left.close()
        deadline = time.monotonic() + WAIT
        while engine.load.active and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.load.active == 0
        with pytest.raises(InputError, match="prompt: expected at least one token"):
            engine.stream(Request([], Sampling()))


def test_programs_compiled_when_needed(networks: dict[str, Any]) -> None:
    model, engine = network(networks, "llama")
    lazy = Engine(model, slots=3, max_len=MAX_LEN)
    request = Request([20, 21], Sampling(max_new=5, seed=1), end_ids=())
    with lazy.running(ahead=False), restarted(engine).running():
        assert list(lazy.stream(request)) == list(engine.stream(request))
    assert 0 < len(lazy.programs._programs) < len(engine.programs._programs)


@pytest.mark.parametrize("name", EACH)
def test_log_probabilities_and_the_most_likely_tokens(networks: dict[str, Any], name: str) -> None:
    """Against the whole sequence at once, without caches."""
    model, engine = network(networks, name)
    ids, found = [50, 51, 52, 53], list[Any]()
    with restarted(engine).running():
        engine.submit(Request(ids, Sampling(max_new=6, temperature=1.0, seed=3), n_top=3), found.append
                      ).wait(WAIT)
    tokens = [event for event in found if isinstance(event, Token)]
    whole = np.array([*ids, *(token.id for token in tokens)])[None]
    logits = np.asarray(jax.jit(lambda ids: model(ids))(whole))[0, :, :engine.vocab_size]
    tolerance = noise(logits, steps=8)
    for i, token in enumerate(tokens):
        row = logits[len(ids) - 1 + i].astype(np.float64)
        expected = row - np.log(np.sum(np.exp(row - row.max()))) - row.max()
        assert token.log_prob == pytest.approx(expected[token.id], abs=tolerance)
        best = np.argsort(-expected, kind="stable")[:3]
        np.testing.assert_allclose([log_prob for _, log_prob in token.top], expected[best], atol=tolerance)
        assert [id for id, _ in token.top] == best.tolist()


@pytest.mark.parametrize("name", EACH)
def test_signals_of_the_prompts_pass(networks: dict[str, Any], name: str) -> None:
    """The final stream, and a request that abstains because of it."""
    model, engine = network(networks, name)
    ids, streams, found = [50, 51, 52, 53, 54], list[Any](), list[Any]()

    def observe(outputs: Any) -> bool:
        streams.append(outputs)
        return len(streams) > 1
    with restarted(engine).running():
        for _ in range(2):
            engine.submit(Request(ids, Sampling(max_new=2, temperature=0.0), observe=observe), found.append
                          ).wait(WAIT)
    assert found[0] == Finished("abstained") and found[-1] == Finished("length") and len(found) == 4
    tap = Tap(record=("resid_post",))
    expected = np.asarray(jax.jit(lambda ids: model.tapped(ids, tap)[1]["resid_post"])(np.array([ids])))
    np.testing.assert_allclose(streams[0], expected[:, 0, -1], atol=noise(expected, steps=4))


@pytest.mark.parametrize("name", ["llama", pytest.param("vanilla", marks=pytest.mark.exhaustive)])
def test_question_signals_match_the_reader(name: str) -> None:
    """Crystallisation from the pass that fills the cache equals that of `PromptReader`."""
    model = random_network(CONFIGS[name], 0)[0]
    signals = PromptSignals(lens_hooks(model))
    engine = Engine(model, slots=2, max_len=64, signals=signals)
    prompts = [PromptIds(list(range(40, 50)), 2, 7), PromptIds(list(range(30, 60)), 0, 30),
               PromptIds(list(range(41, 49)), 0, 0)]
    found: list[Any] = []
    with engine.running():
        for prompt in prompts:
            engine.submit(Request(prompt.ids, Sampling(max_new=0), question=(prompt.start, prompt.stop),
                                  observe=lambda outputs: found.append(outputs) or True), lambda event: None
                          ).wait(WAIT)
    expected = dict(PromptReader(model)(prompts))
    for i, outputs in enumerate(found):
        for one, other in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected[i]), strict=True):
            np.testing.assert_allclose(one, other, atol=noise(5.0, steps=8))


def test_cancelling_and_failing_requests_leave_the_engine_running(networks: dict[str, Any]) -> None:
    _, engine = network(networks, "llama")
    request = Request([20, 21], Sampling(max_new=100, temperature=0.0), end_ids=())

    def fails(event: Any) -> None:
        raise OSError("the client is gone")
    events: list[Any] = []
    with restarted(engine).running():
        failing = engine.submit(request, fails)
        assert failing.wait(WAIT)
        observed = engine.submit(dataclasses.replace(request, observe=lambda outputs: 1 / 0), events.append)
        assert observed.wait(WAIT) and events == [Finished("error", "division by zero")]
        tickets = [engine.submit(request, lambda event: None) for _ in range(5)]
        for ticket in tickets:
            ticket.cancel()
        assert all(ticket.wait(WAIT) for ticket in tickets)
        assert engine.call(lambda: 41 + 1).result(WAIT) == 42
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 / 0).result(WAIT)
        assert engine.load.active == engine.load.waiting == 0


def test_a_damaged_network_is_an_error_not_a_text(networks: dict[str, Any]) -> None:
    model = random_network(CONFIGS["llama"], 0)[0]
    model.embed.kernel[...] = model.embed.kernel[...] * np.nan
    engine, events = Engine(model, slots=1, max_len=64), list[Any]()
    with engine.running():
        engine.submit(Request([20], Sampling(max_new=3)), events.append).wait(WAIT)
    assert len(events) == 1 and events[0].reason == "error" and "damaged" in events[0].error


def test_the_queue_is_limited_and_drained(networks: dict[str, Any]) -> None:
    """With `drain` all accepted requests finish; without, they are cancelled."""
    _, engine = network(networks, "llama")
    request = Request([20, 21], Sampling(max_new=30, temperature=0.0), end_ids=())
    engine.max_waiting, gate, events = 2, threading.Event(), list[Any]()
    try:
        restarted(engine).start()
        engine.call(gate.wait)  # nothing is admitted until it is set
        tickets = [engine.submit(request, events.append) for _ in range(5)]
        with pytest.raises(Full):
            engine.submit(request, events.append)
        threading.Timer(0.2, gate.set).start()
        assert engine.stop(drain=True, timeout=WAIT)
        assert all(ticket.wait(0) for ticket in tickets)
        assert sum(event == Finished("length") for event in events) == 5
        with pytest.raises(Full):
            engine.submit(request, events.append)
        restarted(engine).start()
        assert engine.alive
        ticket = engine.submit(dataclasses.replace(request, sampling=Sampling(max_new=140)), events.append)
        deadline = time.monotonic() + WAIT
        while not isinstance(events[-1], Token) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stop(drain=False, timeout=WAIT) and not engine.alive
        assert ticket.wait(0) and events[-1] == Finished("cancelled")
    finally:
        gate.set()
        engine.max_waiting = 64


@pytest.mark.parametrize(("change", "message"), [
    ({"ids": []}, "prompt: expected at least one token, found none"),
    ({"ids": [80]}, "prompt: expected tokens from 0 to 79, found 80"),
    ({"ids": [-1]}, "prompt: expected tokens from 0 to 79, found -1"),
    ({"ids": [1] * 149}, "prompt: expected at most 150 tokens together with the 2 new ones, found 149"),
    ({"n_top": 21}, "n_top: expected 0 to 20, found 21"),
])
def test_invalid_requests_raise(networks: dict[str, Any], change: dict[str, Any], message: str) -> None:
    _, engine = network(networks, "llama")
    request = dataclasses.replace(Request([1], Sampling(max_new=2)), **change)
    with pytest.raises(InputError, match=message):
        engine.submit(request, lambda event: None)


@pytest.mark.parametrize(("options", "message"), [
    ({"slots": 0}, "slots: expected 1 to 1024, found 0"), ({"max_len": 1}, "max_len: expected 2 to"),
    ({"max_waiting": -1}, "max_waiting: expected 0 to")])
def test_invalid_settings_raise(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(random_network(CONFIGS["llama"], 0)[0], **options)


def test_learned_positions_limit_the_length() -> None:
    with pytest.raises(InputError, match="max_len: expected 2 to 150, found 151"):
        Engine(random_network(CONFIGS["vanilla"], 0)[0], max_len=151)
