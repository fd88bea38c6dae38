"""Networks with their tokenizers, from our directories and from Hugging Face's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.refusals import assert_one_line
from tests.restated.random_weights import random_network
from tilelli_jax import store
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.language import Bytes, Tokens, open_language, open_network, read_chat
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.t5 import T5Config
from tilelli_jax.models.vanilla import VanillaConfig

WORDS = {"[BOS]": 0, "[UNK]": 1, "[PAD]": 2, "a": 3, "cat": 4, "sat": 5}
NEOX = GPTNeoXConfig(vocab_size=8, d_model=16, n_layers=2, n_heads=2, d_hidden=32)


def tokenizer(path: Path, *, limits: bool = False) -> Path:
    """Words; a beginning is put before each text where it is asked for; perhaps cut and filled up to two."""
    pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    if limits:
        made.enable_truncation(2)
        made.enable_padding(length=2, pad_id=2, pad_token="[PAD]")
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers writes them, without a tokenizer."""
    path = tmp_path_factory.mktemp("neox")
    random_network(NEOX, 0)[0].save_pretrained(path)
    return path


def same(found: Any, expected: dict[str, np.ndarray]) -> None:
    arrays = to_arrays(found)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], name)


def refused(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert_one_line(f"error: {caught.value}\n", *parts)


def test_our_directories_read_bytes(tmp_path: Path) -> None:
    model, arrays = random_network(VanillaConfig(d_model=16, n_layers=1, max_seq_len=40, n_heads=2), 0)
    store.save(model, tmp_path)
    found = open_language(str(tmp_path))
    same(found.model, arrays)
    assert found.encode("é a") == [0xC3, 0xA9, 0x20, 0x61]


def test_hugging_face_directories(neox: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(neox, tmp_path / "neox"))
    tokenizer(path)
    found = open_language(path)
    assert isinstance(found.model, FlaxGPTNeoXForCausalLM) and found.model.config == NEOX
    same(found.model, random_network(NEOX, 0)[1])
    assert found.encode("a cat sat dog") == [3, 4, 5, 1] and found.encode("") == []  # no beginning


def test_converted_directories_want_a_tokenizer_too(tmp_path: Path) -> None:
    """Of ours, but no bytes; the tokenizer is a file or the directory that has it."""
    store.save(random_network(NEOX, 0)[0], tmp_path / "ours")
    file = tokenizer(tmp_path / "words")
    refused(lambda: open_language(tmp_path / "ours"), str(tmp_path / "ours" / "tokenizer.json"),
            "no such file: expected the network's tokenizer")
    for where in (file, file.parent, str(file)):
        found = open_language(tmp_path / "ours", where)
        assert found.encode("sat a") == [5, 3] and isinstance(found.model, FlaxGPTNeoXForCausalLM)


def test_a_tokenizer_neither_cuts_nor_fills_up(tmp_path: Path) -> None:
    encode = Tokens(tokenizer(tmp_path, limits=True)).encode
    assert encode("a cat sat a") == [3, 4, 5, 3] and encode("a") == [3]


def test_where_symbols_stand(tmp_path: Path) -> None:
    assert Bytes().place("é a") == ([0xC3, 0xA9, 0x20, 0x61], [(0, 1), (0, 1), (1, 2), (2, 3)])
    found = Tokens(tokenizer(tmp_path))
    assert found.place("a cat sat") == ([3, 4, 5], [(0, 1), (2, 5), (6, 9)])
    assert found.decode([3, 5]) == "a sat" and found.decode([0, 4]) == "[BOS] cat"
    assert (found.token("cat"), found.token("cats"), Bytes().token("\n"), Bytes().token("é")) == (
        4, None, 10, None)
    assert Bytes().decode([0x61, 300, 0xC3]) == "a\ufffd"


TEMPLATE = ("{{ bos_token }}{% if enable_thinking %}<think>{% endif %}{% for m in messages %}"
            "<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
            "{% if add_generation_prompt %}<model>{% endif %}")


@pytest.mark.parametrize("where", ["jinja", "json", "config", "several"])
def test_chat_templates(where: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    assert read_chat(tmp_path) is None
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
    chat = read_chat(tmp_path)
    assert chat is not None and chat.ask(" Who? ") == "<s><user>Who?</><model>"
    assert chat.ask("Who?", thinking=True) == "<s><think><user>Who?</><model>"


def test_chat_templates_that_cannot_be_used(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
    refused(lambda: read_chat(tmp_path), str(tmp_path / "tokenizer_config.json"),
            "chat_template: expected text")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    chat = read_chat(tmp_path)
    assert chat is not None
    refused(lambda: chat.ask("Who?"), str(tmp_path / "chat_template.jinja"), "the template refuses: no users")


def test_pointers_and_pipes_are_called_so(neox: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        shutil.copytree(neox, tmp_path / name)
        tokenizer(tmp_path / name)
        file = tmp_path / name / name
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        refused(lambda at=file.parent: open_language(at), f"{file}: is a git-lfs pointer, not the file")
        file.unlink()
        os.mkfifo(file)
        refused(lambda at=file.parent: open_language(at), f"{file}: cannot be read: expected a regular file")


def test_no_tokenizer(neox: Path, tmp_path: Path) -> None:
    refused(lambda: open_language(neox), str(neox / "tokenizer.json"), "no such file")
    refused(lambda: open_language(neox, tmp_path / "x.json"), str(tmp_path / "x.json"), "no such file")
    pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(lambda: open_language(neox, tmp_path), str(tmp_path / "tokenizer.json"), "no tokenizer: ")


@pytest.mark.parametrize(("config", "family"), [
    (SAEConfig(d_model=4, n_latents=8, k=2), "sae"), (SidecarConfig(d_hidden=4), "lrd"),
    (T5Config(vocab_size=8, d_model=12, n_layers=1, n_decoder_layers=1, n_heads=2, d_head=4, d_hidden=8),
     "t5")])
def test_networks_that_continue_no_texts(config: Any, family: str, tmp_path: Path) -> None:
    model = random_network(config, 0)[0] if family == "t5" else store.build(config)
    store.save(model, tmp_path)
    assert open_network(tmp_path).config == config  # a network, but
    refused(lambda: open_language(tmp_path), f"{tmp_path}: expected a network that continues texts, found "
                                             f"family {family}")
    if family == "t5":
        model.save_pretrained(tmp_path / "theirs")
        refused(lambda: open_language(tmp_path / "theirs"), "continues texts, found family t5")


@pytest.mark.parametrize("kind", ["llama", ["gpt_neox"], 3])
def test_other_kinds_are_named(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    refused(lambda: open_network(tmp_path), str(tmp_path / "config.json"), "model_type: expected one of",
            "gpt_neox", "t5", f"found {kind!r}")


def test_no_directory_of_a_network(tmp_path: Path) -> None:
    refused(lambda: open_network(tmp_path / "none"), str(tmp_path / "none"), "found nothing")
    refused(lambda: open_network(tmp_path), str(tmp_path), "it has no config.json")
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: open_network(tmp_path), str(tmp_path / "config.json"), "family: expected one of")
    (tmp_path / "config.json").write_text("{")
    refused(lambda: open_network(tmp_path), str(tmp_path / "config.json"), "not JSON")
