"""Settings that a `.pt` file does not specify: the note, `--set`, and the choice that `--check` makes.

On text sampled from a network, the settings of that network have the lowest expected NLL, so the tests need
no trained weights.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.convert.torch_files import file_config, load_pt, run, save_pt, state_of, weights
from tests.error_lines import assert_one_line
from tests.references import STORED, needs
from tilelli_jax.config import to_dict
from tilelli_jax.convert import assumptions, torch_networks
from tilelli_jax.convert.families import family_of
from tilelli_jax.convert.plan import Plan
from tilelli_jax.convert.source import open_source
from tilelli_jax.loading.store import load_config
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig

torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")

ASSUMED = ("conv", "attention", "dense")
ALL = (*ASSUMED, "router", "embed", "unembed")
LITE = RoutedConfig(vocab_size=128, d_model=16, n_layers=2, max_seq_len=32, n_heads=1, d_head=8, top_k=4,
                    dense_expand=2, quantizer="ternary")
TWO_HEADS = dataclasses.replace(LITE, n_heads=2)
VANILLA = VanillaConfig(vocab_size=128, d_model=16, n_layers=1, max_seq_len=32, n_heads=2, dense_expand=2,
                        quantizer="ternary")
ATOME = STORED / "checkpoints" / "atome_1m_v1.pt"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One PyTorch thread: more do not help with tensors this small, and slow down a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def sharp(config: Any) -> dict[str, np.ndarray]:
    """Random weights that make large logits."""
    return {name: array * np.float32(4 if "router" in name or "unembed" in name else 1)
            for name, array in weights(config).items()}


@functools.cache
def own_text(config: Any, n_bytes: int = 1024) -> bytes:
    """Text sampled from the network, one context window after the other."""
    network = torch_networks.build(to_dict(config), "exact").eval()
    torch_networks.load_arrays(network, sharp(config))
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (n_bytes // config.max_seq_len, 1), generator=random)
    with torch.no_grad():
        while ids.shape[1] < config.max_seq_len:
            expected = network(ids)[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(expected, 1, generator=random)], 1)
    return bytes(ids.flatten().tolist())


def source_of(path: Path, config: Any) -> Path:
    """Writes the network's file, whose configuration says only that it is quantised."""
    if config.family == "routed":
        config_dict = file_config(config) | {"quantize": True}
        return save_pt(path, {"config": config_dict, "model": state_of(sharp(config))})
    theirs = {"embed.kernel": "tok_embed.weight", "positions.table": "pos_embed.weight",
              "final_norm.scale": "norm_final.weight", "final_norm.bias": "norm_final.bias"}
    state = {}
    for name, array in sharp(config).items():
        known = name.replace("kernel", "weight").replace("scale", "weight").replace(
            "attention", "attn").replace("dense", "ffn")
        is_kernel = name.endswith("kernel") and name != "embed.kernel"
        state[theirs.get(name, known)] = array.T if is_kernel else array
    return save_pt(path, {"config": {"n_heads": config.n_heads, "quantize": True}, "model": state})


def plan_of(path: Path) -> Plan:
    source = open_source(path)
    return family_of(source, None).plan(source, ())


