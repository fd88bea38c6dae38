"""The rows of a recall study's tables, from results.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..conclusions import format_interval, format_p
from ..estimators import panel
from ..estimators.panel import SIDECAR
from ..stats import Interval
from .evaluate import IN_FIGURES, MIN_PER_LABEL, VERDICTS

PART_OF_PASSES = ("final", "answer_final")  # activations of passes that are counted already
DELTA = "Δ vs sidecar (sidecar − method)"
Tree = Mapping[str, Any]


def method_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns the table of methods on the test split, highest AUROC first."""
    comparisons = {comparison["baseline"]: comparison for comparison in results["comparisons"]}
    methods = results["methods"]
    return [{
        "method": name, "questions": methods[name]["questions"],
        **{column: interval(methods[name][key]) for column, key in (
            ("AUROC", "auroc"), ("AUPRC", "auprc"), ("PRR", "prr"), ("PRR₀.₅", "prr_half"), ("AURC", "aurc"),
            ("Brier", "brier"), ("ECE", "ece"))},
        "ECE if calibrated": methods[name]["ece_if_calibrated"],
        DELTA: interval(comparisons.get(name, {}).get("difference")),
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
    """Returns the methods, cheapest first, for which no cheaper or equally cheap one has a higher AUROC.

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
             "precision": interval(verdicts[verdict]["precision"])} for verdict in VERDICTS]


def transfer_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns AUROCs within and across data sets; empty for a single data set."""
    return [*(area_row(f"within {name}", result) for name, result in results["within_dataset"].items()),
            *(area_row(name, result) for name, result in results["cross_dataset"].items())]


def transfer_differences(results: Tree) -> list[dict[str, Any]]:
    """Returns the comparisons within and across data sets; p is corrected within each `questions from`."""
    return [{"questions from": name, "method": comparison["baseline"], "questions": comparison["questions"],
             DELTA: interval(comparison["difference"]), "p (Holm)": comparison["p_holm"]}
            for name, result in (*((f"within {name}", result)
                                   for name, result in results["within_dataset"].items()),
                                 *results["cross_dataset"].items())
            for comparison in result["comparisons"]]


DASH = f"–: fewer than {MIN_PER_LABEL} known or fewer than {MIN_PER_LABEL} unknown questions"  # by popularity


def within_category_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns the AUROC of each method for pairs of the same category, highest first."""
    result = results["within_category"] or {"methods": {}, "comparisons": [], "comparisons_with_free": []}
    compared = {key: {comparison["baseline"]: comparison for comparison in result.get(key, [])}
                for key in ("comparisons", "comparisons_with_free")}

    def cells(key: str, name: str, title: str) -> dict[str, Any]:
        comparison = compared[key].get(name, {})
        return {title: interval(comparison.get("difference")),
                f"p (Holm), {title[2:]}": comparison.get("p_holm")}
    return [{"method": name, "questions": tree["questions"], "AUROC within": interval(tree["auroc"]),
             **cells("comparisons", name, "Δ sidecar − method"),
             **(cells("comparisons_with_free", name, "Δ free − method") if results["free"] else {})}
            for name, tree in sorted(result["methods"].items(), key=lambda item: -item[1]["auroc"]["point"])]


def popularity_rows(results: Tree) -> list[dict[str, Any]]:
    """Returns AUROCs by quartile of popularity; empty where the popularity is unknown."""
    return [{"data set": name, "popularity": f"{result['from']:g} to {result['to']:g}",
             "questions": result["questions"], "known": result["known"],
             **{method: interval(result.get("methods", {}).get(method, {}).get("auroc"))
                for method in IN_FIGURES if method in results["methods"]}}
            for name, bins in results["by_popularity"].items() for result in bins]


def area_row(name: str, result: Tree) -> dict[str, Any]:
    return {"questions from": name, "questions": result["questions"], "known": result["known"],
            **{method: interval(metrics["auroc"]) for method, metrics in result["methods"].items()
               if method in (*IN_FIGURES, "length", "popularity")},
            "ECE, sidecar": interval(result["methods"].get(SIDECAR, {}).get("ece"))}


def interval(tree: Tree | None) -> Interval | None:
    return None if tree is None else Interval.from_tree(tree)
