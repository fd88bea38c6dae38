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
    FEW,
    PRR,
    compare_with_chance,
    few_groups_warning,
    format_difference,
    format_interval,
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
from .evaluate import IN_FIGURES, MIN_PER_LABEL, VERDICTS
from .study import RecallStudy

STYLE_ORDER = (*IN_FIGURES, *(name for name in panel.ESTIMATORS if name not in IN_FIGURES))
CALIBRATORS = {"platt": "Platt scaling", "isotonic": "Isotonic regression",
               "temperature": "Temperature scaling"}
# Compared with the sidecar in the conclusions, as is every other method that differs significantly.
COMPARED = ("first_token_entropy", "words", "layer_probe", "prompt_features")
PART_OF_PASSES = ("final", "answer_final")  # activations of passes that are counted already
DELTA = "Δ vs sidecar (sidecar − method)"
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
    _add_transfer(report, results)
    _add_answerability(report, results)
    _add_layers(report, results, results["config"]["fit"]["c_values"])
    report.finish(out, results, provenance)
    write_tables(out / "methods", method_rows(results), f"{name}: methods")
    return results


def method_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns the table of methods on the test split, highest AUROC first."""
    comparisons = {comparison["baseline"]: comparison for comparison in results["comparisons"]}
    methods = results["methods"]
    return [{
        "method": name, "questions": methods[name]["questions"],
        **{column: _interval(methods[name][key]) for column, key in (
            ("AUROC", "auroc"), ("AUPRC", "auprc"), ("PRR", "prr"), ("PRR₀.₅", "prr_half"), ("AURC", "aurc"),
            ("Brier", "brier"), ("ECE", "ece"))},
        "ECE if calibrated": methods[name]["ece_if_calibrated"],
        DELTA: _interval(comparisons.get(name, {}).get("difference")),
        "p (Holm)": comparisons.get(name, {}).get("p_holm"),
        "forward tokens": cost["forward"], "generated tokens": cost["generated"], "seconds": cost["seconds"]}
        for name in sorted(methods, key=lambda name: -methods[name]["auroc"]["point"])
        for cost in [cost_of(name, results)]]


def cost_of(method: str, results: Tree) -> dict[str, float]:
    """Returns what a method costs for one question beyond the prompt's pass.

    Keys: `forward` and `generated` tokens, mean, and `seconds`, median; NaN where it was not measured.
    """
    costs = [results["costs"].get(need, dict.fromkeys(("forward", "generated", "seconds"), np.nan))
             for need in panel.ESTIMATORS[method].needs if need not in PART_OF_PASSES]
    return {key: float(sum(cost[key] for cost in costs)) for key in ("forward", "generated", "seconds")}


def pareto_set(results: Tree) -> list[str]:
    """Returns the methods, cheapest first, than which no cheaper or equally cheap one has a higher AUROC.

    Controls are left out.
    """
    area = {name: tree["auroc"]["point"] for name, tree in results["methods"].items()
            if name not in panel.CONTROLS and not np.isnan(cost_of(name, results)["seconds"])}
    best: list[str] = []
    for name in sorted(area, key=lambda name: (cost_of(name, results)["seconds"], -area[name])):
        if not best or area[name] > area[best[-1]]:
            best.append(name)
    return best


def comparison_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns the table of methods with their most important columns, as text."""
    return [{"method": row["method"], "AUROC": format_interval(row["AUROC"]),
             DELTA: "–" if row[DELTA] is None else format_interval(row[DELTA], sign=True),
             "p (Holm)": format_p(row["p (Holm)"])} for row in method_rows(results)]


def dataset_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns the fractions of known and refused questions in each data set."""
    return [{"data set": name, "questions": dataset["questions"],
             **({"without an answer": dataset["unanswerable"]} if results["unanswerable"] else {}),
             "known": dataset["known"],
             "refused": dataset["refused"], "known among answered": dataset["known_among_answered"]}
            for name, dataset in results["datasets"].items()]


def example_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns some held-out questions, highest P(knows) first."""
    return [{"question": example["question"], "answer": example["answer"],
             "correct": "yes" if example["correct"] else "no", "P(knows)": example["p"],
             "verdict": example["verdict"] or "–"} for example in results["examples"]]


