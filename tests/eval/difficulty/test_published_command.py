"""The compatibility mode as a command, on made-up files of both kinds, beside the protocol restated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from flax import nnx
from scipy import signal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, TimeSeriesSplit
from sklearn.preprocessing import StandardScaler
from statsmodels.tsa.stattools import acf, adfuller

from eval.difficulty.published.__main__ import main
from eval.difficulty.published.config import load_config
from eval.difficulty.published.files import read_kit
from tests.refusals import assert_one_line
from tilelli_jax import store
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.tensors import in_memory, write_file

ITEMS, POSITIONS, WIDTH, LATENTS, K, CONTEXT = 70, 4, 6, 12, 3, 60
TRAIN, TEST = slice(0, 45), slice(48, None)  # between them what is neither
REPLICATES = 40
Tree = dict[str, Any]


def write_table(path: Path, columns: Tree) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def read(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in
            pyarrow.parquet.read_table(path).to_pydict().items()}


def write_activations(root: Path, items: int = ITEMS, positions: int = POSITIONS, bad: Any = None) -> None:
    values = np.random.default_rng(1).standard_normal((items, positions, WIDTH)).astype(np.float16)
    if bad is not None:
        values[7, 2, 3] = bad
    write_file(root / "a.safetensors", {"encoder_embeddings": in_memory(values)})


def write_autoencoder(root: Path, **about: Any) -> None:
    config = SAEConfig(**{"d_model": WIDTH, "n_latents": LATENTS, "k": K, "unit_norm": "columns"} | about)
    store.save(TopKSAE(config, rngs=nnx.Rngs(0)), root / "sae")


def make(root: Path, modality: str, **more: Any) -> tuple[Path, Tree]:
    """A directory of a run: its configuration, and the columns of its metadata."""
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
    order = rng.permutation(np.arange(ITEMS))  # the expensive model's rows lie in another order
    if modality == "llm":
        words = np.array(["alpha", "Beta", "gamma", "DELTA", "x"])
        columns |= {
            "prompt": [" ".join(words[rng.integers(0, 5, rng.integers(2, 9))]) for _ in range(ITEMS)],
            "activity_label": [f"topic {i // 9}" for i in range(ITEMS)],
            "seq_len": rng.integers(1, POSITIONS + 2, ITEMS), "difficulty": rng.integers(0, 2, ITEMS),
            "prompt_perplexity": rng.uniform(2, 90, ITEMS), "perplexity": rng.uniform(2, 90, ITEMS)}
        dear = {"window_id": windows[order], "difficulty": rng.integers(0, 2, ITEMS)}
    else:
        values = np.sin(np.arange(500) * 2 * np.pi / 24) + rng.standard_normal(500).cumsum() / 5
        (root / "s.csv").write_text("date,OT\n" + "".join(f"d,{value!r}\n" for value in values.tolist()))
        crps = rng.gamma(2.0, size=ITEMS)
        columns |= {"start_ts": np.arange(ITEMS) * 6, "crps_raw": crps,
                    "crps_norm": (crps - crps.mean()) / crps.std()}
        dear = {"window_id": windows[order], "crps_raw": rng.gamma(2.0, size=ITEMS)}
        tree |= {"series_csv": "s.csv", "context_length": CONTEXT}
    write_table(root / "m.parquet", columns)
    write_table(root / "dear.parquet", dear)
    write_activations(root)
    write_autoencoder(root)
    (root / "kit.yaml").write_text(yaml.safe_dump(tree | more))
    return root / "kit.yaml", columns


def run(root: Path, *more: str) -> int:
    return main(["--config", str(root / "kit.yaml"), "--root", str(root), "--out", str(root / "out"),
                 *more])


def pool(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values.mean(axis=0), values.max(axis=0), values[-1]])


def codes(root: Path, x: np.ndarray) -> np.ndarray:
    """Of one item, position by position."""
    sae = {name: tensor.read() for name, tensor in store.read_tensors(root / "sae").items()}
    found = np.zeros((len(x), LATENTS), np.float32)
    for row, position in zip(found, x.astype(np.float32), strict=True):
        before = (position - sae["bias"]) @ sae["encoder.kernel"] + sae["encoder.bias"]
        for latent in sorted(range(LATENTS), key=lambda i: -before[i])[:K]:
            row[latent] = max(before[latent], 0)
    return found


def restated_statistics(x: np.ndarray) -> list[float]:
    _, power = signal.welch(x, nperseg=min(256, len(x)))
    share = power / power.sum()
    lags = acf(x, nlags=24, fft=False)
    return [np.var(x), np.mean(np.abs(np.diff(x))), lags[1], lags[24], adfuller(x, autolag="AIC")[1],
            -sum(p * np.log(p) for p in share if p > 0), np.polyfit(np.arange(len(x)), x, 1)[0],
            x.max() - x.min()]


def check_ladder(root: Path, blocks: dict[str, np.ndarray], y: np.ndarray, folds: Any) -> None:
    """Five rungs by scikit-learn's own search, and intervals one resampled set at a time."""
    made = json.loads((root / "out/probe_results.json").read_text())
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
        rung = made["probes"][name]
        assert rung["best_C"] == search.best_params_["C"]
        assert rung["auroc"] == pytest.approx(roc_auc_score(y[TEST], found), abs=1e-12)
    rng, drawn = np.random.default_rng(42), {name: [] for name in points}
    for _ in range(REPLICATES):
        pick = rng.choice(len(y[TEST]), len(y[TEST]), replace=True)
        for name, found in points.items():
            drawn[name].append(roc_auc_score(y[TEST][pick], found[pick]))
    for name, areas in drawn.items():
        ends = [made["probes"][name]["ci_low"], made["probes"][name]["ci_high"]]
        np.testing.assert_allclose(ends, np.percentile(areas, [2.5, 97.5]), rtol=0, atol=1e-12)
    gap = made["deltas"]["P3_cheap_sae-P2_cheap_raw"]
    np.testing.assert_allclose(
        [gap["ci_low"], gap["ci_high"]],
        np.percentile(np.subtract(drawn["P3_cheap_sae"], drawn["P2_cheap_raw"]), [2.5, 97.5]), atol=1e-12)
    assert (made["n_total"], made["n_train"], made["n_test"]) == (ITEMS, 45, 22)


