"""Decoding with caches against the plain forward pass; stop strings; bad arguments."""

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
from tests.restated.random_weights import random_network
from tests.restated.reciter import reciter
from tests.restated.uncached import Forward, forward_of, logits_before
from tests.tolerance import noise
from tilelli_jax import decoding, sampling
from tilelli_jax.errors import InputError
from tilelli_jax.models import ModelConfig
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


# How far logits with caches and without may lie apart: rounding, in two layers, of sums no larger than 20.
NOISE = noise(20, steps=2)


@functools.cache
def network(case: str) -> Decoder:
    return random_network(CASES[case], seed=0)[0]


@functools.cache
def forward(case: str) -> Forward:
    return forward_of(network(case))


def uncached(case: str, prompts: Sequence[bytes], made: Sequence[bytes]) -> np.ndarray:
    """The logits of each new byte without caches."""
    window = WINDOW if CASES[case].positions == "learned" else None
    found = logits_before(forward(case), prompts, made, window)
    assert np.abs(found).max() < 20
    return found


@functools.cache
def candidates() -> Callable[..., jax.Array]:
    """What may be drawn from logits `[rows, vocab]`: `[rows, 5]`, as they are and with noise."""
    off = np.random.default_rng(0).choice([-NOISE, NOISE], (5, 256)).astype(np.float32)
    off[0] = 0

    def one(seed: jax.Array, index: jax.Array, count: jax.Array, logits: jax.Array, *how: float) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), count)
        return jax.vmap(lambda off: sampling.sample(key, logits + off, *how))(off)
    return jax.jit(jax.vmap(one, (None, 0, 0, 0, None, None, None)))


# Of the cases, in the first tier, those which together have every kind of layer and of cache.
FIRST = ("all in one", "vanilla")


@pytest.mark.filterwarnings("ignore:decoding to")
@pytest.mark.parametrize("case", [
    case if case in FIRST else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES])
def test_a_batch_gives_the_likeliest_bytes_without_caches(case: str) -> None:
    """From one byte to past max_seq_len: prefilled, cached, and then sliding or growing."""
    found = [made.data for made in tilelli_jax.generate(network(case), PROMPTS, max_new=40, temperature=0)]
    for prompt, made, logits in zip(PROMPTS, found, uncached(case, PROMPTS, found), strict=True):
        chosen = logits[np.arange(40), list(made)]
        assert (chosen >= logits.max(1) - 2 * NOISE).all(), (prompt, np.flatnonzero(chosen < logits.max(1)))
    assert len({byte for made in found for byte in made}) > 8, "too dull to tell anything"


@pytest.mark.filterwarnings("ignore:decoding to")
@pytest.mark.parametrize(("case", "batch_size"), [
    ("lite", 2), pytest.param("lite", 3, marks=pytest.mark.exhaustive),
    pytest.param("parent", 3, marks=pytest.mark.exhaustive)])
