"""The published study's numbers, from its own metadata and scores, and from a small run of its scripts.

Numbers that come from the same inputs are held to rounding noise. The scores that are stored of the
rungs on activations (P2 to P5 of SQuAD) are those of the study's older half, whose solver was not
seeded; the published tables are of the newer: they agree to the digits given at each place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.difficulty import cheap, published
from eval.folds import number_of_folds, stratified
from eval.metrics import auroc
from eval.probes import LADDER, RungResult, climb
from eval.stats import PairedBootstrap, bootstrap_mean

REFERENCE = Path(__file__).parents[4] / "shared" / "reference" / "difficulty"
TINY = REFERENCE / "tiny_world"
pytestmark = pytest.mark.skipif(not REFERENCE.exists(),
                                reason="the stored references do not come with this project")
SAME = 1e-12
RUNGS = {"P1_cheap": "pred_P1_InputStats", "P2_cheap_raw": "pred_P2_InputStats_Raw",
         "P3_cheap_sae": "pred_P3_InputStats_SAE", "P4_raw_only": "pred_P4_RawOnly",
         "P5_sae_only": "pred_P5_SAEOnly"}


def read(name: str) -> dict[str, Any]:
    import pyarrow.parquet
    return {column: np.asarray(values) for column, values in
            pyarrow.parquet.read_table(REFERENCE / name).to_pydict().items()}


def told(name: str) -> Any:
    return json.loads((REFERENCE / name).read_text())


def distance(found: Any, expected: Any, path: str = "") -> tuple[float, str]:
    """The largest difference of two trees of numbers, and where it is."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        return max((distance(found[key], expected[key], f"{path}/{key}") for key in expected),
                   default=(0.0, path))
    if isinstance(expected, list):
        assert len(found) == len(expected), path
        return max((distance(a, b, path) for a, b in zip(found, expected, strict=True)), default=(0.0, path))
    if expected is None or isinstance(expected, str | bool):
        assert found == expected, path
        return 0.0, path
    return abs(found - expected), path


def assert_same(found: Any, expected: Any, tolerance: float = SAME) -> None:
    worst, where = distance(found, expected)
    assert worst <= tolerance, (worst, where)


def interval(result: RungResult) -> dict[str, float]:
    return {"auroc": result.auroc.point, "ci_low": result.auroc.low, "ci_high": result.auroc.high,
            "best_C": result.probe.strength}


def dear_errors(name: str, windows: np.ndarray) -> np.ndarray:
    """The expensive model's, in the order of the windows."""
    table = read(name)
    known = dict(zip(table["window_id"].tolist(), table["difficulty"].tolist(), strict=True))
    return np.array([known[window] for window in windows.tolist()])


@pytest.fixture(scope="module")
def squad() -> dict[str, Any]:
    """The published SQuAD run: cheap features and labels, split."""
    table = read("pythia410m_squad/squad_metadata.parquet")
    train, test = table["split"] == "train", table["split"] == "test"
    _, features = cheap.published_prompt_features({key: table[key].tolist() for key in table})
    y = table["difficulty"]
    climbed = climb({"cheap": features[train]}, y[train], {"cheap": features[test]}, y[test],
                    stratified(y[train]), rungs=LADDER[:1], options=published.PROBES)
    return {"train": features[train], "test": features[test], "y_train": y[train], "y_test": y[test],
            "windows": table["window_id"][test], "p1": climbed.rungs["P1_cheap"]}


@pytest.fixture(scope="module")
def scores() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    table = read("pythia410m_squad/squad_scores.parquet")
    return table["difficulty"], {name: table[column] for name, column in RUNGS.items()}


def test_p1_to_the_last_digit(squad: dict[str, Any]) -> None:
    """The rung whose inputs are all there: prompts → features → probe → interval."""
    expected = told("published/llm_squad/probe_results.json")["probes"]["P1_cheap"]
    assert_same(interval(squad["p1"]), {key: expected[key] for key in interval(squad["p1"])})
    found = {"P1_cheap": squad["p1"].probabilities}
    expected = told("published/llm_squad/selective_prediction.json")
    assert_same(published.selective(squad["y_test"], found), expected | {"probes": {
        "P1_cheap": expected["probes"]["P1_cheap"]}})
    dear = dear_errors("pythia410m_squad/squad_metadata_pythia2.8b.parquet", squad["windows"])
    expected = told("published/llm_squad/cascade_results.json")
    assert_same(published.cascade(squad["y_test"], dear, found), expected | {"probes": {
        "P1_cheap": expected["probes"]["P1_cheap"]}})
    expected = told("published/llm_squad/recalibration_results.json")["P1_cheap"]
    assert_same(published.recalibrated(squad["train"], squad["y_train"], squad["test"], squad["y_test"], 0.3),
                expected)