def check_recalibration(root: Path, features: np.ndarray, y: np.ndarray) -> None:
    """P1, unscaled: raw and by Platt's map of probabilities."""
    strength = json.loads((root / "out/probe_results.json").read_text())["probes"]["P1_cheap"]["best_C"]
    model = LogisticRegression(C=strength, l1_ratio=1.0, solver="liblinear", class_weight="balanced",
                               max_iter=2000, random_state=42)
    held = np.empty(45)
    for fit, out in KFold(5, shuffle=True, random_state=42).split(features[TRAIN]):
        held[out] = model.fit(features[fit], y[fit]).predict_proba(features[out])[:, 1]
    raw = model.fit(features[TRAIN], y[TRAIN]).predict_proba(features[TEST])[:, 1]
    platt = LogisticRegression(C=1e6).fit(held[:, None], y[TRAIN]).predict_proba(raw[:, None])[:, 1]
    made = json.loads((root / "out/recalibration_results.json").read_text())
    assert made.keys() == {"P1_cheap", "P3_cheap_sae"}
    for name, found in (("raw", raw), ("platt", platt)):
        assert made["P1_cheap"][name]["brier"] == pytest.approx(np.mean((found - y[TEST]) ** 2), abs=1e-12)
        assert made["P1_cheap"][name]["auroc"] == pytest.approx(roc_auc_score(y[TEST], found), abs=1e-12)


def check_cascade(root: Path, column: str, costs: tuple[float, float], cheap: np.ndarray) -> None:
    dear = read(root / "dear.parquet")
    by_window = dict(zip(dear["window_id"].tolist(), dear[column].tolist(), strict=True))
    scores = read(root / "out/probe_scores.parquet")
    strong = np.array([by_window[window] for window in scores["id"].tolist()])
    made = json.loads((root / "out/cascade_results.json").read_text())
    assert made["always_expensive"] == {"mean_error": pytest.approx(strong.mean()), "cost": costs[1]}
    assert made["win_rate_expensive"] == pytest.approx(np.mean(strong < cheap))
    assert list(made["probes"]) == ["P3_cheap_sae", "P1_cheap"]
    point = made["probes"]["P1_cheap"]["frontier"][20]
    handed = scores["pred_P1_cheap"] >= point["tau"]
    assert point["tau"] == 0.5 and point["mean_cost"] == pytest.approx(np.where(handed, costs[1], 1).mean())
    assert point["mean_error"] == pytest.approx(np.where(handed, strong, cheap).mean())


