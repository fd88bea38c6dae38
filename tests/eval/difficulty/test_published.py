"""Reproduces fm-difficulty-probe's numbers from its metadata and scores, and from a small run of its scripts.

Numbers from the same inputs agree to rounding error. The stored scores of the rungs on activations (P2 to P5
of SQuAD) come from the older half of the study, whose solver was not seeded; the published tables come from
the newer half. They agree to the tolerance given in each test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tests.references import STORED, needs
from tilelli_jax.eval.difficulty import cheap
from tilelli_jax.eval.difficulty.published import protocol, stages
from tilelli_jax.eval.difficulty.published.command import main
from tilelli_jax.eval.difficulty.published.config import ReleaseCascade, ReleaseConfig
from tilelli_jax.eval.difficulty.published.files import Release, read_release
from tilelli_jax.eval.metrics import auroc
from tilelli_jax.eval.stats import PairedBootstrap

REFERENCE = STORED / "difficulty"
TINY = REFERENCE / "tiny_world"
pytestmark = needs(REFERENCE)
ROUNDING = 1e-12
RUNGS = {"P1_cheap": "pred_P1_InputStats", "P2_cheap_raw": "pred_P2_InputStats_Raw",
         "P3_cheap_sae": "pred_P3_InputStats_SAE", "P4_raw_only": "pred_P4_RawOnly",
         "P5_sae_only": "pred_P5_SAEOnly"}


def read(name: str) -> dict[str, Any]:
    import pyarrow.parquet
    return {column: np.asarray(values) for column, values in
            pyarrow.parquet.read_table(REFERENCE / name).to_pydict().items()}


def published_json(name: str) -> Any:
    return json.loads((REFERENCE / name).read_text())


def distance(found: Any, expected: Any, path: str = "") -> tuple[float, str]:
    """Returns the largest difference between two trees of numbers, and its path."""
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


def assert_same(found: Any, expected: Any, tolerance: float = ROUNDING) -> None:
    largest, path = distance(found, expected)
    assert largest <= tolerance, (largest, path)


def expensive_errors(name: str, windows: np.ndarray) -> np.ndarray:
    """Returns the expensive model's errors, in the order of the windows."""
    table = read(name)
    errors = dict(zip(table["window_id"].tolist(), table["difficulty"].tolist(), strict=True))
    return np.array([errors[window] for window in windows.tolist()])


@pytest.fixture(scope="module")
def squad() -> tuple[Release, dict[str, Any]]:
    """The published SQuAD run. Its activations are not stored, so P1 is the only rung."""
    config = ReleaseConfig(metadata="pythia410m_squad/squad_metadata.parquet",
                       cascade=ReleaseCascade(
                           expensive_metadata="pythia410m_squad/squad_metadata_pythia2.8b.parquet"))
    release = read_release(config, REFERENCE, "squad.yaml")
    return release, stages.tables(release)


@pytest.fixture(scope="module")
def scores() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    table = read("pythia410m_squad/squad_scores.parquet")
    return table["difficulty"], {name: table[column] for name, column in RUNGS.items()}


@pytest.mark.exhaustive
def test_p1_to_the_last_digit(squad: tuple[Release, dict[str, Any]]) -> None:
    """All inputs of P1 are stored: prompts → features → probe → interval, and the other stages."""
    _, tables = squad
    for file in ("probe_results", "selective_prediction", "cascade_results"):
        expected = published_json(f"published/llm_squad/{file}.json")
        expected["probes"] = {"P1_cheap": expected["probes"]["P1_cheap"]}
        assert_same(tables[f"{file}.json"], expected | ({"deltas": {}} if "deltas" in expected else {}))
    expected = published_json("published/llm_squad/recalibration_results.json")
    assert_same(tables["recalibration_results.json"], {"P1_cheap": expected["P1_cheap"]})