def verdict_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns how often the exported sidecar gives each verdict, and its precision."""
    verdicts = results["verdicts"]
    return [{"verdict": verdict, "questions": verdicts[verdict]["questions"],
             "fraction": verdicts[verdict]["fraction"], "known": verdicts[verdict]["known"],
             "precision": _interval(verdicts[verdict]["precision"])} for verdict in VERDICTS]


def transfer_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns AUROCs within and across data sets; empty for a single data set."""
    return [*(_area_row(f"within {name}", result) for name, result in results["within_dataset"].items()),
            *(_area_row(name, result) for name, result in results["cross_dataset"].items())]


def transfer_differences(results: Tree) -> list[dict[str, Any]]:
    """Returns the comparisons within and across data sets; p is corrected within each `questions from`."""
    return [{"questions from": name, "method": comparison["baseline"], "questions": comparison["questions"],
             DELTA: _interval(comparison["difference"]), "p (Holm)": comparison["p_holm"]}
            for name, result in (*((f"within {name}", result)
                                   for name, result in results["within_dataset"].items()),
                                 *results["cross_dataset"].items())
            for comparison in result["comparisons"]]


DASH = f"–: fewer than {MIN_PER_LABEL} known or fewer than {MIN_PER_LABEL} unknown questions"  # by popularity


def popularity_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns AUROCs by quartile of popularity; empty where the popularity is unknown."""
    return [{"data set": name, "popularity": f"{result['from']:g} to {result['to']:g}",
             "questions": result["questions"], "known": result["known"],
             **{method: _interval(result.get("methods", {}).get(method, {}).get("auroc"))
                for method in IN_FIGURES if method in results["methods"]}}
            for name, bins in results["by_popularity"].items() for result in bins]


def conclusions(results: Tree) -> list[str]:
    """Returns sentences that claim no more than the intervals and corrected p-values support."""
    sidecar, groups = results["methods"][SIDECAR], results["groups"]
    area, runs = Interval.from_tree(sidecar["auroc"]), sidecar["runs"]
    seeds = (f"mean of {len(runs)} seeds, {min(runs):.3f} to {max(runs):.3f}" if len(runs) > 1 else
             "one seed")
    texts = [f"The sidecar separates known from unknown held-out questions with AUROC "
             f"{format_interval(area)} ({seeds}): {_versus_chance(area, groups)}.",
             *few_groups_warning(groups, "questions"), *results["warnings"]]
    texts += [_comparison_sentence(comparison, results) for comparison in results["comparisons"]
              if comparison["baseline"] in COMPARED
              or is_significant(comparison["p_holm"], comparison["groups"])]
    texts += [CORRECTION] if results["comparisons"] else []
    texts.append(f"Calibration: the sidecar's ECE (10 bins) is "
                 f"{format_interval(Interval.from_tree(sidecar['ece']))}; perfectly calibrated probabilities "
                 f"would have {sidecar['ece_if_calibrated']:.3f} from sampling alone.")
    for name, result in results["cross_dataset"].items():
        texts.append(_transfer_sentence(name, result))
    for name, reason in results["fit"].get("excluded_datasets", {}).items():
        texts.append(f"No method is trained on {name} alone: {reason}.")
    return texts


def summary(results: Tree) -> list[list[str]]:
    """Returns the table that the command prints at its end."""
    rows = comparison_rows(results)
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def read_results(path: Path) -> dict[str, Any]:
    """Returns results.json of a study's directory. Raises InputError if it cannot be read."""
    return read_json(path / RESULTS)


# ---------------------------------------------------------------------------------------------


def _few_groups(groups: int) -> str:
    return (f"inconclusive, because these questions form only {groups} groups, and with fewer than {FEW} "
            "intervals are too narrow and p-values too small")


def _versus_chance(area: Interval, groups: int) -> str:
    return _few_groups(groups) if groups < FEW else compare_with_chance(area, groups)


