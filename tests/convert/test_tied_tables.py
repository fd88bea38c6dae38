"""Tied embedding tables and the flags for them in config.json, compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.extras import needs_transformers
from tests.reference_impl.comparison import distance
from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax.convert.command import main
from tilelli_jax.io.tensors import TENSORS
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.models.t5 import T5Config

NOISE = noise(1, steps=8)  # relative to the largest number
NETWORKS: dict[str, Any] = {
    "t5": T5Config(vocab_size=50, d_model=12, n_layers=1, n_decoder_layers=1, n_heads=3, d_head=5,
                   d_hidden=20),
    "gpt_neox": GPTNeoXConfig(vocab_size=50, d_model=24, n_layers=1, max_seq_len=32, n_heads=3, d_hidden=40,
                              tie_embeddings=True),
    "gemma4": Gemma4Config(
        vocab_size=50, d_model=24, layers=("full",), max_seq_len=64, n_heads=4, n_kv_heads=2, d_head=6,
        n_kv_heads_full=2, d_head_full=12, window=5, n_shared_layers=0, d_hidden=20, d_per_layer=0)}
TABLES = {"t5": ("shared.weight", "lm_head.weight"),
          "gemma4": ("model.embed_tokens.weight", "lm_head.weight"),
          "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight")}
TIE, SCALE = "tie_word_embeddings", "scale_decoder_outputs"
IDS, DECODED = np.random.default_rng(0).integers(0, 50, (2, 2, 9))


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def write_directory(path: Path, family: str, flags: dict[str, Any], head: str, **copies: float) -> Path:
    """Writes a Hugging Face directory whose config.json has only these tie and scale flags.

    Args:
        head: output head: "no", "the same" as the embedding table, or "another".
        copies: further tensors (`__` is a dot) → factor by which they multiply the embedding table.
    """
    random_network(NETWORKS[family], 0)[0].save_pretrained(path)
    stored, (table, unembed) = safetensors.numpy.load_file(path / TENSORS), TABLES[family]
    assert unembed not in stored
    if head != "no":
        same = stored[table].copy()
        stored[unembed] = same if head == "the same" else same[::-1] + np.float32(0.1)
    stored |= {name.replace("__", "."): np.float32(factor) * stored[table]
               for name, factor in copies.items()}
    safetensors.numpy.save_file(stored, path / TENSORS, {"format": "pt"})
    tree = json.loads((path / "config.json").read_text())
    tree = {key: value for key, value in tree.items() if key not in (TIE, SCALE)}
    (path / "config.json").write_text(json.dumps({**tree, **flags}))
    return path


def transformers_logits(path: Path, family: str) -> np.ndarray:
    import torch
    import transformers
    model_class = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    network = model_class.from_pretrained(path, dtype=torch.float32).eval()
    inputs = {"input_ids": torch.from_numpy(IDS)}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.from_numpy(DECODED)
    with torch.no_grad():
        return network(**inputs).logits.numpy()


def our_logits(path: Path, family: str) -> np.ndarray:
    network = tilelli_jax.load(path)
    return np.asarray(jax.jit(network.__call__)(*((IDS, DECODED) if family == "t5" else (IDS,))))


FAST_CASES = [({}, "no"), ({TIE: False}, "no"), ({TIE: True, SCALE: True}, "another"),
              ({TIE: True, SCALE: False}, "another")]  # tied or not, scaled or not


@needs_transformers
@pytest.mark.parametrize(("flags", "head"), [
    pytest.param(flags, head, marks=[pytest.mark.exhaustive] * ((flags, head) not in FAST_CASES),
                 id=f"{', '.join(f'{key} {value}' for key, value in flags.items())}; {head} head")
    for tie in ({}, {TIE: True}, {TIE: False}, {TIE: None})
    for scale in ({}, {SCALE: True}, {SCALE: False}, {SCALE: None})
    for flags in [{**tie, **scale}] for head in ("no", "the same", "another")])
def test_t5_flags(flags: dict[str, Any], head: str, tmp_path: Path) -> None:
    """Our logits equal transformers' on the source, and transformers' on the converted-back directory."""
    source = write_directory(tmp_path / "source", "t5", flags, head)
    expected = transformers_logits(source, "t5")
    assert run(source, tmp_path / "out") == 0
    assert distance(our_logits(tmp_path / "out", "t5"), expected) < NOISE
    assert run(tmp_path / "out", tmp_path / "back", "--to", "torch") == 0
    assert distance(transformers_logits(tmp_path / "back", "t5"), expected) < NOISE
    assert run(tmp_path / "back", tmp_path / "again") == 0
    for name in ("config.json", TENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@needs_transformers
@pytest.mark.parametrize(("family", "tie", "head"), [
    pytest.param(family, tie, head, marks=[pytest.mark.exhaustive] * ((tie, head) != (True, "another")))
    for family in ("gpt_neox", "gemma4") for tie in (True, False) for head in ("no", "the same", "another")
    if tie or head != "no"])
def test_tie_flag_contradicted_by_the_tensors(family: str, tie: bool, head: str, tmp_path: Path) -> None:
    """Despite the flag, transformers does not tie two tables that differ."""
    source = write_directory(tmp_path / "source", family, {TIE: tie}, head)
    expected = transformers_logits(source, family)
    assert run(source, tmp_path / "out") == 0
    assert distance(our_logits(tmp_path / "out", family), expected) < NOISE
    assert run(tmp_path / "out", tmp_path / "back", "--to", "torch") == 0
    assert distance(transformers_logits(tmp_path / "back", family), expected) < NOISE


@pytest.mark.parametrize("family", ["gpt_neox", "gemma4"])
@pytest.mark.parametrize("flag", ["yes", None, 1])
def test_invalid_tie_flag(family: str, flag: Any, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:
    source = write_directory(tmp_path / "source", family, {TIE: flag}, "the same")
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, f"{source}/config.json: tie_", "expected true or false, found ")


@pytest.mark.parametrize("family", ["gpt_neox", "gemma4"])
def test_missing_head(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_directory(tmp_path / "source", family, {TIE: False}, "no")
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, f"{source}: ", f"missing: {TABLES[family][1]}")
    assert not (tmp_path / "out").exists()


def test_gemma_tie_flags_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers uses the outer flag for the multimodal network, the inner one for its text decoder."""
    source = write_directory(tmp_path / "source", "gemma4", {}, "no")
    text = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": text, TIE: False}))
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err,
                    f"text_config.{TIE}: expected False, the value of {TIE}, found True")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_t5_copies_of_the_shared_table(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers uses a copy that differs; our network has only one table, so it is rejected."""
    name = f"{part}__embed_tokens__weight"
    assert run(write_directory(tmp_path / "same", "t5", {}, "no", **{name: 1}), tmp_path / "out") == 0
    other = write_directory(tmp_path / "other", "t5", {}, "no", **{name: 2})
    capsys.readouterr()
    assert run(other, tmp_path / "another") == 2
    assert_one_line(capsys.readouterr().err, f"{other}",
                    f": {part}.embed_tokens.weight: expected the same numbers as shared.weight")


@pytest.mark.parametrize(("flags", "expected_text"), [
    ({TIE: "no"}, f"{TIE}: expected true or false, found 'no'"), ({TIE: 0}, f"{TIE}: expected true or false"),
    ({SCALE: 1}, f"{SCALE}: expected true or false, found 1"),
    ({"feed_forward_proj": "gated-selu", "dense_act_fn": None},
     "feed_forward_proj: expected one of relu, gelu, gelu_new"),
    ({"feed_forward_proj": "twice-relu"}, "feed_forward_proj: expected an activation, or gated- and one"),
    ({"dense_act_fn": "tanh"}, "dense_act_fn: expected one of relu, gelu, gelu_new"),
    ({"is_gated_act": 2}, "is_gated_act: expected true or false, found 2"),
    ({"hidden_size": 24}, "hidden_size: expected the 12 of d_model, found 24"),
    ({"num_hidden_layers": 2}, "num_hidden_layers: expected the 1 of num_layers, found 2"),
    ({"num_attention_heads": 5}, "num_attention_heads: expected the 3 of num_heads, found 5"),
    ({"head_dim": 3}, "head_dim: expected the 5 of d_kv, found 3")])
def test_unsupported_t5_settings(flags: dict[str, Any], expected_text: str, tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Includes pairs of keys for one setting, of which transformers uses the one that we do not read."""
    source = write_directory(tmp_path / "source", "t5", flags, "no")
    assert run(source, tmp_path / "out") == 2
    assert_one_line(capsys.readouterr().err, f"{source}/config.json: {expected_text}")
    assert not (tmp_path / "out").exists()


@needs_transformers
@pytest.mark.exhaustive
@pytest.mark.parametrize("key", ["dense_act_fn", "is_gated_act", "hidden_size", "num_hidden_layers",
                                 "num_attention_heads", "head_dim"])
def test_transformers_uses_the_rejected_settings(key: str, tmp_path: Path) -> None:
    import transformers
    value = {"dense_act_fn": "gelu_new", "is_gated_act": True}.get(key, 60)
    source = write_directory(tmp_path / "source", "t5", {key: value}, "no")
    assert getattr(transformers.AutoConfig.from_pretrained(source), key) == value


def test_default_of_scale_decoder_outputs() -> None:
    assert [T5Config(tie_embeddings=tie).scale_decoder_outputs for tie in (True, False)] == [True, False]
    assert T5Config(tie_embeddings=False) == T5Config(tie_embeddings=False, scale_decoder_outputs=False)
