"""The conclusions of a recall study: no more than intervals and corrected p-values support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..conclusions import (
    CORRECTION,
    FEW,
    compare_with_chance,
    few_groups_warning,
    format_difference,
    format_interval,
    format_p,
    is_significant,
)
from ..estimators.panel import SIDECAR
from ..stats import Interval

MOST_SENTENCES = 8  # more comparisons than these are summarised
# Compared with the sidecar in the conclusions, as is every other method that differs significantly.
COMPARED = ("first_token_entropy", "words", "layer_probe", "prompt_features")
Tree = Mapping[str, Any]


def conclusions(results: Tree) -> list[str]:
    """Returns sentences that claim no more than the intervals and corrected p-values support."""
    sidecar, groups = results["methods"][SIDECAR], results["groups"]
    area, runs = Interval.from_tree(sidecar["auroc"]), sidecar["runs"]
    seeds = (f"mean of {len(runs)} seeds, {min(runs):.3f} to {max(runs):.3f}" if len(runs) > 1 else
             "one seed")
    texts = [f"The sidecar separates known from unknown held-out questions with AUROC "
             f"{format_interval(area)} ({seeds}): {_versus_chance(area, groups)}.",
             *few_groups_warning(groups, "questions"), *results["warnings"]]
    compared = [comparison for comparison in results["comparisons"] if comparison["baseline"] in COMPARED
                or is_significant(comparison["p_holm"], comparison["groups"])]
    if len(compared) <= MOST_SENTENCES:
        texts += [_comparison_sentence(comparison, results) for comparison in compared]
    else:
        texts += _summary_of_comparisons(results["comparisons"])
    texts += [CORRECTION] if results["comparisons"] else []
    texts.append(f"Calibration: the sidecar's ECE (10 bins) is "
                 f"{format_interval(Interval.from_tree(sidecar['ece']))}; perfectly calibrated probabilities "
                 f"would have {sidecar['ece_if_calibrated']:.3f} from sampling alone.")
    texts += _within_category_sentences(results)
    for name, result in results["cross_dataset"].items():
        texts.append(_transfer_sentence(name, result))
    for name, reason in results["fit"].get("excluded_datasets", {}).items():
        texts.append(f"No method is trained on {name} alone: {reason}.")
    return texts


# ---------------------------------------------------------------------------------------------


def _few_groups(groups: int) -> str:
    return (f"inconclusive, because these questions form only {groups} groups, and with fewer than {FEW} "
            "intervals are too narrow and p-values too small")


def _versus_chance(area: Interval, groups: int) -> str:
    return _few_groups(groups) if groups < FEW else compare_with_chance(area, groups)


def _summary_of_comparisons(comparisons: Sequence[Tree]) -> list[str]:
    """A sentence each for the methods than which the sidecar is better, worse, and neither."""
    named: dict[str, list[str]] = {}
    for comparison in comparisons:
        point, groups = comparison["difference"]["point"], comparison["groups"]
        kind = ("not significantly different from" if groups < FEW or comparison["p_holm"] is None
                or not is_significant(comparison["p_holm"], groups) else
                "significantly better than" if point > 0 else "significantly worse than")
        named.setdefault(kind, []).append(comparison["baseline"])
    return [f"The sidecar is {kind} {', '.join(names)} (paired bootstrap, Holm-corrected for "
            f"{len(comparisons)} comparisons)." for kind, names in named.items()]


def _within_category_sentences(results: Tree) -> list[str]:
    result, free = results["within_category"], results["free"]
    if not result or SIDECAR not in result["methods"]:
        return []
    area = Interval.from_tree(result["methods"][SIDECAR]["auroc"])
    text = (f"Among questions of the same category, the sidecar's AUROC is {format_interval(area)}: "
            f"{_versus_chance(area, result['groups'])}.")
    for comparison in result["comparisons"]:
        if comparison["baseline"] == free:
            difference, p = Interval.from_tree(comparison["difference"]), comparison["p_holm"]
            significant = p is not None and is_significant(p, comparison["groups"])
            text += (f" That of the best free score, {free}, is "
                     f"{format_interval(Interval.from_tree(result['methods'][free]['auroc']))}: Δ "
                     f"{format_difference(difference, significant)}, the difference is "
                     f"{'' if significant else 'not '}significant.")
    return [text]


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