def test_the_scaled_probe_of_p1(squad: dict[str, Any]) -> None:
    """Recalibration of the probe as it was fitted: AUROC 0.590 and ECE 0.326 in place of 0.563 and 0.366."""
    found = published.recalibrated(squad["train"], squad["y_train"], squad["test"], squad["y_test"], 0.3,
                                   scaled=True)
    assert found["raw"]["auroc"] == pytest.approx(squad["p1"].auroc.point, abs=SAME)
    assert round(found["raw"]["ece"], 3) == 0.326


@pytest.mark.parametrize("name", [name for name in RUNGS if name != "P1_cheap"])
def test_rungs_from_stored_scores(name: str, scores: tuple) -> None:
    labels, found = scores
    drawn = PairedBootstrap(labels, {name: found[name]}).interval(name)
    expected = told("published/llm_squad/probe_results.json")["probes"][name]
    assert_same(list(drawn), [expected["auroc"], expected["ci_low"], expected["ci_high"]], 1e-4)


def test_answer_length_alone_beats_every_probe(squad: dict[str, Any], scores: tuple) -> None:
    """AUROC 0.904 on all rows and 0.916 on the test rows; the best stored probe has 0.671 there."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(REFERENCE.parent / "data" / "neox_20B_tokenizer.json"))
    table = read("pythia410m_squad/squad_metadata.parquet")
    tokens = [len(tokenizer.encode(" " + answer.strip(), add_special_tokens=False).ids)
              for answer in table["gold_answer"].tolist()]
    length, test = cheap.answer_length(tokens)[:, 0], table["split"] == "test"
    assert auroc(table["difficulty"], -length) == pytest.approx(0.904, abs=5e-4)
    assert auroc(table["difficulty"][test], -length[test]) == pytest.approx(0.916, abs=5e-4)
    labels, found = scores
    assert max(auroc(labels, score) for score in found.values()) < 0.68


def test_the_headline_and_its_p(scores: tuple) -> None:
    labels, found = scores
    drawn = PairedBootstrap(labels, found).difference("P3_cheap_sae", "P2_cheap_raw")
    expected = told("published/llm_squad/probe_results.json")["deltas"]["P3_cheap_sae-P2_cheap_raw"]
    assert_same(list(drawn), [expected["point"], expected["ci_low"], expected["ci_high"]], 1e-4)
    test = published.permutation(labels, found["P3_cheap_sae"], found["P2_cheap_raw"])
    assert (test.p_one_sided, test.p_two_sided) == (0.0, 0.0)
    assert round(float(test.null.std(ddof=1)), 4) == 0.0204


def test_selective_from_stored_scores(scores: tuple) -> None:
    """Oracle and random to the last digit, P4 and P5 too; "41.3 % of the oracle" is P4's."""
    labels, found = scores
    made, expected = published.selective(labels, found), told("published/llm_squad/selective_prediction.json")
    assert_same({**made, "probes": {}}, {**expected, "probes": {}})
    for name in ("P4_raw_only", "P5_sae_only"):
        for key in ("curve", "aurc", "fraction_of_oracle_aurc"):
            assert_same(made["probes"][name][key], expected["probes"][name][key])
    for name in ("P2_cheap_raw", "P3_cheap_sae"):
        assert_same(made["probes"][name]["fraction_of_oracle_aurc"],
                    expected["probes"][name]["fraction_of_oracle_aurc"], 5e-4)
    best = max(made["probes"], key=lambda name: made["probes"][name]["fraction_of_oracle_aurc"])
    assert best == "P4_raw_only" and round(100 * made["probes"][best]["fraction_of_oracle_aurc"], 1) == 41.3


def test_the_cascade_from_stored_scores(scores: tuple) -> None:
    labels, found = scores
    windows = read("pythia410m_squad/squad_scores.parquet")["window_id"]
    dear = dear_errors("pythia410m_squad/squad_metadata_pythia2.8b.parquet", windows)
    made = published.cascade(labels, dear, {"P3_cheap_sae": found["P3_cheap_sae"]})["probes"]["P3_cheap_sae"]
    expected = told("published/llm_squad/cascade_results.json")["probes"]["P3_cheap_sae"]
    assert made["n_dominating_points"] == expected["n_dominating_points"] == 31
    assert_same(made["best_dominating"], expected["best_dominating"])


@pytest.mark.parametrize(("table", "summary"), [
    ("squad_allpos_squad_causal_ablation", "causal_ablation_all"),
    ("squad_disentangle_squad_causal_ablation", "causal_ablation_last")])
