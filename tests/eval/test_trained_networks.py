"""Networks that a study trains: the names of their run directories, and stopped runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.reference_impl.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax import train as train_command
from tilelli_jax.errors import InputError
from tilelli_jax.eval.inputs.networks import (
    NetworkConfig,
    StudyNetwork,
    TrainingStopped,
    check,
    run_path,
    train_network,
)
from tilelli_jax.loading import store
from tilelli_jax.loading.fingerprint import network_fingerprint
from tilelli_jax.models import RoutedConfig
from tilelli_jax.training.config import ExperimentConfig

SMALL = RoutedConfig(d_model=16, n_layers=1, max_seq_len=64, pathways=("local",))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"once upon a time " * 100)
    return path


def run_name(*overrides: str) -> str:
    return run_path(Path("runs"), "base", config_lib.load(ExperimentConfig, None, overrides)).name


def test_the_name_of_a_run_depends_on_settings_and_inputs(text: Path) -> None:
    """Settings that a run may change when it resumes do not count."""
    source = f"data.source={text}"
    name = run_name(source)
    assert name.startswith("base-") and name == run_name(source)
    for override in ("compute.scan_layers=false", "mesh.fsdp=1", "train.checkpoint_every=7",
                     "run_dir=elsewhere", "train.keep=2", "data.prefetch=1"):
        assert run_name(source, override) == name, override
    others = [run_name(source, override) for override in (
        "seed=1", "train.steps=3", "model.d_model=32", "optimizer.learning_rate=0.5", "train.export=last",
        "data.shuffle_seed=1")]
    text.write_bytes(b"once upon a time!" * 100)
    others.append(run_name(source))
    assert len({name, *others}) == 1 + len(others)


def test_the_contents_of_inputs_count_and_their_paths_do_not(tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "who?", "response": "me"})
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "chat.jsonl").write_text(f"{pair}\n{pair.replace('who', 'why')}\n")
        store.save(random_network(SMALL, 0)[0], tmp_path / place / "model")

    def name_for(place: str) -> str:
        directory = tmp_path / place
        return run_name(f"chat.source={directory / 'chat.jsonl'}", f"train.init_from={directory / 'model'}",
                     "train.seq_len=64")
    assert name_for("here") == name_for("there")
    (tmp_path / "there" / "chat.jsonl").write_text(f"{pair}\n{pair.replace('who', 'how')}\n")
    assert name_for("here") != name_for("there")
    (tmp_path / "there" / "chat.jsonl").write_bytes((tmp_path / "here" / "chat.jsonl").read_bytes())
    store.save(random_network(SMALL, 1)[0], tmp_path / "there" / "model")
    assert name_for("here") != name_for("there")


@pytest.mark.parametrize(("name", "message"), [
    ("model.safetensors", "cannot be read: header describes "),
    ("config.json", "cannot be read: expected at most 536,870,912 bytes, found 1,099,511,627,776")])
def test_corrupt_huge_files_are_rejected(tmp_path: Path, name: str, message: str) -> None:
    store.save(random_network(SMALL, 0)[0], tmp_path)
    assert network_fingerprint(tmp_path) == network_fingerprint(tmp_path)
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(InputError) as caught:
        network_fingerprint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize(("keys", "message"), [
    ({}, "path: expected a network's directory, or train with a training configuration, found neither"),
    ({"path": "x", "train": "y"}, "path: expected a network's directory, or train with a training "
     "configuration, found path 'x' and train 'y' (train= with no value removes it)"),
    ({"path": "x", "set": ("seed=1",)}, "set: expected none without train, found ['seed=1']")])
def test_invalid_sections(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as rejected:
        NetworkConfig(**keys)
    assert str(rejected.value) == message


def test_a_section_with_overrides(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its overrides reach the training run and its name; equal settings give one name, however written."""
    (tmp_path / "run.yaml").write_text(f"data: {{source: {text}}}\ntrain: {{steps: 3}}\n")
    calls: list[list[str]] = []
    monkeypatch.setattr(train_command, "main", lambda argv: calls.append(argv) or 3)

    def run_of(*overrides: str) -> str:
        section = NetworkConfig(train=str(tmp_path / "run.yaml"), set=overrides)
        with pytest.raises(TrainingStopped):
            StudyNetwork(section, tmp_path / "out").path  # noqa: B018
        *_, run, = [word for word in calls[-1] if word.startswith("run_dir=")]
        assert calls[-1] == ["--config", section.train, run, *overrides]
        return run
    assert run_of() == run_of("train.steps=3") == run_of("train.keep=1")
    assert len({run_of(), run_of("train.steps=4"), run_of("seed=1")}) == 3
    section = NetworkConfig(train=str(tmp_path / "run.yaml"), set=("train.steps=4",))
    assert section.experiment(["seed=5"]).train.steps == 4 and section.experiment(["seed=5"]).seed == 5
    assert section.experiment(["train.steps=6"]).train.steps == 6, "the study's settings take precedence"
    section.require("train", "set", key="network", reason="it is trained")
    with pytest.raises(InputError, match=r"^network.set: expected only train, because .*; found \('train"):
        section.require("train", key="network", reason="it is trained")


def test_a_section_is_checked_before_any_work(tmp_path: Path) -> None:
    for section, message in (
            (NetworkConfig(path=str(tmp_path / "none")),
             f"base.path: {tmp_path / 'none'}: no such file or directory"),
            (NetworkConfig(path=str(tmp_path), tokenizer="nowhere"),
             "base.tokenizer: nowhere: expected a tokenizer, found"),
            (NetworkConfig(train="nowhere.yaml"), "base: nowhere.yaml: no such file"),
            (NetworkConfig(train="demo", set=("train.stps=3",)),
             "base: overrides: unknown key 'train.stps' (did you mean 'train.steps'?)")):
        with pytest.raises(InputError) as rejected:
            check(section, "base")
        assert str(rejected.value).startswith(message)


@pytest.mark.parametrize(("status", "expected"), [(0, 143), (130, 130), (3, 3)])
def test_a_stopped_run_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int,
                              expected: int) -> None:
    """A run that receives SIGTERM returns 0, but has no summary: status 143."""
    monkeypatch.setattr(train_command, "main", lambda argv: status)
    with pytest.raises(TrainingStopped) as stopped:
        train_network("a.yaml", tmp_path / "run")
    assert stopped.value.status == expected
