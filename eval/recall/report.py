"""The report of a recall study: tables, figures and conclusions, from results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.io.json_text import read_json
from tilelli_jax.signals.crystallisation import band

from .. import figures, metrics, selective
from ..conclusions import (
    CORRECTION,
    PRR,
    format_p,
    is_significant,
)
from ..document import Document
from ..estimators import panel
from ..estimators.panel import SIDECAR
from ..stages import RESULTS, read_result, without
from ..stats import Interval
from ..tables import json_with_nulls
from ..tables import write as write_tables
from . import verdicts as verdict_file
from .evaluate import IN_FIGURES, VERDICTS
from .report_rows import (
    DASH,
    area_row,
    comparison_rows,
    cost_of,
    dataset_rows,
    example_rows,
    interval,
    method_rows,
    pareto_set,
    popularity_rows,
    transfer_differences,
    transfer_rows,
    verdict_rows,
    within_category_rows,
)
from .sentences import conclusions
from .study import RecallStudy

STYLE_ORDER = (*IN_FIGURES, *(name for name in panel.ESTIMATORS if name not in IN_FIGURES))
CALIBRATORS = {"platt": "Platt scaling", "isotonic": "Isotonic regression",
               "temperature": "Temperature scaling"}
Tree = Mapping[str, Any]


def collect(study: RecallStudy, name: str) -> dict[str, Any]:
    """Returns the content of results.json; runs the stages that are not finished.

    Args:
        name: of the study, for titles.
    """
    paths = {stage: getattr(study, stage) for stage in ("signals", "answers", "build", "fitted", "verdict",
                                                        "evaluation")}
    rule = verdict_file.read(paths["verdict"])
    return {"name": name, "config": config_lib.to_dict(study.config),
            "fit": without(read_result(paths["fitted"]), "probes"),
            "stages": {stage: path.name for stage, path in paths.items()},
            "verdict": without(rule.to_dict(), "probes"),
            "thresholds": rule.thresholds._asdict(), "warnings": study.warnings,
            **read_result(paths["evaluation"])}


def write(collected: Tree, out: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Writes results.json, report.md, report.html, figures/ and methods.*; returns the results.

    Args:
        collected: see `collect`.
        provenance: rows of the last section.
    """
    results = json.loads(json_with_nulls(collected))  # as a reader of results.json gets it
    name = results["name"]
    report = Document(f"{name}: does it know before it answers?")
    _add_summary(report, results)
    _add_primary(report, results)
    _add_examples(report, results)
    _add_methods(report, results)
    _add_costs(report, results)
    _add_calibration(report, results)
    _add_verdicts(report, results)
    _add_risk_coverage(report, results)
    _add_within_category(report, results)
    _add_transfer(report, results)
    _add_answerability(report, results)
    _add_layers(report, results, results["config"]["fit"]["c_values"])
    report.finish(out, results, provenance)
    write_tables(out / "methods", method_rows(results), f"{name}: methods")
    return results


def summary(results: Tree) -> list[list[str]]:
    """Returns the table that the command prints at its end."""
    rows = comparison_rows(results)
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def read_results(path: Path) -> dict[str, Any]:
    """Returns results.json of a study's directory. Raises InputError if it cannot be read."""
    return read_json(path / RESULTS)


# ---------------------------------------------------------------------------------------------


def _add_summary(report: Document, results: Tree) -> None:
    splits = results["splits"]
    share, n = f"{results['known_all']:.1%}", results["questions"]
    is_correctness = results["config"]["questions"]["task"] == "correctness"
    label = (f"The network answers {share} of {n} questions correctly and refuses {results['refused']:.1%}."
             if is_correctness else f"The label is whether a question has an answer, as {share} of {n} have: "
             "below, these are the known ones.")
    if results["unanswerable"]:
        label += f" {results['unanswerable']} questions without an answer are evaluated apart."
    report.paragraph(
        f"{label} Methods are trained on {splits['train']} questions and selected "
        f"on {splits['validate']}; probabilities are calibrated on {_calibration_set(results)}; "
        f"{results['test']} questions in {results['groups']} groups are held out ({results['known']:.1%} "
        "known). A prediction takes one forward pass of the prompt; nothing is generated. Intervals are 95 % "
        "bootstrap intervals over whole groups. A method with several seeds is reported as their mean.")
    report.points(conclusions(results))
    report.table(dataset_rows(results))


