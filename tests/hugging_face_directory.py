"""Small Hugging Face directories with random weights, a tokenizer of words and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.reference_impl.random_weights import random_network

WORDS = ("<s>", "</s>", "<user>", "<model>", "a", "cat", "sat", "on", "the", "mat", "who", "<unk>")
BOS, END = 0, 1
TEMPLATE = ("{{ bos_token }}{% for m in messages %} <{{ 'model' if m.role == 'assistant' else m.role }}> "
            "{{ m.content }}{% endfor %}{% if add_generation_prompt %} <model>{% endif %}")


def write_directory(path: Path, config: Any, *, template: str | None = TEMPLATE) -> Any:
    """Writes the directory and returns its network. The tokenizer adds BOS; the template has its own."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    network = random_network(config, 0)[0]
    network.save_pretrained(path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)])
    words.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>"} | ({} if template is None else {"chat_template": template})
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return network


def words_of(ids: Any) -> str:
    """The text of token ids, as it follows other words."""
    return "".join(f" {WORDS[id]}" for id in ids)
