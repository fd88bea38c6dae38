"""What a `.pt` file leaves open: that it is said, how another value is chosen, and what `--check` finds.

Of text that a network wrote itself, the settings that it wrote it with have the least expected negative
log-likelihood, so random weights do.
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
from tilelli_jax.convert import assumptions, torch_networks
from tilelli_jax.convert.families import family_of
from tilelli_jax.convert.plan import Plan
from tilelli_jax.convert.source import open_source

from tests.convert.torch_files import load_pt, run, said_of, save_pt, state_of, weights
from tests.references import STORED, needs
from tests.refusals import assert_one_line
from tilelli_jax.config import to_dict
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.store import load_config

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
    """Tensors so small gain nothing by more, which on a busy machine wait for each other."""
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
    """What such a network writes, in windows of its own."""
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
    """Its file, which says of the quantiser only that there is one."""
    if config.family == "routed":
        said = said_of(config) | {"quantize": True}
        return save_pt(path, {"config": said, "model": state_of(sharp(config))})
    theirs = {"embed.kernel": "tok_embed.weight", "positions.table": "pos_embed.weight",
              "final_norm.scale": "norm_final.weight", "final_norm.bias": "norm_final.bias"}
    state = {}
    for name, array in sharp(config).items():
        known = name.replace("kernel", "weight").replace("scale", "weight").replace(
            "attention", "attn").replace("dense", "ffn")
        turned = name.endswith("kernel") and name != "embed.kernel"
        state[theirs.get(name, known)] = array.T if turned else array
    return save_pt(path, {"config": {"n_heads": config.n_heads, "quantize": True}, "model": state})


def planned(path: Path) -> Plan:
    source = open_source(path)
    return family_of(source, None).plan(source, {})


def reads(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(assumptions.stories, "generate", lambda n_bytes, split: text)


@pytest.mark.parametrize("parts", [ASSUMED, ALL], ids=["as assumed", "all"])
def test_check_names_what_fits(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(LITE, quantize=parts)
    source = source_of(tmp_path / "source.pt", config)
    reads(monkeypatch, own_text(config))
    assert run(source, tmp_path / "out", "--check") == 0
    out, err = capsys.readouterr()
    _, line, difference = out.splitlines()
    assert line.startswith("quantize: 16 choices compared on 1,024 bytes of stories: "
                           f"quantize=[{','.join(parts)}] (")
    assert " nats/byte) predicts it best and is taken; next, quantize=[" in line and err == ""
    assert difference.startswith("largest difference from ")
    assert load_config(tmp_path / "out") == config


@pytest.mark.parametrize("config", [
    dataclasses.replace(TWO_HEADS, head_reduction="sum", quantize=("attention", "dense", "unembed")),
    dataclasses.replace(VANILLA, quantize=("attention", "dense", "embed")),
    *(pytest.param(dataclasses.replace(base, quantize=parts, **more), marks=pytest.mark.exhaustive)
      for base, more in ((TWO_HEADS, {}), (TWO_HEADS, {"head_reduction": "sum"}),
                         (LITE, {"tie_embeddings": True}))
      for parts in (ASSUMED, ALL[:5], (*ASSUMED, "router"), ("attention", "dense"))),
    *(pytest.param(dataclasses.replace(VANILLA, quantize=parts), marks=pytest.mark.exhaustive)
      for parts in (("attention", "dense"), ("attention", "dense", "embed", "unembed")))])
def test_what_fits_is_taken(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is, one of two heads' reductions among it."""
    plan = planned(source_of(tmp_path / "source.pt", config))
    reads(monkeypatch, own_text(config))
    settled, verdict = assumptions.settle(plan)
    assert settled.config == config and settled.notes == []
    assert f"quantize=[{','.join(config.quantize)}]" in verdict.split(" predicts it best and is taken")[0]


def test_every_choice_is_compared_once(tmp_path: Path) -> None:
    """Of the parts there are; attention and feed-forward are quantised in any case."""
    for config, n in ((LITE, 16), (dataclasses.replace(LITE, tie_embeddings=True), 8), (VANILLA, 4),
                      (dataclasses.replace(LITE, pathways=("dense", "sparse")), 8),
                      (dataclasses.replace(LITE, pathways=("dense",)), 4)):
        (one,) = planned(source_of(tmp_path / "source.pt", config)).assumptions
        found = {one.value, *one.others}
        assert len(found) == 1 + len(one.others) == n
        assert all({"attention", "dense"} <= set(parts) for parts in found)


