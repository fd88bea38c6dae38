"""Continuing token ids: as transformers does, row by row as alone, and up to what ends them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilelli_jax
from tests.extras import needs_transformers
from tests.references import STORED, needs
from tests.restated.random_weights import random_network
from tests.restated.uncached import forward_of, logits_before
from tests.tolerance import noise
from tilelli_jax import decoding
from tilelli_jax.errors import InputError
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
CASES = {"gpt_neox": NEOX, "gemma4": GEMMA, "vanilla, past its window": VANILLA}
PROMPTS = [np.arange(1, 10), np.array([299]), np.arange(50, 53)]


# How far logits with caches and without may lie apart: rounding, in up to four layers, of sums below 30.
NOISE = noise(30, steps=4)
FIRST = ("gpt_neox", "vanilla, past its window")  # gemma4's caches: tests/models/test_gemma4.py


@functools.cache
def network(name: str) -> Any:
    return random_network(CASES[name], 0)[0]


def in_both_tiers(*names: str) -> list[Any]:
    return [name if name in FIRST else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


@pytest.mark.parametrize("name", in_both_tiers(*CASES))
@pytest.mark.filterwarnings("ignore:decoding to ")
def test_greedy_ids_are_the_likeliest_of_the_forward_pass(name: str) -> None:
    """Prompts of different lengths in one batch, each read again as a whole for every id."""
    found = tilelli_jax.generate_ids(network(name), PROMPTS, max_new=14, temperature=0)
    ids = np.array([made.ids for made in found])
    assert ids.max() > 255  # ids, not bytes
    window = 16 if name.startswith("vanilla") else None
    logits = logits_before(forward_of(network(name)), PROMPTS, ids, window)
    assert np.abs(logits).max() < 30
    chosen = np.take_along_axis(logits, ids[..., None], axis=2)[..., 0]
    assert (chosen >= logits.max(2) - 2 * NOISE).all()
    assert ids.shape == (3, 14) and not any(made.ended or made.ids.dtype != np.int32 for made in found)


@pytest.mark.parametrize("name", in_both_tiers("gpt_neox", "gemma4"))
def test_each_row_is_as_it_would_be_alone(name: str) -> None:
    """Also drawn, and in batches of any size: prompt i has its own random stream."""
    model = network(name)
    together = tilelli_jax.generate_ids(model, PROMPTS, max_new=9, temperature=0.8, top_k=50, seed=3)
    for size in (1, 2):
        apart = tilelli_jax.generate_ids(model, PROMPTS, max_new=9, temperature=0.8, top_k=50, seed=3,
                                         batch_size=size)
        assert [made.ids.tolist() for made in apart] == [made.ids.tolist() for made in together]
    other = tilelli_jax.generate_ids(model, PROMPTS, max_new=9, temperature=0.8, top_k=50, seed=4)
    assert [made.ids.tolist() for made in other] != [made.ids.tolist() for made in together]


def test_ids_that_end_a_continuation() -> None:
    model = random_network(NEOX, 0)[0]  # changed below
    with pytest.warns(UserWarning, match="decoding to 79 tokens: past the trained length of 64"):
        whole = [made.ids.tolist() for made in
                 tilelli_jax.generate_ids(model, PROMPTS, max_new=70, temperature=1.0)]
        end = whole[0][66]  # past the first chunk that is looked at
        found = tilelli_jax.generate_ids(model, PROMPTS, max_new=70, temperature=1.0, end_ids=[end, 0])
        for ids, made in zip(whole, found, strict=True):
            stops = [i for i, token in enumerate(ids) if token in (end, 0)]
            assert made.ids.tolist() == ids[:stops[0] if stops else None] and made.ended == bool(stops)
        assert found[0].ended
        # Without an argument those of the configuration do.
        model.config = dataclasses.replace(model.config, end_ids=(end, 0))
        again = tilelli_jax.generate_ids(model, PROMPTS, max_new=70, temperature=1.0)
        assert [made.ids.tolist() for made in again] == [made.ids.tolist() for made in found]
        assert [made.ids.tolist() for made in tilelli_jax.generate_ids(
            model, PROMPTS, max_new=70, temperature=1.0, end_ids=[])] == whole


@pytest.mark.parametrize(("prompts", "says"), [
    ([[]], "prompts: 0: expected token ids, at least one"),
    ([[1], [1.5]], "prompts: 1: expected token ids"),
    ([[[1]]], "prompts: 0: expected token ids"),
    ([[1, 300]], "prompts: 0: expected ids from 0 to 299, found 300"),
    ([[-1]], "prompts: 0: expected ids from 0 to 299, found -1")])
def test_prompts_that_are_none(prompts: list, says: str) -> None:
    with pytest.raises(InputError, match=says):
        tilelli_jax.generate_ids(network("gpt_neox"), prompts)


def test_text_is_not_taken_for_token_ids() -> None:
    with pytest.raises(InputError, match="a gpt_neox reads token ids, not bytes: "):
        tilelli_jax.generate(network("gpt_neox"), "Once upon a time")


@pytest.mark.parametrize("name", in_both_tiers(*CASES))
@pytest.mark.filterwarnings("ignore:decoding to ")
def test_a_stream_of_ids_is_what_is_generated_at_once(name: str) -> None:
    """In chunks of any size, drawn or not, with what ends it at any place in a chunk, or not at all."""
    model = random_network(CASES[name], 0)[0]  # changed below
    for how in ({"temperature": 0.0}, {"temperature": 0.9, "top_k": 50, "seed": 3}):
        made, = tilelli_jax.generate_ids(model, PROMPTS[:1], max_new=20, end_ids=(), **how)
        whole = made.ids.tolist()
        assert max(whole) > 255
        for ends, chunk in (((), 1), ((), 6), ((), 50), (whole[:1], 4), (whole[11:13], 4),
                            (whole[-1:], 7)):
            expected, = tilelli_jax.generate_ids(model, PROMPTS[:1], max_new=20, end_ids=ends, **how)
            pieces = list(decoding.stream_ids(model, PROMPTS[0], max_new=20, end_ids=ends, chunk=chunk,
                                              **how))
            assert [i for piece in pieces for i in piece.ids.tolist()] == expected.ids.tolist()
            assert [piece.ended for piece in pieces] == [False] * (len(pieces) - 1) + [bool(ends)]
            assert max(len(piece.ids) for piece in pieces) <= chunk and pieces[0].ids.dtype == np.int32
    model.config = dataclasses.replace(model.config, **(
        {"end_ids": (whole[3],)} if hasattr(model.config, "end_ids") else {}))
    by_default = [piece.ids for piece in decoding.stream_ids(model, PROMPTS[0], max_new=20, **how)]
    expected, = tilelli_jax.generate_ids(model, PROMPTS[:1], max_new=20, **how)
    assert np.concatenate(by_default).tolist() == expected.ids.tolist()


def test_a_stream_of_ids_refuses_at_once() -> None:
    """When it is asked for, not when its first piece is."""
    model = network("gpt_neox")
    for arguments, says in (({"prompt": []}, "prompt: expected token ids, at least one"),
                            ({"prompt": [300]}, "prompt: expected ids from 0 to 299, found 300"),
                            ({"chunk": 0}, "chunk: expected at least 1, found 0"),
                            ({"temperature": -1.0}, "temperature: expected a number"),
                            ({"model": "model"}, "expected a causal network, found str")):
        with pytest.raises(InputError, match=says):
            decoding.stream_ids(**{"model": model, "prompt": [1], "max_new": 3} | arguments)
    with pytest.warns(UserWarning, match="decoding to 69 tokens: past the trained length of 64"):
        decoding.stream_ids(model, PROMPTS[0], max_new=60)


def test_other_bad_arguments() -> None:
    model = network("gpt_neox")
    with pytest.raises(InputError, match="expected a causal network, found str"):
        tilelli_jax.generate_ids("model", PROMPTS)
    with pytest.raises(InputError, match="batch_size: expected a whole number ≥ 1, found 0"):
        tilelli_jax.generate_ids(model, PROMPTS, batch_size=0)
    with pytest.warns(UserWarning, match="decoding to 69 tokens: past the trained length of 64"):
        tilelli_jax.generate_ids(model, PROMPTS, max_new=60, temperature=0)


@needs_reference
@pytest.mark.parametrize("path", [
    "pythia_tiny/parallel", *(pytest.param(path, marks=pytest.mark.exhaustive)
                              for path in ("gemma4_tiny/e4b", "gemma4_tiny/e2b"))])
def test_greedy_ids_of_the_references(path: str) -> None:
    if path.startswith("gemma"):
        stored = np.load(STORED / path / "ref_generate.npz")
        network, prompt, out = FlaxGemma4ForCausalLM, stored["prompt"], stored["out"]
    else:
        stored = np.load(STORED / path / "ref_f32.npz")
        network, prompt, out = FlaxGPTNeoXForCausalLM, stored["gen_prompt"], stored["gen_out"]
    n = prompt.shape[1]
    made = tilelli_jax.generate_ids(network.from_pretrained(STORED / path), list(prompt),
                                    max_new=out.shape[1] - n, temperature=0, end_ids=())
    assert made[0].ids.tolist() == out[0, n:].tolist()


@needs_transformers
@pytest.mark.parametrize("name", ["gpt_neox", pytest.param("gemma4", marks=pytest.mark.exhaustive)])
def test_transformers_generates_the_same(name: str, tmp_path: Path) -> None:
    """A batch of different lengths, which transformers wants padded on the left; greedy."""
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
    made = tilelli_jax.generate_ids(model, PROMPTS, max_new=10, temperature=0)
    assert [row.ids.tolist() for row in made] == expected[:, longest:].tolist()
