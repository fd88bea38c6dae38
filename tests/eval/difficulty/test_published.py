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
from tilelli_jax.eval.difficulty import cheap
from tilelli_jax.eval.difficulty.published import protocol, stages
from tilelli_jax.eval.difficulty.published.command import main
from tilelli_jax.eval.difficulty.published.config import KitCascade, KitConfig
from tilelli_jax.eval.difficulty.published.files import Kit, read_kit
from tilelli_jax.eval.metrics import auroc
from tilelli_jax.eval.stats import PairedBootstrap

from tests.references import STORED, needs
from tests.refusals import assert_one_line

REFERENCE = STORED / "difficulty"
TINY = REFERENCE / "tiny_world"
pytestmark = needs(REFERENCE)
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


def dear_errors(name: str, windows: np.ndarray) -> np.ndarray:
    """The expensive model's, in the order of the windows."""
    table = read(name)
    known = dict(zip(table["window_id"].tolist(), table["difficulty"].tolist(), strict=True))
    return np.array([known[window] for window in windows.tolist()])


@pytest.fixture(scope="module")
def squad() -> tuple[Kit, dict[str, Any]]:
    """The published SQuAD run as far as its files go: without activations, P1."""
    config = KitConfig(metadata="pythia410m_squad/squad_metadata.parquet",
                       cascade=KitCascade(
                           expensive_metadata="pythia410m_squad/squad_metadata_pythia2.8b.parquet"))
    found = read_kit(config, REFERENCE, "squad.yaml")
    return found, stages.tables(found)


@pytest.fixture(scope="module")
def scores() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    table = read("pythia410m_squad/squad_scores.parquet")
    return table["difficulty"], {name: table[column] for name, column in RUNGS.items()}


@pytest.mark.exhaustive
def test_p1_to_the_last_digit(squad: tuple[Kit, dict[str, Any]]) -> None:
    """The rung whose inputs are all there: prompts → features → probe → interval, and the other stages."""
    _, made = squad
    for file in ("probe_results", "selective_prediction", "cascade_results"):
        expected = told(f"published/llm_squad/{file}.json")
        expected["probes"] = {"P1_cheap": expected["probes"]["P1_cheap"]}
        assert_same(made[f"{file}.json"], expected | ({"deltas": {}} if "deltas" in expected else {}))
    expected = told("published/llm_squad/recalibration_results.json")
    assert_same(made["recalibration_results.json"], {"P1_cheap": expected["P1_cheap"]})


@pytest.mark.exhaustive
def test_the_scaled_probe_of_p1(squad: tuple[Kit, dict[str, Any]]) -> None:
    """Recalibration of the probe as it was fitted: AUROC 0.590 and ECE 0.326 in place of 0.563 and 0.366."""
    found, made = squad
    p1 = made["probe_results.json"]["probes"]["P1_cheap"]
    raw = stages.recalibration(found, {"P1_cheap": p1["best_C"]}, scaled=True)["P1_cheap"]["raw"]
    assert raw["auroc"] == pytest.approx(p1["auroc"], abs=SAME)
    assert round(raw["ece"], 3) == 0.326


@pytest.mark.parametrize("name", [name for name in RUNGS if name != "P1_cheap"])
def test_rungs_from_stored_scores(name: str, scores: tuple) -> None:
    labels, found = scores
    drawn = PairedBootstrap(labels, {name: found[name]}).interval(name)
    expected = told("published/llm_squad/probe_results.json")["probes"][name]
    assert_same(list(drawn), [expected["auroc"], expected["ci_low"], expected["ci_high"]], 1e-4)


def test_answer_length_alone_beats_every_probe(scores: tuple) -> None:
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
    test = protocol.permutation(labels, found["P3_cheap_sae"], found["P2_cheap_raw"])
    assert (test.p_one_sided, test.p_two_sided) == (0.0, 0.0)
    assert round(float(test.null.std(ddof=1)), 4) == 0.0204


def test_selective_from_stored_scores(scores: tuple) -> None:
    """Oracle and random to the last digit, P4 and P5 too; "41.3 % of the oracle" is P4's."""
    labels, found = scores
    made, expected = protocol.selective(labels, found), told("published/llm_squad/selective_prediction.json")
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
    made = protocol.cascade(labels, dear, {"P3_cheap_sae": found["P3_cheap_sae"]})["probes"]["P3_cheap_sae"]
    expected = told("published/llm_squad/cascade_results.json")["probes"]["P3_cheap_sae"]
    assert made["n_dominating_points"] == expected["n_dominating_points"] == 31
    assert_same(made["best_dominating"], expected["best_dominating"])


