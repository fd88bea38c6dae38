"""The whole study on a tiny Chronos and one series."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.eval.running import stage, write
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.eval.difficulty.command import main
from tilelli_jax.eval.probes import LADDER
from tilelli_jax.eval.tables import read_columns
from tilelli_jax.loading import store
from tilelli_jax.models.chronos import ChronosConfig
from tilelli_jax.models.t5 import T5Config


@pytest.fixture
def series(tmp_path: Path) -> Iterator[Path]:
    """A directory with a random Chronos, a random autoencoder, and a series whose noise varies in time."""
    config = T5Config(vocab_size=60, d_model=16, n_layers=2, n_decoder_layers=1, n_heads=2, d_head=8,
                      d_hidden=24,
                      chronos=ChronosConfig(n_tokens=60, context_length=32, prediction_length=8))
    store.save(store.build(config, 0), tmp_path / "chronos")
    store.save(store.build(SAEConfig(d_model=16, n_latents=40, k=5), 0), tmp_path / "1" / "sae")
    rng, time = np.random.default_rng(0), np.arange(1400)
    values = 3 + np.sin(time / 4) + (0.1 + (np.sin(time / 50) > 0)) * rng.standard_normal(1400)
    (tmp_path / "series.csv").write_text("date,OT\n" + "\n".join(f"{t},{v}" for t, v in enumerate(values)))
    yield tmp_path


def test_series(series: Path) -> None:
    """The split in time, the CRPS, and the same random numbers for every patch."""
    out = series / "out"
    config = {
        "out": str(out), "data": {"family": "series", "source": str(series / "series.csv"), "context": 32,
                                  "horizon": 8, "stride": 8, "season": 12, "samples": 8},
        "network": {"path": str(series / "chronos")}, "large_model": {"path": str(series / "chronos")},
        "extract": {"layers": [1], "hook": "encoder.resid_post", "skip": 0, "shard_items": 64},
        "sae": {"path": str(series / "{layer}" / "sae"), "force": True}, "labels": {"quantile": 0.725},
        "probe": {"replicates": 400, "jobs": 1},
        "causal": {"items": 12, "controls": 2, "samples": 4, "horizon": 8, "latents": 2}}
    assert main(["--config", write(series / "tiny.yaml", config)]) == 0
    found = json.loads((out / "results.json").read_text())
    results = found["layers"]["1"]
    assert found["unit"] == "CRPS" and results["probe"]["purged"] > 0
    assert list(results["probe"]["rungs"]) == [rung.name for rung in LADDER], "a series has no controls"
    table = read_columns(stage(out, "items") / "items.parquet")
    starts = np.arange(len(table["split"])) * 8
    assert starts[table["split"] == "train"].max() + 40 <= 980 < starts[table["split"] == "test"].min()
    # The larger model is the same network with the same random numbers; only its batches differ.
    assert results["cascade"]["always_large"] == pytest.approx(results["cascade"]["always_small"], rel=1e-3)
    losses = read_columns(stage(out, "causal-1") / "losses-boundary.parquet")
    for latent in results["causal"]["positions"]["boundary"]["chosen"]:
        same = losses[latent] == losses["reconstructed"]
        assert same.mean() == pytest.approx(1 - results["causal"]["positions"]["boundary"]["chosen"][latent][
            "items_changed"] / 12)
    text = (out / "report.md").read_text()
    assert "autoencoder fails a quality check" in text
    assert "if its CRPS is at least the 72.5 % quantile of the train items" in text
