"""The compatibility command on synthetic files of both modalities, against an independent restatement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import signal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, TimeSeriesSplit
from sklearn.preprocessing import StandardScaler
from statsmodels.tsa.stattools import acf, adfuller

from tests.eval.difficulty.synthetic_release import (
    CONTEXT,
    ITEMS,
    LATENTS,
    POSITIONS,
    REPLICATES,
    TEST,
    TRAIN,
    WIDTH,
    K,
    make,
    read,
    run,
    write_table,
)
from tilelli_jax.eval.difficulty.published.config import load_config
from tilelli_jax.eval.difficulty.published.files import read_release
from tilelli_jax.loading import store


def pool(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values.mean(axis=0), values.max(axis=0), values[-1]])


def codes(root: Path, x: np.ndarray) -> np.ndarray:
    """Encodes one item, position by position."""
    sae = {name: tensor.read() for name, tensor in store.read_tensors(root / "sae").items()}
    found = np.zeros((len(x), LATENTS), np.float32)
    for row, position in zip(found, x.astype(np.float32), strict=True):
        preactivations = (position - sae["bias"]) @ sae["encoder.kernel"] + sae["encoder.bias"]
        for latent in sorted(range(LATENTS), key=lambda i: -preactivations[i])[:K]:
            row[latent] = max(preactivations[latent], 0)
    return found


def reference_statistics(x: np.ndarray) -> list[float]:
    _, power = signal.welch(x, nperseg=min(256, len(x)))
    density = power / power.sum()
    lags = acf(x, nlags=24, fft=False)
    return [np.var(x), np.mean(np.abs(np.diff(x))), lags[1], lags[24], adfuller(x, autolag="AIC")[1],
            -sum(p * np.log(p) for p in density if p > 0), np.polyfit(np.arange(len(x)), x, 1)[0],
            x.max() - x.min()]


def check_ladder(root: Path, blocks: dict[str, np.ndarray], y: np.ndarray, folds: Any) -> None:
    """Fits five rungs with GridSearchCV, and computes intervals one bootstrap replicate at a time."""
    result = json.loads((root / "out/probe_results.json").read_text())
    scores = read(root / "out/probe_scores.parquet")
    assert scores["y_test"].tolist() == y[TEST].tolist()
    points = {}
    for name, parts in {"P1_cheap": ("cheap",), "P2_cheap_raw": ("cheap", "raw"),
                        "P3_cheap_sae": ("cheap", "sae"), "P4_raw_only": ("raw",),
                        "P5_sae_only": ("sae",)}.items():
        features = np.concatenate([blocks[part] for part in parts], axis=1)
        scaler = StandardScaler().fit(features[TRAIN])
        search = GridSearchCV(
            LogisticRegression(l1_ratio=1.0, solver="liblinear", class_weight="balanced", max_iter=2000,
                               random_state=42),
            {"C": [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0]}, scoring="roc_auc", cv=folds)
        search.fit(scaler.transform(features[TRAIN]), y[TRAIN])
        found = search.predict_proba(scaler.transform(features[TEST]))[:, 1]
        np.testing.assert_allclose(scores[f"pred_{name}"], found, rtol=0, atol=1e-12)
        points[name] = found
        rung = result["probes"][name]
        assert rung["best_C"] == search.best_params_["C"]
        assert rung["auroc"] == pytest.approx(roc_auc_score(y[TEST], found), abs=1e-12)
    rng, drawn = np.random.default_rng(42), {name: [] for name in points}
    for _ in range(REPLICATES):
        pick = rng.choice(len(y[TEST]), len(y[TEST]), replace=True)
        for name, found in points.items():
            drawn[name].append(roc_auc_score(y[TEST][pick], found[pick]))
    for name, areas in drawn.items():
        ends = [result["probes"][name]["ci_low"], result["probes"][name]["ci_high"]]
        np.testing.assert_allclose(ends, np.percentile(areas, [2.5, 97.5]), rtol=0, atol=1e-12)
    gap = result["deltas"]["P3_cheap_sae-P2_cheap_raw"]
    np.testing.assert_allclose(
        [gap["ci_low"], gap["ci_high"]],
        np.percentile(np.subtract(drawn["P3_cheap_sae"], drawn["P2_cheap_raw"]), [2.5, 97.5]), atol=1e-12)
    assert (result["n_total"], result["n_train"], result["n_test"]) == (ITEMS, 45, 22)


def check_recalibration(root: Path, features: np.ndarray, y: np.ndarray) -> None:
    """P1 on unscaled features: raw, and with Platt's map fitted to probabilities."""
    c_value = json.loads((root / "out/probe_results.json").read_text())["probes"]["P1_cheap"]["best_C"]
    model = LogisticRegression(C=c_value, l1_ratio=1.0, solver="liblinear", class_weight="balanced",
                               max_iter=2000, random_state=42)
    held_out = np.empty(45)
    for fit, out in KFold(5, shuffle=True, random_state=42).split(features[TRAIN]):
        held_out[out] = model.fit(features[fit], y[fit]).predict_proba(features[out])[:, 1]
    raw = model.fit(features[TRAIN], y[TRAIN]).predict_proba(features[TEST])[:, 1]
    platt = LogisticRegression(C=1e6).fit(held_out[:, None], y[TRAIN]).predict_proba(raw[:, None])[:, 1]
    result = json.loads((root / "out/recalibration_results.json").read_text())
    assert result.keys() == {"P1_cheap", "P3_cheap_sae"}
    for name, found in (("raw", raw), ("platt", platt)):
        assert result["P1_cheap"][name]["brier"] == pytest.approx(np.mean((found - y[TEST]) ** 2), abs=1e-12)
        assert result["P1_cheap"][name]["auroc"] == pytest.approx(roc_auc_score(y[TEST], found), abs=1e-12)


