"""Resuming a run that stopped half-way: allowed and forbidden changes, damaged checkpoints, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from tests.compiled import READ_ONLY
from tests.error_lines import assert_one_line
from tests.train.runs import checkpoints, damage, losses
from tilelli_jax import train as train_module
from tilelli_jax.train import main
from tilelli_jax.training.log import read_metrics
from tilelli_jax.training.run import RunDirectory


def test_stopping_saves(half_way):
    assert checkpoints(half_way) == ["4", "6", "7"]  # the best so far and the newest two
    assert not (half_way / "summary.json").exists() and not (half_way / "model").exists()
    assert list(losses(half_way)) == list(range(1, 8))


@pytest.mark.parametrize("mesh", [
    (1, 1, 1), pytest.param((2, 2, 2), marks=[pytest.mark.eight_devices, pytest.mark.exhaustive])], ids=str)
def test_resuming(finished, resumable, capsys, mesh):
    run_dir, args = resumable
    sizes = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    assert main([*args, *sizes]) == 0
    assert "resuming from step 7" in capsys.readouterr().out
    expected = losses(finished[0])
    if mesh == (1, 1, 1):
        assert losses(run_dir) == expected  # to the last bit
        assert (run_dir / "model/model.safetensors").read_bytes() == (
            finished[0] / "model/model.safetensors").read_bytes()
    else:  # sums over eight devices round differently, and five updates of Adam amplify it
        assert losses(run_dir) == pytest.approx(expected, rel=1e-4)
    assert json.loads((run_dir / "summary.json").read_text())["tokens"] == 12 * 8 * 16


def test_a_damaged_newest_checkpoint(finished, resumable, capsys, caplog):
    run_dir, args = resumable
    damage(run_dir, 7)
    assert main(args) == 0
    assert "resuming from step 6" in capsys.readouterr().out
    assert "7: damaged checkpoint" in caplog.text and "skipped, continuing from step 6" in caplog.text
    assert losses(run_dir) == losses(finished[0])
    assert "damaged-7" in checkpoints(run_dir)


def test_every_checkpoint_damaged(resumable, capsys):
    run_dir, args = resumable
    for step in (4, 6, 7):
        damage(run_dir, step)
    before = sorted(run_dir.rglob("*"))
    assert main(args) == 2
    assert_one_line(capsys.readouterr().err, f"{run_dir}/checkpoints/7: damaged checkpoint", "no other")
    assert sorted(run_dir.rglob("*")) == before


def test_other_settings_raise_an_error(resumable, capsys):
    run_dir, args = resumable
    before = (run_dir / "config.yaml").read_text()
    assert main([*args, "train.batch_size=16"]) == 2
    assert_one_line(capsys.readouterr().err, "train.batch_size was 8 and is now 16", "--resume")
    assert (run_dir / "config.yaml").read_text() == before


@pytest.mark.exhaustive
def test_changed_text_raises_an_error(resumable, text_file, tmp_path, capsys):
    run_dir, args = resumable
    text = tmp_path / "text.txt"
    changed = bytearray(text_file.read_bytes())
    changed[1000] ^= 1
    text.write_bytes(changed)
    before = sorted(run_dir.rglob("*"))
    (run_dir / "config.yaml").write_text(
        (run_dir / "config.yaml").read_text().replace(str(text_file), str(text)))
    assert main([*args, f"data.source={text}"]) == 2
    assert_one_line(capsys.readouterr().err, f"{text} is not the data that {run_dir} was trained on",
                    "--resume")
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.exhaustive
def test_changed_text_is_allowed_with_resume(resumable, text_file, tiny_file, tmp_path, capsys):
    run_dir, _ = resumable
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    args = ["--config", str(tiny_file), f"run_dir={run_dir}", "--resume", f"data.source={text}"]
    assert main(args) == 0  # the same text under another name
    (run_dir / "summary.json").unlink()
    damage(run_dir, 12)
    changed = bytearray(text.read_bytes())
    changed[1000] ^= 1
    text.write_bytes(changed)
    capsys.readouterr()
    args.remove("--resume")
    assert main(args) == 2
    assert_one_line(capsys.readouterr().err, f"{text} is not the data that {run_dir} was trained on",
                    "--resume")
    assert main([*args, "--resume"]) == 0
    text.write_bytes(text_file.read_bytes())  # the run is complete with the changed text
    capsys.readouterr()
    assert main(args) == 2
    assert_one_line(capsys.readouterr().err, f"{text} is not the data that {run_dir} was trained on")


@pytest.mark.exhaustive
def test_a_run_resumes_without_its_starting_model(resumable, finished, tmp_path):
    run_dir, args = resumable
    start = f"train.init_from={tmp_path / 'gone'}"
    assert main([*args, "--resume", start]) == 0
    assert losses(run_dir) == losses(finished[0])


@pytest.mark.exhaustive
def test_a_request_to_stop_while_the_model_is_written(resumable, finished, monkeypatch):
    run_dir, args = resumable
    save = train_module.store.save

    def save_after_a_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(train_module.store, "save", save_after_a_signal)
    with pytest.raises(SystemExit, match="143"):
        main(args)
    assert not (run_dir / "summary.json").exists()
    monkeypatch.undo()
    assert main(args) == 0
    assert (run_dir / "summary.json").exists() and losses(run_dir) == losses(finished[0])


@pytest.mark.parametrize("fixed", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_divergence_is_explained_and_can_be_fixed(finished, resumable, capsys, fixed):
    run_dir, args = resumable
    assert main([*args, "--resume", "optimizer.learning_rate=1e38"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: step 8: the loss is ")
    for part in ("batch 7 of the data", "windows start at bytes ", "the residual stream is finite",
                 "training stopped before this update", "last good checkpoint: step 7"):
        assert part in error
    assert checkpoints(run_dir) == ["4", "6", "7"] and list(losses(run_dir)) == list(range(1, 8))
    assert not (run_dir / "summary.json").exists()
    if fixed:
        assert main([*args, "--resume"]) == 0
        assert losses(run_dir) == losses(finished[0])


def test_tokens_and_windows_under_another_batch_size(tiny_file, tmp_path, capsys):
    """Each update counts its own batch size; settings that no update ran with are not recorded."""
    run_dir = tmp_path / "run"
    args = ["--config", str(tiny_file), f"run_dir={run_dir}", "train.steps=4", "train.checkpoint_every=2"]
    assert main(args) == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for settings in (["train.steps=2"], ["train.batch_size=16"], ["train.steps=3", "seed=4"]):
        assert main([*args, *settings, "--resume"]) == 2
        assert_one_line(capsys.readouterr().err, "train.steps: ", "has run 4 updates already; expected more")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert main([*args, "train.steps=6", "train.batch_size=16", "--resume"]) == 0
    tokens = [row["tokens"] for row in read_metrics(run_dir / "metrics.jsonl")]
    assert tokens == [128, 256, 384, 512, 768, 1024]
    assert json.loads((run_dir / "summary.json").read_text())["tokens"] == 1024
    assert (run_dir / "config.yaml").read_text().splitlines()[-1] == (
        "# from step 4: train.steps: 6 (before: 4), train.batch_size: 16 (before: 8)")
    notes = json.loads((run_dir / "checkpoints" / "6" / "notes" / "metadata").read_text())
    assert notes["data"] == {"examples": 4 * 8 + 2 * 16, "size": 16}


@pytest.mark.exhaustive
def test_a_full_disk(tiny_file, train_command, environment, tmp_path):
    """The error is one line with file and cause; the previous checkpoint stays, and the run resumes."""
    run_dir = tmp_path / "run"
    args = ["--config", str(tiny_file), f"run_dir={run_dir}", "train.checkpoint_every=4"]
    assert main([*args, "train.steps=4"]) == 0
    limited = ["sh", "-c", 'ulimit -f 8 && exec "$@"', "sh",
               *train_command, *args, "train.steps=8", "--resume"]
    done = subprocess.run(limited, env=environment | READ_ONLY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert_one_line(done.stderr, f"{run_dir}/checkpoints: a checkpoint cannot be written: ", "File too large")
    assert "4" in checkpoints(run_dir) and "8" not in checkpoints(run_dir)
    assert main([*args, "train.steps=8", "--resume"]) == 0
    assert checkpoints(run_dir)[-1] == "8"


def test_the_data_position_of_an_older_checkpoint(half_way):
    """It counts batches of the size in config.yaml."""
    run = RunDirectory(half_way)
    assert train_module._position({"next_index": 7}, 16, run) == {"examples": 7 * 8, "size": 16}
    state = {"examples": 5, "size": 32}
    assert train_module._position(state, 16, run) == state
