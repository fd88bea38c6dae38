"""Fine-tuning runs: starting model, untouched parameters, resuming, and errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

import tilelli_jax
from tests.error_lines import assert_one_line
from tilelli_jax.loading.store import build
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.train import main
from tilelli_jax.training import loop
from tilelli_jax.training.log import read_metrics

ROUTED = RoutedConfig(d_model=16, n_layers=2, max_seq_len=64, dense_expand=2, quantizer="ternary",
                      pathways=("local", "dense"))
VANILLA = VanillaConfig(d_model=16, n_layers=1, max_seq_len=64, n_heads=2, dense_expand=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models to start from, and answerable and unanswerable pairs with distinguishable prompts."""
    path = tmp_path_factory.mktemp("finetune")
    tilelli_jax.save(build(ROUTED, 0), path / "routed")
    tilelli_jax.save(build(ROUTED, 0), path / "packed", packed=True)
    tilelli_jax.save(build(VANILLA, 0), path / "vanilla")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for _ in range(120):
        name = "".join(rng.choice(list("abcdefgh"), 4))
        if rng.random() < 0.6:
            rows.append({"prompt": f"Where is {name}?", "response": f"In {name[::-1]}."})
        else:
            rows.append({"prompt": f"Who is {name.upper()}?", "response": "I do not know.",
                         "answerable": False})
    (path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(folder: Path, run: Path, **finetune: Any) -> list[str]:
    tree = {"chat": {"source": str(folder / "chat.jsonl")}, "finetune": finetune,
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            "train": {"init_from": str(folder / "routed"), "steps": 8, "batch_size": 8, "seq_len": 64,
                      "log_every": 1, "eval_every": 4, "eval_batch_size": 8, "checkpoint_every": 4,
                      "export": "last"}}
    run.parent.mkdir(parents=True, exist_ok=True)
    config = run.parent / f"{run.name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    return ["--config", str(config), f"run_dir={run}"]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def only_head(folder: Path) -> Path:
    """A finished run that trained nothing but the abstain head."""
    run = folder / "only-head"
    assert main(configured(folder, run, trainable=["abstain"], cross_entropy_weight=0, abstain_weight=1)) == 0
    return run


def test_everything(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain fine-tuning of the whole starting network, in nats per byte of the responses."""
    args = configured(folder, tmp_path / "run")
    assert main([*args, "train.steps=30", "train.eval_every=30", "chat.pack=true"]) == 0
    out = capsys.readouterr().out
    assert "pairs (" in out and "nats/byte" in out and "of which" not in out and "to train on in" in out
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert re.fullmatch(rf"{rows[-1]['tokens']:,} positions in \d+ s; model: .*", out.splitlines()[-1])
    card = (tmp_path / "run/model/README.md").read_text()
    assert "tilelli chat --model ." in card and "```\nUSER: {message}\nTILELLI: {answer}\nUSER:\n```" in card
    assert rows[-1]["valid_loss"] < rows[0]["loss"] - 1 and "bits_per_byte" in rows[0]
    assert {"nats", "router_entropy_loss", "router_entropy", "zero_fraction"} <= rows[0].keys()
    assert not {"abstain", "router_kl"} & rows[0].keys()
    summary = summary_of(tmp_path / "run")
    assert summary["trained_parameters"] == summary["parameters"] and summary["trained"] == ["everything"]
    assert summary["held_out"]["cross_entropy"] == pytest.approx(summary["final_valid_loss"], rel=1e-5)
    assert tilelli_jax.load(tmp_path / "run" / "model").config == ROUTED


def test_only_the_head(folder: Path, only_head: Path) -> None:
    """A network without a head gets one; no other parameter changes, nor any generated text."""
    before, after = (tilelli_jax.load(path) for path in (folder / "routed", only_head / "model"))
    after_arrays, before_arrays = to_arrays(after), to_arrays(before)
    assert after_arrays.keys() - before_arrays.keys() == {"abstain.kernel", "abstain.bias"}
    for name, array in before_arrays.items():
        assert after_arrays[name].tobytes() == array.tobytes(), name
    texts = [[output.data for output in tilelli_jax.generate(
        model, ["USER: hi\nTILELLI:", "Once"], max_new=40, temperature=1.0, seed=3)]
             for model in (before, after)]
    assert texts[0] == texts[1]
    summary = summary_of(only_head)
    assert summary["trained_parameters"] == 17
    assert summary["parameters"] == sum(array.size for array in after_arrays.values())
    rows = read_metrics(only_head / "metrics.jsonl")
    assert rows[0]["abstain"] == pytest.approx(np.log(2), rel=1e-6)  # a head of zeros
    assert rows[-1]["valid_loss"] < rows[0]["abstain"]
    held_out = summary["held_out"]
    assert held_out["abstain"] == pytest.approx(summary["final_valid_loss"], rel=1e-5)
    assert held_out["abstain_p_unknown"] > held_out["abstain_p_known"]
    assert held_out["pairs"] == 12 and 0 < held_out["entropy_known"] < 1


@pytest.mark.exhaustive
def test_training_continues_from_an_existing_head(folder: Path, only_head: Path, tmp_path: Path) -> None:
    """A frozen head can also train a router."""
    args = configured(folder, tmp_path / "run", trainable=["router"], cross_entropy_weight=0,
                      abstain_weight=1)
    assert main([*args, f"train.init_from={only_head / 'model'}", "train.steps=4"]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["abstain"] < 0.999 * np.log(2)
    after_arrays, before_arrays = (to_arrays(tilelli_jax.load(path / "model"))
                                   for path in (tmp_path / "run", only_head))
    changed = {name for name, array in after_arrays.items()
               if array.tobytes() != before_arrays[name].tobytes()}
    assert changed == {f"blocks.{i}.router.kernel" for i in range(2)}


@pytest.mark.exhaustive
def test_an_interrupted_run_equals_an_uninterrupted_one(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, including the router_kl loss state, and without the starting model."""
    goal = {"trainable": ["router", "abstain"], "abstain_weight": 1, "router_entropy_weight": 2,
            "router_kl_weight": 0.5}
    shutil.copytree(folder / "routed", tmp_path / "start")
    start = f"train.init_from={tmp_path / 'start'}"
    uninterrupted = [*configured(folder, tmp_path / "whole", **goal), start]
    assert main(uninterrupted) == 0
    assert "parameters, of which 81 are trained;" in capsys.readouterr().out  # 2 · 16 · 2 + 16 + 1
    parts = [*configured(folder, tmp_path / "parts", **goal), start]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "should_stop", lambda step: step == 3)
        assert main(parts) == 0
    shutil.rmtree(tmp_path / "start")
    jax.clear_caches()
    assert main(parts) == 0
    assert "resuming from step 3" in capsys.readouterr().out
    assert ((tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
            == (tmp_path / "parts" / "model" / "model.safetensors").read_bytes())
    rows = [[{key: value for key, value in row.items() if "second" not in key}
             for row in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("whole", "parts")]
    assert rows[0] == rows[1] and rows[0][-1]["router_kl"] > 0 == round(rows[0][0]["router_kl"], 6)
    assert main(parts) == 0  # complete
    assert "is complete" in capsys.readouterr().out
    assert main([*parts, "finetune.trainable=[router]", "--resume"]) == 2
    assert_one_line(capsys.readouterr().err, "finetune.trainable was")
    # The saved configuration is complete.
    saved = yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())
    assert saved["model"]["abstain_head"] is True and saved["model"]["d_model"] == 16


@pytest.mark.parametrize(("change", "parts"), [
    (["finetune.trainable=[routr]"], ["finetune.trainable[0]", "'routr'", "did you mean 'router'?"]),
    (["finetune.trainable=[state]"], ["finetune.trainable", "no parameters of 'state'", "router"]),
    (["finetune.trainable=[]"], ["finetune.trainable", "at least one"]),
    (["finetune.trainable=[abstain]"], ["finetune.abstain_weight", "above 0"]),
    (["finetune.cross_entropy_weight=0"], ["cross_entropy_weight, abstain_weight, router_entropy_weight"]),
    (["finetune.trainable=[router]", "finetune.abstain_weight=1"],
     ["finetune.abstain_weight", "has no abstain head"]),
    (["train.init_from={dir}/vanilla", "finetune.router_entropy_weight=1"],
     ["finetune.router_entropy_weight", "no router"]),
    (["train.init_from={dir}/vanilla", "finetune.trainable=[router]"],
     ["parameters of 'router'", "attention"]),
    (["train.init_from=", "finetune.trainable=[router]"], ["finetune.trainable: expected everything"]),
    (["train.init_from={dir}/nowhere"], ["nowhere: no such directory; expected a trained network"]),
    (["train.init_from={dir}/packed"], ["train.init_from:", "packed: expected full-precision weights, which "
                                        "training updates, found packed ones"]),
    (["model.d_model=32"], ["has d_model 16, and model.d_model is 32"]),
    (["chat.source={dir}/nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
    (["chat.source="], ["chat.source: expected a .jsonl file"]),
    (["chat=null", "finetune.trainable=[router]"], ["finetune: expected a section chat"]),
    (["train.seq_len=30"], ["chat.jsonl: expected pairs that fit in train.seq_len", "longer than 30 bytes"]),
    (["train.seq_len=65"], ["train.seq_len: expected at most model.max_seq_len 64"]),
    (["report.trigram=true"], ["report.trigram"])])
def test_invalid_settings(change: list[str], parts: list[str], folder: Path, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:
    changes = [override.replace("{dir}", str(folder)) for override in change]
    assert main([*configured(folder, tmp_path / "run"), *changes]) == 2
    assert_one_line(capsys.readouterr().err, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["source", "valid"])
def test_pairs_without_a_response_in_the_loss(part: str, folder: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """A mean over zero bytes would be a loss of 0.0, and count as the best."""
    files = {name: tmp_path / f"{name}.jsonl" for name in ("source", "valid")}
    for name, path in files.items():
        path.write_text("".join(json.dumps({"prompt": f"{name[0]}{i}", "response": "b",
                                            "answerable": name != part}) + "\n" for i in range(8)))
    assert main([*configured(folder, tmp_path / "run"), f"chat.source={files['source']}",
                 f"chat.valid={files['valid']}", "chat.loss_on=answerable"]) == 2
    assert_one_line(capsys.readouterr().err, "cross_entropy_weight: expected 0",
                    f"{part}.jsonl has no response", "train on" if part == "source" else "validate on")
    assert not (tmp_path / "run").exists()