def check_cascade(root: Path, column: str, costs: tuple[float, float], cheap: np.ndarray) -> None:
    table = read(root / "dear.parquet")
    by_window = dict(zip(table["window_id"].tolist(), table[column].tolist(), strict=True))
    scores = read(root / "out/probe_scores.parquet")
    expensive = np.array([by_window[window] for window in scores["id"].tolist()])
    result = json.loads((root / "out/cascade_results.json").read_text())
    assert result["always_expensive"] == {"mean_error": pytest.approx(expensive.mean()), "cost": costs[1]}
    assert result["win_rate_expensive"] == pytest.approx(np.mean(expensive < cheap))
    assert list(result["probes"]) == ["P3_cheap_sae", "P1_cheap"]
    point = result["probes"]["P1_cheap"]["frontier"][20]
    routed = scores["pred_P1_cheap"] >= point["tau"]
    assert point["tau"] == 0.5 and point["mean_cost"] == pytest.approx(np.where(routed, costs[1], 1).mean())
    assert point["mean_error"] == pytest.approx(np.where(routed, expensive, cheap).mean())


def test_a_text_that_looks_like_a_number_is_kept(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "llm")
    config = load_config(path, ["causal_model=007", "experiment=2024", "seed=7"])
    assert (config.causal_model, config.experiment, config.seed) == ("007", "2024", 7)


