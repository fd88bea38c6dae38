"""GGUF files that cannot be read, or hold what no network here computes: one line, and nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.gguf_files import write_directory, write_gguf
from tests.models.test_llama import LLAMA
from tilelli_jax.convert.command import main as convert
from tilelli_jax.errors import InputError
from tilelli_jax.pretrained.gguf import read_gguf

pytest.importorskip("gguf", reason="gguf (extra: gguf) is not installed")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(scope="module")
def content(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with arrays of texts and of numbers in its metadata."""
    arrays = {"test.texts": ["a", "bc"], "test.numbers": [1, 2]}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "a.gguf", llama, metadata=arrays).read_bytes()


Q8_K = (np.zeros((61, 292), np.uint8), "Q8_K")
# Changes of the metadata and the tensors → parts of the message.
MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "architecture": ({"general.architecture": "mamba"}, {}, (
        "general.architecture: expected one of llama, qwen2, qwen3, gemma3, found 'mamba'",)),
    "no architecture": ({"general.architecture": None}, {}, ("general.architecture: expected", "found None")),
    "no width": ({"llama.embedding_length": None}, {}, ("expected the key llama.embedding_length",)),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, (
        "expected the key llama.attention.layer_norm_rms_epsilon",)),
    "heads per layer": ({"llama.attention.head_count": [4, 4]}, {}, (
        "llama.attention.head_count: expected a number > 0, found [4, 4]",)),
    "no heads": ({"llama.attention.head_count": 0}, {}, ("head_count: expected a number > 0, found 0",)),
    "a text": ({"llama.block_count": "two"}, {}, ("llama.block_count: expected a number > 0, found 'two'",)),
    "experts": ({"llama.expert_count": 8}, {}, ("llama.expert_count: expected 0, found 8",)),
    "soft caps": ({"llama.final_logit_softcapping": 30.0}, {}, (
        "llama.final_logit_softcapping: expected 0, found 30.0",)),
    "value heads": ({"llama.attention.value_length": 8}, {}, (
        "llama.attention.value_length: expected 6, the width of a head, found 8",)),
    "partly rotated": ({"llama.rope.dimension_count": 4}, {}, ("llama.rope.dimension_count: expected 6",)),
    "split": ({"split.count": 3}, {}, ("split.count", "one of 3 parts", "llama-gguf-split --merge")),
    "a scale": ({"llama.attention.scale": 0.5}, {}, ("llama.attention.scale: expected 0, found 0.5",)),
    "a scale of the logits": ({"llama.logit_scale": 0.5}, {}, ("llama.logit_scale: expected 1, found 0.5",)),
    "clamps": ({"llama.attention.clamp_kqv": 8.0}, {}, ("llama.attention.clamp_kqv: expected 0, found 8.0",)),
    "parallel": ({"llama.use_parallel_residual": True}, {}, (
        "llama.use_parallel_residual: expected 0, found True",)),
    "bidirectional": ({"llama.attention.causal": False}, {}, (
        "llama.attention.causal: expected True, found False",)),
    "a pattern": ({"llama.attention.sliding_window_pattern": 2}, {}, (
        "llama.attention.sliding_window_pattern: expected 0, found 2",)),
    "scaling": ({"llama.rope.scaling.type": "longrope"}, {}, (
        "llama.rope.scaling.type: expected none, linear or yarn, found 'longrope'",)),
    "no factor": ({"llama.rope.scaling.type": "yarn"}, {}, ("expected the key llama.rope.scaling.factor",)),
    "extrapolation": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
                       "llama.rope.scaling.yarn_ext_factor": 0.5}, {}, (
        "llama.rope.scaling.yarn_ext_factor: expected 1, found 0.5",)),
    "divisors": ({}, {"rope_freqs.weight": np.array([1, 2, 8], np.float32)}, (
        "rope_freqs.weight: expected the divisors of Llama 3.1's rotary scaling",)),
    "divisors of 0": ({}, {"rope_freqs.weight": np.zeros(3, np.float32)}, ("rope_freqs.weight: expected",)),
    "four divisors": ({}, {"rope_freqs.weight": np.ones(4, np.float32)}, ("rope_freqs.weight: expected",)),
    "heads that do not divide": ({"llama.attention.head_count": 5}, {}, (
        "blk.0.attn_q.weight: expected a multiple of 10 rows, found 24",)),
    "key heads that do not divide": ({"llama.attention.head_count_kv": 5}, {}, (
        "blk.0.attn_k.weight: expected a multiple of 10 rows, found 12",)),
    "no table": ({}, {"token_embd.weight": None}, ("expected the tensor token_embd.weight",)),
    "tokens": ({"tokenizer.ggml.tokens": ["a"] * 62}, {}, (
        "tokenizer.ggml.tokens: expected at most 61 tokens, the rows of token_embd.weight, found 62",)),
    "format": ({}, {"token_embd.weight": Q8_K}, (
        "token_embd.weight: its format Q8_K cannot be decoded by the installed version of gguf",)),
    "tensor missing": ({}, {"blk.1.ffn_up.weight": None}, ("missing: model.layers.1.mlp.up_proj.weight",)),
    "tensor unknown": ({}, {"blk.1.ffn_sub_norm.weight": np.ones(24, np.float32)}, (
        "not known: blk.1.ffn_sub_norm.weight",)),
    "layers": ({"llama.block_count": 3}, {}, ("missing: model.layers.2.",)),
    "shape": ({}, {"blk.1.ffn_norm.weight": np.ones(23, np.float32)}, (
        "model.layers.1.post_attention_layernorm.weight (23,) instead of (24,)",)),
    "end": ({"tokenizer.ggml.eos_token_id": 61}, {}, ("eos_token_id: expected ids of the vocabulary",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(mistake: str, llama: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    metadata, tensors, parts = MISTAKES[mistake]
    path = write_gguf(tmp_path / "a.gguf", llama, metadata=metadata, tensors=tensors)
    capsys.readouterr()  # the writer prints
    assert convert([str(path), str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, str(path), *parts)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]
    raises_error(lambda: tilelli_jax.load(path), str(path), *parts)


def raises_error(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert_one_line(f"error: {caught.value}\n", *parts)
    assert str(caught.value).startswith(parts[0]) and str(caught.value).count(parts[0]) == 1


FOREIGN = {
    "empty": (b"", "not a GGUF file: expected b'GGUF' at its start, found b''"),
    "foreign": (b"PK-- and more", "not a GGUF file: expected b'GGUF' at its start, found b'PK--'"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
    "version 1": (b"GGUF" + (1).to_bytes(4, "little"), "version: expected one of 2, 3, found 1"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "version: expected one of 2, 3"),
    "many tensors": (b"GGUF" + (3).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") + bytes(8) +
                     bytes(1000), "not a complete GGUF file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused(kind: str, tmp_path: Path) -> None:
    content, message = FOREIGN[kind]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    raises_error(lambda: read_gguf(path), f"{path}: {message}")


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    raises_error(lambda: read_gguf(tmp_path / "a.gguf"), str(tmp_path / "a.gguf"), "no such file")
    raises_error(lambda: read_gguf(tmp_path), str(tmp_path), "expected a regular file, found a directory")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_files_are_refused(data: st.DataObject, content: bytes, tmp_path: Path) -> None:
    length = data.draw(st.integers(4, len(content) - 40))  # up to 31 bytes after the last tensor are padding
    path = tmp_path / "a.gguf"
    path.write_bytes(content[:length])
    raises_error(lambda: read_gguf(path), f"{path}: not a complete GGUF file: ")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_are_read_or_refused(data: st.DataObject, content: bytes, tmp_path: Path) -> None:
    """One line for whatever the bytes are, and no endless reading."""
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(4, 3000))
        damaged[place:place + 8] = data.draw(st.one_of(
            st.binary(min_size=8, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x10"])))
    path = tmp_path / "a.gguf"
    path.write_bytes(damaged)
    try:
        file = read_gguf(path)
        for tensor in file.tensors.values():
            tensor.read()
    except InputError as error:
        assert_one_line(f"error: {error}\n", str(path))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("key", ["test.texts", "test.numbers"])
@pytest.mark.parametrize("length", [1 << 60, 1 << 33])
def test_arrays_longer_than_the_file_are_refused(key: str, length: int, content: bytes, tmp_path: Path
                                                 ) -> None:
    place = content.index(key.encode()) + len(key) + 8  # after the types of the value and its elements
    path = tmp_path / "a.gguf"
    path.write_bytes(content[:place] + length.to_bytes(8, "little") + content[place + 8:])
    raises_error(lambda: read_gguf(path), f"{path}: not a complete GGUF file: truncated header")


def test_gguf_is_required(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    monkeypatch.setitem(sys.modules, "gguf", None)
    raises_error(lambda: read_gguf(tmp_path / "a.gguf"), str(tmp_path),
                 "a.gguf: reading GGUF files needs gguf: pip install 'tilelli_jax[gguf]'")


def test_a_file_that_shrinks_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    tensors = read_gguf(path).tensors
    path.write_bytes(content[:len(content) // 2])
    raises_error(lambda: [tensor.read() for tensor in tensors.values()], str(path),
                 "truncated inside tensor ")
