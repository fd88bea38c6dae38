"""The run directory: its owner, the settings that may change between sessions, and provenance."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tilelli_jax import config as config_lib
from tilelli_jax.errors import InputError
from tilelli_jax.training.config import ExperimentConfig, TrainConfig
from tilelli_jax.training.report import ReportConfig
from tilelli_jax.training.run import SUMMARY_KEYS, RunDirectory, provenance

CONFIG = ExperimentConfig()


def changed(**overrides):
    """The default configuration with keys like train__steps replaced."""
    config = CONFIG
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            value = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: value})
    return config


def open_run(run, config=CONFIG, force_resume=False, write=True):
    return run.open(config, force_resume=force_resume, write=write)


@pytest.fixture
def run(tmp_path):
    """A run directory created by a first session."""
    run = RunDirectory(tmp_path / "a" / "run")
    assert not open_run(run)
    return run


def finish(run):
    run.write_summary({"steps": 1000, "best_step": 900, "best_valid_loss": 1.0, "final_valid_loss": 1.1,
                       "tokens": 10, "seconds": 1.0})
    run.model.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (run.model / name).write_text("")


def test_the_directory_has_the_complete_configuration(run):
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]
    assert config_lib.load(ExperimentConfig, run.config) == CONFIG


def test_an_empty_directory_is_accepted(tmp_path):
    assert not open_run(RunDirectory(tmp_path))


def test_a_run_is_resumed_until_it_is_complete(run):
    assert not open_run(run)
    finish(run)
    assert open_run(run)
    assert run.read_summary()["steps"] == 1000
    (run.model / "model.safetensors").unlink()
    assert not open_run(run)


def test_killed_while_creating_the_directory(tmp_path):
    """Leftovers of config.yaml do not count as other files; a user's files do."""
    for name in (".config.yaml.ab12_xyz.tilelli-tmp", ".config.yaml.00000000.tilelli-tmp"):
        (tmp_path / name).write_text("model:")
    assert not open_run(RunDirectory(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    (tmp_path / "config.yaml").unlink()
    for name in (".config.yaml", ".config.yaml.original", ".other.ab12_xyz.tilelli-tmp",
                 "config.yaml.ab12_xyz"):
        (tmp_path / name).write_text("")
        with pytest.raises(InputError, match="holds other files"):
            open_run(RunDirectory(tmp_path))
        (tmp_path / name).unlink()


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff",
                                     json.dumps({key: [] for key in SUMMARY_KEYS}).encode()])
def test_a_run_with_a_damaged_summary_is_not_complete(run, content):
    run.summary.write_bytes(content)
    assert not open_run(run)


def a_file(path):
    path.write_text("")


def a_pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes in directories")
    os.mkfifo(path)