def test_drawn_bytes_are_those_of_the_rows_own_stream(case: str, batch_size: int) -> None:
    model, how = network(case), {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    found = tilelli_jax.generate(model, PROMPTS, max_new=40, seed=5, **how)
    logits = uncached(case, PROMPTS, [made.data for made in found])
    rows, counts = np.indices(logits.shape[:2])
    may = candidates()(5, rows.ravel(), counts.ravel(), logits.reshape(-1, 256), *how.values())
    drawn = np.array([list(made.data) for made in found])
    assert (np.asarray(may) == drawn.reshape(-1, 1)).any(1).all()
    # However many go through the network at once, and in whatever company.
    assert tilelli_jax.generate(model, PROMPTS, max_new=40, seed=5, batch_size=batch_size, **how) == found
    others = [b"x"] * (len(PROMPTS) - 1)
    assert tilelli_jax.generate(model, [*others, PROMPTS[-1]], max_new=40, seed=5, **how)[-1] == found[-1]
    # And another seed, or another row, is another stream.
    assert tilelli_jax.generate(model, PROMPTS, max_new=40, seed=6, **how) != found
    same = tilelli_jax.generate(model, PROMPTS[:1] * 2, max_new=40, seed=5, **how)
    assert same[0] == found[0] and same[1] != same[0]


@pytest.mark.filterwarnings("ignore:decoding to")
@pytest.mark.parametrize("case", ["lite", pytest.param("parent", marks=pytest.mark.exhaustive)])
def test_prompts_at_and_past_the_window(case: str) -> None:
    text = b"The cat sat on the mat and looked at the moon. " * 3
    prompts = [text[:length] for length in (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW)]
    found = [tilelli_jax.generate(network(case), prompt, max_new=3, temperature=0)[0] for prompt in prompts]
    logits = uncached(case, prompts, [made.data for made in found])
    chosen = np.take_along_axis(logits, np.array([list(made.data) for made in found])[..., None], axis=2)
    assert (chosen[..., 0] >= logits.max(2) - 2 * NOISE).all()
    for prompt, made in zip(prompts, found, strict=True):
        assert made.slid == (case == "lite" and len(prompt) + 2 > WINDOW)


def test_passing_the_trained_length_is_said_once_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_chunks", lambda *_: iter(()))
    for case, says in (("lite", "past 48 each sees the last 48 only"),
                       ("parent", "past the trained length of 48")):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tilelli_jax.generate(network(case), ["ab", "abc"], max_new=WINDOW - 2)
            assert not said, "the last byte is predicted from all of WINDOW others"
            tilelli_jax.generate(network(case), ["ab", "abc"], max_new=WINDOW - 1)
            list(decoding.stream(network(case), [np.zeros(3, np.uint8)], max_new=WINDOW - 1, chunk=20))
        assert len(said) == 2
        for warning, decoded in zip(said, (WINDOW + 2, WINDOW + 2), strict=True):
            assert str(warning.message) == f"decoding to {decoded} tokens: {says}"
            assert warning.filename == __file__


def test_the_same_bytes_in_chunks_of_any_size() -> None:
    model, prompts = network("lite"), [np.frombuffer(p, np.uint8) for p in PROMPTS]
    with pytest.warns(UserWarning, match="sees the last"):
        whole = tilelli_jax.generate(model, PROMPTS, max_new=40, seed=3)
    for size in (1, 7):
        with pytest.warns(UserWarning):
            chunks = list(decoding.stream(model, prompts, max_new=40, seed=3, chunk=size))
        assert [row.tobytes() for row in np.concatenate([chunk.new for chunk in chunks], axis=1)] == [
            made.data for made in whole]
        # The window slides for a row from the byte on that has more than WINDOW before it.
        at = np.cumsum([chunk.new.shape[1] for chunk in chunks])
        for i, prompt in enumerate(prompts):
            assert [chunk.slid[i] for chunk in chunks] == [len(prompt) + n - 1 > WINDOW for n in at]


def test_many_prompts_few_bytes_and_none() -> None:
    model = network("lite")
    prompts = [bytes([i]) * (1 + i % 5) for i in range(64)]
    found = tilelli_jax.generate(model, prompts, max_new=2, temperature=0, batch_size=len(PROMPTS))
    one, = tilelli_jax.generate(model, prompts[-1], max_new=2, temperature=0)
    assert len(found) == 64 and found[-1] == one and len(set(found)) > 3
    for prompt in ("x", "x" * 100):
        assert tilelli_jax.generate(model, prompt, max_new=0) == [decoding.Continuation(b"", False, False)]
    assert tilelli_jax.generate(model, [], max_new=5) == []


def test_nothing_is_compiled_for_other_numbers_of_the_same_kind(request: pytest.FixtureRequest) -> None:
    compiled: list[str] = []

    def listen(event: str, _: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(more.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listen))
    jax.jit(lambda x: x + 1)(1.0)
    assert compiled, "compiling is called otherwise"
    model, other = network("lite"), random_network(LITE, seed=1)[0]
    with pytest.warns(UserWarning, match="sees the last"):
        tilelli_jax.generate(model, ["abc", "defgh"], max_new=46, temperature=0.8)
        list(decoding.stream(model, [np.zeros(3, np.uint8)], max_new=48, chunk=8))
    compiled.clear()
    with pytest.warns(UserWarning, match="sees the last"):
        for how in ({}, {"temperature": 0.0}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.5},
                    {"seed": 7}, {"stop": ["zz"]}, {"max_new": 47}):
            tilelli_jax.generate(model, ["abc", "defgh"], **{"max_new": 46} | how)
        tilelli_jax.generate(model, ["another one", "x"], max_new=40)
        tilelli_jax.generate(other, ["abc", "defgh"], max_new=46)
        for n in (48, 49, 55):
            list(decoding.stream(model, [np.zeros(2, np.uint8)], max_new=n, chunk=8))
    assert compiled == []


