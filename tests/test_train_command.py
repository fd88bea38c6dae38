"""The train command inside this process: a whole run, stops, accidents.

What it refuses is in test_train_refusals.py; runs of processes of their own, killed and
interrupted, are in training/test_interrupted.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import tilelli_jax
from tests.compiled import READ_ONLY
from tests.refusals import assert_one_line
from tilelli_jax import config as config_lib
from tilelli_jax import train as train_module
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.windows import validation_batches
from tilelli_jax.sharding import MeshConfig, make_mesh
from tilelli_jax.train import main
from tilelli_jax.training import loop
from tilelli_jax.training import text as text_module
from tilelli_jax.training.checkpoint import Checkpoints
from tilelli_jax.training.evaluate import make_evaluate
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.log import read_metrics
from tilelli_jax.training.optimizers import make_optimizer
from tilelli_jax.training.step import init_state, take_apart


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")}


def damage(run_dir, step):
    """Cuts off the largest of a checkpoint's array files."""
    largest = max((run_dir / "checkpoints" / str(step) / "state" / "d").iterdir(),
                  key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


@pytest.fixture(scope="module")
def tiny(tiny):
    """With two pathways instead of three: every run traces its step anew."""
    return tiny | {"model": tiny["model"] | {"pathways": ["local", "dense"]}}


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


@pytest.fixture(scope="module")
def finished(tiny_file, tmp_path_factory):
    """A complete run: its directory and what it printed."""
    run_dir = tmp_path_factory.mktemp("finished") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        import io
        out = io.StringIO()
        patch.setattr("sys.stdout", out)
        status = main(["--config", str(tiny_file), f"run_dir={run_dir}", "report.trigram=true",
                       "report.reference=0.5", "report.reference_name=a rival, of old",
                       'report.prompts=["Once", "The "]', "report.sample_bytes=5"])
    assert status == 0
    return run_dir, out.getvalue()


def test_a_run_directory_has_everything(finished):
    run_dir, _ = finished
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "model", "summary.json"]
    assert sorted(path.name for path in (run_dir / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_metrics(finished):
    run_dir, _ = finished
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "valid_loss" in row] == [4, 8, 12]
    for row in rows:
        assert set(row) - {"valid_loss", "valid_bits_per_byte"} == {
            "step", "loss", "bits_per_byte", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second",
            "load_balance", "router_use", "router_entropy", "zero_fraction"}
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))
        assert row["tokens"] == row["step"] * 8 * 16
        use = np.array(row["router_use"])
        assert use.shape == (2, 2) and np.allclose(use.sum(-1), 1, atol=1e-5)
        assert len(row["router_entropy"]) == 2 and all(0 < value <= 1 for value in row["router_entropy"])
        assert 0.2 < row["zero_fraction"] < 0.5  # a normal kernel: |w| < mean|w| / 2 for 31 %
        assert row["grad_norm"] > 0
    assert rows[0]["lr"] == pytest.approx(1e-2 / 5) and max(row["lr"] for row in rows) == pytest.approx(1e-2)
    assert rows[0]["loss"] == pytest.approx(math.log(256), abs=1.0)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3  # it learns
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert rows[0]["tokens_per_second"] is None  # compilation is no speed
    assert all(row["tokens_per_second"] > 0 for row in rows[2:])


def test_summary(finished):
    run_dir, _ = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = read_metrics(run_dir / "metrics.jsonl")
    validated = {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}
    best = min(validated, key=validated.get)
    assert summary["final_valid_loss"] == validated[12]
    assert summary["best_valid_loss"] == validated[best] and summary["best_step"] == best
    for kind in ("final", "best"):
        assert summary[f"{kind}_valid_bits_per_byte"] == summary[f"{kind}_valid_loss"] / math.log(2)
    assert summary["tokens"] == 12 * 8 * 16 and summary["steps"] == 12
    assert summary["seconds"] > 0 and summary["seed"] == 0 and "git_commit" in summary
    assert summary["versions"]["jax"] == jax.__version__
    assert 1 < summary["trigram_valid_loss"] < 4


