"""Runs that train sparse autoencoders: shared trainer, resuming, errors."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import tilelli_jax
from tests.error_lines import assert_one_line
from tests.reference_impl.mixtures import mixtures
from tilelli_jax.convert.command import main as convert
from tilelli_jax.data.activations import ActivationsConfig, open_activations, write_activations
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.train import main
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.tasks.sae import with_provenance


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, _ = mixtures(3000, d=16, atoms=24, active=3)
    out = tmp_path_factory.mktemp("activations") / "rows"
    parts = np.array_split(rows.astype(np.float16), 7)
    write_activations(out, parts, {"source_model": "mixture"}, shard_rows=1000)
    return out


def configured(activations: Path, tmp_path: Path) -> Path:
    tree = {"model": {"family": "sae", "d_model": 16, "n_latents": 32, "k": 3},
            "activations": {"source": str(activations)},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5, "weight_decay": 0},
            "train": {"steps": 40, "batch_size": 64, "eval_every": 10, "eval_batch_size": 64, "log_every": 5,
                      "checkpoint_every": 10}}
    (tmp_path / "sae.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "sae.yaml"


def test_a_run(activations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run directory, table, figure and resuming are the same as for text."""
    config, run = configured(activations, tmp_path), tmp_path / "run"
    assert main(["--config", str(config), f"run_dir={run}", "train.steps=20"]) == 0
    assert "2,700 activations to train on, 300 to validate on" in capsys.readouterr().out
    assert main(["--config", str(config), f"run_dir={run}", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "resuming from step 20" in out and "of the variance unexplained" in out and "bits" not in out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 40 and {"fvu", "l0", "dead", "valid_loss", "mse"} <= rows[-1].keys()
    assert rows[-1]["valid_loss"] < 0.9 * rows[0]["loss"]
    summary = json.loads((run / "summary.json").read_text())
    held_out = summary["held_out"]
    assert held_out["rows"] == 300 and 0 < held_out["l0"] <= 3
    assert held_out["explained_variance"] == pytest.approx(1 - summary["best_valid_loss"], abs=1e-4)
    assert (run / "loss.png").stat().st_size > 1000
    model = tilelli_jax.load(run / "model")
    assert model.config.source_model == "mixture", "as the activations state"
    np.testing.assert_allclose(jnp.linalg.norm(model.decoder.kernel[...], axis=1), 1, atol=1e-5)


def test_the_autoencoder_states_where_its_activations_come_from(tmp_path: Path) -> None:
    """From the activations' description to the hook name of the directory for SAELens."""
    info = {"source_model": "pythia-70m", "hook": "mlp_write", "layer": 1, "prepend_bos": False,
            "context_size": 64, "dataset": "me/texts", "note": "kept here only"}
    rows, _ = mixtures(200, d=16, atoms=24, active=3)
    write_activations(tmp_path / "rows", [rows], info)
    config = ExperimentConfig(model=SAEConfig(d_model=16, n_latents=32, k=3, layer=1),
                              activations=ActivationsConfig(source=str(tmp_path / "rows")))
    model = with_provenance(config).model
    assert model == SAEConfig(d_model=16, n_latents=32, k=3, source_model="pythia-70m", hook="mlp_write",
                              layer=1, prepend_bos=False, context_size=64, dataset="me/texts")
    tilelli_jax.save(tilelli_jax.build(model, 0), tmp_path / "model")
    assert convert([str(tmp_path / "model"), str(tmp_path / "out"), "--to", "saelens"]) == 0
    assert json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"] == {
        "sae_lens_version": "6.54.0", "sae_lens_training_version": None, "model_name": "pythia-70m",
        "hook_name": "blocks.1.hook_mlp_out", "hook_layer": 1, "hook_head_index": None, "prepend_bos": False,
        "context_size": 64, "dataset_path": "me/texts"}
    assert with_provenance(ExperimentConfig()) == ExperimentConfig()


@pytest.mark.parametrize(("info", "change", "parts"), [
    ({"layer": 1}, ["model.layer=7"], ["model.layer: expected 1, as in", "rows/activations.json, found 7"]),
    ({"hook": "resid_post"}, ["model.hook=mix"], ["model.hook: expected resid_post", "found mix"]),
    ({"source_model": "a"}, ["model.source_model=b"], ["model.source_model: expected a", "found b"]),
    ({"prepend_bos": True}, ["model.prepend_bos=false"], ["model.prepend_bos: expected True", "found False"]),
    ({"layer": "1"}, [], ["rows/activations.json: info.layer: expected an integer, found '1'"]),
    ({"layer": True}, [], ["info.layer: expected an integer, found True"]),
    ({"layer": -7}, [], ["rows/activations.json: info.layer: expected an integer ≥ -1, found -7"])])
def test_contradictions_with_the_activations_are_rejected(
        info: dict[str, object], change: list[str], parts: list[str], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = mixtures(200, d=16, atoms=24, active=3)
    write_activations(tmp_path / "rows", [rows], info)
    config = configured(tmp_path / "rows", tmp_path)
    assert main(["--config", str(config), f"run_dir={tmp_path / 'run'}", *change]) == 2
    assert_one_line(capsys.readouterr().err, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_an_interrupted_run_equals_an_uninterrupted_one(activations: Path, tmp_path: Path) -> None:
    config = configured(activations, tmp_path)
    for run, steps in (("whole", (40,)), ("parts", (20, 40))):
        for n in steps:
            assert main(["--config", str(config), f"run_dir={tmp_path / run}", f"train.steps={n}",
                         "optimizer.schedule=constant", "sae.dead_after=100",
                         *(["--resume"] if n != steps[0] else [])]) == 0
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.exhaustive
def test_batch_topk_with_prefixes(activations: Path, tmp_path: Path) -> None:
    """Interrupted or not, weights and threshold are equal bit for bit; held-out rows use the threshold."""
    config = configured(activations, tmp_path)
    for run, steps in (("whole", (40,)), ("parts", (20, 40))):
        for n in steps:
            assert main(["--config", str(config), f"run_dir={tmp_path / run}", f"train.steps={n}",
                         "optimizer.schedule=constant", "sae.dead_after=100", "model.activation=batch_topk",
                         "sae.prefixes=[8,16]", *(["--resume"] if n != steps[0] else [])]) == 0
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]
    model = tilelli_jax.load(tmp_path / "whole" / "model")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert float(model.threshold[...]) == pytest.approx(rows[-1]["threshold"], rel=1e-5)
    assert rows[-1]["threshold"] > 0 and {"fvu", "l0", "dead"} <= rows[-1].keys()
    assert rows[-1]["valid_loss"] < 0.9 * rows[0]["loss"]
    held_out = open_activations(activations).part(2700, 3000)
    n_active = (model.encode(jnp.asarray(held_out.gather(np.arange(300)), jnp.float32)).values > 0).sum()
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())["held_out"]
    assert summary["l0"] == pytest.approx(float(n_active) / 300) and 1 < summary["l0"] < 9


@pytest.mark.parametrize(("change", "parts"), [
    (["model.d_model=8"], ["model.d_model: expected 16, the width of the activations"]),
    (["activations.source=nowhere"], ["nowhere", "expected a directory of activations"]),
    (["train.batch_size=4096"], ["train.batch_size: expected at most 2700, the rows to train on"]),
    (["activations="], ["activations"]),
    (["activations.valid_fraction=0.0001"], ["activations.valid_fraction", "rows that differ"]),
    (["report.prompts=[hello]"], ["report.prompts", "no text"]),
    (["model.k=33"], ["k: expected at most n_latents 32"]),
    (["model.max_active=8"], ["model.max_active: expected 0 with activation topk"]),
    (["model.activation=batch_topk", "model.max_active=2"], ["model.max_active: expected 0, or from k 3"]),
    (["model.activation=batch_topk", "model.max_active=33"], ["model.max_active", "to n_latents 32"]),
    (["model.activation=batchtopk"], ["model.activation", "topk or batch_topk or jumprelu"]),
    (["model.activation=jumprelu"], ["model.k: expected 0 with activation jumprelu", "cannot be trained"]),
    (["model.activation=jumprelu", "model.k=0"],
     ["model.activation: expected topk or batch_topk, which can be trained, found jumprelu"]),
    (["model.input_norm=layer_norm"],
     ["model.input_norm: expected none, which can be trained, found layer_norm"]),
    (["sae.prefixes=[8,8]"], ["sae.prefixes: expected increasing numbers", "n_latents 32", "found 8, 8"]),
    (["sae.prefixes=[0,8]"], ["sae.prefixes"]), (["sae.prefixes=[8,32]"], ["sae.prefixes"])])
def test_invalid_settings(change: list[str], parts: list[str], activations: Path, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(activations, tmp_path)
    assert main(["--config", str(config), f"run_dir={tmp_path / 'run'}", *change]) == 2
    assert_one_line(capsys.readouterr().err, *parts)
    assert not (tmp_path / "run").exists()