@pytest.mark.parametrize("length", [1, 63, 64, 65, 512, 513, 5000, 100_000])
def test_lengths_are_rounded_up_to_few_sizes(length: int) -> None:
    size = decoding._bucket(length)
    assert length <= size <= max(64, length * 1.25 + 64)
    assert decoding._bucket(length, 48) == 48
    sizes = {decoding._bucket(n) for n in range(1, length + 1)}
    assert len(sizes) <= 8 + 4 * np.log2(max(length / 512, 1)) + 1


# Stop strings, on a network that recites.

SCRIPT = "abcdefghijklmnopqrstuvwxyzäöü€🙂Z0123456789ABCDEFGHIJKLMNOPQRSTUVWXYabcde".encode()


@functools.cache
def reciting() -> Decoder:
    return reciter(SCRIPT)


@pytest.mark.parametrize(("stop", "expected"), [
    ("jkl", SCRIPT[4:9]),
    (["xyz", "jkl"], SCRIPT[4:9]),  # whichever comes first
    (["jklX"], SCRIPT[4:104]),
    ("e", b""),  # at once
    ("abc", SCRIPT[4:-5]),  # not in the prompt
    ("", SCRIPT[4:104]),
    ("ö", SCRIPT[4:28]),
    ("\N{SLIGHTLY SMILING FACE}Z", SCRIPT[4:35]),
    ("STU", SCRIPT[4:SCRIPT.index(b"STU")]),
    ("VW", SCRIPT[4:SCRIPT.index(b"VW")]),
])
def test_stop_strings(stop: str | list[str], expected: bytes) -> None:
    made, = tilelli_jax.generate(reciting(), "abcd", max_new=100, temperature=0, stop=stop)
    assert made.stopped == (expected != SCRIPT[4:104])
    assert made.data == (expected if made.stopped else expected.ljust(100, b"\0"))


def test_a_stop_string_across_the_border_of_two_chunks() -> None:
    model = reciting()
    for at in range(decoding.BUCKET - 3, decoding.BUCKET + 3):
        stop = SCRIPT[4 + at:4 + at + 3].decode()
        made, = tilelli_jax.generate(model, "abcd", max_new=90, temperature=0, stop=stop)
        assert made.data == SCRIPT[4:4 + at] and made.stopped


def test_one_row_stops_and_the_others_go_on() -> None:
    found = tilelli_jax.generate(reciting(), ["a", "a" * 30], max_new=40, temperature=0, stop="xyz")
    assert [made.stopped for made in found] == [True, False]
    assert [made.data for made in found] == [SCRIPT[1:23], SCRIPT[30:70]]


def test_bytes_that_are_no_text() -> None:
    model = reciter(b"\xff\xfea\xc3(\x80z")
    made, = tilelli_jax.generate(model, b"\xff", max_new=6, temperature=0)
    assert made.data == b"\xfea\xc3(\x80z"
    assert made.text == "�a�(�z"


