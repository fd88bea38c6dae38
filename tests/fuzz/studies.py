"""Studies of difficulty, abstention and comparison, and claims: what they read, stages, results."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tilelli_jax.eval.abstention.command import calibrate
from tilelli_jax.eval.abstention.command import main as abstention
from tilelli_jax.eval.claims.command import main as claims
from tilelli_jax.eval.comparison.command import main as comparison
from tilelli_jax.eval.difficulty.command import main as difficulty
from tilelli_jax.eval.difficulty.published.command import main as published
from tilelli_jax.eval.tables import write_columns

from tests.eval.difficulty import made_up_kit
from tests.fuzz.networks import HEADED, save
from tests.fuzz.recall import BYTES, NOWHERE, OUT, finish, write_lines, write_yaml
from tests.fuzz.running import Target
from tests.fuzz.training import TEXT
from tilelli_jax.data import stories
from tilelli_jax.data.village import REGIMES
from tilelli_jax.estimators.sae import SAEConfig

ROOT = Path(__file__).parents[2]
STAGES = "out/stages/**/*"

# --- Difficulty ----------------------------------------------------------------------------------

WINDOWS = {"context": 32, "horizon": 8, "stride": 8}
ITEMS: dict[str, dict[str, Any]] = {
    "text.txt": {"family": "text", "items": 100, "prompt": 30, "ending": 6},
    "hellaswag.jsonl": {"family": "hellaswag"}, "squad.json": {"family": "squad"},
    "series.csv": {"family": "series", **WINDOWS}, "series.parquet": {"family": "series", **WINDOWS}}


def _items() -> None:
    """Items of every kind, and a directory that is no network."""
    Path("text.txt").write_bytes(stories.generate(8000))
    write_lines("hellaswag.jsonl", [
        {"ctx_a": f"A cat {i} sits", "ctx_b": "and then", "endings": [f"runs {word} {i}" for word in "abcd"],
         "label": str(i % 4), "activity_label": "x",
         "source_id": f"{('activitynet', 'wikihow')[i % 2]}~{i // 2}"} for i in range(40)])
    paragraphs = [{"context": f"It is in {i}, of {i % 7}.", "qas": [
        {"id": f"q{i}", "question": f"Where is {i}?", "answers": [{"text": f"in {i}", "answer_start": 6}]}]}
        for i in range(60)]
    Path("squad.json").write_text(json.dumps({"version": "1.1", "data": [
        {"title": f"t{i}", "paragraphs": paragraphs[i::12]} for i in range(12)]}))
    values = np.random.default_rng(0).standard_normal(400).tolist()
    Path("series.csv").write_text("date,OT\n" + "".join(
        f"{i:05},{value!r}\n" for i, value in enumerate(values)))
    write_columns(Path("series.parquet"), {"date": [f"{i:05}" for i in range(len(values))], "OT": values})
    Path("nowhere").mkdir()
    save(SAEConfig(d_model=8, n_latents=16, k=3), Path("sae"))
    for name, data in ITEMS.items():
        write_yaml(f"{name}.yaml", {
            "out": "out", "seed": 1, "data": data | {"source": name}, "network": {"path": "nowhere"},
            "large_model": {"path": "nowhere"}, "extract": {"layers": [0], "shard_items": 50},
            "sae": {"path": "sae", "force": True}, "probe": {"replicates": 400, "folds": 2, "jobs": 1},
            "causal": {"items": 10, "controls": 1, "latents": 2}})


def _difficulty() -> None:
    _items()
    save(BYTES, Path("network"))
    tree = yaml.safe_load(Path("text.txt.yaml").read_text())
    write_yaml("study.yaml", tree | {"network": {"path": "network"}, "large_model": {"path": "network"}})
    finish(difficulty, "--config", "study.yaml")
    shutil.copytree("out", "another", ignore=shutil.ignore_patterns("stages"))


READ = partial(Target, make=_items, main=difficulty, writes=OUT, tells=True, refused=NOWHERE)
MADE = partial(Target, make=_difficulty, main=difficulty, writes=OUT, tells=True)
DIFFICULTY = (
    READ("difficulty, configuration", argv="--config text.txt.yaml --stage extract out=out",
         spoilt="text.txt.yaml",
         inputs=40),
    *(READ(f"difficulty, {name}", argv=f"--config {name}.yaml --stage extract", spoilt=name, inputs=25)
      for name in ITEMS),
    MADE("difficulty, network", argv="--config study.yaml --stage extract", spoilt="network network/*",
         inputs=30),
    MADE("difficulty, autoencoder", argv="--config study.yaml --stage sae", spoilt="sae sae/*", inputs=30),
    *(MADE(f"difficulty, stages, {stage}", argv=f"--config study.yaml --stage {stage}", spoilt=STAGES,
           inputs=30) for stage in ("calibrate", "cascade", "causal")),
    MADE("difficulty, another study", argv="--config study.yaml --stage synthesize also=[another]",
         spoilt="another another/results.json", inputs=30))

# --- The published protocol ----------------------------------------------------------------------


def _kit(modality: str) -> None:
    made_up_kit.make(Path(), modality, n_boot=2)
    names = ("nll_natural", "nll_recon", "nll_ablate_3", "nll_ablate_5")
    losses = {name: np.random.default_rng(0).gamma(2.0, size=12) for name in names}
    Path("theirs").mkdir()
    made_up_kit.write_table(Path("theirs/causal_ablation_all.parquet"),
                            {"window_id": np.arange(12), **losses})


LLM, TSFM = partial(_kit, "llm"), partial(_kit, "tsfm")
PUBLISHED = (
    Target("published, configuration", LLM, published, "--config kit.yaml --out out sae_ckpt.mid=nowhere",
           "kit.yaml", 40, tells=True, refused="nowhere: no such directory"),
    Target("published, questions", LLM, published, "--config kit.yaml --out out",
           "m.parquet dear.parquet a.safetensors sae sae/* theirs/*", 70, tells=True),
    Target("published, series", TSFM, published, "--config kit.yaml --out out",
           "m.parquet dear.parquet s.csv", 50, tells=True))

# --- Abstention, its thresholds, and claims ------------------------------------------------------

CLAIMS = {"held_out": {"prompts": 2, "templates": ["I do not know"]}, "false_inability": {"prompts": 2},
          "answers": {"max_new": 1}, "architecture": {"family": "routed", "n_layers": 1, "parameters": 1000},
          "cross_regime": {"lens_margin": 0.5, "router_conf": [0.4, 0.6]}, "of": "something"}
RECIPES = ("base", "chat", "variant", "sae")
PAIRS = ("semantic", "calibration", "held_out")


def _abstention() -> None:
    """Data, a network and training configurations of one's own, and claims."""
    save(dataclasses.replace(HEADED, max_seq_len=128), Path("v4"))
    for name in RECIPES:
        shutil.copy(ROOT / f"configs/abstention-{name}.yaml", f"{name}.yaml")
    write_lines("prompts.jsonl", [{"prompt": f"{regime} {i}?", "regime": regime, "answer": "it"}
                                  for regime in REGIMES for i in range(2)])
    for name in PAIRS:
        write_lines(f"{name}.jsonl", [{"prompt": f"Where is {name} {i}?", "response": "In it.",
                                       "answerable": i % 2 == 0} for i in range(60)])
    write_yaml("abstention.yaml", {
        "out": "out", "seeds": [0], "variants": ["v4", "v9"], "given": ["v4=v4"], "prompts": "prompts.jsonl",
        "training": {name: {"train": f"{name}.yaml", "set": ["train.steps=2"]} for name in RECIPES},
        "pairs": {"pairs": 20, "calibration": 20, "held_out": 40,
                  "files": [f"{name}={name}.jsonl" for name in PAIRS]},
        "answers": {"max_new": 4}, "fitted": {"prompts": 40, "rank": 2, "latents": 2, "jobs": 1},
        "replicates": 100})
    write_yaml("claims.yaml", CLAIMS)


