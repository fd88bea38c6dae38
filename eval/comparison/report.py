"""The report of a comparison."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from tilelli_jax import config as config_lib

from .. import conclusions, figures
from ..conclusions import ALPHA, format_interval, format_p
from ..document import Document
from ..stages import read_result
from ..stats import Interval
from ..tables import json_with_nulls
from ..tables import write as write_tables
from .compare import TESTS
from .config import file_name
from .study import ComparisonStudy

Tree = Mapping[str, Any]
TEST_NAMES = {"welch": "Welch", "unpaired": "exact", "paired": "exact, paired"}
DECIDING = ("welch", "unpaired")  # with five pairs the paired exact p cannot be below 0.0625


def collect(study: ComparisonStudy) -> dict[str, Any]:
    """Returns the content of results.json; runs the stages that are missing."""
    path = study.evaluation
    return {
        "config": config_lib.to_dict(study.config), "stage": path.name,
        "sizes": {name: size._asdict() for name, size in study.sizes.items()},
        "bytes": {text: {"train": len(corpus.train), "valid": len(corpus.valid)}
                  for text, corpus in study.corpora.items()},
        "tuning": {text: {name: read_result(stage) for name, stage in stages.items()}
                   for text, stages in study.rates.items()},
        **read_result(path)}


def write(study: ComparisonStudy, name: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Writes results.json, report.md, report.html, figures/, models.* and differences.*; returns the results.

    Args:
        name: the comparison's name, for the title.
        provenance: command, seeds, commit and machine, for the last section.
    """
    # As a reader of results.json gets it.
    results = json.loads(json_with_nulls(collect(study) | {"name": name}))
    report = Document(f"{name}: which network reaches the lower loss at equal size and budget?")
    report.points([*conclusions.few_seeds_warning(len(results["config"]["seeds"]), len(results["sizes"]) - 1),
                   *verdicts(results)])
    report.paragraph(limits(results))
    for text in results["texts"]:
        _text(report, results, text)
    _learning_rates(report, results)
    _method(report, results)
    report.finish(study.out, results, provenance)
    for table, rows_of in (("models", rows), ("differences", differences)):
        write_tables(study.out / table, [{"text": text, **row} for text in results["texts"]
                                         for row in rows_of(results, text)], f"{name}: {table}")
    return results


def rows(results: Tree, text: str) -> list[dict[str, Any]]:
    """The size and the losses of each model on one text, the reference first."""
    of_text, table = results["texts"][text], []
    for name, losses in of_text["losses"].items():
        size, runs = results["sizes"][name], of_text["runs"][name]
        table.append({
            "model": name, "parameters": f"{size['parameters']:,}",
            "bits per weight": size["bits_per_weight"], "bits per parameter": size["bits_per_parameter"],
            "nats/byte": f"{losses['mean']:.4f} ± {losses['sd']:.4f}",
            "nats/byte, by seed": ", ".join(f"{loss:.4f}" for loss in losses["by_seed"]),
            "tokens": f"{runs[0]['tokens']:,}",
            "seconds": f"{statistics.mean(run['seconds'] for run in runs):.0f}"})
    return table


def differences(results: Tree, text: str) -> list[dict[str, Any]]:
    """The difference of each model from the reference on one text, in nats/byte; negative: lower loss."""
    of_text = results["texts"][text]
    return [{
        "model": row["model"],
        f"Δ vs {of_text['reference']}": format_interval(Interval.from_tree(row["difference"]), 4, sign=True),
        "Δ, paired": format_interval(Interval.from_tree(row["paired_difference"]), 4, sign=True),
        **{f"p, {TEST_NAMES[test]}": row["p"][test] for test in TESTS},
        **{f"p Holm, {TEST_NAMES[test]}": row["p_holm"][test] for test in TESTS}}
        for row in of_text["comparisons"]]


def verdicts(results: Tree) -> list[str]:
    """Returns a sentence for each model and text: losses, difference, tests and conclusion."""
    return [_verdict(of_text, comparison, text) for text, of_text in results["texts"].items()
            for comparison in of_text["comparisons"]]


