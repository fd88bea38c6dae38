"""generate_ids: matches transformers and single-row decoding, and stops at end tokens."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilelli_jax
from tests.extras import needs_transformers
from tests.reference_impl.random_weights import random_network
from tests.reference_impl.uncached import forward_of, logits_before
from tests.references import STORED, needs
from tests.tolerance import noise
from tilelli_jax.errors import InputError
from tilelli_jax.generation import decoding
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM, Gemma4Config
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.vanilla import VanillaConfig

needs_reference = needs(STORED)
NEOX = GPTNeoXConfig(vocab_size=300, d_model=24, n_layers=2, max_seq_len=64, n_heads=3, d_hidden=40)
GEMMA = Gemma4Config(
    vocab_size=300, d_model=24, layers=("sliding", "full", "sliding", "full"), max_seq_len=64, n_heads=4,
    n_kv_heads=2, d_head=6, n_kv_heads_full=2, d_head_full=12, window=5, n_shared_layers=2, d_hidden=20,
    d_per_layer=4, vocab_per_layer=300, end_ids=())
VANILLA = VanillaConfig(vocab_size=300, d_model=16, n_layers=2, max_seq_len=16, n_heads=2)
CASES = {"gpt_neox": NEOX, "gemma4": GEMMA, "vanilla, beyond its window": VANILLA}
PROMPTS = [np.arange(1, 10), np.array([299]), np.arange(50, 53)]


# Tolerance between logits with and without caches: rounding in up to four layers, of sums below 30.
NOISE = noise(30, steps=4)
QUICK = ("gpt_neox", "vanilla, beyond its window")  # gemma4's caches: tests/models/test_gemma4.py


@functools.cache
def network(name: str) -> Any:
    return random_network(CASES[name], 0)[0]


def with_exhaustive(*names: str) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


@pytest.mark.parametrize("name", with_exhaustive(*CASES))
@pytest.mark.filterwarnings("ignore:decoding to ")
def test_greedy_ids_match_the_forward_pass(name: str) -> None:
    """Prompts of different lengths in one batch; the reference recomputes the full text for every id."""
    results = tilelli_jax.generate_ids(network(name), PROMPTS, max_new=14, temperature=0)
    ids = np.array([result.ids for result in results])
    assert ids.max() > 255  # ids, not bytes
    window = 16 if name.startswith("vanilla") else None
    logits = logits_before(forward_of(network(name)), PROMPTS, ids, window)
    assert np.abs(logits).max() < 30
    chosen = np.take_along_axis(logits, ids[..., None], axis=2)[..., 0]
    assert (chosen >= logits.max(2) - 2 * NOISE).all()
    assert ids.shape == (3, 14)
    assert not any(result.ended or result.ids.dtype != np.int32 for result in results)


@pytest.mark.parametrize("name", with_exhaustive("gpt_neox", "gemma4"))
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    """Sampled ids do not depend on the batch size: prompt i has a separate random stream."""
    model = network(name)
    batched = tilelli_jax.generate_ids(model, PROMPTS, max_new=9, temperature=0.8, top_k=50, seed=3)
    for size in (1, 2):
        separate = tilelli_jax.generate_ids(model, PROMPTS, max_new=9, temperature=0.8, top_k=50, seed=3,
                                            batch_size=size)
        assert [result.ids.tolist() for result in separate] == [result.ids.tolist() for result in batched]
    other = tilelli_jax.generate_ids(model, PROMPTS, max_new=9, temperature=0.8, top_k=50, seed=4)
    assert [result.ids.tolist() for result in other] != [result.ids.tolist() for result in batched]


def test_end_ids_end_a_continuation() -> None:
    model = random_network(NEOX, 0)[0]  # changed below
    with pytest.warns(UserWarning, match="decoding to 79 tokens: past the trained length of 64"):
        complete = [result.ids.tolist() for result in
                    tilelli_jax.generate_ids(model, PROMPTS, max_new=70, temperature=1.0)]
        end = complete[0][66]  # beyond the first chunk
        results = tilelli_jax.generate_ids(model, PROMPTS, max_new=70, temperature=1.0, end_ids=[end, 0])
        for ids, result in zip(complete, results, strict=True):
            stops = [i for i, token in enumerate(ids) if token in (end, 0)]
            assert result.ids.tolist() == ids[:stops[0] if stops else None] and result.ended == bool(stops)
        assert results[0].ended
        # By default the end ids of the configuration are used.
        model.config = dataclasses.replace(model.config, end_ids=(end, 0))
        again = tilelli_jax.generate_ids(model, PROMPTS, max_new=70, temperature=1.0)
        assert [result.ids.tolist() for result in again] == [result.ids.tolist() for result in results]
        assert [result.ids.tolist() for result in tilelli_jax.generate_ids(
            model, PROMPTS, max_new=70, temperature=1.0, end_ids=[])] == complete

        counts: list[int] = []

        def stop(ids: np.ndarray) -> int | None:
            counts.append(len(ids))
            return 66 if ids.tolist() == complete[1] else None
        results = tilelli_jax.generate_ids(model, PROMPTS, max_new=70, temperature=1.0, end_ids=[], stop=stop)
    assert [result.ids.tolist() for result in results] == [complete[0], complete[1][:66], complete[2]]
    assert [result.ended for result in results] == [False, True, False]
    assert counts == [64] * 3 + [70] * 3


@pytest.mark.parametrize(("prompts", "message"), [
    ([[]], "prompts: 0: expected token ids, at least one"),
    ([[1], [1.5]], "prompts: 1: expected token ids"),
    ([[[1]]], "prompts: 0: expected token ids"),
    ([[1, 300]], "prompts: 0: expected ids from 0 to 299, found 300"),
    ([[-1]], "prompts: 0: expected ids from 0 to 299, found -1")])
def test_invalid_prompts_raise(prompts: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tilelli_jax.generate_ids(network("gpt_neox"), prompts)


def test_generating_bytes_with_a_token_network_raises() -> None:
    with pytest.raises(InputError, match="expected a byte-level network, found family gpt_neox"):
        tilelli_jax.generate(network("gpt_neox"), "Once upon a time")


@pytest.mark.parametrize("name", with_exhaustive("gpt_neox", "gemma4"))
@pytest.mark.filterwarnings("ignore:decoding to ")
def test_caches_grow_with_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids are those of caches that have room for everything at once."""
    sizes: list[int] = []
    grown = decoding._grown

    def recorded(*args: Any) -> Any:
        sizes.append(args[-1])
        return grown(*args)
    monkeypatch.setattr(decoding, "_grown", recorded)
    options: Any = {"max_new": 300, "temperature": 0.9, "seed": 3, "end_ids": ()}
    expected, = tilelli_jax.generate_ids(network(name), PROMPTS[:1], **options)
    assert not sizes
    monkeypatch.setattr(decoding, "FIRST_ROOM", 10)
    pieces = list(decoding.stream_ids(network(name), PROMPTS[0], chunk=7, **options))
    assert [i for piece in pieces for i in piece.ids.tolist()] == expected.ids.tolist()
    assert sizes == [128, 256, 320]