@pytest.mark.parametrize(("table", "summary"), [
    ("squad_allpos_squad_causal_ablation", "causal_ablation_all"),
    ("squad_disentangle_squad_causal_ablation", "causal_ablation_last")])
def test_causal_effects(table: str, summary: str) -> None:
    """Means and their intervals from the published losses of each item."""
    columns, expected = read(f"pythia410m_squad/{table}.parquet"), told(f"published/llm_squad/{summary}.json")
    found = protocol.causal_summary({name: columns[name] for name in columns if name != "window_id"},
                                     {"metric": "nats", "positions": expected["positions"], "model": ""})
    assert found["top_features"] == expected["top_5_features"]
    assert_same([found["mean_natural"], found["mean_sae_recon"]],
                [expected["natural_error_mean"], expected["recon_error_mean"]])
    assert_same(found["delta_sae_recon"], {
        "point": expected["delta_recon_natural"],
        "ci95": [expected[f"delta_recon_natural_ci_{end}"] for end in ("lower", "upper")]})
    for feature, effect in expected["feature_effects"].items():
        made = found["per_feature_ablation_delta"][feature]
        assert_same([made["point"], *made["ci95"]],
                    [effect["delta_error"], effect["ci_lower"], effect["ci_upper"]])


# --- A small run of the study's own scripts ----------------------------------------------------


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their .pt files as model directories."""
    pytest.importorskip("torch", reason="PyTorch (extra: torch), which reads .pt files, is not installed")
    from tilelli_jax.convert.command import main as convert
    path = tmp_path_factory.mktemp("autoencoders")
    for name in ("squad", "squad_allpos"):
        assert convert([str(TINY / f"sae/{name}.pt"), str(path / name), "--set", "k=8"]) == 0
    return path


def run(name: str, autoencoders: Path, out: Path) -> int:
    return main(["--config", str(TINY / f"{name}.yaml"), "--root", str(REFERENCE), "--out", str(out),
                 f"sae_ckpt.mid={autoencoders / name}"])


def test_the_small_run(autoencoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every table of the command, and the score of every item."""
    assert run("squad", autoencoders, tmp_path) == 0
    expected = TINY / "res/squad"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cascade_results.json", "probe_results.json", "probe_scores.parquet",
                     "recalibration_results.json", "selective_prediction.json"]
    for name in names:
        if name.endswith(".json"):
            assert_same(json.loads((tmp_path / name).read_text()), json.loads((expected / name).read_text()))
    made, there = (read(path / "probe_scores.parquet") for path in (tmp_path, expected))
    assert list(made) == list(there)
    for column in there:
        assert made[column].dtype == there[column].dtype
        np.testing.assert_allclose(made[column], there[column], rtol=0, atol=SAME)
    out = capsys.readouterr().out
    assert "210 items to learn from, 72 test items, 29.2% of them hard" in out
    assert "P2_cheap_raw  0.522 [0.383, 0.669]" in out and "17 of 41" in out
    assert "P3_cheap_sae − P2_cheap_raw: -0.040 [-0.202, 0.116]" in out


def test_causal_effects_of_the_small_run(autoencoders: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the tables of a ladder on all positions, those that are in their out_dir."""
    assert run("squad_allpos", autoencoders, tmp_path) == 0
    for positions in ("all", "boundary"):
        name = f"causal_ablation_{positions}.json"
        made = json.loads((tmp_path / name).read_text())
        assert_same(made, told(f"tiny_world/res/squad_allpos/{name}"))
    assert "causal, all: reconstruction 0.004 [-0.011, 0.018] nats, 0 of 5 latents" in capsys.readouterr().out


def test_a_torch_file_is_refused_with_what_makes_it_readable(tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--config", str(TINY / "squad.yaml"), "--root", str(REFERENCE), "--out", str(out)]) == 2
    stem = TINY / "sae/squad"
    assert_one_line(capsys.readouterr().err, f"`tilelli convert {stem}.pt {stem} --set k=8`",
                    "then add sae_ckpt.mid=tiny_world/sae/squad")
    assert not out.exists()