def test_without_a_check_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what the line says to do is done."""
    source = source_of(tmp_path / "source.pt", TWO_HEADS)
    assert run(source, tmp_path / "out") == 0
    assert load_config(tmp_path / "out") == TWO_HEADS
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        "note: quantize: nothing says which weights are quantised (ternary); conv, attention, dense are "
        f"assumed (--set 'quantize=[{','.join(ALL)}]' for others; --check compares them on text)",
        "note: head_reduction: nothing says whether heads are averaged or summed; mean is assumed "
        "(--set head_reduction=sum for the other; --check compares them on text)"]
    chosen = [word for note in notes for word in ("--set", shlex.split(note.split("--set ")[1])[0])]
    assert run(source, tmp_path / "other", *chosen) == 0
    expected = dataclasses.replace(TWO_HEADS, quantize=ALL, head_reduction="sum")
    assert load_config(tmp_path / "other") == expected
    assert capsys.readouterr().err == ""
    assert run("--inspect", source) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == notes


@pytest.mark.parametrize("config", [dataclasses.replace(LITE, quantizer="none"), TWO_HEADS],
                         ids=["not quantised", "said"])
def test_what_is_not_open_is_not_said(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    said = said_of(config) | {"quantize": config.quantizer != "none"}
    source = save_pt(tmp_path / "source.pt", {"config": said, "model": state_of(sharp(config))})
    monkeypatch.setattr(assumptions, "_nats", None)  # nothing is run
    assert run(source, tmp_path / "out", "--set", "quantize=[conv,attention,dense]", "--set",
               "head_reduction=mean", "--check") == 0
    assert "choices" not in capsys.readouterr().out
    assert load_config(tmp_path / "out") == config


@pytest.mark.parametrize(("nats", "taken", "says"), [
    ([[3.0, 3.2], [2.0, 2.3], [2.9, 3.1]], 1,
     "a=[y] (2.1500 nats/byte) predicts it best and is taken; next, a=[z] (3.0000 nats/byte)"),
    ([[2.005, 2.305], [2.0, 2.3], [2.9, 3.1]], 0,
     "inconclusive: a=[y] (2.1500 nats/byte), a=[x] (2.1550 nats/byte) are too close; "
     "a=[x] (2.1550 nats/byte) is assumed, --set chooses another"),
    ([[2.0, 3.0], [2.5, 2.4], [3.0, 2.0]], 0,
     "and 1 more are too close; a=[x] (2.5000 nats/byte) is assumed"),
    ([[3.0, 3.2], [2.0, 2.3], [2.0, 2.295]], 2, "are too close; a=[z] (2.1475 nats/byte) is assumed"),
    ([[3.0, 3.2], [2.0, 2.3], [np.nan] * 2], 1, "predicts it best and is taken; next, a=[x]"),
    ([[4.0, 4.4], [4.1, 3.9], [5.0, 5.0]], 0,
     "inconclusive: none is better than chance (4.0000); a=[x] (4.2000 nats/byte) is assumed"),
    ([[np.nan] * 2] * 3, 0, "inconclusive: none is better than chance")],
    ids=["one", "two", "three of much scatter", "two others", "one without numbers", "none", "no numbers"])
def test_the_verdict(nats: Any, taken: int, says: str) -> None:
    """The first was assumed; it is kept unless the text shows it to be worse."""
    choices = [{"a": (letter,)} for letter in "xyz"]
    found, verdict = assumptions._verdict(choices, np.array(nats), 4.0)
    assert found == taken and says in verdict


def test_where_there_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then it remains assumed, and both are said."""
    config = dataclasses.replace(LITE, vocab_size=11)
    assert run(source_of(tmp_path / "source.pt", config), tmp_path / "out", "--check") == 0
    out, err = capsys.readouterr()
    assert "quantize: not compared: no text fits a vocabulary of 11 and 32 positions\n" in out
    assert err.startswith("note: quantize: ")


def test_untrained_networks_show_nothing(tmp_path: Path) -> None:
    settled, verdict = assumptions.settle(planned(source_of(tmp_path / "source.pt", TWO_HEADS)))
    assert settled.config == TWO_HEADS
    assert verdict.startswith("quantize, head_reduction: 32 choices compared on 2,048 bytes of stories: "
                              "inconclusive: none is better than chance (4.8520); ")


def test_a_network_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(tmp_path / "source.pt", LITE)
    monkeypatch.setattr(torch_networks, "build", lambda *_: 1 // 0)
    assert run(source, tmp_path / "out", "--check") == 2
    assert_one_line(capsys.readouterr().err, f"--check: {source} could not be run: ZeroDivisionError")
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


@needs(ATOME)
@pytest.mark.parametrize("n_bytes", [512, pytest.param(2048, marks=pytest.mark.exhaustive)])
def test_a_trained_network(n_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """atome as a file that says only that it is quantised: all of it is, as its authors publish."""
    tree = load_pt(ATOME)
    del tree["config"]["n_pathways"]
    tree["config"]["quantize"] = True
    torch.save(tree, tmp_path / "kit.pt")
    monkeypatch.setattr(assumptions, "BYTES", n_bytes)
    monkeypatch.setattr(assumptions, "WINDOW", 64)
    plan = planned(tmp_path / "kit.pt")
    assert plan.config.quantize == ASSUMED
    settled, verdict = assumptions.settle(plan)
    assert settled.config.quantize == ALL and "is taken" in verdict
