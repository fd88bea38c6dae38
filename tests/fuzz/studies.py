"""Fuzz targets of the difficulty, abstention and comparison studies and of claims."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.eval.difficulty import synthetic_release
from tests.fuzz.networks import ABSTAINING, save
from tests.fuzz.recall import BYTES, NO_MODEL, OUT, run_silently, write_lines, write_yaml
from tests.fuzz.running import Target
from tests.fuzz.training import TEXT
from tilelli_jax.data.synthetic import stories
from tilelli_jax.data.synthetic.village import REGIMES
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.eval.abstention.command import calibrate
from tilelli_jax.eval.abstention.command import main as abstention
from tilelli_jax.eval.claims.command import main as claims
from tilelli_jax.eval.comparison.command import main as comparison
from tilelli_jax.eval.difficulty.command import main as difficulty
from tilelli_jax.eval.difficulty.published.command import main as published
from tilelli_jax.eval.tables import write_columns

ROOT = Path(__file__).parents[2]
STAGES = "out/stages/**/*"

# --- Difficulty ----------------------------------------------------------------------------------

WINDOWS = {"context": 32, "horizon": 8, "stride": 8}
ITEMS: dict[str, dict[str, Any]] = {
    "text.txt": {"family": "text", "items": 100, "prompt": 30, "ending": 6},
    "hellaswag.jsonl": {"family": "hellaswag"}, "squad.json": {"family": "squad"},
    "series.csv": {"family": "series", **WINDOWS}, "series.parquet": {"family": "series", **WINDOWS}}


def _make_items() -> None:
    """Items of every family, and an empty directory in place of the network."""
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


def _make_difficulty() -> None:
    _make_items()
    save(BYTES, Path("network"))
    tree = yaml.safe_load(Path("text.txt.yaml").read_text())
    write_yaml("study.yaml", tree | {"network": {"path": "network"}, "large_model": {"path": "network"}})
    run_silently(difficulty, "--config", "study.yaml")
    shutil.copytree("out", "another", ignore=shutil.ignore_patterns("stages"))


ITEMS_READER = partial(Target, make=_make_items, main=difficulty, writes=OUT, prints_progress=True,
                       expected_error=NO_MODEL)
STUDY = partial(Target, make=_make_difficulty, main=difficulty, writes=OUT, prints_progress=True)
DIFFICULTY = (
    ITEMS_READER("difficulty, configuration", argv="--config text.txt.yaml --stage extract out=out",
                 mutated="text.txt.yaml", inputs=40),
    *(ITEMS_READER(f"difficulty, {name}", argv=f"--config {name}.yaml --stage extract", mutated=name,
                   inputs=25) for name in ITEMS),
    STUDY("difficulty, network", argv="--config study.yaml --stage extract", mutated="network network/*",
          inputs=30),
    STUDY("difficulty, autoencoder", argv="--config study.yaml --stage sae", mutated="sae sae/*", inputs=30),
    *(STUDY(f"difficulty, stages, {stage}", argv=f"--config study.yaml --stage {stage}", mutated=STAGES,
            inputs=30) for stage in ("calibrate", "cascade", "causal")),
    STUDY("difficulty, another study", argv="--config study.yaml other_studies=[another]",
          mutated="another another/results.json", inputs=30))

# --- The published protocol ----------------------------------------------------------------------


def _make_kit(modality: str) -> None:
    synthetic_release.make(Path(), modality, n_boot=2)
    names = ("nll_natural", "nll_recon", "nll_ablate_3", "nll_ablate_5")
    losses = {name: np.random.default_rng(0).gamma(2.0, size=12) for name in names}
    Path("theirs").mkdir()
    synthetic_release.write_table(Path("theirs/causal_ablation_all.parquet"),
                            {"window_id": np.arange(12), **losses})


LLM, TSFM = partial(_make_kit, "llm"), partial(_make_kit, "tsfm")
PUBLISHED = (
    Target("published, configuration", LLM, published, "--config release.yaml --out out sae_ckpt.mid=nowhere",
           "release.yaml", 40, prints_progress=True, expected_error="nowhere: no such directory"),
    Target("published, questions", LLM, published, "--config release.yaml --out out",
           "m.parquet dear.parquet a.safetensors sae sae/* theirs/*", 70, prints_progress=True),
    Target("published, series", TSFM, published, "--config release.yaml --out out",
           "m.parquet dear.parquet s.csv", 50, prints_progress=True))

# --- Abstention, its thresholds, and claims ------------------------------------------------------

CLAIMS = {"held_out": {"prompts": 2, "templates": ["I do not know"]}, "false_inability": {"prompts": 2},
          "answers": {"max_new": 1}, "architecture": {"family": "routed", "n_layers": 1, "parameters": 1000},
          "cross_regime": {"lens_margin": 0.5, "router_conf": [0.4, 0.6]}, "source": "something"}
RECIPES = ("base", "chat", "variant", "sae")
PAIRS = ("answerability", "calibration", "held_out")


def _make_abstention() -> None:
    """Data, a network, custom training configurations, and claims."""
    save(dataclasses.replace(ABSTAINING, max_seq_len=128), Path("v4"))
    for name in RECIPES:
        shutil.copy(ROOT / f"configs/abstention-{name}.yaml", f"{name}.yaml")
    write_lines("prompts.jsonl", [{"prompt": f"{regime} {i}?", "regime": regime, "answer": "it"}
                                  for regime in REGIMES for i in range(2)])
    for name in PAIRS:
        write_lines(f"{name}.jsonl", [{"prompt": f"Where is {name} {i}?", "response": "In it.",
                                       "answerable": i % 2 == 0} for i in range(60)])
    write_yaml("abstention.yaml", {
        "out": "out", "seeds": [0], "variants": ["v4", "v9"], "networks": {"v4": {"path": "v4"}},
        "prompts": "prompts.jsonl",
        "training": {name: {"train": f"{name}.yaml", "set": ["train.steps=2"]} for name in RECIPES},
        "pairs": {"count": 20, "calibration": 20, "held_out": 40,
                  "files": {name: f"{name}.jsonl" for name in PAIRS}},
        "answers": {"max_new": 4}, "fitted": {"prompts": 40, "rank": 2, "latents": 2, "jobs": 1},
        "replicates": 100})
    write_yaml("claims.yaml", CLAIMS)


def _make_abstention_data() -> None:
    _make_abstention()
    run_silently(abstention, "--config", "abstention.yaml", "--stage", "data", "out=out")


DATA = partial(Target, main=abstention, argv="--config abstention.yaml --stage data out=out", writes=OUT,
               prints_progress=True)
ABSTENTION = (
    DATA("abstention, configuration", _make_abstention, mutated="*.yaml", inputs=70),
    DATA("abstention, data", _make_abstention, mutated="*.jsonl v4/config.json", inputs=60),
    DATA("abstention, stages", _make_abstention_data, mutated=STAGES, inputs=30),
    Target("abstention, threshold", _make_abstention, calibrate,
           "--model v4 --on calibration.jsonl --fpr 0.1", "calibration.jsonl v4 v4/*", 40),
    Target("claims", _make_abstention, claims,
           "--model v4 --expect claims.yaml --prompts prompts.jsonl --out out.json",
           "claims.yaml prompts.jsonl v4/*", 60, statuses=(1, 0, 2)))

# --- Comparison ----------------------------------------------------------------------------------


def _make_models() -> None:
    Path("text.txt").write_bytes(stories.generate(3000))
    write_yaml("model.yaml", TEXT)
    write_yaml("comparison.yaml", {
        "out": "out", "reference": "full", "seeds": [0, 1], "texts": ["text.txt"], "models": {
            "faster": {"train": "model.yaml", "set": ["optimizer.learning_rate=0.1"]},
            "full": {"train": "model.yaml"}}})


def _make_comparison() -> None:
    _make_models()
    run_silently(comparison, "--config", "comparison.yaml")


A_RUN = "out/runs/full-*-0-*"
COMPARISON = (
    # The missing text is reported only after the configuration has been read.
    Target("comparison, configuration", _make_models, comparison,
           "--config comparison.yaml texts=[nowhere.txt] out=out", "*.yaml", 50, OUT, prints_progress=True,
           expected_error="nowhere.txt: no such file"),
    Target("comparison, runs", _make_comparison, comparison, "--config comparison.yaml --stage evaluate",
           " ".join(
        [A_RUN, *(f"{A_RUN}/{name}" for name in ("config.yaml", "summary.json", "metrics.jsonl", "model/*")),
         STAGES]), 60, OUT, prints_progress=True))
TARGETS = (*DIFFICULTY, *PUBLISHED, *ABSTENTION, *COMPARISON)