@pytest.mark.exhaustive
def test_the_scaled_probe_of_p1(squad: tuple[Release, dict[str, Any]]) -> None:
    """With the scaling of the fit, AUROC is 0.590 and ECE 0.326, instead of 0.563 and 0.366."""
    release, tables = squad
    p1 = tables["probe_results.json"]["probes"]["P1_cheap"]
    raw = stages.recalibration(release, {"P1_cheap": p1["best_C"]}, scaled=True)["P1_cheap"]["raw"]
    assert raw["auroc"] == pytest.approx(p1["auroc"], abs=ROUNDING)
    assert round(raw["ece"], 3) == 0.326


@pytest.mark.parametrize("name", [name for name in RUNGS if name != "P1_cheap"])
def test_rungs_from_stored_scores(name: str, scores: tuple) -> None:
    labels, by_rung = scores
    interval = PairedBootstrap(labels, {name: by_rung[name]}).interval(name)
    expected = published_json("published/llm_squad/probe_results.json")["probes"][name]
    assert_same(list(interval), [expected["auroc"], expected["ci_low"], expected["ci_high"]], 1e-4)


def test_answer_length_alone_beats_every_probe(scores: tuple) -> None:
    """AUROC 0.904 on all items and 0.916 on the test items; the best stored probe has 0.671 on the latter."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: hf) is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(REFERENCE.parent / "data" / "neox_20B_tokenizer.json"))
    table = read("pythia410m_squad/squad_metadata.parquet")
    tokens = [len(tokenizer.encode(" " + answer.strip(), add_special_tokens=False).ids)
              for answer in table["gold_answer"].tolist()]
    length, test = cheap.answer_length(tokens)[:, 0], table["split"] == "test"
    assert auroc(table["difficulty"], -length) == pytest.approx(0.904, abs=5e-4)
    assert auroc(table["difficulty"][test], -length[test]) == pytest.approx(0.916, abs=5e-4)
    labels, by_rung = scores
    assert max(auroc(labels, score) for score in by_rung.values()) < 0.68


def test_the_headline_difference_and_its_p(scores: tuple) -> None:
    labels, by_rung = scores
    interval = PairedBootstrap(labels, by_rung).difference("P3_cheap_sae", "P2_cheap_raw")
    expected = published_json("published/llm_squad/probe_results.json")["deltas"]["P3_cheap_sae-P2_cheap_raw"]
    assert_same(list(interval), [expected["point"], expected["ci_low"], expected["ci_high"]], 1e-4)
    test = protocol.permutation(labels, by_rung["P3_cheap_sae"], by_rung["P2_cheap_raw"])
    assert (test.p_one_sided, test.p_two_sided) == (0.0, 0.0)
    assert round(float(test.null.std(ddof=1)), 4) == 0.0204


def test_selective_from_stored_scores(scores: tuple) -> None:
    """Oracle, random, P4 and P5 agree to the last digit; the published "41.3 % of the oracle" is P4's."""
    labels, by_rung = scores
    result = protocol.selective(labels, by_rung)
    expected = published_json("published/llm_squad/selective_prediction.json")
    assert_same({**result, "probes": {}}, {**expected, "probes": {}})
    for name in ("P4_raw_only", "P5_sae_only"):
        for key in ("curve", "aurc", "fraction_of_oracle_aurc"):
            assert_same(result["probes"][name][key], expected["probes"][name][key])
    for name in ("P2_cheap_raw", "P3_cheap_sae"):
        assert_same(result["probes"][name]["fraction_of_oracle_aurc"],
                    expected["probes"][name]["fraction_of_oracle_aurc"], 5e-4)
    best = max(result["probes"], key=lambda name: result["probes"][name]["fraction_of_oracle_aurc"])
    assert best == "P4_raw_only" and round(100 * result["probes"][best]["fraction_of_oracle_aurc"], 1) == 41.3