def test_the_model_is_the_best_one_and_loads(finished, tiny):
    run_dir, _ = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    model = tilelli_jax.load(run_dir / "model")
    network, params = take_apart(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == summary["parameters"]
    config = config_lib.load(ExperimentConfig, run_dir / "config.yaml")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        batches = validation_batches(open_corpus(config.data).valid, batch_size=4, seq_len=16,
                                     max_bytes=tiny["train"]["eval_bytes"])
        evaluate = make_evaluate(network, batches, mesh, batch_size=4)
        assert evaluate(params) == pytest.approx(summary["best_valid_loss"], rel=1e-5)


def test_the_newest_and_the_best_checkpoint_stay(finished):
    run_dir, _ = finished
    best = json.loads((run_dir / "summary.json").read_text())["best_step"]
    assert {int(path.name) for path in (run_dir / "checkpoints").iterdir()} == {9, 12, best}


def test_what_is_printed(finished):
    run_dir, printed = finished
    assert printed.startswith("demo: routed, ") and "1 × cpu" in printed
    for part in ("step 4: validation ", "this run, best (step ", "a rival, of old", "byte trigrams",
                 f"figure: {run_dir}/loss.png", "[1] Once|", "[2] The |"):
        assert part in printed


def test_the_same_command_on_a_complete_run(finished, capsys):
    run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert main(["--config", str(run_dir / "config.yaml")]) == 0  # the file knows its run_dir
    out, err = capsys.readouterr()
    assert f"{run_dir} is complete" in out and "this run, best" in out and err == ""
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.exhaustive
def test_a_complete_run_with_another_report_and_export(finished, tiny_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    args = ["--config", str(tiny_file), f"run_dir={run_dir}", "train.export=last"]
    assert main([*args, 'report.prompts=["Two"]']) == 0
    out = capsys.readouterr().out
    assert "going on from step 12" in out and "[1] Two|" in out and "byte trigrams" not in out
    assert json.loads((run_dir / "summary.json").read_text())["exported_step"] == 12
    assert losses(run_dir) == losses(finished[0])
    # And what the same command again shows is what it showed at the end.
    assert main([*args, 'report.prompts=["Two"]']) == 0
    again = capsys.readouterr().out
    assert "is complete" in again
    assert again.partition("validation loss")[2] == out.partition("validation loss")[2]


@pytest.mark.exhaustive
def test_another_text_is_noticed(taken_up, text_file, tmp_path, capsys):
    run_dir, args = taken_up
    text = tmp_path / "text.txt"
    changed = bytearray(text_file.read_bytes())
    changed[1000] ^= 1
    text.write_bytes(changed)
    before = sorted(run_dir.rglob("*"))
    (run_dir / "config.yaml").write_text(
        (run_dir / "config.yaml").read_text().replace(str(text_file), str(text)))
    assert main([*args, f"data.source={text}"]) == 2
    assert_one_line(capsys.readouterr().err, f"data.source: {text} is not what {run_dir} has learned from",
                    "--resume")
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.exhaustive
def test_another_text_may_be_gone_on_with(taken_up, text_file, tiny_file, tmp_path, capsys):
    run_dir, _ = taken_up
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
    assert_one_line(capsys.readouterr().err, f"data.source: {text} is not what {run_dir} has learned from",
                    "--resume")
    assert main([*args, "--resume"]) == 0
    text.write_bytes(text_file.read_bytes())  # complete with the changed one: that is told, too
    capsys.readouterr()
    assert main(args) == 2
    assert_one_line(capsys.readouterr().err, f"data.source: {text} is not what {run_dir} has learned from")


@pytest.mark.exhaustive
def test_the_saved_configuration_reproduces_the_run(finished, tmp_path):
    run_dir, _ = finished
    again = tmp_path / "again"
    assert main(["--config", str(run_dir / "config.yaml"), f"run_dir={again}", "report.prompts=[]",
                 "train.export=last"]) == 0
    assert losses(again) == losses(run_dir)  # to the last bit
    assert json.loads((again / "summary.json").read_text())["exported_step"] == 12


def test_starting_from_a_model(finished, tiny_file, tmp_path):
    run_dir, _ = finished
    args = ["--config", str(tiny_file), f"run_dir={tmp_path / 'next'}",
            f"train.init_from={run_dir / 'model'}", "train.steps=1", "train.eval_every=1"]
    assert main(args) == 0
    # The first loss is that of the model taken up, on the first batch.
    assert losses(tmp_path / "next")[1] < losses(run_dir)[1] - 0.3


@pytest.mark.exhaustive
def test_a_run_that_began_from_a_model_goes_on_without_it(taken_up, finished, tmp_path):
    run_dir, args = taken_up
    start = f"train.init_from={tmp_path / 'gone'}"
    assert main([*args, "--resume", start]) == 0
    assert losses(run_dir) == losses(finished[0])


def test_the_best_weights_are_exported_though_later_ones_are_worse(tiny_file, tmp_path, monkeypatch, caplog):
    run_dir = tmp_path / "run"
    args = ["--config", str(tiny_file), f"run_dir={run_dir}"]
    found = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(text_module, "make_evaluate", lambda *_, **__: lambda params: next(found))
    assert main(args) == 0
    assert json.loads((run_dir / "summary.json").read_text())["exported_step"] == 8

    def kernel_of(step):
        config = config_lib.load(ExperimentConfig, run_dir / "config.yaml")
        mesh = make_mesh(MeshConfig())
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        _, outline, _ = init_state(config.model, config.compute, optimizer, 0, mesh)
        opened = Checkpoints(run_dir / "checkpoints")
        kernel = np.asarray(opened.restore(step, outline).state.params["embed"]["kernel"])
        opened.close()
        return kernel

    def exported():
        return np.asarray(tilelli_jax.load(run_dir / "model").embed.kernel[...])
    assert np.array_equal(exported(), kernel_of(8)) and not np.array_equal(exported(), kernel_of(12))

    # Should the best checkpoint be lost in the meantime, the last weights are better than none.
    (run_dir / "summary.json").unlink()
    damage(run_dir, 8)
    assert main(args) == 0
    assert json.loads((run_dir / "summary.json").read_text())["exported_step"] == 12
    assert np.array_equal(exported(), kernel_of(12))
    assert "8: damaged checkpoint" in caplog.text and "gets the last weights" in caplog.text


@pytest.mark.exhaustive
def test_a_request_to_stop_at_the_very_end_comes_too_late(taken_up, finished, monkeypatch):
    run_dir, args = taken_up
    save = train_module.store.save

    def save_and_be_told_to_stop(*what):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*what)

    monkeypatch.setattr(train_module.store, "save", save_and_be_told_to_stop)
    assert main(args) == 0
    assert (run_dir / "summary.json").exists() and losses(run_dir) == losses(finished[0])


def test_a_run_killed_while_it_wrote_its_end(finished, tiny_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    for name in ("summary.json", "loss.png"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "model")
    assert main(["--config", str(tiny_file), f"run_dir={run_dir}"]) == 0
    assert "going on from step 12" in capsys.readouterr().out
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json"):
        assert (run_dir / name).read_bytes() == (finished[0] / name).read_bytes()
    assert (run_dir / "loss.png").exists() and (run_dir / "summary.json").exists()


# ---------------------------------------------------------------------------------------------
# Stopped half-way, and what then may happen.


@pytest.fixture(scope="module")
def half_way(tiny_file, tmp_path_factory):
    """The directory of a run that was asked to stop after step 7."""
    run_dir = tmp_path_factory.mktemp("half way") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "should_stop", lambda step: step == 7)
        assert main(["--config", str(tiny_file), f"run_dir={run_dir}"]) == 0
    return run_dir


@pytest.fixture
def taken_up(half_way, tiny_file, tmp_path):
    """A copy of that directory, and the command that goes on with it."""
    run_dir = tmp_path / "run"
    shutil.copytree(half_way, run_dir)
    return run_dir, ["--config", str(tiny_file), f"run_dir={run_dir}"]


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_stopping_saves(half_way):
    assert checkpoints(half_way) == ["4", "6", "7"]  # the best so far and the newest two
    assert not (half_way / "summary.json").exists() and not (half_way / "model").exists()
    assert list(losses(half_way)) == list(range(1, 8))


@pytest.mark.parametrize("mesh", [
    (1, 1, 1), pytest.param((2, 2, 2), marks=[pytest.mark.eight_devices, pytest.mark.exhaustive])], ids=str)
def test_going_on(finished, taken_up, capsys, mesh):
    run_dir, args = taken_up
    sizes = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    assert main([*args, *sizes]) == 0
    assert "going on from step 7" in capsys.readouterr().out
    expected = losses(finished[0])
    if mesh == (1, 1, 1):
        assert losses(run_dir) == expected  # to the last bit
        assert (run_dir / "model/model.safetensors").read_bytes() == (
            finished[0] / "model/model.safetensors").read_bytes()
    else:  # sums over eight devices are rounded otherwise, and five updates of Adam make more of it
        assert losses(run_dir) == pytest.approx(expected, rel=1e-4)
    assert json.loads((run_dir / "summary.json").read_text())["tokens"] == 12 * 8 * 16


def test_a_damaged_newest_checkpoint(finished, taken_up, capsys, caplog):
    run_dir, args = taken_up
    damage(run_dir, 7)
    assert main(args) == 0
    assert "going on from step 6" in capsys.readouterr().out
    assert "7: damaged checkpoint" in caplog.text and "passed over, going on from step 6" in caplog.text
    assert losses(run_dir) == losses(finished[0])
    assert "damaged-7" in checkpoints(run_dir)


def test_every_checkpoint_damaged(taken_up, capsys):
    run_dir, args = taken_up
    for step in (4, 6, 7):
        damage(run_dir, step)
    before = sorted(run_dir.rglob("*"))
    assert main(args) == 2
    assert_one_line(capsys.readouterr().err, f"{run_dir}/checkpoints/7: damaged checkpoint", "no other")
    assert sorted(run_dir.rglob("*")) == before


def test_other_settings_are_refused(taken_up, capsys):
    run_dir, args = taken_up
    before = (run_dir / "config.yaml").read_text()
    assert main([*args, "train.batch_size=16"]) == 2
    assert_one_line(capsys.readouterr().err, "train.batch_size was 8 and is now 16", "--resume")
    assert (run_dir / "config.yaml").read_text() == before


@pytest.mark.parametrize("mended", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_divergence_is_explained_and_can_be_mended(finished, taken_up, capsys, mended):
    run_dir, args = taken_up
    assert main([*args, "--resume", "optimizer.learning_rate=1e38"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: step 8: the loss is ")
    for part in ("batch 7 of the data", "windows start at bytes ", "the residual stream is finite",
                 "training stopped before this update", "last good checkpoint: step 7"):
        assert part in error
    assert checkpoints(run_dir) == ["4", "6", "7"] and list(losses(run_dir)) == list(range(1, 8))
    assert not (run_dir / "summary.json").exists()
    if mended:
        assert main([*args, "--resume"]) == 0
        assert losses(run_dir) == losses(finished[0])


def test_poisoned_weights(finished, tiny_file, tmp_path, capsys):
    model = tilelli_jax.load(finished[0] / "model")
    kernel = model.blocks.dense.up.kernel
    args = ["--config", str(tiny_file), f"run_dir={tmp_path / 'run'}",
            f"train.init_from={tmp_path / 'poisoned'}"]
    kernel[...] = kernel[...].at[1, 0].set(3e38)  # finite, but their sum, for the scale, is not
    tilelli_jax.save(model, tmp_path / "poisoned")
    assert main(args) == 3
    error = capsys.readouterr().err
    for part in ("step 1: the loss is nan", "batch 0 of the data",
                 "not finite after block 1 of 2", "last good checkpoint: none yet"):
        assert part in error
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    kernel[...] = kernel[...].at[1, 0, 0].set(jnp.nan)
    tilelli_jax.save(model, tmp_path / "poisoned")
    assert main(args) == 2
    assert_one_line(capsys.readouterr().err, "blocks.1.dense.up.kernel: holds numbers that are not finite")


@pytest.mark.exhaustive
def test_the_default_run_directory(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tiny))
    monkeypatch.setattr(loop, "should_stop", lambda step: True)
    assert main(["--config", "small.yaml"]) == 0
    assert checkpoints(tmp_path / "runs" / "small") == ["1"]
    # The saved configuration is that of the same run.
    monkeypatch.setattr(loop, "should_stop", lambda step: step == 2)
    assert main(["--config", "runs/small/config.yaml"]) == 0
    assert "2" in checkpoints(tmp_path / "runs" / "small")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small"]


def test_tokens_and_windows_under_another_batch_size(tiny_file, tmp_path, capsys):
    """Each update counts as it was set; the settings that no update ran with are not recorded."""
    run_dir = tmp_path / "run"
    args = ["--config", str(tiny_file), f"run_dir={run_dir}", "train.steps=4", "train.checkpoint_every=2"]
    assert main(args) == 0
    kept = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for settings in (["train.steps=2"], ["train.batch_size=16"], ["train.steps=3", "seed=4"]):
        assert main([*args, *settings, "--resume"]) == 2
        assert_one_line(capsys.readouterr().err, "train.steps: ", "has made 4 updates; expected more of them")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == kept
    assert main([*args, "train.steps=6", "train.batch_size=16", "--resume"]) == 0
    found = [row["tokens"] for row in read_metrics(run_dir / "metrics.jsonl")]
    assert found == [128, 256, 384, 512, 768, 1024]
    assert json.loads((run_dir / "summary.json").read_text())["tokens"] == 1024
    assert (run_dir / "config.yaml").read_text().splitlines()[-1] == (
        "# from step 4: train.steps: 6 (before: 4), train.batch_size: 16 (before: 8)")
    notes = json.loads((run_dir / "checkpoints" / "6" / "notes" / "metadata").read_text())
    assert notes["data"] == {"examples": 4 * 8 + 2 * 16, "size": 16}


@pytest.mark.exhaustive
def test_a_disk_that_is_full(tiny_file, train_command, environment, tmp_path):
    """One line that names the file and the cause; the checkpoint before is kept, and the run goes on."""
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
