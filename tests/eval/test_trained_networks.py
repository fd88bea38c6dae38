"""Networks that a study trains: what their runs are named by, and how they end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tilelli_jax.eval.inputs.networks import TrainingStopped, contents, run_path, trained

from tests.restated.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax import store
from tilelli_jax import train as train_command
from tilelli_jax.errors import InputError
from tilelli_jax.models import RoutedConfig
from tilelli_jax.training.experiment import ExperimentConfig

SMALL = RoutedConfig(d_model=16, n_layers=1, max_seq_len=64, pathways=("local",))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"once upon a time " * 100)
    return path


def named(*overrides: str) -> str:
    return run_path(Path("runs"), "base", config_lib.load(ExperimentConfig, None, overrides)).name


def test_a_run_is_named_by_what_it_depends_on(text: Path) -> None:
    """By settings and the contents of what it reads; not by what may change between two sittings."""
    source = f"data.source={text}"
    name = named(source)
    assert name.startswith("base-") and name == named(source)
    for free in ("compute.scan_layers=false", "mesh.fsdp=1", "train.checkpoint_every=7", "run_dir=elsewhere",
                 "train.keep=2", "data.prefetch=1"):
        assert named(source, free) == name, free
    others = [named(source, changed) for changed in (
        "seed=1", "train.steps=3", "model.d_model=32", "optimizer.learning_rate=0.5", "train.export=last",
        "data.shuffle_seed=1")]
    text.write_bytes(b"once upon a time!" * 100)
    others.append(named(source))
    assert len({name, *others}) == 1 + len(others)


def test_what_is_read_counts_wherever_it_stands(tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "who?", "response": "me"})
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "chat.jsonl").write_text(f"{pair}\n{pair.replace('who', 'why')}\n")
        store.save(random_network(SMALL, 0)[0], tmp_path / place / "model")

    def of(place: str) -> str:
        at = tmp_path / place
        return named(f"chat.source={at / 'chat.jsonl'}", f"train.init_from={at / 'model'}",
                     "train.seq_len=64")
    assert of("here") == of("there")
    (tmp_path / "there" / "chat.jsonl").write_text(f"{pair}\n{pair.replace('who', 'how')}\n")
    assert of("here") != of("there")
    (tmp_path / "there" / "chat.jsonl").write_bytes((tmp_path / "here" / "chat.jsonl").read_bytes())
    store.save(random_network(SMALL, 1)[0], tmp_path / "there" / "model")
    assert of("here") != of("there")


@pytest.mark.parametrize(("name", "says"), [
    ("model.safetensors", "cannot be read: its header tells of "),
    ("config.json", "cannot be read: expected at most 536,870,912 bytes, found 1,099,511,627,776")])
def test_what_would_be_read_for_hours_is_refused(tmp_path: Path, name: str, says: str) -> None:
    store.save(random_network(SMALL, 0)[0], tmp_path)
    known = contents(tmp_path)
    assert contents(tmp_path) == known
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(InputError) as caught:
        contents(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {says}")


@pytest.mark.parametrize(("status", "expected"), [(0, 143), (130, 130), (3, 3)])
def test_a_run_that_has_not_come_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int,
                                            expected: int) -> None:
    """A run that SIGTERM ends says 0, as it has saved itself: its study has made nothing of it."""
    monkeypatch.setattr(train_command, "main", lambda argv: status)
    with pytest.raises(TrainingStopped) as stopped:
        trained("a.yaml", tmp_path / "run")
    assert stopped.value.status == expected
