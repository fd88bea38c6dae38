"""Decoding with caches matches the plain forward pass; stop strings; invalid arguments."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.monitoring
import numpy as np
import pytest

import tilelli_jax
from tests.reference_impl.memorised_text import reciter
from tests.reference_impl.random_weights import random_network
from tests.reference_impl.uncached import Forward, forward_of, logits_before
from tests.tolerance import noise
from tilelli_jax.errors import InputError
from tilelli_jax.generation import decoding
from tilelli_jax.models import ModelConfig, sampling
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig

WINDOW = 48
LITE = RoutedConfig(d_model=16, n_layers=2, max_seq_len=WINDOW, n_heads=2, d_head=4, top_k=3,
                    dense_expand=2)
PARENT = dataclasses.replace(LITE, pathways=("local", "wide", "state", "sparse", "dense"), n_heads=1,
                             positions="none")
VANILLA = VanillaConfig(d_model=16, n_layers=2, max_seq_len=WINDOW, n_heads=2, dense_expand=2)
ALL = ("conv", "attention", "dense", "router", "embed", "unembed")
CASES: dict[str, ModelConfig] = {
    "lite": LITE,
    "lite ternary": dataclasses.replace(LITE, quantizer="ternary", tie_embeddings=True),
    "parent": PARENT,
    "parent ternary": dataclasses.replace(PARENT, quantizer="ternary"),
    "lite summed": dataclasses.replace(LITE, head_reduction="sum", router_bias=True),
    "parent banks": dataclasses.replace(PARENT, n_banks=2, second_norm="mix", conv_bias=True),
    "atome": dataclasses.replace(LITE, pathways=("local", "state", "sparse"), n_heads=1, positions="none",
                                 quantizer="ternary", quantize=ALL),
    "all in one": dataclasses.replace(
        PARENT, n_layers=1, n_banks=2, second_norm="mix", conv_bias=True, router_bias=True,
        head_reduction="sum", quantizer="ternary", quantize=ALL),
    "vanilla": VANILLA,
    "vanilla without positions": dataclasses.replace(VANILLA, positions="none"),
    **{name: dataclasses.replace(PARENT, quantizer=name, quantize=ALL, d_model=12, second_norm="dense")
       for name in ("ternary_row", "hadamard", "lsq", "power3", "power3_row")},
}
PROMPTS = [b"q", b"Once upon a time, there", "Grüße an alle".encode(), bytes(range(200, 206))]


# Tolerance between logits with and without caches: rounding in two layers, of sums below 20.
NOISE = noise(20, steps=2)


@functools.cache
def network(case: str) -> Decoder:
    return random_network(CASES[case], seed=0)[0]


@functools.cache
def forward(case: str) -> Forward:
    return forward_of(network(case))


def uncached(case: str, prompts: Sequence[bytes], outputs: Sequence[bytes]) -> np.ndarray:
    """The logits of each new byte without caches."""
    window = WINDOW if CASES[case].positions == "learned" else None
    logits = logits_before(forward(case), prompts, outputs, window)
    assert np.abs(logits).max() < 20
    return logits


@functools.cache
def candidates() -> Callable[..., jax.Array]:
    """Tokens that may be sampled from logits `[rows, vocab]`, without and with noise: `[rows, 5]`."""
    offset = np.random.default_rng(0).choice([-NOISE, NOISE], (5, 256)).astype(np.float32)
    offset[0] = 0

    def row_candidates(seed: jax.Array, index: jax.Array, count: jax.Array, logits: jax.Array,
                       *options: float) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), count)
        return jax.vmap(lambda offset: sampling.sample(key, logits + offset, *options))(offset)
    return jax.jit(jax.vmap(row_candidates, (None, 0, 0, 0, None, None, None)))


# Cases of the quick tests: together they have every kind of layer and cache.
QUICK = ("all in one", "vanilla")


@pytest.mark.filterwarnings("ignore:decoding to")
@pytest.mark.parametrize("case", [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES])
def test_greedy_bytes_match_the_forward_pass_without_caches(case: str) -> None:
    """From one byte to beyond max_seq_len: prefill, cache, then a sliding window or a growing cache."""
    results = tilelli_jax.generate(network(case), PROMPTS, max_new=40, temperature=0)
    outputs = [result.data for result in results]
    for prompt, output, logits in zip(PROMPTS, outputs, uncached(case, PROMPTS, outputs), strict=True):
        chosen = logits[np.arange(40), list(output)]
        assert (chosen >= logits.max(1) - 2 * NOISE).all(), (prompt, np.flatnonzero(chosen < logits.max(1)))
    assert len({byte for output in outputs for byte in output}) > 8, "too uniform for a meaningful test"


@pytest.mark.filterwarnings("ignore:decoding to")
@pytest.mark.parametrize(("case", "batch_size"), [
    ("lite", 2), pytest.param("lite", 3, marks=pytest.mark.exhaustive),
    pytest.param("parent", 3, marks=pytest.mark.exhaustive)])
def test_sampled_bytes_use_the_random_stream_of_their_row(case: str, batch_size: int) -> None:
    model, options = network(case), {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    results = tilelli_jax.generate(model, PROMPTS, max_new=40, seed=5, **options)
    logits = uncached(case, PROMPTS, [result.data for result in results])
    rows, counts = np.indices(logits.shape[:2])
    allowed = candidates()(5, rows.ravel(), counts.ravel(), logits.reshape(-1, 256), *options.values())
    sampled = np.array([list(result.data) for result in results])
    assert (np.asarray(allowed) == sampled.reshape(-1, 1)).any(1).all()
    # The result does not depend on the batch size or the other prompts.
    again = tilelli_jax.generate(model, PROMPTS, max_new=40, seed=5, batch_size=batch_size, **options)
    assert again == results
    others = [b"x"] * (len(PROMPTS) - 1)
    mixed = tilelli_jax.generate(model, [*others, PROMPTS[-1]], max_new=40, seed=5, **options)
    assert mixed[-1] == results[-1]
    # Another seed or another row is another random stream.
    assert tilelli_jax.generate(model, PROMPTS, max_new=40, seed=6, **options) != results
    same = tilelli_jax.generate(model, PROMPTS[:1] * 2, max_new=40, seed=5, **options)
    assert same[0] == results[0] and same[1] != same[0]


@pytest.mark.filterwarnings("ignore:decoding to")
@pytest.mark.parametrize("case", ["lite", pytest.param("parent", marks=pytest.mark.exhaustive)])
def test_prompts_at_and_beyond_the_window(case: str) -> None:
    text = b"The cat sat on the mat and looked at the moon. " * 3
    prompts = [text[:length] for length in (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW)]
    results = [tilelli_jax.generate(network(case), prompt, max_new=3, temperature=0)[0] for prompt in prompts]
    logits = uncached(case, prompts, [result.data for result in results])
    outputs = np.array([list(result.data) for result in results])
    chosen = np.take_along_axis(logits, outputs[..., None], axis=2)
    assert (chosen[..., 0] >= logits.max(2) - 2 * NOISE).all()
    for prompt, result in zip(prompts, results, strict=True):
        assert result.context_truncated == (case == "lite" and len(prompt) + 2 > WINDOW)


def test_exceeding_the_trained_length_warns_the_caller_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_chunks", lambda *_: iter(()))
    for case, message in (("lite", "past 48 each sees the last 48 only"),
                          ("parent", "past the trained length of 48")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tilelli_jax.generate(network(case), ["ab", "abc"], max_new=WINDOW - 2)
            assert not caught, "the last byte is predicted from all of WINDOW others"
            tilelli_jax.generate(network(case), ["ab", "abc"], max_new=WINDOW - 1)
            list(decoding.stream(network(case), [np.zeros(3, np.uint8)], max_new=WINDOW - 1, chunk=20))
        assert len(caught) == 2
        for warning, decoded in zip(caught, (WINDOW + 2, WINDOW + 2), strict=True):
            assert str(warning.message) == f"decoding to {decoded} tokens: {message}"
            assert warning.filename == __file__


def test_bytes_do_not_depend_on_the_chunk_size() -> None:
    model, prompts = network("lite"), [np.frombuffer(p, np.uint8) for p in PROMPTS]
    with pytest.warns(UserWarning, match="sees the last"):
        whole = tilelli_jax.generate(model, PROMPTS, max_new=40, seed=3)
    for size in (1, 7):
        with pytest.warns(UserWarning):
            chunks = list(decoding.stream(model, prompts, max_new=40, seed=3, chunk=size))
        assert [row.tobytes() for row in np.concatenate([chunk.new for chunk in chunks], axis=1)] == [
            result.data for result in whole]
        # The window of a row slides from the first byte with more than WINDOW bytes before it.
        ends = np.cumsum([chunk.new.shape[1] for chunk in chunks])
        for i, prompt in enumerate(prompts):
            assert ([chunk.context_truncated[i] for chunk in chunks]
                    == [len(prompt) + n - 1 > WINDOW for n in ends])


def test_many_prompts_few_bytes_and_no_bytes() -> None:
    model = network("lite")
    prompts = [bytes([i]) * (1 + i % 5) for i in range(64)]
    results = tilelli_jax.generate(model, prompts, max_new=2, temperature=0, batch_size=len(PROMPTS))
    single, = tilelli_jax.generate(model, prompts[-1], max_new=2, temperature=0)
    assert len(results) == 64 and results[-1] == single and len(set(results)) > 3
    for prompt in ("x", "x" * 100):
        assert tilelli_jax.generate(model, prompt, max_new=0) == [decoding.Continuation(b"", False, False)]
    assert tilelli_jax.generate(model, [], max_new=5) == []


def test_other_settings_need_no_new_compilation(request: pytest.FixtureRequest) -> None:
    compiled: list[str] = []

    def listen(event: str, _: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(more.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listen))
    jax.jit(lambda x: x + 1)(1.0)
    assert compiled, "the event of a compilation has another name"
    model, other = network("lite"), random_network(LITE, seed=1)[0]
    with pytest.warns(UserWarning, match="sees the last"):
        tilelli_jax.generate(model, ["abc", "defgh"], max_new=46, temperature=0.8)
        list(decoding.stream(model, [np.zeros(3, np.uint8)], max_new=48, chunk=8))
    compiled.clear()
    with pytest.warns(UserWarning, match="sees the last"):
        for options in ({}, {"temperature": 0.0}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.5},
                        {"seed": 7}, {"stop": ["zz"]}, {"max_new": 47}):
            tilelli_jax.generate(model, ["abc", "defgh"], **{"max_new": 46} | options)
        tilelli_jax.generate(model, ["another one", "x"], max_new=40)
        tilelli_jax.generate(other, ["abc", "defgh"], max_new=46)
        for n in (48, 49, 55):
            list(decoding.stream(model, [np.zeros(2, np.uint8)], max_new=n, chunk=8))
    assert compiled == []


@pytest.mark.parametrize("length", [1, 63, 64, 65, 512, 513, 5000, 100_000])
def test_lengths_are_rounded_up_to_few_sizes(length: int) -> None:
    size = decoding.bucket(length)
    assert length <= size <= max(64, length * 1.25 + 64)
    assert decoding.bucket(length, 48) == 48
    sizes = {decoding.bucket(n) for n in range(1, length + 1)}
    assert len(sizes) <= 8 + 4 * np.log2(max(length / 512, 1)) + 1


# Stop strings, with a network that recites a text.

SCRIPT = "abcdefghijklmnopqrstuvwxyzäöü€🙂Z0123456789ABCDEFGHIJKLMNOPQRSTUVWXYabcde".encode()


@functools.cache
def reciting() -> Decoder:
    return reciter(SCRIPT)


@pytest.mark.parametrize(("stop", "expected"), [
    ("jkl", SCRIPT[4:9]),
    (["xyz", "jkl"], SCRIPT[4:9]),  # the earliest ends it
    (["jklX"], SCRIPT[4:104]),
    ("e", b""),  # immediately
    ("abc", SCRIPT[4:-5]),  # its occurrence in the prompt does not count
    ("", SCRIPT[4:104]),
    ("ö", SCRIPT[4:28]),
    ("\N{SLIGHTLY SMILING FACE}Z", SCRIPT[4:35]),
    ("STU", SCRIPT[4:SCRIPT.index(b"STU")]),
    ("VW", SCRIPT[4:SCRIPT.index(b"VW")]),
])
def test_stop_strings(stop: str | list[str], expected: bytes) -> None:
    result, = tilelli_jax.generate(reciting(), "abcd", max_new=100, temperature=0, stop=stop)
    assert result.stopped == (expected != SCRIPT[4:104])
    assert result.data == (expected if result.stopped else expected.ljust(100, b"\0"))


def test_a_stop_string_across_two_chunks() -> None:
    model = reciting()
    for ends in range(decoding.BUCKET - 3, decoding.BUCKET + 3):
        stop = SCRIPT[4 + ends:4 + ends + 3].decode()
        result, = tilelli_jax.generate(model, "abcd", max_new=90, temperature=0, stop=stop)
        assert result.data == SCRIPT[4:4 + ends] and result.stopped


def test_one_row_stops_and_the_others_continue() -> None:
    results = tilelli_jax.generate(reciting(), ["a", "a" * 30], max_new=40, temperature=0, stop="xyz")
    assert [result.stopped for result in results] == [True, False]
    assert [result.data for result in results] == [SCRIPT[1:23], SCRIPT[30:70]]


def test_invalid_utf8_is_replaced_in_text() -> None:
    model = reciter(b"\xff\xfea\xc3(\x80z")
    result, = tilelli_jax.generate(model, b"\xff", max_new=6, temperature=0)
    assert result.data == b"\xfea\xc3(\x80z"
    assert result.text == "�a�(�z"


@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompts": ""}, "the prompt is empty; expected at least one byte"),
    ({"prompts": ["a", ""]}, "prompt 1 is empty; expected at least one byte"),
    ({"max_new": -1}, "max_new: expected an integer ≥ 0 and ≤ 1048576, found -1"),
    ({"temperature": -0.1}, "temperature: expected a number ≥ 0 and ≤ 1e.30, found -0.1"),
    ({"temperature": float("nan")}, "temperature: expected a number ≥ 0 and ≤ 1e.30, found nan"),
    ({"temperature": float("inf")}, "temperature: expected a number ≥ 0 and ≤ 1e.30, found inf"),
    ({"prompts": 5}, "prompts: expected text, bytes or a list of them, found 5"),
    ({"prompts": ["a", 5]}, r"prompts: expected text, bytes or a list of them, found \['a', 5\]"),
    ({"max_new": 1.5}, "max_new: expected an integer ≥ 0 and ≤ 1048576, found 1.5"),
    ({"temperature": "hot"}, "temperature: expected a number ≥ 0 and ≤ 1e.30, found 'hot'"),
    ({"batch_size": 0}, "batch_size: expected an integer ≥ 1, found 0"),
    ({"batch_size": 1.5}, "batch_size: expected an integer ≥ 1, found 1.5"),
    ({"stop": 3}, "stop: expected text, bytes or a list of them, found 3"),
    ({"stop": None}, "stop: expected text, bytes or a list of them, found None"),
    ({"prompts": "\ud800"}, "prompts: not text: "),
    ({"model": "runs/demo/model"}, r"model: expected a causal network, found "),
    ({"max_new": True}, "max_new: expected an integer ≥ 0 and ≤ 1048576, found True"),
    ({"temperature": 10**400}, "temperature: expected a number ≥ 0 and ≤ 1e\\+30, found 1000"),
    ({"top_k": -1}, "top_k: expected an integer ≥ 0, found -1"),
    ({"top_p": 0.0}, "top_p: expected a number > 0 and ≤ 1, found 0.0"),
    ({"top_p": 1.1}, "top_p: expected a number > 0 and ≤ 1, found 1.1"),
    ({"seed": -1}, "seed: expected an integer ≥ 0 and ≤ 4294967295, found -1"),
    ({"seed": 2**32}, "seed: expected an integer"),
])
def test_invalid_arguments_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tilelli_jax.generate(**{"model": reciting(), "prompts": "a"} | arguments)


def test_numpy_numbers_and_bytes_are_accepted() -> None:
    result, = tilelli_jax.generate(reciting(), b"abcd", max_new=np.int64(9), temperature=np.float32(0),
                                   stop=b"jkl")
    assert result == (SCRIPT[4:9], True, False)


def test_a_vocabulary_smaller_than_256_raises() -> None:
    model = random_network(dataclasses.replace(LITE, vocab_size=100), seed=0)[0]
    with pytest.raises(InputError, match="vocab_size: expected at least 256 to continue bytes, found 100"):
        tilelli_jax.generate(model, "a")


def test_tokens_above_255_are_never_sampled() -> None:
    model = random_network(dataclasses.replace(LITE, vocab_size=1000, n_layers=1), seed=0)[0]
    logits = logits_before(forward_of(model), [[i] for i in range(8)], [[0]] * 8, None)[:, 0]
    assert logits.argmax(1).max() >= 256
    results = tilelli_jax.generate(model, [bytes([i]) for i in range(8)], max_new=1, temperature=0)
    chosen = logits[np.arange(8), [result.data[0] for result in results]]
    assert (chosen >= logits[:, :256].max(1) - 2 * NOISE).all()


def test_warnings_point_to_the_caller() -> None:
    import tilelli_jax
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tilelli_jax.generate(reciting(), "ab", max_new=128)
    assert [warning.filename for warning in caught] == [__file__]