def use_text(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(assumptions.stories, "generate", lambda n_bytes, split: text)


@pytest.mark.parametrize("parts", [ASSUMED, ALL], ids=["as assumed", "all"])
def test_check_reports_the_true_setting(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(LITE, quantize=parts)
    source = source_of(tmp_path / "source.pt", config)
    use_text(monkeypatch, own_text(config))
    assert run(source, tmp_path / "out", "--check") == 0
    out, err = capsys.readouterr()
    _, line, difference = out.splitlines()
    assert line.startswith("quantize: 16 choices compared on 1,024 bytes of stories: "
                           f"quantize=[{','.join(parts)}] (")
    assert " nats/byte) has the lowest NLL and is used; second: quantize=[" in line and err == ""
    assert difference.startswith("largest difference from ")
    assert load_config(tmp_path / "out") == config


@pytest.mark.parametrize("config", [
    dataclasses.replace(TWO_HEADS, head_reduction="sum", quantize=("attention", "dense", "unembed")),
    dataclasses.replace(VANILLA, quantize=("attention", "dense", "embed")),
    *(pytest.param(dataclasses.replace(base, quantize=parts, **changes), marks=pytest.mark.exhaustive)
      for base, changes in ((TWO_HEADS, {}), (TWO_HEADS, {"head_reduction": "sum"}),
                            (LITE, {"tie_embeddings": True}))
      for parts in (ASSUMED, ALL[:5], (*ASSUMED, "router"), ("attention", "dense"))),
    *(pytest.param(dataclasses.replace(VANILLA, quantize=parts), marks=pytest.mark.exhaustive)
      for parts in (("attention", "dense"), ("attention", "dense", "embed", "unembed")))])
def test_resolve_chooses_the_true_settings(config: Any, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the reduction of two heads undetermined."""
    plan = plan_of(source_of(tmp_path / "source.pt", config))
    use_text(monkeypatch, own_text(config))
    resolved, verdict = assumptions.resolve(plan)
    assert resolved.config == config and resolved.notes == []
    assert f"quantize=[{','.join(config.quantize)}]" in verdict.split(" has the lowest NLL and is used")[0]


def test_every_choice_is_compared_once(tmp_path: Path) -> None:
    """Only existing parts are varied; attention and feed-forward are quantised in every choice."""
    for config, n in ((LITE, 16), (dataclasses.replace(LITE, tie_embeddings=True), 8), (VANILLA, 4),
                      (dataclasses.replace(LITE, pathways=("dense", "sparse")), 8),
                      (dataclasses.replace(LITE, pathways=("dense",)), 4)):
        (assumption,) = plan_of(source_of(tmp_path / "source.pt", config)).assumptions
        choices = {assumption.value, *assumption.others}
        assert len(choices) == 1 + len(assumption.others) == n
        assert all({"attention", "dense"} <= set(parts) for parts in choices)


def test_without_check_the_assumptions_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The `--set` arguments in the notes work."""
    source = source_of(tmp_path / "source.pt", TWO_HEADS)
    assert run(source, tmp_path / "out") == 0
    assert load_config(tmp_path / "out") == TWO_HEADS
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        "note: quantize: the source does not specify which weights are quantised (ternary); conv, attention, "
        f"dense are assumed (--set 'quantize=[{','.join(ALL)}]' for others; --check compares them on text)",
        "note: head_reduction: the source does not specify whether heads are averaged or summed; mean is "
        "assumed (--set head_reduction=sum for the other; --check compares them on text)"]
    chosen = [word for note in notes for word in ("--set", shlex.split(note.split("--set ")[1])[0])]
    assert run(source, tmp_path / "other", *chosen) == 0
    expected = dataclasses.replace(TWO_HEADS, quantize=ALL, head_reduction="sum")
    assert load_config(tmp_path / "other") == expected
    assert capsys.readouterr().err == ""
    assert run("--inspect", source) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == notes


@pytest.mark.parametrize("config", [dataclasses.replace(LITE, quantizer="none"), TWO_HEADS],
                         ids=["not quantised", "quantised"])
def test_specified_settings_cause_no_note(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    config_dict = file_config(config) | {"quantize": config.quantizer != "none"}
    source = save_pt(tmp_path / "source.pt", {"config": config_dict, "model": state_of(sharp(config))})
    monkeypatch.setattr(assumptions, "_nll", None)  # the network is not run
    assert run(source, tmp_path / "out", "--set", "quantize=[conv,attention,dense]", "--set",
               "head_reduction=mean", "--check") == 0
    assert "choices" not in capsys.readouterr().out
    assert load_config(tmp_path / "out") == config


@pytest.mark.parametrize(("nll", "expected_choice", "expected_text"), [
    ([[3.0, 3.2], [2.0, 2.3], [2.9, 3.1]], 1,
     "a=[y] (2.1500 nats/byte) has the lowest NLL and is used; second: a=[z] (3.0000 nats/byte)"),
    ([[2.005, 2.305], [2.0, 2.3], [2.9, 3.1]], 0,
     "inconclusive: a=[y] (2.1500 nats/byte), a=[x] (2.1550 nats/byte) are too close; "
     "a=[x] (2.1550 nats/byte) is assumed; --set selects another"),
    ([[2.0, 3.0], [2.5, 2.4], [3.0, 2.0]], 0,
     "and 1 more are too close; a=[x] (2.5000 nats/byte) is assumed"),
    ([[3.0, 3.2], [2.0, 2.3], [2.0, 2.295]], 2, "are too close; a=[z] (2.1475 nats/byte) is assumed"),
    ([[3.0, 3.2], [2.0, 2.3], [np.nan] * 2], 1, "has the lowest NLL and is used; second: a=[x]"),
    ([[4.0, 4.4], [4.1, 3.9], [5.0, 5.0]], 0,
     "inconclusive: no choice is better than chance (4.0000); a=[x] (4.2000 nats/byte) is assumed"),
    ([[np.nan] * 2] * 3, 0, "inconclusive: no choice is better than chance")],
    ids=["one best", "two close", "three with large scatter", "two others close", "one NaN",
         "none above chance", "all NaN"])
def test_verdict(nll: Any, expected_choice: int, expected_text: str) -> None:
    """The first choice is the assumed one; it stays unless it is significantly worse."""
    choices = [{"a": (letter,)} for letter in "xyz"]
    chosen, verdict = assumptions._verdict(choices, np.array(nll), 4.0)
    assert chosen == expected_choice and expected_text in verdict


def test_vocabulary_too_small_for_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The assumption stays; the note and the reason are both printed."""
    config = dataclasses.replace(LITE, vocab_size=11)
    assert run(source_of(tmp_path / "source.pt", config), tmp_path / "out", "--check") == 0
    out, err = capsys.readouterr()
    assert ("quantize: not compared: the test text does not fit a vocabulary of 11 tokens and 32 positions\n"
            in out)
    assert err.startswith("note: quantize: ")


def test_untrained_networks_are_inconclusive(tmp_path: Path) -> None:
    resolved, verdict = assumptions.resolve(plan_of(source_of(tmp_path / "source.pt", TWO_HEADS)))
    assert resolved.config == TWO_HEADS
    assert verdict.startswith("quantize, head_reduction: 32 choices compared on 2,048 bytes of stories: "
                              "inconclusive: no choice is better than chance (4.8520); ")


def test_network_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(tmp_path / "source.pt", LITE)
    monkeypatch.setattr(torch_networks, "build", lambda *_: 1 // 0)
    assert run(source, tmp_path / "out", "--check") == 2
    assert_one_line(capsys.readouterr().err, f"--check: {source} could not be run: ZeroDivisionError")
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


@needs(ATOME)
@pytest.mark.parametrize("n_bytes", [512, pytest.param(2048, marks=pytest.mark.exhaustive)])
def test_trained_network(n_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """atome, from a file that says only that it is quantised; its authors publish that all parts are."""
    tree = load_pt(ATOME)
    del tree["config"]["n_pathways"]
    tree["config"]["quantize"] = True
    torch.save(tree, tmp_path / "kit.pt")
    monkeypatch.setattr(assumptions, "BYTES", n_bytes)
    monkeypatch.setattr(assumptions, "WINDOW", 64)
    plan = plan_of(tmp_path / "kit.pt")
    assert plan.config.quantize == ASSUMED
    resolved, verdict = assumptions.resolve(plan)
    assert resolved.config.quantize == ALL and "is used" in verdict