def a_circular_link(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize(("name", "make", "expected"), [
    ("checkpoints", a_file, "a directory"), ("checkpoints", a_circular_link, "a directory"),
    ("checkpoints/3", a_pipe, "a directory"), ("model", a_pipe, "a directory"),
    ("summary.json", a_pipe, "a regular file"), ("summary.json", Path.mkdir, "a regular file"),
    ("metrics.jsonl", a_pipe, "a regular file"), ("loss.png", Path.mkdir, "a regular file"),
    ("model/config.json", a_pipe, "a regular file")])
def test_a_path_of_the_wrong_kind(run, name, make, expected):
    """Paths that would fail or block at the end raise InputError before training."""
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(InputError) as caught:
        open_run(run)
    assert str(caught.value) == f"run_dir: {path}: expected {expected}"


def test_the_name_of_a_run(run, monkeypatch):
    monkeypatch.chdir(run.path)
    assert RunDirectory(Path(".")).name == RunDirectory(Path("")).name == run.name == "run"
    a_circular_link(run.path / "round")
    assert RunDirectory(run.path / "round").name == "round"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl: nothing is locked there")
def test_one_process_at_a_time(run, tmp_path):
    other = RunDirectory(run.path)
    run.lock()
    run.lock()
    with pytest.raises(InputError, match="is in use by another process"):
        other.lock()
    run.close()
    other.lock()
    other.close()
    RunDirectory(tmp_path / "none").lock()  # nothing to lock, and nothing is created
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("free", [
    {"mesh__fsdp": 2}, {"compute__remat": True}, {"train__checkpoint_every": 7}, {"train__log_every": 7},
    {"data__prefetch": 9}, {"run_dir": "elsewhere"}])
def test_settings_that_may_change_between_sessions(run, free):
    assert not open_run(run, changed(**free))
    assert config_lib.load(ExperimentConfig, run.config) == changed(**free)
    finish(run)
    assert open_run(run, changed(**free))
    assert open_run(run)  # no setting that affects the result has changed


@pytest.mark.parametrize("change", [{"report__trigram": True}, {"train__export": "last"}])
def test_settings_that_rewrite_the_outputs_of_a_complete_run(run, change):
    finish(run)
    assert not open_run(run, changed(**change))
    assert not run.summary.exists() and config_lib.load(ExperimentConfig, run.config) == changed(**change)
    finish(run)
    assert open_run(run, changed(**change))


@pytest.mark.parametrize(("change", "key", "old", "new"), [
    ({"train__steps": 7}, "train.steps", 1000, 7), ({"seed": 3}, "seed", 0, 3),
    ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate", 0.0003, 0.5),
    ({"data__shuffle_seed": 1}, "data.shuffle_seed", 0, 1)])
def test_other_changes_need_resume(run, change, key, old, new):
    finish(run)
    message = f"{run.path} .* {key} was {old} and is now {new}; choose .*--resume"
    with pytest.raises(InputError, match=message):
        open_run(run, changed(**change))
    assert config_lib.load(ExperimentConfig, run.config) == CONFIG
    # Until an update has run with them, they are not recorded, and the earlier run counts as complete.
    assert not open_run(run, changed(**change), force_resume=True)
    assert config_lib.load(ExperimentConfig, run.config) == CONFIG and open_run(RunDirectory(run.path))
    with pytest.raises(InputError, match=r"train.steps: .* has run 2000 updates already; expected more"):
        run.check_updates(2000, 2000)
    run.check_updates(2000, 2001)
    run.record(2000)
    assert config_lib.load(ExperimentConfig, run.config) == changed(**change)
    assert run.config.read_text().endswith(f"\n# from step 2000: {key}: {new} (before: {old})\n")
    # The summary from before the change is not that of the changed run.
    assert not open_run(run, changed(**change))
    run.check_updates(9, 9)  # nothing is changed now


def test_all_changes_are_recorded(run):
    """Comments after the settings list each change and its first step."""
    for step, settings in ((3, {"seed": 1}), (5, {"seed": 2, "train__batch_size": 64})):
        assert not open_run(run, changed(**settings), force_resume=True)
        run.record(step)
        run.record(step + 1)  # once
    assert not open_run(run, changed(**settings, train__keep=3))  # does not affect the result
    assert config_lib.load(ExperimentConfig, run.config) == changed(**settings, train__keep=3)
    assert run.config.read_text().splitlines()[-2:] == [
        "# from step 3: seed: 1 (before: 0)",
        "# from step 5: seed: 2 (before: 1), train.batch_size: 64 (before: 32)"]


def test_the_error_mentions_further_changes(run):
    with pytest.raises(InputError, match=(
            r"settings: seed was 0 and is now 1, train.steps was 1000 and is now 7; choose another run_dir, "
            r"or --resume")):
        open_run(run, changed(seed=1, train__steps=7))
    many = {"seed": 1, "train__steps": 7, "train__seq_len": 8, "train__eval_every": 9,
            "data__shuffle_seed": 2, "optimizer__warmup_steps": 3, "model__d_model": 64}
    with pytest.raises(InputError) as error:  # first the one that no run can resume with
        open_run(run, changed(**many))
    assert re.search(r"settings: model.d_model was 256 and is now 64, seed was 0 and is now 1, "
                     r"(\S+ was \S+ and is now \S+, ){3}and 2 more; choose another run_dir, and "
                     r"train.init_from", str(error.value))


def test_a_budget_that_was_too_small_can_be_replaced_by_a_number_of_updates(tmp_path):
    """Nothing is decided or trained yet; with a decision the settings are fixed."""
    run, budgeted = RunDirectory(tmp_path / "run"), changed(train__minutes=1.0)
    assert not open_run(run, budgeted)
    assert not open_run(run, changed(train__steps=7))
    assert config_lib.load(ExperimentConfig, run.config) == changed(train__steps=7)
    run = RunDirectory(tmp_path / "decided")
    assert not open_run(run, budgeted)
    run.write_steps(50, 1.0)
    with pytest.raises(InputError, match=r"train.steps was 1000 and is now 7"):
        open_run(run, changed(train__steps=7))


@pytest.mark.parametrize(("change", "key"), [({"model__d_model": 64}, "model.d_model"),
                                             ({"optimizer__name": "muon"}, "optimizer.name")])
def test_settings_that_no_run_can_resume_with(run, change, key):
    for force_resume in (False, True):
        with pytest.raises(InputError, match=f"{key} was .*choose another run_dir, and train.init_from"):
            open_run(run, changed(**change), force_resume=force_resume)
    assert config_lib.load(ExperimentConfig, run.config) == CONFIG


def test_a_directory_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=f"{tmp_path} holds other files"):
        open_run(RunDirectory(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_directory_that_cannot_be_created(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=f"run_dir: .*{Path(place).name}.*(cannot be written|is a file)"):
        open_run(RunDirectory(tmp_path / place))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_the_first_of_several_processes_writes(tmp_path, run):
    other = RunDirectory(tmp_path / "other")
    assert not open_run(other, write=False)
    assert not other.path.exists()
    # Files that the first process has begun to write do not matter.
    other.path.mkdir()
    (other.path / ".config.yaml.x").write_text("")
    assert not open_run(other, write=False)
    assert not open_run(run, changed(train__steps=7), force_resume=True, write=False)
    assert config_lib.load(ExperimentConfig, run.config) == CONFIG


def test_provenance():
    record = json.loads(json.dumps(provenance(5)))
    assert record["seed"] == 5 and record["device"].startswith("1 × ")
    assert all(re.match(r"\d+\.\d+", record["versions"][name])
               for name in ("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"))
    root = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=root, capture_output=True,
                         text=True, check=False)
    top, _, head = git.stdout.strip().partition("\n")
    in_a_checkout = git.returncode == 0 and Path(top) == root
    assert (record["git_commit"] or "").rstrip("+") == (head if in_a_checkout else "")


@pytest.mark.parametrize(("section", "key", "value"), [
    (TrainConfig, "steps", 0), (TrainConfig, "eval_bytes", -1), (TrainConfig, "load_balance_weight", -0.5),
    (TrainConfig, "load_balance_weight", float("nan")), (TrainConfig, "accumulate", 5),
    (TrainConfig, "keep", 0),
    (ReportConfig, "prompts", ("a", "")), (ReportConfig, "sample_bytes", -1),
    (ReportConfig, "temperature", -0.1), (ReportConfig, "temperature", float("inf"))])
def test_settings_out_of_range(section, key, value):
    with pytest.raises(InputError, match=f"^{key}: expected "):
        section(**{key: value})