@pytest.mark.parametrize("name", with_exhaustive(*CASES))
@pytest.mark.filterwarnings("ignore:decoding to ")
def test_streamed_ids_match_generate_ids(name: str) -> None:
    """For all chunk sizes, greedy and sampled, with the end token anywhere in a chunk or absent."""
    model = random_network(CASES[name], 0)[0]  # changed below
    for options in ({"temperature": 0.0}, {"temperature": 0.9, "top_k": 50, "seed": 3}):
        result, = tilelli_jax.generate_ids(model, PROMPTS[:1], max_new=20, end_ids=(), **options)
        complete = result.ids.tolist()
        assert max(complete) > 255
        for ends, chunk in (((), 1), ((), 6), ((), 50), (complete[:1], 4), (complete[11:13], 4),
                            (complete[-1:], 7)):
            expected, = tilelli_jax.generate_ids(model, PROMPTS[:1], max_new=20, end_ids=ends, **options)
            chunks = list(decoding.stream_ids(model, PROMPTS[0], max_new=20, end_ids=ends, chunk=chunk,
                                              **options))
            assert [i for piece in chunks for i in piece.ids.tolist()] == expected.ids.tolist()
            assert [piece.ended for piece in chunks] == [False] * (len(chunks) - 1) + [bool(ends)]
            assert max(len(piece.ids) for piece in chunks) <= chunk and chunks[0].ids.dtype == np.int32
    model.config = dataclasses.replace(model.config, **(
        {"end_ids": (complete[3],)} if hasattr(model.config, "end_ids") else {}))
    by_default = [piece.ids for piece in decoding.stream_ids(model, PROMPTS[0], max_new=20, **options)]
    expected, = tilelli_jax.generate_ids(model, PROMPTS[:1], max_new=20, **options)
    assert np.concatenate(by_default).tolist() == expected.ids.tolist()