def test_causal_effects(table: str, summary: str) -> None:
    """Means and their intervals from the published losses of each item."""
    columns, expected = read(f"pythia410m_squad/{table}.parquet"), told(f"published/llm_squad/{summary}.json")
    drawn = bootstrap_mean(columns["err_recon"] - columns["err_natural"])
    assert_same(list(drawn), [expected["delta_recon_natural"], expected["delta_recon_natural_ci_lower"],
                              expected["delta_recon_natural_ci_upper"]])
    for feature, effect in expected["feature_effects"].items():
        drawn = bootstrap_mean(columns[f"err_ablate_{feature}"] - columns["err_recon"])
        assert_same(list(drawn), [effect["delta_error"], effect["ci_lower"], effect["ci_upper"]])


# --- A small run of the study's own scripts ----------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    torch = pytest.importorskip(
        "torch", reason="PyTorch (extra: torch), which reads .pt files, is not installed")
    import safetensors.numpy
    table = read("tiny_world/act/squad_metadata.parquet")
    raw = safetensors.numpy.load_file(TINY / "act/squad_activations.safetensors")["encoder_embeddings"]
    raw = raw.astype(np.float32)[:, 0]
    state = torch.load(TINY / "sae/squad.pt", weights_only=True)
    before = (torch.from_numpy(raw) - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    values, which = before.topk(8, dim=-1)
    codes = torch.zeros_like(before).scatter(1, which, values.relu()).numpy()
    _, features = cheap.published_prompt_features({key: table[key].tolist() for key in table})
    blocks = {"cheap": features, "raw": raw, "sae": codes}
    train, test = table["split"] == "train", table["split"] == "test"
    y = table["difficulty"]
    climbed = climb({name: block[train] for name, block in blocks.items()}, y[train],
                    {name: block[test] for name, block in blocks.items()}, y[test],
                    stratified(y[train], number_of_folds(y[train])), options=published.PROBES)
    return {"blocks": blocks, "train": train, "test": test, "y": y, "climbed": climbed,
            "windows": table["window_id"][test]}


def test_the_ladder_of_the_small_run(tiny: dict[str, Any]) -> None:
    expected = told("tiny_world/res/squad/probe_results.json")
    for name, result in tiny["climbed"].rungs.items():
        assert_same(interval(result), {key: expected["probes"][name][key] for key in interval(result)})
    for comparison in tiny["climbed"].comparisons:
        gap = expected["deltas"][f"{comparison.a}-{comparison.b}"]
        assert_same(list(comparison.difference), [gap["point"], gap["ci_low"], gap["ci_high"]])


def test_the_other_stages_of_the_small_run(tiny: dict[str, Any]) -> None:
    stored = np.load(TINY / "res/squad/probe_preds.npz")
    found = {name: stored[name] for name in tiny["climbed"].rungs}
    y = tiny["y"][tiny["test"]]
    assert_same(published.selective(y, found), told("tiny_world/res/squad/selective_prediction.json"))
    dear = dear_errors("tiny_world/act_base/squad_metadata.parquet", tiny["windows"])
    chosen = {name: found[name] for name in ("P3_cheap_sae", "P1_cheap", "P2_cheap_raw")}
    assert_same(published.cascade(y, dear, chosen), told("tiny_world/res/squad/cascade_results.json"))
    for name, names in (("P1_cheap", ["cheap"]), ("P3_cheap_sae", ["cheap", "sae"])):
        block = np.concatenate([tiny["blocks"][part] for part in names], axis=1)
        made = published.recalibrated(block[tiny["train"]], tiny["y"][tiny["train"]], block[tiny["test"]], y,
                                      tiny["climbed"].rungs[name].probe.strength)
        assert_same(made, told("tiny_world/res/squad/recalibration_results.json")[name])


@pytest.mark.parametrize("positions", ["all", "boundary"])
def test_causal_effects_of_the_small_run(positions: str) -> None:
    columns = read(f"tiny_world/res/squad_allpos/causal_ablation_{positions}.parquet")
    expected = told(f"tiny_world/res/squad_allpos/causal_ablation_{positions}.json")
    drawn = bootstrap_mean(columns["m_sae_recon"] - columns["m_natural"])
    assert_same(list(drawn), [expected["delta_sae_recon"]["point"], *expected["delta_sae_recon"]["ci95"]])
    for feature, effect in expected["per_feature_ablation_delta"].items():
        drawn = bootstrap_mean(columns[f"m_ablate_{feature}"] - columns["m_sae_recon"])
        assert_same(list(drawn), [effect["point"], *effect["ci95"]])
        assert drawn.excludes_zero == effect["significant"]