def test_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, columns = make(tmp_path, "llm")
    assert run(tmp_path) == 0
    config = load_config(path)
    found = read_kit(config, tmp_path, str(path))
    activations = np.random.default_rng(1).standard_normal((ITEMS, POSITIONS, WIDTH)).astype(np.float16)
    seen = [x[:min(n, POSITIONS)] for x, n in zip(activations, columns["seq_len"], strict=True)]
    np.testing.assert_array_equal(found.blocks["raw"], [pool(x) for x in seen])
    assert found.blocks["raw"].dtype == np.float16
    np.testing.assert_allclose(found.blocks["sae"], [pool(codes(tmp_path, x)) for x in seen], rtol=0,
                               atol=1e-6)
    np.testing.assert_array_equal(found.blocks["cheap"][:, 0], [len(text) for text in columns["prompt"]])
    np.testing.assert_array_equal(found.blocks["cheap"][:, 3], columns["prompt_perplexity"])
    np.testing.assert_array_equal(found.blocks["cheap"][:, 6], np.arange(ITEMS) // 9)
    y = np.asarray(columns["difficulty"])
    # 45 rows, 10 at least for a fold.
    check_ladder(tmp_path, found.blocks, y, StratifiedKFold(4, shuffle=True, random_state=42))
    check_recalibration(tmp_path, found.blocks["cheap"], y)
    check_cascade(tmp_path, "difficulty", (1.0, 5.0), y[TEST])
    kept = json.loads((tmp_path / "out/selective_prediction.json").read_text())
    assert kept["mean_error_no_abstention"] == y[TEST].mean()
    assert len(list((tmp_path / "out").iterdir())) == 5
    told = capsys.readouterr().out
    assert "45 items to learn from, 22 test items" in told and "P5_sae_only" in told


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
    found = read_kit(load_config(path), tmp_path, str(path))
    values = np.loadtxt(tmp_path / "s.csv", delimiter=",", skiprows=1, usecols=1)
    statistics = [restated_statistics(values[start:start + CONTEXT]) for start in columns["start_ts"]]
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
    kept = json.loads((tmp_path / "out/selective_prediction.json").read_text())
    assert kept["mean_error_no_abstention"] == pytest.approx(columns["crps_raw"][TEST].mean())
    causal = json.loads((tmp_path / "out/causal_ablation_last.json").read_text())
    assert (causal["n"], causal["metric"], causal["positions"], causal["top_features"], causal["model"]) == (
        9, "CRPS", "last", [7, 2], "who/what")
    assert causal["per_feature_ablation_delta"]["2"]["point"] == pytest.approx(
        (losses["ablate_2"] - losses["sae_recon"]).mean())
    assert "causal, last: reconstruction" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:adfuller:FutureWarning")
@pytest.mark.parametrize("reference", ["all", "train"])
def test_whose_quantile_is_hard(reference: str, tmp_path: Path) -> None:
    path, columns = make(tmp_path, "tsfm", label_threshold_split=reference, hard_quantile=0.6)
    found = read_kit(load_config(path), tmp_path, str(path))
    crps = columns["crps_norm"]
    quantile = np.quantile(crps if reference == "all" else crps[TRAIN], 0.6)
    np.testing.assert_array_equal(found.hard, crps >= quantile)


def test_the_rungs_whose_files_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "llm")
    assert run(tmp_path, "sae_ckpt.mid=null", "cascade=null") == 0
    made = json.loads((tmp_path / "out/probe_results.json").read_text())
    assert list(made["probes"]) == ["P1_cheap", "P2_cheap_raw", "P4_raw_only"]
    assert list(made["deltas"]) == ["P2_cheap_raw-P1_cheap"]
    assert not (tmp_path / "out/cascade_results.json").exists()
    assert "sae_ckpt.mid: none; no rung that needs it is made" in capsys.readouterr().err


