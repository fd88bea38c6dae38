"""What a comparison has found, in one report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from tilelli_jax import config as config_lib

from .. import conclusions, figures
from ..conclusions import ALPHA, format_interval, format_p
from ..report import Report
from ..stages import read_result
from ..stats import Interval
from ..tables import as_json
from ..tables import write as write_tables
from .compare import TESTS
from .config import file_name
from .study import Study

Tree = Mapping[str, Any]
CALLED = {"welch": "Welch", "unpaired": "exact", "paired": "exact, paired"}
DECIDING = ("welch", "unpaired")  # of five pairs the paired p cannot come below 0.0625


def collect(study: Study) -> dict[str, Any]:
    """Every stage's result, made if need be: what results.json holds."""
    made = study.evaluation
    return {
        "config": config_lib.to_dict(study.config), "stage": made.name,
        "sizes": {name: size._asdict() for name, size in study.sizes.items()},
        "bytes": {text: {"train": len(corpus.train), "valid": len(corpus.valid)}
                  for text, corpus in study.corpora.items()},
        "tuning": {text: {name: read_result(path) for name, path in found.items()}
                   for text, found in study.rates.items()},
        **read_result(made)}


def write(study: Study, name: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """Writes results.json, report.md, report.html, figures/, models.* and differences.*; returns
    what was found.

    Args:
        how: what made it, for the last section.
    """
    found = json.loads(as_json(collect(study) | {"name": name}))  # as it will be read
    report = Report(f"{name}: which network learns more, of one size and budget?")
    report.points(verdicts(found))
    report.paragraph(limits(found))
    for text in found["texts"]:
        _text(report, found, text)
    _learning_rates(report, found)
    _method(report, found)
    report.finish(study.out, found, how)
    for table, of_text in (("models", rows), ("differences", differences)):
        write_tables(study.out / table, [{"text": text, **row} for text in found["texts"]
                                         for row in of_text(found, text)], f"{name}: {table}")
    return found


def rows(found: Tree, text: str) -> list[dict[str, Any]]:
    """What each model is and came to on one text, the reference first."""
    there, made = found["texts"][text], []
    for name, losses in there["losses"].items():
        size, runs = found["sizes"][name], there["runs"][name]
        made.append({
            "model": name, "parameters": f"{size['parameters']:,}",
            "bits per weight": size["bits_per_weight"], "per parameter": size["bits_per_parameter"],
            "nats/byte": f"{losses['mean']:.4f} ± {losses['sd']:.4f}",
            "each seed": ", ".join(f"{loss:.4f}" for loss in losses["each"]),
            "tokens": f"{runs[0]['tokens']:,}",
            "seconds": f"{statistics.mean(run['seconds'] for run in runs):.0f}"})
    return made


def differences(found: Tree, text: str) -> list[dict[str, Any]]:
    """What sets the others apart from the reference on one text; nats/byte, below 0 they are better."""
    there = found["texts"][text]
    return [{
        "model": one["model"],
        f"less {there['reference']}": format_interval(Interval.from_tree(one["difference"]), 4, sign=True),
        "paired": format_interval(Interval.from_tree(one["paired_difference"]), 4, sign=True),
        **{f"p, {CALLED[test]}": one["p"][test] for test in TESTS},
        **{f"Holm, {CALLED[test]}": one["p_holm"][test] for test in TESTS}}
        for one in there["comparisons"]]


def verdicts(found: Tree) -> list[str]:
    """What the numbers say, and no more than that."""
    return [_verdict(there, one, text) for text, there in found["texts"].items()
            for one in there["comparisons"]]


def is_significant(one: Tree) -> bool:
    """Whether a difference may be called one: by Welch's test and by relabelling, both corrected."""
    return all(conclusions.is_significant(one["p_holm"][test]) for test in DECIDING)


def limits(found: Tree) -> str:
    """What none of it says."""
    sizes = [size["parameters"] for size in found["sizes"].values()]
    run = next(iter(next(iter(found["texts"].values()))["runs"].values()))[0]
    return (f"All of this is at {min(sizes):,} to {max(sizes):,} parameters, after {run['tokens']:,} "
            f"bytes of learning ({run['steps']:,} updates), on the texts named: it says nothing of "
            "larger networks, of other texts, or of longer training, where the order may be another. "
            "Intervals and p are for other seeds on the same text; another text would differ, too.")


def summary(found: Tree, text: str) -> list[list[str]]:
    """The closing table of the terminal, of one text."""
    there = found["texts"][text]
    apart = {row["model"]: row for row in differences(found, text)}
    less = f"less {there['reference']}"
    made = [["model", "parameters", "bits/weight", "nats/byte", less,
             *(f"p {CALLED[test]}" for test in TESTS)]]
    for row in rows(found, text):
        one = apart.get(row["model"])
        made.append([row["model"], row["parameters"], f"{row['bits per weight']:.2f}",
                     row["nats/byte"], "–" if one is None else one[less],
                     *("–" if one is None else format_p(one[f"Holm, {CALLED[test]}"])
                       for test in TESTS)])
    return made


def at_an_end(found: Tree) -> list[str]:
    """Models, with their text, whose best learning rate may lie outside those that were tried."""
    rates = found["config"]["tuning"]["rates"]
    return [f"{name} on {text}" for text, tuned in found["tuning"].items()
            for name, one in tuned.items() if one["chosen"] in (min(rates), max(rates))]


# ---------------------------------------------------------------------------------------------


def _verdict(there: Tree, one: Tree, text: str) -> str:
    name, reference = one["model"], there["reference"]
    change = Interval.from_tree(one["difference"])
    below = sum(difference < 0 for difference in one["differences"])
    ps = "; ".join(f"{CALLED[test]} {format_p(one['p_holm'][test])}" for test in TESTS)
    return (f"**{name}** on {text}: {there['losses'][name]['mean']:.4f} nats/byte, {reference} "
            f"{there['losses'][reference]['mean']:.4f}; difference {format_interval(change, 4, sign=True)}, lower "
            f"in {below} of {len(one['differences'])} pairs; corrected p: {ps}. " + (
                "No difference that is sure." if not is_significant(one) else
                f"{name} has learned more." if change.point < 0 else f"{name} has learned less."))


def _text(report: Report, found: Tree, text: str) -> None:
    there, name = found["texts"][text], file_name(text)
    report.heading(text)
    report.paragraph(f"{found['bytes'][text]['train']:,} bytes to learn from; the loss is that after "
                     f"the last update, on all {found['bytes'][text]['valid']:,} bytes of the "
                     "validation part.")
    report.table(rows(found, text))
    report.figure(f"losses-{name}", figures.dots(
        {model: losses["each"] for model, losses in there["losses"].items()},
        unit="validation loss, nats/byte"), "Every run's last validation loss.")
    report.table(differences(found, text))
    report.figure(f"differences-{name}", figures.effects(
        {one["model"]: Interval.from_tree(one["paired_difference"])
         for one in there["comparisons"]}, unit="nats/byte"),
        f"Mean paired difference to {there['reference']}, with Student's interval over the "
        f"{len(found['config']['seeds'])} pairs; below 0 the model has the lower loss.")
    report.table([{"seed": seed, **{one["model"]: f"{one['differences'][i]:+.4f}"
                                    for one in there["comparisons"]}}
                  for i, seed in enumerate(found["config"]["seeds"])])


def _learning_rates(report: Report, found: Tree) -> None:
    report.heading("Learning rates")
    if not found["tuning"]:
        report.paragraph("Each is as its training configuration has it; none was looked for here.")
        return
    tuning = found["config"]["tuning"]
    report.paragraph(f"Each model was tried on each text with the same {len(tuning['rates'])} rates, "
                     f"by a run of full length each (seed {tuning['seed']}, none of those compared), and "
                     "learned with the best: as much looking for one as for another. It was chosen by "
                     "the last loss on the validation part, which is also what is compared.")
    report.table([{"text": text, "model": name,
                   **{f"at {rate}": loss for rate, loss in one["losses"].items()},
                   "chosen": f"{one['chosen']:g}"}
                  for text, tuned in found["tuning"].items() for name, one in tuned.items()])
    if at_the_end := at_an_end(found):
        report.paragraph("The best is the lowest or the highest that was tried, so that there may be a "
                         f"better one beyond, for {', '.join(at_the_end)}.")


def _method(report: Report, found: Tree) -> None:
    seeds = found["config"]["seeds"]
    comparisons = next(iter(found["texts"].values()))["comparisons"]
    least, ways = comparisons[0]["least"], comparisons[0]["arrangements"]
    never = too_few = ""
    if least["paired"] >= ALPHA:
        never = f", and so never below {ALPHA:g}, however large the difference"
    if least["unpaired"] * len(comparisons) >= ALPHA:
        too_few = " With so few runs none can be."
    report.heading("How it is compared")
    report.points([
        f"{len(seeds)} runs of each model (seeds {', '.join(map(str, seeds))}). A seed is that of "
        "the weights and of the order of the text: runs of one seed see the same batches, which makes "
        "the pairs.",
        "The loss is that after the last update, not the lowest on the way: the budget is what is "
        "alike, and the lowest of many looks at the validation part is too low, the more so the "
        "noisier a run is.",
        "Welch: interval and p take the runs for independent draws of two normal distributions. That "
        "runs of one seed share their batches is left to the paired test: what it makes alike in them "
        "makes Welch's and the exact p too large, not too small.",
        f"exact: all {ways['unpaired']:,} ways to tell which runs are whose; p cannot be below "
        f"{least['unpaired']:.4f}. exact, paired: all {ways['paired']:,} ways to exchange the two runs "
        f"of a seed; p cannot be below {least['paired']:.4f}{never}.",
        f"Holm's correction is for the {len(comparisons)} comparisons of one text, test by test. A "
        "difference is called one where Welch's and the exact p, of all runs, are both below "
        f"{ALPHA:g} after it.{too_few}",
        "bits per weight: log₂ of the values that a quantised weight can have; per parameter: the mean "
        "over all, those not quantised at 32. seconds: of a run, mean, whatever else was running.",
    ])