def test_stream_ids_raises_before_the_first_chunk() -> None:
    """The call itself raises, not the first iteration."""
    model = network("gpt_neox")
    for arguments, message in (({"prompt": []}, "prompt: expected token ids, at least one"),
                               ({"prompt": [300]}, "prompt: expected ids from 0 to 299, found 300"),
                               ({"chunk": 0}, "chunk: expected at least 1, found 0"),
                               ({"temperature": -1.0}, "temperature: expected a number"),
                               ({"model": "model"}, "expected a causal network, found str")):
        with pytest.raises(InputError, match=message):
            decoding.stream_ids(**{"model": model, "prompt": [1], "max_new": 3} | arguments)
    with pytest.warns(UserWarning, match="decoding to 69 tokens: past the trained length of 64"):
        decoding.stream_ids(model, PROMPTS[0], max_new=60)


def test_other_invalid_arguments_raise() -> None:
    model = network("gpt_neox")
    with pytest.raises(InputError, match="expected a causal network, found str"):
        tilelli_jax.generate_ids("model", PROMPTS)
    with pytest.raises(InputError, match="batch_size: expected an integer ≥ 1, found 0"):
        tilelli_jax.generate_ids(model, PROMPTS, batch_size=0)
    with pytest.warns(UserWarning, match="decoding to 69 tokens: past the trained length of 64"):
        tilelli_jax.generate_ids(model, PROMPTS, max_new=60, temperature=0)


@needs_reference
@pytest.mark.parametrize("path", [
    "pythia_tiny/parallel", *(pytest.param(path, marks=pytest.mark.exhaustive)
                              for path in ("gemma4_tiny/e4b", "gemma4_tiny/e2b"))])
def test_greedy_ids_match_the_references(path: str) -> None:
    if path.startswith("gemma"):
        stored = np.load(STORED / path / "ref_generate.npz")
        network, prompt, out = FlaxGemma4ForCausalLM, stored["prompt"], stored["out"]
    else:
        stored = np.load(STORED / path / "ref_f32.npz")
        network, prompt, out = FlaxGPTNeoXForCausalLM, stored["gen_prompt"], stored["gen_out"]
    n = prompt.shape[1]
    result = tilelli_jax.generate_ids(network.from_pretrained(STORED / path), list(prompt),
                                      max_new=out.shape[1] - n, temperature=0, end_ids=())
    assert result[0].ids.tolist() == out[0, n:].tolist()


@needs_transformers
@pytest.mark.parametrize("name", ["gpt_neox", pytest.param("gemma4", marks=pytest.mark.exhaustive)])
def test_transformers_generates_the_same(name: str, tmp_path: Path) -> None:
    """Greedy decoding of a batch of different lengths, which transformers needs padded on the left."""
    import torch
    import transformers
    model = network(name)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    longest = max(map(len, PROMPTS))
    ids, mask = (np.zeros((3, longest), np.int64) for _ in range(2))
    for row, prompt in enumerate(PROMPTS):
        ids[row, longest - len(prompt):], mask[row, longest - len(prompt):] = prompt, 1
    with torch.no_grad():
        expected = theirs.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
                                   max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=-1)
    result = tilelli_jax.generate_ids(model, PROMPTS, max_new=10, temperature=0)
    assert [row.ids.tolist() for row in result] == expected[:, longest:].tolist()
