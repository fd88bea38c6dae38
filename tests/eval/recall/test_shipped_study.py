"""The study that comes with the package: its numbers are those of the results page, its sidecar predicts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.eval.recall.small import Place
from tests.smollm2 import smollm2_file
from tilelli_jax.errors import InputError
from tilelli_jax.eval.recall import report_rows, scores, shipped, verdicts
from tilelli_jax.eval.recall.command import evaluate_shipped
from tilelli_jax.eval.recall.predictor import KnowledgePredictor
from tilelli_jax.loading import store

NAME = "smollm2-135m-facts"
PAGE = Path(__file__).parents[3] / "docs/results/recall-smollm2.md"


def test_it_is_complete_and_names_no_machine() -> None:
    assert shipped.names() == [NAME]
    path = shipped.ROOT / NAME
    files = [file for file in path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4 * 2**20
    for file in files:
        if file.suffix in (".json", ".md"):
            assert not re.search(r"""["' ]/\w""", file.read_text("utf-8")), "an absolute path"
    rule, sidecar = verdicts.read(path / "sidecar"), store.load(path / "sidecar")
    assert rule.network["n_layers"] == 30 and "layer_probe" in rule.probes and len(rule.examples) == 5
    assert sidecar.config.n_features == 12 and rule.knows_from > rule.unknown_below


def test_abstaining_on_a_part_of_the_known_questions() -> None:
    """The threshold of the sidecar's rule, on the calibration questions' own scores."""
    path = shipped.ROOT / NAME
    table, rule = shipped.read_table(path), verdicts.read(path / "sidecar")
    run = json.loads((path / "study.json").read_text())["fit"]["selected_run"]
    rows = (table.split == "calibrate") & (table.known == 1)
    p = scores.read(path)[None]["sidecar"].probabilities[run, rows]
    for rate in (0, 0.05, 0.5, 1):
        threshold = rule.threshold_at(rate)
        assert abs((p < threshold - 1e-6).mean() - rate) <= 1 / len(p) + 1e-9
        assert threshold == pytest.approx(np.quantile(p, rate), abs=1e-5)
    with pytest.raises(ValueError, match="known_quantiles: expected quantiles, found none"):
        verdicts.VerdictRule().threshold_at(0.5)


def test_another_network_is_refused(place: Place, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"none is shipped for .*; shipped are those of {NAME}"):
        shipped.find_sidecar("", place.model)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(InputError, match=r"damaged\.gguf: not a complete GGUF file"):
        shipped.find_sidecar("", damaged)
    with pytest.raises(InputError, match="trained on another network: expected 30 layers"):
        KnowledgePredictor.open(place.model, shipped.ROOT / NAME / "sidecar")


@pytest.mark.exhaustive
def test_its_report_has_the_numbers_of_the_page(tmp_path: Path) -> None:
    assert evaluate_shipped(["--shipped", NAME, "--out", str(tmp_path)]) == 0
    results, page = json.loads((tmp_path / "results.json").read_text()), PAGE.read_text("utf-8")
    within = {row["method"]: row["AUROC within"] for row in report_rows.within_category_rows(results)}
    for name, tree in results["methods"].items():
        row, = [line for line in page.splitlines() if line.startswith((f"| {name} |", f"| {name} ("))
                and line.count("|") == 9]
        for interval in (report_rows.interval(tree["auroc"]), within[name]):
            assert f"{interval.point:.3f} [{interval.low:.3f}, {interval.high:.3f}]" in row, name
    for result in results["primary"]:
        assert f"{result['difference']['low']:.3f}".replace("-", "−") in page


@pytest.mark.exhaustive
def test_it_predicts_without_training() -> None:
    """P(knows) of two facts, as the results page prints them."""
    predictor = KnowledgePredictor.open(smollm2_file())
    known, unknown, other = predictor.predict([
        "The capital of France is", "The capital of Ouachita County is", "Who wrote Emma?"])
    assert known.p > 0.9 and known.verdict == "likely knows"
    assert unknown.p < 0.4 and unknown.verdict == "likely beyond its knowledge"
    assert f"{other.p:.3f}" in PAGE.read_text("utf-8")
    assert predictor.answer(["The capital of France is"]) == ["Paris"]