def without(name: str) -> Callable[[Path, Tree], None]:
    return lambda root, columns: write_table(
        root / "m.parquet", {key: values for key, values in columns.items() if key != name})


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Path, Tree], None]:
    return lambda root, columns: write_table(
        root / "m.parquet", columns | {name: change(np.asarray(columns[name]).tolist())})


def at(row: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda cells: [value if i == row else cell for i, cell in enumerate(cells)]


def fewer_dear_rows(root: Path, columns: Tree) -> None:
    dear = read(root / "dear.parquet")
    kept = dear["window_id"] != 250
    write_table(root / "dear.parquet", {name: values[kept] for name, values in dear.items()})


def two_dear_rows(root: Path, columns: Tree) -> None:
    dear = read(root / "dear.parquet")
    write_table(root / "dear.parquet", {"window_id": [*dear["window_id"].tolist(), 250, 250],
                                        "difficulty": [*dear["difficulty"].tolist(), 0, 1]})


def a_torch_file(root: Path, columns: Tree) -> None:
    (root / "sae_topk_3.pt").write_bytes(b"PK")


def half_a_table_of_losses(root: Path, columns: Tree) -> None:
    (root / "theirs").mkdir()
    write_table(root / "theirs/causal_ablation_all.parquet", {"window_id": [1, 2], "m_natural": [1.0, 2.0]})


def nothing(root: Path, columns: Tree) -> None:
    pass


LLM: list[tuple[Callable[[Path, Tree], None], str, str]] = [
    (nothing, "metadata=none.parquet",
     "metadata: ROOT/none.parquet: no such file; paths are relative to --root"),
    (nothing, "metadata=", "kit.yaml: metadata: expected a file, found nothing"),
    (nothing, "metadata=kit.yaml", "ROOT/kit.yaml: cannot be read: "),
    (nothing, "layer=late", "activations.late: ROOT/b.safetensors: no such file"),
    (nothing, "layer=early", "layer: expected mid or late, found text 'early'"),
    (nothing, "metadat=x", "unknown key 'metadat' (did you mean 'metadata'?)"),
    (nothing, "cascade.expensive_metadata=x", "cascade.expensive_metadata: ROOT/x: no such file"),
    (nothing, "cascade.score_cols=[P6]", "cascade.score_cols: expected some of P1_cheap, "),
    (nothing, "cascade.cost_cheap=6", "cascade.cost_expensive: expected more than cost_cheap 6, found 5"),
    (nothing, "activations.mid=null cascade.score_cols=[P4_raw_only]",
     "cascade.score_cols: P4_raw_only is not made, for want of activations"),
    (without("prompt"), "", "m.parquet: expected the column 'prompt', found window_id, split"),
    (without("difficulty"), "", "m.parquet: expected the column 'difficulty'"),
    (without("split"), "", "m.parquet: expected the column 'split'"),
    (with_column("split", lambda cells: ["train"] * ITEMS), "", "m.parquet: the test split is empty"),
    (with_column("split", lambda cells: ["test"] * ITEMS), "", "m.parquet: the train split is empty"),
    (with_column("difficulty", lambda cells: [*cells[:48], *[1] * 22]), "",
     "m.parquet: the test split has one class only: all its 22 items are hard"),
    (with_column("difficulty", lambda cells: [*[0] * 45, *cells[45:]]), "",
     "m.parquet: the train split has one class only: all its 45 items are easy"),
    (with_column("difficulty", lambda cells: [1, *[0] * 44, *cells[45:]]), "",
     "kit.yaml: expected two hard and two easy items to learn from, found 1 and 44"),
    (with_column("difficulty", at(5, 2)), "", "m.parquet: row 5: difficulty: expected 0 or 1"),
    (with_column("difficulty", at(5, None)), "", "m.parquet: row 5: difficulty: expected a whole number"),
    (with_column("prompt", at(6, None)), "", "m.parquet: row 6: prompt: expected text"),
    (with_column("seq_len", at(6, 0)), "", "m.parquet: row 6: seq_len: expected at least 1"),
    (with_column("prompt_perplexity", at(9, float("inf"))), "",
     "m.parquet: row 9: prompt_perplexity: expected a finite number"),
    (lambda root, columns: write_table(root / "m.parquet", {name: [] for name in columns}), "",
     "m.parquet: expected rows, found none"),
    (lambda root, columns: write_activations(root, items=69), "",
     "a.safetensors: expected 70 items, as the metadata has rows, found 69"),
    (lambda root, columns: write_activations(root, bad=np.inf), "",
     "a.safetensors: item 7: expected finite numbers only"),
    (lambda root, columns: write_file(root / "a.safetensors", {"x": in_memory(np.zeros(3, np.float16))}), "",
     "a.safetensors: expected the tensor 'encoder_embeddings', found x"),
    (lambda root, columns: write_file(root / "a.safetensors", {
        "encoder_embeddings": in_memory(np.zeros((70, WIDTH), np.float16))}), "",
     "encoder_embeddings: expected float16 or float32 [items, positions, d], found float16 [70, 6]"),
    (lambda root, columns: write_autoencoder(root, d_model=5), "",
     "sae: expected an autoencoder of width 6, as the activations have, found 5"),
    (lambda root, columns: write_autoencoder(root, k=4), "",
     "sae: expected k 3, as ROOT/kit.yaml says, found topk with k 4"),
    (nothing, "sae_ckpt.mid=none",
     "sae_ckpt.mid: ROOT/none: no such directory; nothing is probed with random weights"),
    (a_torch_file, "sae_ckpt.mid=sae_topk_3.pt",
     "ROOT/sae_topk_3.pt: a file of PyTorch, which is not read here: `python -m convert ROOT/sae_topk_3.pt "
     "ROOT/sae_topk_3 --set k=3` makes a model directory of it; then add sae_ckpt.mid=sae_topk_3"),
    (fewer_dear_rows, "", "dear.parquet: expected a row for every test item, found none of window_id 250"),
    (two_dear_rows, "", "dear.parquet: window_id 250: two rows with different difficulty"),
    (half_a_table_of_losses, "", "causal_ablation_all.parquet: expected columns …_natural, …_recon"),
    (lambda root, columns: (root / "out").write_text(""), "",
     "--out: ROOT/out: expected a directory, found a file"),
]
TSFM: list[tuple[Callable[[Path, Tree], None], str, str]] = [
    (nothing, "series_csv=https://example.org/s.csv",
     "series_csv: expected a local file, found https://example.org/s.csv; fetch it, and add series_csv=FILE"),
    (nothing, "series_csv=", "series_csv: expected a file, found nothing"),
    (nothing, "target_col=HULL", "s.csv: expected the column 'HULL', found date, OT"),
    (nothing, "context_length=90",
     "m.parquet: row 69: start_ts: expected the row of the series that a window of 90 values begins at"),
    (with_column("start_ts", at(3, -1)), "", "m.parquet: row 3: start_ts: expected the row of the series"),
    (without("crps_norm"), "", "m.parquet: expected the column 'crps_norm'"),
    (with_column("crps_raw", at(2, float("nan"))), "",
     "m.parquet: row 2: crps_raw: expected a finite number"),
    (lambda root, columns: (root / "s.csv").write_text("date,OT\n" + "d,1.0\n" * 500), "",
     "m.parquet: row 0: expected a window with statistics, found one whose values are all the same"),
    (with_column("crps_norm", lambda cells: [*np.arange(45.0), *np.arange(25.0) + 30]), "",
     "kit.yaml: fold 0 of 3 of the 45 items to learn from has one class only in a part"),
]


@pytest.mark.parametrize(("modality", "change", "override", "says"), [
    (modality, *case) for modality, cases in (("llm", LLM), ("tsfm", TSFM)) for case in cases])
def test_refusals(modality: str, change: Callable[[Path, Tree], None], override: str, says: str,
                  tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, columns = make(tmp_path, modality)
    change(tmp_path, columns)
    assert run(tmp_path, *override.split()) == 2
    assert_one_line(capsys.readouterr().err, says.replace("ROOT", str(tmp_path)))
    assert not (tmp_path / "out").is_dir()


def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "llm")
    (tmp_path / "file").write_text("")
    arguments = ["--config", str(tmp_path / "kit.yaml"), "--root", str(tmp_path), "activations.mid=null"]
    assert main([*arguments, "--out", str(tmp_path / "file/out")]) == 2
    assert f"{tmp_path}/file/out: cannot be written" in capsys.readouterr().err