def is_significant(comparison: Tree) -> bool:
    """Whether Welch's test and the exact relabelling test are both significant after Holm's correction."""
    return all(conclusions.is_significant(comparison["p_holm"][test]) for test in DECIDING)


def limits(results: Tree) -> str:
    """Returns a paragraph on the scope of the comparison."""
    sizes = [size["parameters"] for size in results["sizes"].values()]
    run = next(iter(next(iter(results["texts"].values()))["runs"].values()))[0]
    return (f"All results are for {min(sizes):,} to {max(sizes):,} parameters, trained on {run['tokens']:,} "
            f"bytes ({run['steps']:,} updates) of the texts named. Larger networks, other texts or longer "
            "training may rank the models differently. Intervals and p cover the variation between seeds on "
            "the same text, not between texts.")


def summary(results: Tree, text: str) -> list[list[str]]:
    """The table that the command prints at the end, for one text."""
    of_text = results["texts"][text]
    by_model = {row["model"]: row for row in differences(results, text)}
    delta = f"Δ vs {of_text['reference']}"
    table = [["model", "parameters", "bits/weight", "nats/byte", delta,
              *(f"p {TEST_NAMES[test]}" for test in TESTS)]]
    for row in rows(results, text):
        difference = by_model.get(row["model"])
        table.append([row["model"], row["parameters"], f"{row['bits per weight']:.2f}",
                      row["nats/byte"], "–" if difference is None else difference[delta],
                      *("–" if difference is None else format_p(difference[f"p Holm, {TEST_NAMES[test]}"])
                        for test in TESTS)])
    return table


def at_boundary(results: Tree) -> list[str]:
    """Returns the models, with their text, whose best learning rate is the lowest or highest tried."""
    rates = results["config"]["tuning"]["rates"]
    return [f"{name} on {text}" for text, by_model in results["tuning"].items()
            for name, tuned in by_model.items() if tuned["chosen"] in (min(rates), max(rates))]


# ---------------------------------------------------------------------------------------------


def _verdict(of_text: Tree, comparison: Tree, text: str) -> str:
    name, reference = comparison["model"], of_text["reference"]
    change = Interval.from_tree(comparison["difference"])
    lower = sum(difference < 0 for difference in comparison["differences"])
    return (f"**{name}** on {text}: {of_text['losses'][name]['mean']:.4f} nats/byte, {reference} "
            f"{of_text['losses'][reference]['mean']:.4f}; difference "
            f"{format_interval(change, 4, sign=True)}, lower in {lower} of "
            f"{len(comparison['differences'])} pairs. "
            + _conclusion(of_text, comparison, change.point < 0))


def _conclusion(of_text: Tree, comparison: Tree, lower: bool) -> str:
    """Returns one sentence: significant, not significant or inconclusive, with the tests and corrected p."""
    name, corrected = comparison["model"], comparison["p_holm"]
    tests = (f"Welch's p {_p(corrected['welch'])}, exact p {_p(corrected['unpaired'])} after Holm's "
             "correction")
    if is_significant(comparison):
        return (f"The difference is significant ({tests}): {name} has the "
                + ("lower loss." if lower else "higher loss."))
    seeds, tested = len(comparison["differences"]), len(of_text["comparisons"])
    min_p = comparison["min_p"]["unpaired"]
    if (corrected_min_p := min(1.0, min_p * tested)) >= ALPHA:
        correction = (f" ({corrected_min_p:.3f} after correction for {tested} comparisons)" if tested > 1
                      else "")
        return (f"The difference is inconclusive ({tests}): significance requires both tests below "
                f"{ALPHA:g}, and with {seeds} seeds the exact p cannot be below {min_p:.3f}{correction}.")
    return f"The difference is not significant ({tests}; significance requires both below {ALPHA:g})."


def _p(p: float | None) -> str:
    """Returns `= 0.023` or `< 0.001`."""
    text = format_p(p)
    return text if text.startswith("<") else f"= {text}"


