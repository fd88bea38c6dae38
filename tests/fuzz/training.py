"""Fuzz targets that read text, pairs, activations and runs: data, train, launch_check."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.fuzz.networks import save
from tests.fuzz.running import DIVERGED, Target
from tilelli_jax.commands import launch_check
from tilelli_jax.commands.data import main as data
from tilelli_jax.data.activations import write_activations
from tilelli_jax.data.synthetic import stories
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.train import main as train
from tilelli_jax.training import loop

MODEL: dict[str, Any] = {"family": "vanilla", "d_model": 8, "n_layers": 1, "max_seq_len": 16, "n_heads": 1,
                         "dense_expand": 1}
SHORT: dict[str, Any] = {"steps": 2, "batch_size": 4, "seq_len": 16, "log_every": 1, "eval_every": 2,
                         "eval_batch_size": 4, "eval_bytes": 100, "checkpoint_every": 1}
TEXT: dict[str, Any] = {
    "model": MODEL, "data": {"source": "text.txt"}, "train": SHORT,
    "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup_steps": 1}}
CHAT: dict[str, Any] = {
    "model": MODEL | {"max_seq_len": 48, "abstain_head": True},
    "chat": {"source": "chat.jsonl", "valid": "valid.jsonl"}, "finetune": {"abstain_weight": 0.5},
    "optimizer": TEXT["optimizer"], "train": SHORT | {"init_from": "start", "seq_len": 48, "export": "last"}}
SAE: dict[str, Any] = {"model": {"family": "sae", "d_model": 4, "n_latents": 8, "k": 2},
                       "activations": {"source": "rows"}, "optimizer": TEXT["optimizer"], "train": SHORT}
# A configuration with every type of value.
FULL: dict[str, Any] = {
    "seed": 3, "model": {"family": "routed", "d_model": 8, "n_layers": 1, "max_seq_len": 16, "n_heads": 1,
                         "pathways": ["local", "dense"], "dense_expand": 1, "quantizer": "ternary"},
    "compute": {"dtype": "float32", "remat": False}, "mesh": {"data": 1, "fsdp": 1},
    "data": {"source": "text.txt", "valid_fraction": 0.1, "cache_dir": "cache"},
    "optimizer": TEXT["optimizer"] | {"schedule": "cosine", "eps": "1e-8"}, "train": SHORT,
    "log": {"tensorboard": False},
    "report": {"prompts": ["Once"], "trigram": True, "reference": None}}

# The array files of a checkpoint have random names, so they are not mutated.
CHECKPOINT = ("*.json", "*.txt", "notes", "notes/*", "state", "state/_*", "state/*.ocdbt", "state/d",
              "state/ocdbt.process_0", "state/ocdbt.process_0/*.ocdbt")
STOPPED = " ".join(["stopped", *(f"stopped/{name}" for name in (
    "config.yaml", "metrics.jsonl", "checkpoints", "checkpoints/1", *(f"checkpoints/1/{name}"
                                                                      for name in CHECKPOINT)))])


def _write_pairs(name: str, n: int) -> None:
    Path(name).write_text("".join(json.dumps({
        "prompt": f"Where is {i}?", "response": "In it." if i % 2 else "Unknown.",
        "answerable": bool(i % 2)}) + "\n" for i in range(n)))


def _make_texts() -> None:
    Path("text.txt").write_bytes(stories.generate(3000))
    Path("rows.jsonl").write_text("".join(
        json.dumps({"text": f"This is text {i}, and so on. " * 4, "id": i}) + "\n" for i in range(20)))
    assert data(["--source", "text.txt", "rows.jsonl", "--out", "shards"]) == 0
    _write_pairs("chat.jsonl", 24)
    _write_pairs("valid.jsonl", 8)
    save(VanillaConfig(d_model=8, n_layers=1, max_seq_len=48, n_heads=1, dense_expand=1), Path("start"))
    rows = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float16)
    write_activations(Path("rows"), [rows], {"source_model": "x", "hook": "y", "layer": 1}, shard_rows=100)
    for name, tree in (("text", TEXT), ("chat", CHAT), ("sae", SAE), ("full", FULL)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(tree))


def _make_runs() -> None:
    """A complete run, and a run stopped after its first update."""
    _make_texts()
    assert train(["--config", "text.yaml", "run_dir=finished"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "should_stop", lambda step: True)
        assert train(["--config", "text.yaml", "run_dir=stopped"]) == 0


RUN = partial(Target, main=train, prints_progress=True, statuses=(0, 2, DIVERGED))
TARGETS = (
    Target("data", _make_texts, data, "--source text.txt rows.jsonl --out made --max-bytes 1000000",
           "text.txt rows.jsonl", 60),
    # The missing text is reported only after the configuration has been read.
    Target("train, configuration", _make_texts, train, "--config full.yaml data.source=nowhere.txt",
           "full.yaml", 80, expected_error="nowhere.txt: no such file"),
    Target("launch_check", _make_texts, launch_check.main, "--topology none:1 --config full.yaml",
           "full.yaml", 30, expected_error="tilelli launch-check needs libtpu"),
    RUN("train, text", _make_texts, argv="--config text.yaml", mutated="text.txt", inputs=24, large=False),
    RUN("train, shards", _make_texts, argv="--config text.yaml data.source=shards", mutated="shards shards/*",
        inputs=40),
    RUN("train, pairs", _make_texts, argv="--config chat.yaml train.steps=2",
        mutated="chat.jsonl valid.jsonl chat.yaml", inputs=30),
    RUN("train, model", _make_texts, argv="--config chat.yaml train.steps=2", mutated="start start/*",
        inputs=24),
    RUN("train, activations", _make_texts, argv="--config sae.yaml train.steps=2",
        mutated="rows rows/* sae.yaml", inputs=40),
    RUN("train, stopped", _make_runs, argv="--config text.yaml run_dir=stopped", mutated=STOPPED, inputs=60,
        writes="stopped stopped/*"),
    RUN("train, complete", _make_runs, argv="--config text.yaml run_dir=finished",
        mutated="finished/* finished/model/*", inputs=40, writes="finished finished/*"))
