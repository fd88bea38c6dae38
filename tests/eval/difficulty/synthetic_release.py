"""Writes a directory in the format of fm-difficulty-probe, with synthetic items, and its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from flax import nnx

from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.eval.difficulty.published.command import main
from tilelli_jax.io.tensors import in_memory, write_file
from tilelli_jax.loading import store

ITEMS, POSITIONS, WIDTH, LATENTS, K, CONTEXT = 70, 4, 6, 12, 3, 60
TRAIN, TEST = slice(0, 45), slice(48, None)  # the rows between them belong to neither split
REPLICATES = 40
Tree = dict[str, Any]


def write_table(path: Path, columns: Tree) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def read(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in
            pyarrow.parquet.read_table(path).to_pydict().items()}


def write_activations(root: Path, items: int = ITEMS, positions: int = POSITIONS,
                      bad_value: Any = None) -> None:
    values = np.random.default_rng(1).standard_normal((items, positions, WIDTH)).astype(np.float16)
    if bad_value is not None:
        values[7, 2, 3] = bad_value
    write_file(root / "a.safetensors", {"encoder_embeddings": in_memory(values)})


def write_autoencoder(root: Path, **options: Any) -> None:
    config = SAEConfig(**{"d_model": WIDTH, "n_latents": LATENTS, "k": K, "unit_norm": "columns"} | options)
    store.save(TopKSAE(config, rngs=nnx.Rngs(0)), root / "sae")


def make(root: Path, modality: str, **options: Any) -> tuple[Path, Tree]:
    """Writes a run's directory; returns its configuration file and the columns of its metadata."""
    rng = np.random.default_rng(0)
    split = np.full(ITEMS, "purge", dtype=object)
    split[TRAIN], split[TEST] = "train", "test"
    windows = np.arange(ITEMS) * 3 + 100
    columns: Tree = {"window_id": windows, "split": split.tolist()}
    tree: Tree = {"modality": modality, "experiment": "made_up", "default": True, "k": K,
                  "n_boot": REPLICATES, "metadata": "m.parquet",
                  "activations": {"mid": "a.safetensors", "late": "b.safetensors"},
                  "sae_ckpt": {"mid": "sae", "late": "no"}, "layer_modules": {"mid": 1, "late": "x.3"},
                  "causal": {"k_features": 5}, "out_dir": "theirs", "causal_model": "who/what",
                  "cascade": {"expensive_metadata": "dear.parquet", "n_random_trials": 7}}
    order = rng.permutation(np.arange(ITEMS))  # the expensive model's rows have another order
    if modality == "llm":
        words = np.array(["alpha", "Beta", "gamma", "DELTA", "x"])
        columns |= {
            "prompt": [" ".join(words[rng.integers(0, 5, rng.integers(2, 9))]) for _ in range(ITEMS)],
            "activity_label": [f"topic {i // 9}" for i in range(ITEMS)],
            "seq_len": rng.integers(1, POSITIONS + 2, ITEMS), "difficulty": rng.integers(0, 2, ITEMS),
            "prompt_perplexity": rng.uniform(2, 90, ITEMS), "perplexity": rng.uniform(2, 90, ITEMS)}
        expensive = {"window_id": windows[order], "difficulty": rng.integers(0, 2, ITEMS)}
    else:
        values = np.sin(np.arange(500) * 2 * np.pi / 24) + rng.standard_normal(500).cumsum() / 5
        (root / "s.csv").write_text("date,OT\n" + "".join(f"d,{value!r}\n" for value in values.tolist()))
        crps = rng.gamma(2.0, size=ITEMS)
        columns |= {"start_ts": np.arange(ITEMS) * 6, "crps_raw": crps,
                    "crps_norm": (crps - crps.mean()) / crps.std()}
        expensive = {"window_id": windows[order], "crps_raw": rng.gamma(2.0, size=ITEMS)}
        tree |= {"series_csv": "s.csv", "context_length": CONTEXT}
    write_table(root / "m.parquet", columns)
    write_table(root / "dear.parquet", expensive)
    write_activations(root)
    write_autoencoder(root)
    (root / "release.yaml").write_text(yaml.safe_dump(tree | options))
    return root / "release.yaml", columns


def run(root: Path, *arguments: str) -> int:
    return main(["--config", str(root / "release.yaml"), "--root", str(root), "--out", str(root / "out"),
                 *arguments])