def test_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, columns = make(tmp_path, "llm")
    assert run(tmp_path) == 0
    config = load_config(path)
    found = read_release(config, tmp_path, str(path))
    activations = np.random.default_rng(1).standard_normal((ITEMS, POSITIONS, WIDTH)).astype(np.float16)
    used = [x[:min(n, POSITIONS)] for x, n in zip(activations, columns["seq_len"], strict=True)]
    np.testing.assert_array_equal(found.blocks["raw"], [pool(x) for x in used])
    assert found.blocks["raw"].dtype == np.float16
    np.testing.assert_allclose(found.blocks["sae"], [pool(codes(tmp_path, x)) for x in used], rtol=0,
                               atol=1e-6)
    np.testing.assert_array_equal(found.blocks["cheap"][:, 0], [len(text) for text in columns["prompt"]])
    np.testing.assert_array_equal(found.blocks["cheap"][:, 3], columns["prompt_perplexity"])
    np.testing.assert_array_equal(found.blocks["cheap"][:, 6], np.arange(ITEMS) // 9)
    y = np.asarray(columns["difficulty"])
    # 45 train items, with at least 10 per fold.
    check_ladder(tmp_path, found.blocks, y, StratifiedKFold(4, shuffle=True, random_state=42))
    check_recalibration(tmp_path, found.blocks["cheap"], y)
    check_cascade(tmp_path, "difficulty", (1.0, 5.0), y[TEST])
    selective = json.loads((tmp_path / "out/selective_prediction.json").read_text())
    assert selective["mean_error_no_abstention"] == y[TEST].mean()
    assert len(list((tmp_path / "out").iterdir())) == 6
    made = json.loads((tmp_path / "out/how_to_reproduce.json").read_text())
    assert made["command"].startswith("tilelli difficulty published --config ") and made["seed"] == "42"
    assert made["configuration"].endswith(".yaml") and made["versions"]["python"] and made["machine"]
    output = capsys.readouterr().out
    assert "45 train items, 22 test items" in output and "P5_sae_only" in output


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:adfuller:FutureWarning")
@pytest.mark.parametrize("reference", ["all", "train"])
def test_a_series(reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, columns = make(tmp_path, "tsfm", label_threshold_split=reference, hard_quantile=0.6)
    (tmp_path / "theirs").mkdir()
    rng = np.random.default_rng(5)
    losses = {name: rng.standard_normal(9) for name in ("natural", "sae_recon", "ablate_7", "ablate_2")}
    write_table(tmp_path / "theirs/causal_ablation_last.parquet",
                {"window_id": np.arange(9), **{f"crps_{name}": values for name, values in losses.items()}})
    assert run(tmp_path) == 0
    found = read_release(load_config(path), tmp_path, str(path))
    values = np.loadtxt(tmp_path / "s.csv", delimiter=",", skiprows=1, usecols=1)
    statistics = [reference_statistics(values[start:start + CONTEXT]) for start in columns["start_ts"]]
    np.testing.assert_allclose(found.blocks["cheap"], statistics, rtol=1e-9, atol=1e-9)
    activations = np.random.default_rng(1).standard_normal((ITEMS, POSITIONS, WIDTH)).astype(np.float16)
    np.testing.assert_array_equal(found.blocks["raw"], [pool(x) for x in activations])
    np.testing.assert_allclose(found.blocks["sae"], [pool(codes(tmp_path, x)) for x in activations], rtol=0,
                               atol=1e-6)
    chosen = columns["crps_norm"] if reference == "all" else columns["crps_norm"][TRAIN]
    y = (columns["crps_norm"] >= np.quantile(chosen, 0.6)).astype(int)
    check_ladder(tmp_path, found.blocks, y, TimeSeriesSplit(5))
    check_recalibration(tmp_path, found.blocks["cheap"], y)
    check_cascade(tmp_path, "crps_raw", (1.0, 4.0), columns["crps_raw"][TEST])
    selective = json.loads((tmp_path / "out/selective_prediction.json").read_text())
    assert selective["mean_error_no_abstention"] == pytest.approx(columns["crps_raw"][TEST].mean())
    causal = json.loads((tmp_path / "out/causal_ablation_last.json").read_text())
    assert (causal["n"], causal["metric"], causal["positions"], causal["top_features"], causal["model"]) == (
        9, "CRPS", "last", [7, 2], "who/what")
    assert causal["per_feature_ablation_delta"]["2"]["point"] == pytest.approx(
        (losses["ablate_2"] - losses["sae_recon"]).mean())
    assert "causal, last: reconstruction" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:adfuller:FutureWarning")
@pytest.mark.parametrize("reference", ["all", "train"])
def test_the_threshold_comes_from_the_configured_rows(reference: str, tmp_path: Path) -> None:
    path, columns = make(tmp_path, "tsfm", label_threshold_split=reference, hard_quantile=0.6)
    found = read_release(load_config(path), tmp_path, str(path))
    crps = columns["crps_norm"]
    quantile = np.quantile(crps if reference == "all" else crps[TRAIN], 0.6)
    np.testing.assert_array_equal(found.hard, crps >= quantile)
