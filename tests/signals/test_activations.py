"""Collecting activations, and training an autoencoder on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import tilelli_jax
from tilelli_jax.data.activations import open_activations, write_activations
from tilelli_jax.errors import InputError
from tilelli_jax.loading.store import build
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.signals import batching
from tilelli_jax.signals.activations import activation_rows
from tilelli_jax.signals.patching import PatchedLoss, patched_loss
from tilelli_jax.train import main

CONFIG = GPTNeoXConfig(vocab_size=61, d_model=16, n_layers=3, n_heads=2, d_hidden=32, max_seq_len=128)


@pytest.fixture(scope="module")
def model() -> Any:
    return build(CONFIG, 0)


def texts(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 61, length).tolist() for length in lengths]


def test_rows_are_the_activations_of_each_text(model: Any) -> None:
    inputs = texts([5, 1, 33, 2])
    results = list(activation_rows(model, inputs, hook="mlp_write", layer=1, skip=1, dtype=np.float32,
                                   batch_size=2))
    assert sorted(len(rows) for rows in results) == [1, 4, 32]  # without the text of one token
    by_length = {len(ids) - 1: ids for ids in inputs}
    for rows, ids in ((rows, by_length[len(rows)]) for rows in results):
        _, recorded = jax.jit(lambda ids: model.tapped(ids, Tap(record=("mlp_write",))))(jnp.asarray([ids]))
        np.testing.assert_allclose(rows, recorded["mlp_write"][1, 0, 1:], atol=2e-5)


def test_the_last_rows_are_a_random_sample(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training holds out the last rows, which must not be those of the shortest texts."""
    monkeypatch.setattr(batching, "RUN", 1)
    lengths = [4] * 16 + [30] * 16

    def row_counts() -> list[int]:
        rows = activation_rows(model, texts(lengths), hook="resid_post", layer=0, batch_size=4)
        return [len(part) for part in rows]
    counts = row_counts()
    assert 0.25 < np.mean(np.array(counts[16:]) == 29) < 0.75
    assert row_counts() == counts


def test_activations_that_are_not_finite_raise(model: Any) -> None:
    large = build(CONFIG, 0)
    large.unroll()
    large.blocks[2].mlp.down.bias[...] += 1e6
    with pytest.raises(InputError, match="text 1, layer 2: activations are not finite as float16"):
        list(activation_rows(large, texts([1, 4]), hook="resid_post", layer=2))


@pytest.mark.skipif("max_isa=SSE4_2" in os.environ["XLA_FLAGS"],
                    reason="XLA has no conversion of float16 for CPUs without the instruction (F16C)")
def test_training_an_autoencoder_increases_the_recovered_loss(model: Any, tmp_path: Path) -> None:
    """Collects and stores activations, trains an autoencoder, and measures the loss that it recovers."""
    inputs = texts([64] * 60)
    write_activations(tmp_path / "rows", activation_rows(model, inputs, hook="resid_post", layer=1, skip=0),
                      {"hook": "resid_post", "layer": 1}, shard_rows=1000)
    stored = open_activations(tmp_path / "rows")
    assert (len(stored), stored.d_model, len(stored.shards)) == (60 * 64, 16, 4)
    assert stored.info == {"hook": "resid_post", "layer": 1}
    tree = {"model": {"family": "sae", "d_model": 16, "n_latents": 64, "k": 8},
            "activations": {"source": str(tmp_path / "rows")},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0},
            "train": {"steps": 150, "batch_size": 256, "eval_every": 150, "eval_batch_size": 64}}
    (tmp_path / "sae.yaml").write_text(yaml.safe_dump(tree))
    assert main(["--config", str(tmp_path / "sae.yaml"), f"run_dir={tmp_path / 'run'}"]) == 0
    trained, held_out = tilelli_jax.load(tmp_path / "run" / "model"), texts([64] * 68)[60:]
    before = patched_loss(model, build(trained.config, 0), held_out, hook="resid_post", layer=1, skip=0)
    after = patched_loss(model, trained, held_out, hook="resid_post", layer=1, skip=0)
    logits = np.asarray(jax.jit(model)(jnp.asarray(held_out)), np.float64)[:, :-1]
    right = np.take_along_axis(logits, np.asarray(held_out)[:, 1:, None], axis=2)[..., 0]
    nll = (np.log(np.exp(logits).sum(axis=-1)) - right).mean()
    assert after.natural == before.natural == pytest.approx(nll, abs=1e-5)
    assert after.zeroed == before.zeroed
    assert abs(after.reconstructed - after.natural) < 0.5 * abs(before.reconstructed - before.natural)
    assert after.zeroed < after.natural and np.isnan(after.recovered), "zeros beat this random network"
    assert PatchedLoss(natural=1.0, reconstructed=1.5, zeroed=3.0).recovered == 0.75