def _add_primary(report: Document, results: Tree) -> None:
    if not results["primary"]:
        return
    report.heading("Primary comparisons")
    report.paragraph("Fixed in the configuration, before anything was fitted. Paired bootstraps over groups "
                     f"of questions; p is corrected for these {len(results['primary'])} comparisons, by "
                     "Holm's method.")
    rows = []
    for comparison in results["primary"]:
        (a, b), p = comparison["comparison"].split(" - "), comparison["p_holm"]
        row: dict[str, Any] = {"A": a, "B": b, "questions": comparison["questions"]}
        rows.append(row)
        if comparison["missing"]:
            row["significant"] = f"not tested: {comparison['missing']}"
            continue
        row |= {"AUROC of A": interval(comparison["auroc"][a]),
                "AUROC of B": interval(comparison["auroc"][b]),
                "Δ (A − B)": interval(comparison["difference"]), "p (Holm)": format_p(p),
                "significant": "yes" if is_significant(p, comparison["groups"]) else "no"}
    report.table(rows)


def _add_examples(report: Document, results: Tree) -> None:
    if not any(example["question"] for example in results["examples"]):
        return  # a shipped study, without the texts of the questions
    report.heading("Examples")
    report.paragraph("Held-out questions at evenly spaced ranks, from the highest P(knows) to the lowest. "
                     "P(knows) is predicted from one pass of the question, before the answer.")
    report.table(example_rows(results))
    for end, title in (("highest", "The highest P(knows)"), ("lowest", "The lowest P(knows)")):
        report.table([{"question": example["question"], "answer": example["answer"],
                       "expected": example["expected"], "correct": "yes" if example["correct"] else "no",
                       "P(knows)": example["p"]} for example in results["extremes"][end]], title)


def _calibration_set(results: Tree) -> str:
    split = results["fit"]["calibrated_on"]
    return (f"{results['splits'][split]} other questions" if split == "calibrate" else
            f"the {results['splits'][split]} validation questions")


def _add_methods(report: Document, results: Tree) -> None:
    report.heading("Methods")
    rows = method_rows(results)
    figures.reserve_styles([name for name in STYLE_ORDER if name in results["methods"]])
    report.figure("methods", figures.ladder({row["method"]: row["AUROC"] for row in rows}),
                  "AUROC of each method on the held-out questions, with 95 % intervals; the dotted line is "
                  "chance.")
    report.table(comparison_rows(results))
    report.table(_method_descriptions(list(results["methods"])), "What each method is. It reads "
                 + "; ".join(f"{name}: {text}" for name, text in panel.GROUPS.items()))
    few = {name: tree["questions"] for name, tree in results["methods"].items()
           if tree["questions"] < results["test"]}
    if few:
        report.paragraph("Evaluated on a part of the held-out questions, and compared with others there: "
                         + ", ".join(f"{name} ({n})" for name, n in few.items()) + ".")
    if results["verbalised_without_number"] is not None:
        report.paragraph(f"verbalised: {results['verbalised_without_number']} replies have no number.")
    report.points([f"{name} is left out: {reason}." for name, reason in results["fit"]["omitted"].items()])
    report.paragraph(f"Comparisons are paired bootstraps over groups of questions. {CORRECTION}")
    report.table(rows, "All metrics of each method: AUPRC, Brier score, and ECE beside the ECE that "
                 "perfectly calibrated probabilities would have from sampling alone")
    selected = {name: info for name, info in results["fit"]["methods"].items() if "C" in info}
    report.table([{"method": name, "layer": info.get("layer"), "C": info["C"],
                   "validation AUROC": info["validation_auroc"]} for name, info in selected.items()],
                 "Layer and C (inverse regularisation) that the validation questions selected")