def test_the_cascade_from_stored_scores(scores: tuple) -> None:
    labels, by_rung = scores
    windows = read("pythia410m_squad/squad_scores.parquet")["window_id"]
    expensive = expensive_errors("pythia410m_squad/squad_metadata_pythia2.8b.parquet", windows)
    result = protocol.cascade(labels, expensive, {"P3_cheap_sae": by_rung["P3_cheap_sae"]})[
        "probes"]["P3_cheap_sae"]
    expected = published_json("published/llm_squad/cascade_results.json")["probes"]["P3_cheap_sae"]
    assert result["n_dominating_points"] == expected["n_dominating_points"] == 31
    assert_same(result["best_dominating"], expected["best_dominating"])


@pytest.mark.parametrize(("table", "summary"), [
    ("squad_allpos_squad_causal_ablation", "causal_ablation_all"),
    ("squad_disentangle_squad_causal_ablation", "causal_ablation_last")])
def test_causal_effects(table: str, summary: str) -> None:
    """Means and intervals from the published losses per item."""
    columns = read(f"pythia410m_squad/{table}.parquet")
    expected = published_json(f"published/llm_squad/{summary}.json")
    result = protocol.causal_summary({name: columns[name] for name in columns if name != "window_id"},
                                    {"metric": "nats", "positions": expected["positions"], "model": ""})
    assert result["top_features"] == expected["top_5_features"]
    assert_same([result["mean_natural"], result["mean_sae_recon"]],
                [expected["natural_error_mean"], expected["recon_error_mean"]])
    assert_same(result["delta_sae_recon"], {
        "point": expected["delta_recon_natural"],
        "ci95": [expected[f"delta_recon_natural_ci_{end}"] for end in ("lower", "upper")]})
    for feature, effect in expected["feature_effects"].items():
        change = result["per_feature_ablation_delta"][feature]
        assert_same([change["point"], *change["ci95"]],
                    [effect["delta_error"], effect["ci_lower"], effect["ci_upper"]])


# --- A small run of the study's own scripts ----------------------------------------------------


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published .pt files, converted to model directories."""
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
    """All tables of the command, and the score of every item."""
    assert run("squad", autoencoders, tmp_path) == 0
    expected = TINY / "res/squad"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cascade_results.json", "how_to_reproduce.json", "probe_results.json",
                     "probe_scores.parquet", "recalibration_results.json", "selective_prediction.json"]
    for name in names:
        if name.endswith(".json") and name != "how_to_reproduce.json":
            assert_same(json.loads((tmp_path / name).read_text()), json.loads((expected / name).read_text()))
    ours, theirs = (read(path / "probe_scores.parquet") for path in (tmp_path, expected))
    assert list(ours) == list(theirs)
    for column in theirs:
        assert ours[column].dtype == theirs[column].dtype
        np.testing.assert_allclose(ours[column], theirs[column], rtol=0, atol=ROUNDING)
    out = capsys.readouterr().out
    assert "210 train items, 72 test items, 29.2% of them hard" in out
    assert "P2_cheap_raw  0.522 [0.383, 0.669]" in out and "17 of 41" in out
    assert "P3_cheap_sae − P2_cheap_raw: −0.040 [−0.202, 0.116]" in out


def test_causal_effects_of_the_small_run(autoencoders: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The command also summarises the tables of losses in out_dir."""
    assert run("squad_allpos", autoencoders, tmp_path) == 0
    for positions in ("all", "boundary"):
        name = f"causal_ablation_{positions}.json"
        result = json.loads((tmp_path / name).read_text())
        assert_same(result, published_json(f"tiny_world/res/squad_allpos/{name}"))
    summary = "causal, all: reconstruction 0.004 [−0.011, 0.018] nats, 0 of 5 intervals"
    assert summary in capsys.readouterr().out


def test_a_torch_file_is_rejected_with_the_conversion_command(tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--config", str(TINY / "squad.yaml"), "--root", str(REFERENCE), "--out", str(out)]) == 2
    stem = TINY / "sae/squad"
    assert_one_line(capsys.readouterr().err, f"`tilelli convert {stem}.pt {stem} --set k=8`",
                    "then add sae_ckpt.mid=tiny_world/sae/squad")
    assert not out.exists()
