"""The conclusions of a recall study: no more than intervals and corrected p-values support."""

from __future__ import annotations

from collections.abc import Mapping
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
