"""Networks with their tokenizers, from model directories and Hugging Face directories."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.loading import store
from tilelli_jax.loading.language import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    load,
    load_with_tokenizer,
    read_chat_template,
)
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.t5 import T5Config
from tilelli_jax.models.vanilla import VanillaConfig

WORDS = {"[BOS]": 0, "[UNK]": 1, "[PAD]": 2, "a": 3, "cat": 4, "sat": 5}
NEOX = GPTNeoXConfig(vocab_size=8, d_model=16, n_layers=2, n_heads=2, d_hidden=32)


def tokenizer(path: Path, *, limits: bool = False) -> Path:
    """A word-level tokenizer with optional BOS token; `limits`: truncation and padding to two tokens."""
    pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    if limits:
        words.enable_truncation(2)
        words.enable_padding(length=2, pad_id=2, pad_token="[PAD]")
    path.mkdir(parents=True, exist_ok=True)
    words.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory without a tokenizer."""
    path = tmp_path_factory.mktemp("neox")
    random_network(NEOX, 0)[0].save_pretrained(path)
    return path


def assert_same_arrays(result: Any, expected: dict[str, np.ndarray]) -> None:
    arrays = to_arrays(result)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], name)


def raises_error(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert_one_line(f"error: {caught.value}\n", *parts)


def test_model_directories_read_bytes(tmp_path: Path) -> None:
    model, arrays = random_network(VanillaConfig(d_model=16, n_layers=1, max_seq_len=40, n_heads=2), 0)
    store.save(model, tmp_path)
    result = load_with_tokenizer(str(tmp_path))
    assert_same_arrays(result.model, arrays)
    assert result.encode("é a") == [0xC3, 0xA9, 0x20, 0x61]


def test_hugging_face_directories(neox: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(neox, tmp_path / "neox"))
    tokenizer(path)
    result = load_with_tokenizer(path)
    assert isinstance(result.model, FlaxGPTNeoXForCausalLM) and result.model.config == NEOX
    assert_same_arrays(result.model, random_network(NEOX, 0)[1])
    assert result.encode("a cat sat dog") == [3, 4, 5, 1] and result.encode("") == []  # no BOS token


def test_converted_directories_require_a_tokenizer(tmp_path: Path) -> None:
    """A model directory of a token-level network; the tokenizer is a file or a directory with it."""
    store.save(random_network(NEOX, 0)[0], tmp_path / "ours")
    file = tokenizer(tmp_path / "words")
    raises_error(lambda: load_with_tokenizer(tmp_path / "ours"), str(tmp_path / "ours" / "tokenizer.json"),
                 "no such file: expected the network's tokenizer")
    for where in (file, file.parent, str(file)):
        result = load_with_tokenizer(tmp_path / "ours", where)
        assert result.encode("sat a") == [5, 3] and isinstance(result.model, FlaxGPTNeoXForCausalLM)


def test_tokens_that_begin_and_end_a_text(tmp_path: Path) -> None:
    """The tokenizer's files have priority over the network's configuration; null is none."""
    random_network(dataclasses.replace(NEOX, bos_id=5, end_ids=(4, 3)), 0)[0].save_pretrained(tmp_path)
    tokenizer(tmp_path)
    for tree, expected in (({}, (5, 4)), ({"bos_token": "[BOS]", "eos_token": {"content": "a"}}, (0, 3)),
                           ({"bos_token": None, "eos_token": "missing"}, (None, None))):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tree))
        result = load_with_tokenizer(tmp_path)
        assert (result.bos_id, result.eos_id) == expected
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "cat", "pad_token": "a"}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_with_tokenizer(tmp_path).bos_id == 4


def test_truncation_and_padding_are_disabled(tmp_path: Path) -> None:
    encode = HuggingFaceTokenizer(tokenizer(tmp_path, limits=True)).encode
    assert encode("a cat sat a") == [3, 4, 5, 3] and encode("a") == [3]


def test_token_spans(tmp_path: Path) -> None:
    encoding = ByteTokenizer().encode_with_spans("é a")
    assert encoding == ([0xC3, 0xA9, 0x20, 0x61], [(0, 1), (0, 1), (1, 2), (2, 3)])
    result = HuggingFaceTokenizer(tokenizer(tmp_path))
    assert result.encode_with_spans("a cat sat") == ([3, 4, 5], [(0, 1), (2, 5), (6, 9)])
    assert result.decode([3, 5]) == "a sat" and result.decode([0, 4]) == "[BOS] cat"
    result._tokenizer.add_special_tokens(["[BOS]"])
    assert result.decode([0, 4]) == "[BOS] cat" and result.decode([0, 4], special=False) == "cat"
    assert (result.token("cat"), result.token("cats")) == (4, None)
    assert (ByteTokenizer().token("\n"), ByteTokenizer().token("é")) == (10, None)
    assert ByteTokenizer().decode([0x61, 300, 0xC3]) == "a\ufffd"


TEMPLATE = ("{{ bos_token }}{% if enable_thinking %}<think>{% endif %}{% for m in messages %}"
            "<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
            "{% if add_generation_prompt %}<model>{% endif %}")


