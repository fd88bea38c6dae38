"""Model cards: the YAML head, what they state, and when an existing one is replaced."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest
import yaml

import tilelli_jax
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.estimators.sidecar import SidecarConfig
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.loading.model_card import FAMILIES, MARK, CardInfo, model_card
from tilelli_jax.loading.store import FAMILIES as NETWORKS
from tilelli_jax.loading.store import build
from tilelli_jax.models import GPTNeoXConfig, RoutedConfig, T5Config, VanillaConfig

TINY = VanillaConfig(d_model=8, n_layers=1, max_seq_len=8, n_heads=1, dense_expand=1)
INFO = CardInfo(
    data=["source: hf:a/b: c", "size: 3 bytes\nin two lines"], datasets=["a/b"], unit="nats/byte",
    losses={"best | last": 1.25, "byte trigrams": 2}, command="tilelli train 'a ```` b'",
    made_from="From: x.")


TURNS = "USER: {message}\nTILELLI: {answer}\nUSER:"


def head_and_body(card: str) -> tuple[dict, str]:
    """Splits a card as the hub does, and parses its head."""
    empty, head, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


@pytest.fixture
def model():
    return build(TINY, 0)


@pytest.mark.parametrize("config", [
    RoutedConfig(), VanillaConfig(quantizer="none"), GPTNeoXConfig(), T5Config(), SAEConfig(),
    SidecarConfig()], ids=lambda config: config.family)
def test_every_family(config):
    head, body = head_and_body(model_card(config, 1234))
    assert head["library_name"] == "tilelli_jax" and config.family in head["tags"]
    assert not {"license", "datasets"} & head.keys()
    generates = config.family in ("routed", "vanilla", "gpt_neox")
    assert (head.get("pipeline_tag") == "text-generation") == generates == ("tilelli generate" in body)
    assert ("byte-level" in head["tags"]) == ("bytes, without a tokenizer" in body) == (
        config.family in ("routed", "vanilla"))
    assert f"# {config.family}\n" in body and "| parameters | 1,234 |" in body
    assert "tilelli_jax.load" in body and "## Limits" in body
    assert not [section for section in ("Origin", "Training data", "Results", "Command")
                if f"## {section}" in body], "nothing is known"


def test_every_family_is_described():
    assert FAMILIES.keys() == NETWORKS.keys()


def test_what_the_card_states():
    head, body = head_and_body(model_card(RoutedConfig(quantizer="ternary"), 10, INFO))
    assert head["datasets"] == ["a/b"] and "ternary" in head["tags"]
    for line in ("| context, in tokens | 256 |", "| quantiser of the weights | ternary |", "From: x.",
                 "- source: hf:a/b: c", "- size: 3 bytes in two lines", "| loss | nats/byte |",
                 r"| best \| last | 1.2500 |", "| byte trigrams | 2.0000 |"):
        assert line in body.splitlines(), line
    assert "`````\ntilelli train 'a ```` b'\n`````" in body, "the fence is longer than the longest inside"
    assert f"tilelli_jax {tilelli_jax_version()}" in body


def test_a_network_that_chats():
    body = model_card(RoutedConfig(), 10, CardInfo(turns=TURNS))
    assert "```\ntilelli chat --model .  # in this directory\n```" in body and "tilelli generate" not in body
    assert f"```\n{TURNS}\n```" in body
    assert r"prompt = 'USER: Who are you?\nTILELLI:'" in body and r"stop='\nUSER:'" in body


def tilelli_jax_version():
    import importlib.metadata
    return importlib.metadata.version("tilelli_jax")


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_of_a_card_runs(chat, tmp_path, monkeypatch, capsys):
    model = build(dataclasses.replace(TINY, max_seq_len=64), 0)
    tilelli_jax.save(model, tmp_path, CardInfo(turns=TURNS * chat))
    code = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_new=100", "max_new=3"), {})
    assert capsys.readouterr().out


def test_a_card_changes_neither_loading_nor_the_fingerprint(model, tmp_path):
    tilelli_jax.save(model, tmp_path, INFO)
    with_card = network_fingerprint(tmp_path)
    (tmp_path / "README.md").unlink()
    assert network_fingerprint(tmp_path) == with_card
    assert tilelli_jax.load(tmp_path).config == TINY


def test_when_a_card_is_replaced(model, tmp_path):
    card = tmp_path / "README.md"
    tilelli_jax.save(model, tmp_path, INFO)
    full = card.read_text()
    assert MARK in full and "## Results" in full
    tilelli_jax.save(tilelli_jax.load(tmp_path), tmp_path)
    assert card.read_text() == full, "the same network, and nothing more is known"
    model.embed.kernel[...] = jnp.zeros_like(model.embed.kernel[...])
    tilelli_jax.save(model, tmp_path)
    assert "## Results" not in card.read_text(), "the results were those of another network"
    tilelli_jax.save(model, tmp_path, INFO)
    assert card.read_text() == full
    edited = full.replace(MARK, "").replace("library_name", "license: mit\nlibrary_name")
    card.write_text(edited)
    tilelli_jax.save(build(TINY, 1), tmp_path, INFO)
    assert card.read_text() == edited, "its user has edited it"


def test_a_damaged_model_gets_a_new_card(model, tmp_path):
    tilelli_jax.save(model, tmp_path, INFO)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    tilelli_jax.save(model, tmp_path)
    assert "## Results" not in (tmp_path / "README.md").read_text()


def test_a_directory_in_the_place_of_the_card(model, tmp_path):
    (tmp_path / "README.md").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        tilelli_jax.save(model, tmp_path)
    assert not (tmp_path / "config.json").exists()