def _abstention_data() -> None:
    _abstention()
    finish(abstention, "--config", "abstention.yaml", "--stage", "data", "out=out")


DATA = partial(Target, main=abstention, argv="--config abstention.yaml --stage data out=out", writes=OUT,
               tells=True)
ABSTENTION = (
    DATA("abstention, configuration", _abstention, spoilt="*.yaml", inputs=70),
    DATA("abstention, data", _abstention, spoilt="*.jsonl v4/config.json", inputs=60),
    DATA("abstention, stages", _abstention_data, spoilt=STAGES, inputs=30),
    Target("abstention, threshold", _abstention, calibrate,
           "--model v4 --on calibration.jsonl --fpr 0.1", "calibration.jsonl v4 v4/*", 40),
    Target("claims", _abstention, claims,
           "--model v4 --expect claims.yaml --prompts prompts.jsonl --out out.json",
           "claims.yaml prompts.jsonl v4/*", 60, statuses=(1, 0, 2)))

# --- Comparison ----------------------------------------------------------------------------------


def _contenders() -> None:
    Path("text.txt").write_bytes(stories.generate(3000))
    write_yaml("model.yaml", TEXT)
    write_yaml("comparison.yaml", {
        "out": "out", "reference": "full", "seeds": [0, 1], "texts": ["text.txt"], "models": [
            ["faster", "model.yaml", "optimizer.learning_rate=0.1"], ["full", "model.yaml"]]})


def _comparison() -> None:
    _contenders()
    finish(comparison, "--config", "comparison.yaml")


A_RUN = "out/runs/full-*-0-*"
COMPARISON = (
    # What is read first is refused last: a text that is not there.
    Target("comparison, configuration", _contenders, comparison,
           "--config comparison.yaml texts=[nowhere.txt] out=out", "*.yaml", 50, OUT, tells=True,
           refused="nowhere.txt: no such file"),
    Target("comparison, runs", _comparison, comparison, "--config comparison.yaml --stage evaluate", " ".join(
        [A_RUN, *(f"{A_RUN}/{name}" for name in ("config.yaml", "summary.json", "metrics.jsonl", "model/*")),
         STAGES]), 60, OUT, tells=True))
TARGETS = (*DIFFICULTY, *PUBLISHED, *ABSTENTION, *COMPARISON)