def _text(report: Document, results: Tree, text: str) -> None:
    of_text, name = results["texts"][text], file_name(text)
    report.heading(text)
    report.paragraph(f"Trained on {results['bytes'][text]['train']:,} bytes. The loss is that after the last "
                     f"update, on all {results['bytes'][text]['valid']:,} bytes of the validation split.")
    report.table(rows(results, text))
    report.figure(f"losses-{name}", figures.dots(
        {model: losses["by_seed"] for model, losses in of_text["losses"].items()},
        unit="validation loss, nats/byte"), "Validation loss after the last update, one dot per run.")
    report.table(differences(results, text))
    report.figure(f"differences-{name}", figures.effects(
        {row["model"]: Interval.from_tree(row["paired_difference"])
         for row in of_text["comparisons"]}, unit="nats/byte"),
        f"Mean paired difference from {of_text['reference']}, with Student's 95 % interval over "
        f"{len(results['config']['seeds'])} pairs; below 0 the model has the lower loss.")
    report.table([{"seed": seed, **{row["model"]: f"{row['differences'][i]:+.4f}"
                                    for row in of_text["comparisons"]}}
                  for i, seed in enumerate(results["config"]["seeds"])])


def _learning_rates(report: Document, results: Tree) -> None:
    report.heading("Learning rates")
    if not results["tuning"]:
        report.paragraph("Each model uses the learning rate of its training configuration, without a "
                         "search.")
        return
    tuning = results["config"]["tuning"]
    report.paragraph(f"For each model and text, the same {len(tuning['rates'])} learning rates were tried in "
                     f"one run of full length each (seed {tuning['seed']}, which is not compared), and the "
                     "best was used. It was selected by the last loss on the validation split, which is also "
                     "the split that is compared.")
    report.table([{"text": text, "model": name,
                   **{f"nats/byte at {rate}": loss for rate, loss in tuned["losses"].items()},
                   "selected": f"{tuned['chosen']:g}"}
                  for text, by_model in results["tuning"].items() for name, tuned in by_model.items()])
    if boundary := at_boundary(results):
        report.paragraph("The best rate is the lowest or the highest that was tried, so a better one may lie "
                         f"beyond, for {', '.join(boundary)}.")


def _method(report: Document, results: Tree) -> None:
    seeds = results["config"]["seeds"]
    comparisons = next(iter(results["texts"].values()))["comparisons"]
    min_p, arrangements = comparisons[0]["min_p"], comparisons[0]["arrangements"]
    never = too_few_runs = ""
    if min_p["paired"] >= ALPHA:
        never = f", so never below {ALPHA:g}, however large the difference"
    if min_p["unpaired"] * len(comparisons) >= ALPHA:
        too_few_runs = " With so few runs no difference can be significant."
    report.heading("Statistical tests")
    report.points([
        f"{len(seeds)} runs of each model (seeds {', '.join(map(str, seeds))}). A seed sets the weights and "
        "the order of the training data: runs of the same seed see the same batches and form the pairs.",
        "The loss is that after the last update, not the lowest during training. The budget is equal, and "
        "the minimum over many evaluations is biased downwards, the more so the noisier a run is.",
        "Welch: interval and p assume that the runs are independent draws from two normal distributions. "
        "They ignore that runs of the same seed share their batches, which the paired test uses; this makes "
        "Welch's and the exact p too large, not too small.",
        f"exact: permutation test over all {arrangements['unpaired']:,} assignments of the runs to the two "
        f"models; p cannot be below {min_p['unpaired']:.4f}. exact, paired: over all "
        f"{arrangements['paired']:,} ways to swap the two runs of each seed; p cannot be below "
        f"{min_p['paired']:.4f}{never}.",
        f"Holm's correction covers all comparisons of one text ({len(comparisons)}), separately for each "
        "test. A difference is significant if Welch's and the exact p (unpaired, over all runs) are both "
        f"below {ALPHA:g} after correction.{too_few_runs}",
        "bits per weight: log₂ of the number of values of a quantised weight. bits per parameter: mean over "
        "all parameters, unquantised ones at 32 bits. seconds: mean duration of a run; other work on the "
        "machine may have slowed it.",
    ])
