"""The train command inside this process: the outputs of a complete run.

test_train_resume.py tests resuming, test_train_invalid_input.py invalid input, training/test_interrupted.py
separate processes that are killed and interrupted.
"""

from __future__ import annotations

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.train.runs import checkpoints, damage, losses
from tilelli_jax import config as config_lib
from tilelli_jax import train as train_module
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.windows import validation_batches
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.train import main
from tilelli_jax.training import loop
from tilelli_jax.training.checkpoint import Checkpoints
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.log import read_metrics
from tilelli_jax.training.optimizers import make_optimizer
from tilelli_jax.training.step import init_state, split_params
from tilelli_jax.training.tasks import text as text_module
from tilelli_jax.training.tasks.text import TextTask, held_out_nats
from tilelli_jax.training.tasks.text_loss import NextByteLoss


def test_a_run_directory_has_everything(finished):
    run_dir, _ = finished
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "model", "summary.json"]
    assert sorted(path.name for path in (run_dir / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors"]
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
    assert rows[0]["tokens_per_second"] is None  # the first step includes compilation
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
    network, params = split_params(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == summary["parameters"]
    config = config_lib.load(ExperimentConfig, run_dir / "config.yaml")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        batches = validation_batches(open_corpus(config.data).valid, batch_size=4, seq_len=16,
                                     max_bytes=tiny["train"]["eval_bytes"])
        evaluate = held_out_nats(network, batches, mesh, batch_size=4)
        assert evaluate(params) == pytest.approx(summary["best_valid_loss"], rel=1e-5)


def test_the_model_card(finished, tiny_file, text_file):
    run_dir, _ = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    card = (run_dir / "model/README.md").read_text()
    for part in (f"# {run_dir.name}\n", f"- fingerprint: {summary['corpus']}\n",
                 "- size: 18,000 bytes to train on, 2,000 to validate on\n",
                 f"| parameters | {summary['parameters']:,} |", "| loss | nats/byte |",
                 f"best (update {summary['best_step']}) | {summary['best_valid_loss']:.4f} |",
                 f"last (update 12) | {summary['final_valid_loss']:.4f} |", "| a rival, of old | 0.5000 |",
                 f"| byte trigrams | {summary['trigram_valid_loss']:.4f} |",
                 f"tilelli train --config {tiny_file} run_dir={run_dir} report.trigram=true",
                 f"report.sample_bytes=5 data.source={text_file}\n", "tilelli generate --model .",
                 f"The weights are those after update {summary['exported_step']}."):
        assert part in card, part


def test_the_newest_and_the_best_checkpoint_stay(finished):
    run_dir, _ = finished
    best = json.loads((run_dir / "summary.json").read_text())["best_step"]
    assert {int(path.name) for path in (run_dir / "checkpoints").iterdir()} == {9, 12, best}


def test_what_is_printed(finished):
    run_dir, printed = finished
    assert printed.startswith("demo: routed, ") and "1 × cpu" in printed
    for part in ("step 4: validation ", "this run, best (step ", "a rival, of old", "byte trigrams",
                 "[1] Once|", "[2] The |"):
        assert part in printed
    seconds = json.loads((run_dir / "summary.json").read_text())["seconds"]
    assert printed.endswith(f"\n\n1,536 tokens in {seconds:.0f} s; model: {run_dir}/model; figure: "
                            f"{run_dir}/loss.png\n")


def test_the_same_command_on_a_complete_run(finished, capsys):
    run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert main(["--config", str(run_dir / "config.yaml")]) == 0  # the file contains its run_dir
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
    assert "resuming from step 12" in out and "[1] Two|" in out and "byte trigrams" not in out
    assert json.loads((run_dir / "summary.json").read_text())["exported_step"] == 12
    assert losses(run_dir) == losses(finished[0])
    # The same command again prints the same report.
    assert main([*args, 'report.prompts=["Two"]']) == 0
    again = capsys.readouterr().out
    assert "is complete" in again
    assert again.partition("validation loss")[2] == out.partition("validation loss")[2]


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
    # The first loss is that of the starting model, on the first batch.
    assert losses(tmp_path / "next")[1] < losses(run_dir)[1] - 0.3


def test_the_best_weights_are_exported_instead_of_later_ones(tiny_file, tmp_path, monkeypatch, caplog):
    run_dir = tmp_path / "run"
    args = ["--config", str(tiny_file), f"run_dir={run_dir}"]
    losses_to_return = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(text_module, "held_out_nats", lambda *_, **__: lambda params: next(losses_to_return))
    assert main(args) == 0
    assert json.loads((run_dir / "summary.json").read_text())["exported_step"] == 8

    def kernel_of(step):
        config = config_lib.load(ExperimentConfig, run_dir / "config.yaml")
        mesh = make_mesh(MeshConfig())
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        _, abstract_state, _ = init_state(config.model, config.compute, optimizer, NextByteLoss(0.0), 0, mesh)
        opened = Checkpoints(run_dir / "checkpoints")
        kernel = np.asarray(opened.restore(step, abstract_state).state.params["embed"]["kernel"])
        opened.close()
        return kernel

    def exported():
        return np.asarray(tilelli_jax.load(run_dir / "model").embed.kernel[...])
    assert np.array_equal(exported(), kernel_of(8)) and not np.array_equal(exported(), kernel_of(12))

    # If the best checkpoint is lost in the meantime, the last weights are exported.
    (run_dir / "summary.json").unlink()
    damage(run_dir, 8)
    assert main(args) == 0
    assert json.loads((run_dir / "summary.json").read_text())["exported_step"] == 12
    assert np.array_equal(exported(), kernel_of(12))
    assert "8: damaged checkpoint" in caplog.text and "gets the last weights" in caplog.text


def test_a_run_killed_while_writing_its_outputs(finished, tiny_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    for name in ("summary.json", "loss.png"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "model")
    assert main(["--config", str(tiny_file), f"run_dir={run_dir}"]) == 0
    assert "resuming from step 12" in capsys.readouterr().out
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json"):
        assert (run_dir / name).read_bytes() == (finished[0] / name).read_bytes()
    assert (run_dir / "loss.png").exists() and (run_dir / "summary.json").exists()


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
    # The saved configuration resumes the same run.
    monkeypatch.setattr(loop, "should_stop", lambda step: step == 2)
    assert main(["--config", "runs/small/config.yaml"]) == 0
    assert "2" in checkpoints(tmp_path / "runs" / "small")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small"]


def test_the_reference_is_dropped_on_other_data(tiny, tmp_path, capsys, caplog):
    """The reference is a loss on the config file's data, so it does not apply to other data."""
    text = tmp_path / "mine.txt"
    text.write_text("Once upon a time there was a fox. " * 30)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny | {"report": {"reference": 0.5, "reference_name": "a rival",
                                                      "trigram": True}}))
    assert main(["--config", str(path), f"data.source={text}", f"run_dir={tmp_path / 'run'}",
                 "train.steps=2"]) == 0
    printed = capsys.readouterr().out
    assert "a rival" not in printed and "byte trigrams" in printed
    assert "network: train it longer, or on more text\n" in printed and "overfit" not in printed
    assert "only 102 bytes to validate on: the validation loss is unreliable" in caplog.text
    assert main(["--config", str(path), f"data.source={text}", f"run_dir={tmp_path / 'other'}",
                 "train.steps=2", "report.reference=0.4"]) == 0
    assert "a rival" in capsys.readouterr().out


def test_a_text_that_is_read_many_times(tiny, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("Once upon a time there was a fox. " * 30)  # 918 bytes to train on
    config = config_lib.from_dict(ExperimentConfig, tiny | {"data": {"source": str(text)}})
    task = TextTask(config, make_mesh(config.mesh))
    steps = 20 * 918 // task.tokens  # 20 passes
    assert task.advice(steps) == ""
    times = f"{50 * steps * task.tokens / 918:,.0f} times in {50 * steps:,} updates"
    assert task.advice(50 * steps) == (
        f"918 bytes to train on are read {times}: expect the network to overfit; use 51 kB of text or more, "
        "or fewer updates")  # 50 × 1,020 bytes, of which nine tenths are trained on
    assert f"read up to {times}" in task.advice(50 * steps, at_most=True)


def test_the_note_at_the_end_agrees_with_the_one_at_the_start(tiny, tmp_path, capsys):
    """Who is to expect that the network overfits is not asked to train it longer."""
    text = tmp_path / "mine.txt"
    text.write_text("Once upon a time there was a fox. " * 6)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny | {"report": {"trigram": True}}))
    assert main(["--config", str(path), f"data.source={text}", f"run_dir={tmp_path / 'run'}",
                 "train.steps=40"]) == 0
    printed = capsys.readouterr().out
    first, _, last = printed.partition("expect the network to overfit")
    assert first.splitlines()[-1].startswith("note: 183 bytes to train on are read 28 times in 40 updates")
    assert ("train it on more text\n" in last or "it overfits, and needs more text\n" in last), last
    assert "longer" not in last


def test_the_card_names_the_data_of_the_configuration():
    config = ExperimentConfig()
    assert train_module._command(["--config", "demo"], config) == (
        "tilelli train --config demo data.source=stories")
    given = ["--config", "a b", "data.source=x y.txt", "seed=1"]
    assert train_module._command(given, config) == (
        "tilelli train --config 'a b' 'data.source=x y.txt' seed=1")
    chat = config_lib.from_dict(ExperimentConfig, {"chat": {"source": "chat.jsonl"}})
    assert train_module._command(["--config", "sft-demo"], chat).endswith("sft-demo chat.source=chat.jsonl")