@pytest.mark.parametrize(("arguments", "says"), [
    ({"prompts": ""}, "the prompt is empty; expected at least one byte"),
    ({"prompts": ["a", ""]}, "prompt 1 is empty; expected at least one byte"),
    ({"max_new": -1}, "max_new: expected a whole number ≥ 0 and ≤ 1048576, found -1"),
    ({"temperature": -0.1}, "temperature: expected a number ≥ 0 and ≤ 1e.30, found -0.1"),
    ({"temperature": float("nan")}, "temperature: expected a number ≥ 0 and ≤ 1e.30, found nan"),
    ({"temperature": float("inf")}, "temperature: expected a number ≥ 0 and ≤ 1e.30, found inf"),
    ({"prompts": 5}, "prompts: expected text, bytes or a list of them, found 5"),
    ({"prompts": ["a", 5]}, r"prompts: expected text, bytes or a list of them, found \['a', 5\]"),
    ({"max_new": 1.5}, "max_new: expected a whole number ≥ 0 and ≤ 1048576, found 1.5"),
    ({"temperature": "hot"}, "temperature: expected a number ≥ 0 and ≤ 1e.30, found 'hot'"),
    ({"batch_size": 0}, "batch_size: expected a whole number ≥ 1, found 0"),
    ({"batch_size": 1.5}, "batch_size: expected a whole number ≥ 1, found 1.5"),
    ({"stop": 3}, "stop: expected text, bytes or a list of them, found 3"),
    ({"stop": None}, "stop: expected text, bytes or a list of them, found None"),
    ({"prompts": "\ud800"}, "prompts: not text: "),
    ({"model": "runs/demo/model"}, r"model: expected a causal network, found "),
    ({"max_new": True}, "max_new: expected a whole number ≥ 0 and ≤ 1048576, found True"),
    ({"temperature": 10**400}, "temperature: expected a number ≥ 0 and ≤ 1e\\+30, found 1000"),
    ({"top_k": -1}, "top_k: expected a whole number ≥ 0, found -1"),
    ({"top_p": 0.0}, "top_p: expected a number > 0 and ≤ 1, found 0.0"),
    ({"top_p": 1.1}, "top_p: expected a number > 0 and ≤ 1, found 1.1"),
    ({"seed": -1}, "seed: expected a whole number ≥ 0 and ≤ 4294967295, found -1"),
    ({"seed": 2**32}, "seed: expected a whole number"),
])
def test_bad_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        tilelli_jax.generate(**{"model": reciting(), "prompts": "a"} | arguments)


def test_numbers_of_numpy_and_bytes_will_do() -> None:
    made, = tilelli_jax.generate(reciting(), b"abcd", max_new=np.int64(9), temperature=np.float32(0),
                                 stop=b"jkl")
    assert made == (SCRIPT[4:9], True, False)


def test_a_vocabulary_smaller_than_all_bytes() -> None:
    model = random_network(dataclasses.replace(LITE, vocab_size=100), seed=0)[0]
    with pytest.raises(InputError, match="vocab_size: expected at least 256 to continue bytes, found 100"):
        tilelli_jax.generate(model, "a")


def test_symbols_past_the_bytes_are_never_drawn() -> None:
    model = random_network(dataclasses.replace(LITE, vocab_size=1000, n_layers=1), seed=0)[0]
    logits = logits_before(forward_of(model), [[i] for i in range(8)], [[0]] * 8, None)[:, 0]
    assert logits.argmax(1).max() >= 256
    found = tilelli_jax.generate(model, [bytes([i]) for i in range(8)], max_new=1, temperature=0)
    chosen = logits[np.arange(8), [made.data[0] for made in found]]
    assert (chosen >= logits[:, :256].max(1) - 2 * NOISE).all()


def test_warnings_name_the_caller() -> None:
    import tilelli_jax
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tilelli_jax.generate(reciting(), "ab", max_new=128)
    assert [warning.filename for warning in said] == [__file__]