def _method_descriptions(methods: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each of these methods: what it is, reads and learns from, and its paper."""
    return [{"method": name, "what it is": panel.MEANINGS[name], "reads": estimator.group,
             "learns from": estimator.learns_from, "source": estimator.source or "–"}
            for name, estimator in panel.ESTIMATORS.items() if name in methods]


def _add_costs(report: Document, results: Tree) -> None:
    pass_seconds = results["costs"].get("prompt", {}).get("seconds", np.nan)
    points = {name: (pass_seconds + cost_of(name, results)["seconds"], Interval.from_tree(tree["auroc"]),
                     panel.GROUPS[panel.ESTIMATORS[name].group])
              for name, tree in results["methods"].items() if name not in panel.CONTROLS}
    points = {name: point for name, point in points.items() if point[0] > 0}
    if not points:
        return
    report.heading("Cost")
    best = [name for name in pareto_set(results) if name in points]
    if len({kind for _, _, kind in points.values()}) > 1:
        figures.reserve_styles(list(panel.GROUPS.values()))
        report.figure("cost", figures.cost_benefit(points, best), "AUROC of each method over its cost. The "
                      "line joins the Pareto set, the methods for which no cheaper one has a higher AUROC: "
                      f"{', '.join(best)}. The prompt's pass with all its signals takes {pass_seconds:.3g} "
                      "s.")
    rows = [{"method": name, "reads": panel.ESTIMATORS[name].group, **{
        title: cost_of(name, results)[key] for title, key in (
            ("forward tokens", "forward"), ("generated tokens", "generated"), ("seconds", "seconds"))}}
            for name in results["methods"] if name not in panel.CONTROLS]
    report.table(rows, "Cost of each method for one question beyond the prompt's pass: tokens, mean, and "
                 "seconds, median, in the batches of this study and on its machine")
    if (free := results["free"]) is not None:
        report.table([{"method": comparison["baseline"],
                       "Δ vs best free score (free − method)": interval(comparison["difference"]),
                       "p (Holm)": format_p(comparison["p_holm"])}
                      for comparison in results["comparisons_with_free"]],
                     f"Every method compared with {free}, the free score that is best on the validation "
                     "questions")


def _add_answerability(report: Document, results: Tree) -> None:
    result = results["answerability"]
    if not result or not result["methods"]:
        return
    report.heading("Questions without an answer")
    report.paragraph(
        f"No method is trained on these questions. Does its score separate the {results['test']} held-out "
        f"questions, which have an answer, from the {result['questions'] - results['test']} that have none? "
        "An AUROC above 0.5 means that the unanswerable ones get lower scores.")
    report.table([{"method": name, "AUROC": interval(metrics["auroc"])} for name, metrics in sorted(
        result["methods"].items(), key=lambda item: -item[1]["auroc"]["point"])])


def _add_calibration(report: Document, results: Tree) -> None:
    report.heading("Calibration")
    curves = {name: metrics.Reliability(np.asarray(curve["confidence"]), np.asarray(curve["accuracy"]),
                                        np.asarray(curve["counts"]))
              for name, curve in results["reliability"].items()}
    calibrator = CALIBRATORS[results["config"]["fit"]["calibrate"]]
    report.figure("reliability", figures.reliability(curves), "Observed frequency of correct answers against "
                  "mean predicted probability, on the held-out questions; the larger a marker, the more "
                  f"questions it stands for. {calibrator} on {_calibration_set(results)} gives the "
                  "probabilities. The sidecar is the exported run.")


def _add_verdicts(report: Document, results: Tree) -> None:
    report.heading("Verdicts")
    options, thresholds, fit = results["config"]["verdict"], results["thresholds"], results["fit"]
    precision, confidence = f"{options['precision']:.0%}", f"{options['confidence']:.0%}"
    unused = [verdict for name, verdict in (("knows_from", VERDICTS[0]), ("unknown_below", VERDICTS[2]))
              if thresholds[name] is None]
    if len(unused) == 2:
        report.paragraph(
            f"There are no thresholds, so no verdict is given: {_calibration_set(results)}, one of each group"
            f", do not suffice to guarantee a precision of {precision} with {confidence} confidence."
            if options["guarantee"] else "There are no thresholds, so no verdict is given: none reaches a "
            f"precision of {precision} on {_calibration_set(results)}.")
        return
    limits = ", ".join(f"'{verdict}' {bound} P(knows) = {thresholds[name]:.3f}" for name, verdict, bound in (
        ("knows_from", VERDICTS[0], "from"), ("unknown_below", VERDICTS[2], "below"))
        if thresholds[name] is not None)
    target = (f"is guaranteed for new questions of the same kind with {confidence} confidence"
              if options["guarantee"] else
              "was reached on the calibration questions and is not guaranteed for new ones")
    report.paragraph(
        f"The exported sidecar (seed {fit['seeds'][fit['selected_run']]}) gives the verdicts {limits}, and "
        f"otherwise 'uncertain'. A precision of {precision} {target}."
        + (f" No threshold achieves this for '{unused[0]}', which is never given." if unused else ""))
    report.table(verdict_rows(results))


def _add_risk_coverage(report: Document, results: Tree) -> None:
    report.heading("Selective answering")
    risk = results["risk"]
    curves = {name: selective.RiskCoverage.from_tree(risk["coverages"], curve)
              for name, curve in risk["methods"].items()}
    report.figure("risk-coverage", figures.risk_coverage(
        curves, risk["oracle"], risk["mean_error"], unit="fraction of wrong answers"),
        "Risk–coverage: fraction of wrong answers among the questions answered, when each method answers the "
        f"questions with its highest scores first. {figures.intervals_caption(curves)}")
    report.paragraph(f"The table of all metrics has the AURC and the PRR. {PRR}")


def _add_within_category(report: Document, results: Tree) -> None:
    rows = within_category_rows(results)
    if not rows:
        return
    report.heading("Within categories")
    free = f" The free score is {results['free']}." if results["free"] else ""
    report.paragraph("The AUROC of pairs of a known and an unknown question of the same category. A method "
                     "that only recognises the category has 0.5 here, although it may have a high AUROC over "
                     f"all questions.{free}")
    report.table(rows)


def _add_transfer(report: Document, results: Tree) -> None:
    if results["within_dataset"] or results["cross_dataset"]:
        report.heading("Within and across data sets")
        report.paragraph("Within: trained on all data sets, tested on held-out questions of one, so that "
                         "recognising the data set does not help. Across (a → b): trained, selected and "
                         "calibrated on one data set, tested on all questions of another that share no "
                         "group with it. p is corrected within each row of the first table.")
        report.table(transfer_rows(results))
        report.table(transfer_differences(results))
    names = sorted(results["datasets"])
    if results["cross_dataset"]:
        shown = [name for name in (SIDECAR, "layer_probe", results["free"]) if name in results["methods"]]
        for method in shown:
            report.figure(f"transfer-{method}", figures.heat_map(
                [[_transfer_area(results, method, a, b) for b in names] for a in names], names, names,
                x="tested on", y="trained on"),
                f"AUROC of {method}, trained, selected and calibrated on one data set and tested on another; "
                "on the diagonal trained on all and tested on held-out questions of one.")
    if results["answered_only"]:
        report.heading("Without refusals")
        report.paragraph("An answer that refuses or asks for more context is not correct, and is easier to "
                         "predict than an error. AUROCs on the held-out questions without refusals:")
        report.table([area_row("answered", results["answered_only"])])
    if any(results["by_popularity"].values()):
        report.heading("By popularity")
        report.table(popularity_rows(results))
        report.paragraph(f"{DASH}.")


def _transfer_area(results: Tree, method: str, trained: str, tested: str) -> float:
    result = (results["within_dataset"].get(tested) if trained == tested else
              results["cross_dataset"].get(f"{trained} → {tested}"))
    return np.nan if result is None or method not in result["methods"] else (
        result["methods"][method]["auroc"]["point"])


def _add_layers(report: Document, results: Tree, c_values: Sequence[float]) -> None:
    report.heading("By layer")
    entropy = results["entropy_by_layer"]
    low, high = band(len(entropy["known"]))
    report.figure("entropy", figures.by_depth(entropy, (low, high), unit="entropy of the next token, nats"),
                  "Mean entropy of the logit lens at the last position of the prompt, by layer, over the "
                  f"held-out questions. Shaded: layers {low} to {high}, for the strongest MLP write.")
    if probe := results["fit"]["methods"].get("layer_probe"):
        curves = {"layer_probe": probe["by_layer"]}
        report.figure("layer-probe", figures.by_depth(curves, unit="validation AUROC", line=0.5),
                      "Validation AUROC of a logistic probe of the residual stream at each layer, with the "
                      f"best C of {list(c_values)}.")