def _comparison_sentence(comparison: Tree, results: Tree) -> str:
    baseline, groups, p = comparison["baseline"], comparison["groups"], comparison["p_holm"]
    p_text = "p is undefined" if p is None else f"p {format_p(p)}" if p < 0.001 else f"p = {format_p(p)}"
    difference = Interval.from_tree(comparison["difference"])
    if groups < FEW:
        verdict = _few_groups(groups)
    elif p is None:
        verdict = "inconclusive, because the bootstrap replicates do not differ"
    elif not is_significant(p, groups):
        verdict = "the difference is not significant"
    else:
        verdict = f"the sidecar is significantly {'better' if difference.point > 0 else 'worse'}"
    below_chance = Interval.from_tree(results["methods"][baseline]["auroc"]).high < 0.5
    shown = format_difference(difference, is_significant(p, groups))
    return (f"Sidecar minus {baseline}: ΔAUROC {shown}, paired bootstrap, Holm-corrected {p_text}: "
            f"{verdict}."
            + (f" ({baseline} is worse than chance.)" if below_chance else ""))


def _transfer_sentence(name: str, result: Tree) -> str:
    if SIDECAR not in result["methods"]:
        return (f"Trained on one data set, tested on another ({name}): inconclusive, because the "
                f"{result['questions']} questions that share no group with the training questions include "
                "too few known or unknown ones.")
    metrics = result["methods"][SIDECAR]
    area = Interval.from_tree(metrics["auroc"])
    return (f"Trained on one data set, tested on another ({name}): AUROC {format_interval(area)} on "
            f"{result['questions']} questions in {result['groups']} groups, ECE "
            f"{metrics['ece']['point']:.3f}: {_versus_chance(area, result['groups'])}.")


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
        row |= {"AUROC of A": _interval(comparison["auroc"][a]),
                "AUROC of B": _interval(comparison["auroc"][b]),
                "Δ (A − B)": _interval(comparison["difference"]), "p (Holm)": format_p(p),
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
                  f"chance. {_legend(list(results['methods']))}")
    report.table(comparison_rows(results))
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


def _legend(methods: Sequence[str]) -> str:
    """Returns what the methods are: those that are shown, and no others."""
    described = "; ".join(f"{name}: {text}" for name, text in panel.MEANINGS.items()
                          if name in methods and name not in panel.CONTROLS)
    controls = [name for name in panel.CONTROLS if name in methods]
    return f"{described[0].upper()}{described[1:]}." + (
        f" Controls, which do not read activations: {', '.join(controls)}." if controls else "")


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
                      "line joins the Pareto set, the methods than which no cheaper one has a higher AUROC: "
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
                       "Δ vs best free score (free − method)": _interval(comparison["difference"]),
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
    report.table([{"method": name, "AUROC": _interval(metrics["auroc"])} for name, metrics in sorted(
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
        for method in (SIDECAR, "layer_probe", *([results["free"]] if results["free"] else [])):
            report.figure(f"transfer-{method}", figures.heat_map(
                [[_transfer_area(results, method, a, b) for b in names] for a in names], names, names,
                x="tested on", y="trained on"),
                f"AUROC of {method}, trained, selected and calibrated on one data set and tested on another; "
                "on the diagonal trained on all and tested on held-out questions of one.")
    if results["answered_only"]:
        report.heading("Without refusals")
        report.paragraph("An answer that refuses or asks for more context is not correct, and is easier to "
                         "predict than an error. AUROCs on the held-out questions without refusals:")
        report.table([_area_row("answered", results["answered_only"])])
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


def _area_row(name: str, result: Tree) -> dict[str, Any]:
    return {"questions from": name, "questions": result["questions"], "known": result["known"],
            **{method: _interval(metrics["auroc"]) for method, metrics in result["methods"].items()
               if method in (*IN_FIGURES, "length", "popularity")},
            "ECE, sidecar": _interval(result["methods"].get(SIDECAR, {}).get("ece"))}


def _interval(tree: Tree | None) -> Interval | None:
    return None if tree is None else Interval.from_tree(tree)
