"""Networks that a study trains: the names of their run directories, and stopped runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tilelli_jax.eval.inputs.networks import TrainingStopped, contents, run_path, trained

from tests.restated.random_weights import random_network
from tilelli_jax import config as config_lib
from tilelli_jax import train as train_command
from tilelli_jax.errors import InputError
from tilelli_jax.loading import store
from tilelli_jax.models import RoutedConfig
from tilelli_jax.training.experiment import ExperimentConfig

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
    ("model.safetensors", "cannot be read: its header tells of "),
    ("config.json", "cannot be read: expected at most 536,870,912 bytes, found 1,099,511,627,776")])
def test_corrupt_huge_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    store.save(random_network(SMALL, 0)[0], tmp_path)
    assert contents(tmp_path) == contents(tmp_path)
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(InputError) as caught:
        contents(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize(("status", "expected"), [(0, 143), (130, 130), (3, 3)])
def test_a_stopped_run_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int,
                              expected: int) -> None:
    """A run that receives SIGTERM returns 0, but has no summary: status 143."""
    monkeypatch.setattr(train_command, "main", lambda argv: status)
    with pytest.raises(TrainingStopped) as stopped:
        trained("a.yaml", tmp_path / "run")
    assert stopped.value.status == expected