@pytest.mark.parametrize("where", ["jinja", "json", "config", "several"])
def test_chat_templates(where: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    assert read_chat_template(tmp_path) is None
    settings: dict[str, Any] = {"bos_token": {"content": "<s>"}, "pad_token": None}
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    elif where == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    elif where == "config":
        settings["chat_template"] = TEMPLATE
    else:
        settings["chat_template"] = [{"name": "tools", "template": "x"},
                                     {"name": "default", "template": TEMPLATE}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = read_chat_template(tmp_path)
    assert chat is not None and chat.format_prompt(" Who? ") == "<s><user>Who?</><model>"
    assert chat.format_prompt("Who?", thinking=True) == "<s><think><user>Who?</><model>"
    messages = [{"role": "user", "content": "Who?"}, {"role": "model", "content": "The cat"}]
    assert chat.format_messages(messages, continue_last=True) == "<s><user>Who?</><model>The cat"


def test_invalid_chat_templates_raise(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    raises_error(lambda: read_chat_template(tmp_path), str(tmp_path / "tokenizer_config.json"),
                 "chat_template: expected text")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    chat = read_chat_template(tmp_path)
    assert chat is not None
    raises_error(lambda: chat.format_prompt("Who?"), str(tmp_path / "chat_template.jinja"),
                 "the template raises an error: no users")


def test_lfs_pointers_and_pipes_raise(neox: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        shutil.copytree(neox, tmp_path / name)
        tokenizer(tmp_path / name)
        file = tmp_path / name / name
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        raises_error(lambda at=file.parent: load_with_tokenizer(at),
                     f"{file}: is a git-lfs pointer, not the file")
        file.unlink()
        os.mkfifo(file)
        raises_error(lambda at=file.parent: load_with_tokenizer(at),
                     f"{file}: cannot be read: expected a regular file")


def test_a_missing_tokenizer_raises(neox: Path, tmp_path: Path) -> None:
    raises_error(lambda: load_with_tokenizer(neox), str(neox / "tokenizer.json"), "no such file")
    raises_error(lambda: load_with_tokenizer(neox, tmp_path / "x.json"), str(tmp_path / "x.json"),
                 "no such file")
    pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    (tmp_path / "tokenizer.json").write_text("{}")
    raises_error(lambda: load_with_tokenizer(neox, tmp_path), str(tmp_path / "tokenizer.json"),
                 "not a tokenizer: ")


@pytest.mark.parametrize(("config", "family"), [
    (SAEConfig(d_model=4, n_latents=8, k=2), "sae"), (SidecarConfig(d_hidden=4), "lrd"),
    (T5Config(vocab_size=8, d_model=12, n_layers=1, n_decoder_layers=1, n_heads=2, d_head=4, d_hidden=8),
     "t5")])
def test_networks_that_are_not_causal_raise(config: Any, family: str, tmp_path: Path) -> None:
    model = random_network(config, 0)[0] if family == "t5" else store.build(config)
    store.save(model, tmp_path)
    assert load(tmp_path).config == config  # load accepts it, load_with_tokenizer does not
    raises_error(lambda: load_with_tokenizer(tmp_path),
                 f"{tmp_path}: expected a network that continues texts, found family {family}")
    if family == "t5":
        model.save_pretrained(tmp_path / "theirs")
        raises_error(lambda: load_with_tokenizer(tmp_path / "theirs"), "continues texts, found family t5")


@pytest.mark.parametrize("kind", ["mamba", ["gpt_neox"], 3])
def test_unknown_model_types_raise(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    raises_error(lambda: load(tmp_path), str(tmp_path / "config.json"), "model_type: expected one of",
                 "gpt_neox", "t5", f"found {kind!r}")


def test_invalid_directories_raise(tmp_path: Path) -> None:
    raises_error(lambda: load(tmp_path / "none"), str(tmp_path / "none"), "no such file or directory")
    raises_error(lambda: load(tmp_path), str(tmp_path), "config.json is missing")
    (tmp_path / "config.json").write_text("{}")
    raises_error(lambda: load(tmp_path), str(tmp_path / "config.json"), "family: expected one of")
    (tmp_path / "config.json").write_text("{")
    raises_error(lambda: load(tmp_path), str(tmp_path / "config.json"), "not JSON")


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_bytes_of_tokens(kind: str, tmp_path: Path) -> None:
    """The bytes of a text's tokens, joined, are the text's, also where a character is several tokens."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    text = " Grüße 🦙 \x01\u00ad!" if kind == "byte-level" else "Grüße 🦙"
    if kind == "byte-level":
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
            {letter: i for i, letter in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        vocab = [f"<0x{byte:02X}>" for byte in range(256)] + list("\u2581Gre\u00fc")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
            {token: i for i, token in enumerate(vocab)}, [], byte_fallback=True))
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = tokenizers.decoders.Sequence([
            tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse()])
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = HuggingFaceTokenizer(tmp_path)
    ids = read.encode(text + "<|end|>")
    assert b"".join(map(read.token_bytes, ids)) == text.encode() + b"<|end|>"
    assert read.token_bytes(10**6) == b"" and len(ids) > len(text)
    assert b"".join(map(ByteTokenizer().token_bytes, "ü".encode())) == "ü".encode()
