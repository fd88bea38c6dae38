"""What a study of recall has found, in one report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.json_text import read_json
from tilelli_jax.signals.crystallisation import band

from .. import figures, metrics, selective
from ..conclusions import against_chance, format_interval, format_p, is_significant, too_few
from ..report import Report
from ..stages import RESULTS, read_result
from ..stats import Interval
from ..tables import as_json
from ..tables import write as write_tables
from . import verdicts as verdict_file
from .evaluate import WORDS
from .fit import SIDECAR
from .study import Study

SHOWN = (SIDECAR, "layer probe", "globals", "negative entropy", "words")  # in figures
Tree = Mapping[str, Any]


def collect(study: Study) -> dict[str, Any]:
    """Every stage's result, made if need be: what results.json holds."""
    made = {name: getattr(study, name) for name in ("signals", "answers", "build", "fitted", "verdict",
                                                    "evaluation")}
    rule = verdict_file.read(made["verdict"])
    return {"config": config_lib.to_dict(study.config), "fit": read_result(made["fitted"]),
            "stages": {name: path.name for name, path in made.items()}, "verdict": rule.to_dict(),
            "thresholds": rule.thresholds._asdict(), **read_result(made["evaluation"])}


def write(study: Study, name: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """Writes results.json, report.md, report.html, figures/ and methods.*; returns what was found.

    Args:
        how: what made it, for the last section.
    """
    found = json.loads(as_json(collect(study) | {"name": name}))  # as it will be read
    report = Report(f"{name}: does it know before it answers?")
    _opening(report, study, found)
    _examples(report, found)
    _methods(report, found)
    _calibration(report, found)
    _verdicts(report, found)
    _selective(report, found)
    _elsewhere(report, found)
    _depth(report, found, study.config.fit.strengths)
    report.finish(study.out, found, how)
    write_tables(study.out / "methods", rows(found), f"{name}: methods")
    return found


def rows(found: Tree) -> list[dict[str, Any]]:
    """The table of methods on the held-out questions, the best first."""
    against = {one["against"]: one for one in found["comparisons"]}
    order = sorted(found["methods"], key=lambda name: -found["methods"][name]["auroc"]["point"])
    return [{
        "method": name, "questions": found["methods"][name]["questions"],
        **{head: _interval(found["methods"][name][key]) for head, key in (
            ("AUROC", "auroc"), ("AUPRC", "auprc"), ("Brier", "brier"), ("ECE", "ece"))},
        "ECE by chance": found["methods"][name]["ece_of_calibrated"],
        "sidecar − it": _interval(against.get(name, {}).get("difference")),
        "p": against.get(name, {}).get("p_holm")} for name in order]


def of_datasets(found: Tree) -> list[dict[str, Any]]:
    """How much of each data set is known."""
    return [{"data set": name, "questions": about["questions"], "known": about["known"],
             "refused": about["refused"], "known of those answered": about["known_of_answered"]}
            for name, about in found["datasets"].items()]


def of_examples(found: Tree) -> list[dict[str, Any]]:
    """Some of the held-out questions, from the highest P(knows) to the lowest."""
    return [{"question": one["question"], "answer": one["answer"], "right": "yes" if one["right"] else "no",
             "P(knows)": one["p"], "verdict": one["verdict"] or "–"} for one in found["examples"]]


def of_words(found: Tree) -> list[dict[str, Any]]:
    """How often the kept sidecar says each word, and how often rightly."""
    return [{"word": word, "questions": found["verdicts"][word]["questions"],
             "share": found["verdicts"][word]["share"], "known": found["verdicts"][word]["known"],
             "precision": _interval(found["verdicts"][word]["precision"])} for word in WORDS]


def elsewhere(found: Tree) -> list[dict[str, Any]]:
    """Within one data set, and from one to another; nothing where there is but one."""
    return [*(_area_row(f"within {name}", one) for name, one in found["within"].items()),
            *(_area_row(name, one) for name, one in found["cross"].items())]


def differences(found: Tree) -> list[dict[str, Any]]:
    """The sidecar against the others there; p corrected within a row's where."""
    return [{"where": name, "sidecar −": one["against"], "questions": one["questions"],
             "AUROC": _interval(one["difference"]), "p": one["p_holm"]}
            for name, there in (*((f"within {name}", one) for name, one in found["within"].items()),
                                *found["cross"].items()) for one in there["comparisons"]]


def by_popularity(found: Tree) -> list[dict[str, Any]]:
    """From the rarest to the most popular; nothing where that is not known."""
    return [{"data set": name, "popularity": f"{one['from']:g} to {one['to']:g}",
             "questions": one["questions"], "known": one["known"],
             **{method: _interval(one.get("methods", {}).get(method, {}).get("auroc"))
                for method in SHOWN if method in found["methods"]}}
            for name, some in found["slices"].items() for one in some]


def verdicts(found: Tree) -> list[str]:
    """What the numbers say, and no more than that."""
    sidecar, groups = found["methods"][SIDECAR], found["groups"]
    area, runs = Interval.from_tree(sidecar["auroc"]), sidecar["runs"]
    seeds = (f"mean of {len(runs)} seeds, {min(runs):.3f} to {max(runs):.3f}" if len(runs) > 1 else
             "one seed")
    texts = [f"The sidecar tells known from unknown held-out questions with AUROC {format_interval(area)} ({seeds}): "
             f"{against_chance(area, groups)}.", *too_few(groups, "questions")]
    for one in found["comparisons"]:
        if one["against"] in ("negative entropy", "words", "layer probe", "globals"):
            change = Interval.from_tree(one["difference"])
            below = Interval.from_tree(found["methods"][one["against"]]["auroc"]).high < 0.5
            texts.append(f"Against {_of(one['against'])}: {format_interval(change, sign=True)}, corrected p "
                         f"{format_p(one['p_holm'])}: " + (
                             "no difference that is sure." if not is_significant(one["p_holm"], groups) else
                             "the sidecar is better." if change.point > 0 else "the sidecar is worse.")
                         + (" (That one is worse than chance itself.)" if below else ""))
    texts.append(f"Its probabilities err by {format_interval(Interval.from_tree(sidecar['ece']))} (ECE, 10 bins); "
                 f"chance alone would make {sidecar['ece_of_calibrated']:.3f} of true ones.")
    for name, there in found["cross"].items():
        if SIDECAR not in there["methods"]:
            texts.append(f"Learned from one data set alone, {name}: {there['questions']} questions that "
                         "share no group with it, too few of a kind to tell.")
            continue
        of = there["methods"][SIDECAR]
        area = Interval.from_tree(of["auroc"])
        texts.append(f"Learned from one data set alone, {name}: AUROC {format_interval(area)} on {there['questions']} "
                     f"questions in {there['groups']} groups, ECE {of['ece']['point']:.3f}: "
                     f"{against_chance(area, there['groups'])}.")
    for name, why in found["fit"].get("left_out", {}).items():
        texts.append(f"Nothing was learned from {name} alone: {why}.")
    return texts


# ---------------------------------------------------------------------------------------------


def _opening(report: Report, study: Study, found: Tree) -> None:
    parts = found["parts"]
    report.paragraph(
        f"{found['questions']} questions, of which the network answers {found['known_all']:.1%} rightly and "
        f"{found['refused']:.1%} not at all. Learned from {parts['train']}, chosen by {parts['validate']}, "
        f"calibrated on {_calibrated(found)}; {found['test']} in {found['groups']} groups held out "
        f"({found['known']:.1%} known). Nothing is generated to predict: one pass of the prompt. Intervals "
        "are of 95 % and resample whole groups; a method of several seeds is told by their mean.")
    report.points(verdicts(found))
    report.table(of_datasets(found))


def _examples(report: Report, found: Tree) -> None:
    report.heading("Some of the questions")
    report.paragraph("Held-out questions, evenly spaced from the highest P(knows) to the lowest. P(knows) is "
                     "from one pass of the question, before the answer.")
    report.table(of_examples(found))


def _calibrated(found: Tree) -> str:
    part = found["fit"]["calibrated_on"]
    return (f"{found['parts'][part]} questions of their own" if part == "calibrate" else
            f"the {found['parts'][part]} questions that choices looked at")


def _methods(report: Report, found: Tree) -> None:
    report.heading("What predicts that it knows?")
    intervals = {row["method"]: row["AUROC"] for row in rows(found)}
    report.figure("methods", figures.ladder(intervals), "AUROC on the held-out questions. " + LEGEND)
    report.table(rows(found))
    chosen = {name: about for name, about in found["fit"]["methods"].items() if "C" in about}
    report.table([{"method": name, "layer": about.get("layer"), "C": about["C"],
                   "AUROC on validate": about["validation"]} for name, about in chosen.items()])


LEGEND = ("sidecar: a GRU over the layers on what the logit lens and the writes say. layer probe: the stream "
          "at the last position, at the layer that is best on validate. globals, entropies: ten numbers of "
          "the prompt, three entropies a layer. words, length, dataset, popularity: controls that no network "
          "is asked for.")


def _calibration(report: Report, found: Tree) -> None:
    report.heading("Can the probability be believed?")
    curves = {name: metrics.Reliability(np.asarray(c["confidence"]), np.asarray(c["accuracy"]),
                                        np.asarray(c["counts"]))
              for name in SHOWN if (c := found["reliability"].get(name))}
    report.figure("reliability", figures.reliability(curves), "Observed frequency over mean predicted "
                  "probability, on the held-out questions; probabilities by "
                  f"{found['config']['fit']['calibrate']} on "
                  f"{_calibrated(found)}. Of the sidecar, the run that was kept.")


def _verdicts(report: Report, found: Tree) -> None:
    report.heading("Verdicts")
    aim, at = found["config"]["verdict"], found["thresholds"]
    promised = (f"is promised for new questions of the same kind with {aim['confidence']:.0%} confidence"
                if aim["guarantee"] else "was reached on the questions to calibrate on: no promise")
    fitted, silent = found["fit"], [word for name, word in (("green", WORDS[0]), ("red", WORDS[2]))
                                    if at[name] is None]
    if len(silent) == 2:
        report.paragraph(f"No word is said: with {_calibrated(found)}, one of each group heard, a precision "
                         f"of {aim['precision']:.0%} cannot be promised with {aim['confidence']:.0%} "
                         "confidence." if aim["guarantee"] else "No word is said: no threshold reaches a "
                         f"precision of {aim['precision']:.0%} on {_calibrated(found)}.")
        return
    report.paragraph(f"The kept sidecar (seed {fitted['seeds'][fitted['run']]}) says one of three words: "
                     + ", ".join(f"{word} P(knows) {at[name]:.3f}" for name, word in (
                         ("green", "the first from"), ("red", "the last below")) if at[name] is not None)
                     + f". A precision of {aim['precision']:.0%} {promised}." + (
                         f" None does that for '{silent[0]}', which is never said." if silent else ""))
    report.table(of_words(found))


def _selective(report: Report, found: Tree) -> None:
    report.heading("Answering only what it seems to know")
    risk = found["risk"]
    curves = {name: selective.RiskCoverage(
        np.asarray(risk["coverages"]), np.asarray(one["risks"]), np.asarray(one["low"]),
        np.asarray(one["high"]), Interval.from_tree(one["aurc"]),
        Interval.from_tree(one["fraction_of_oracle"]))
        for name in SHOWN if (one := risk["methods"].get(name))}
    report.figure("risk-coverage", figures.risk_coverage(
        curves, risk["oracle"], risk["mean_error"], unit="share of wrong answers"),
        "Share of wrong answers among the questions answered, those first that a method takes for known.")
    report.table([{"method": name, "AURC": _interval(one["aurc"]),
                   "of the oracle's gain": _interval(one["fraction_of_oracle"])}
                  for name, one in risk["methods"].items()])


def _elsewhere(report: Report, found: Tree) -> None:
    if found["within"] or found["cross"]:
        report.heading("Within one data set, and from one to another")
        report.paragraph("Within: learned from all, held-out questions of one data set, so that telling the "
                         "data sets apart is no help. From one to another: learned, chosen and calibrated on "
                         "one alone, compared with all of the other.")
        report.table(elsewhere(found))
        report.table(differences(found))
    if found["not_refused"]:
        report.heading("Without refusals")
        report.paragraph("An answer that asks for more, or declines, is not right; to predict it is easier "
                         "than to predict an error. The held-out questions that were answered:")
        report.table([_area_row("answered", found["not_refused"])])
    if any(found["slices"].values()):
        report.heading("From the rarest to the most popular")
        report.table(by_popularity(found))


def _depth(report: Report, found: Tree, strengths: Sequence[float]) -> None:
    report.heading("Where in the depth?")
    entropy = found["by_depth"]
    low, high = band(len(entropy["known"]))
    report.figure("entropy", figures.by_depth(entropy, (low, high), unit="entropy of the next token, nats"),
                  "What the logit lens says at the last position of the prompt, layer by layer: mean entropy "
                  f"over the held-out questions. Shaded: layers {low} to {high}, where writes are told of.")
    if probe := found["fit"]["methods"].get("layer probe"):
        report.figure("layer-probe", figures.by_depth({"layer probe": probe["by_layer"]},
                                                      unit="AUROC on validate", line=0.5),
                      f"Logistic probes of the stream at each layer, the best of C in {list(strengths)}.")


def _area_row(name: str, one: Tree) -> dict[str, Any]:
    return {"where": name, "questions": one["questions"], "known": one["known"],
            **{method: _interval(of["auroc"]) for method, of in one["methods"].items()
               if method in (*SHOWN, "length", "popularity")},
            "ECE, sidecar": _interval(one["methods"].get(SIDECAR, {}).get("ece"))}


def _of(method: str) -> str:
    return {"words": "the words of the question alone", "layer probe": "the best layer's probe",
            "globals": "ten numbers of the prompt", "negative entropy": "negative entropy"}[method]


def _interval(tree: Tree | None) -> Interval | None:
    return None if tree is None else Interval.from_tree(tree)


def summary(found: Tree) -> list[list[str]]:
    """The closing table of the terminal."""
    return [["method", "AUROC", "ECE", "sidecar − it", "p"], *([
        row["method"], format_interval(row["AUROC"]), f"{row['ECE'].point:.3f}",
        "–" if row["sidecar − it"] is None else format_interval(row["sidecar − it"]),
        "–" if row["p"] is None else format_p(row["p"])] for row in rows(found))]


def read_results(path: Path) -> dict[str, Any]:
    """What a study has left in its directory. Raises InputError where it cannot be read."""
    return read_json(path / RESULTS)
