"""What a study has found, in one report; and its line in the table of all studies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.json_text import as_expected

from .. import cascade, conclusions, figures, metrics, selective
from ..conclusions import FEW
from ..report import Report
from ..stages import RESULTS, read_result
from ..stats import Interval
from ..tables import as_json, read_columns
from ..tables import write as write_tables
from .config import SeriesConfig, StudyConfig
from .measures import rung_names
from .study import Study, read_results

LEGEND = ("P: the published rungs. C: controls: the answer's length and the surprise at the prompt, without "
          "and with activations beside them.")


def collect(study: Study) -> dict[str, Any]:
    """Every stage's result, made if need be: what results.json holds."""
    found: dict[str, Any] = {"config": config_lib.to_dict(study.config), "unit": study.subject.unit,
                             "layers": {}}
    for number, layer in study.layers.items():
        judged = layer.judged
        told: dict[str, Any] = {"stages": {}}
        if judged is not None:
            told["sae"] = {name: getattr(judged, name)
                           for name in ("steps", "explained", "probed", "untrained", "dead", "l0", "rows")}
            told["sae"] |= {**judged.losses._asdict(), "recovered": judged.losses.recovered}
            told["sae"]["faults"] = layer.faults(judged)
        for name in ("probe", "selective", "calibrate", "cascade", "causal"):
            path = getattr(layer, name)
            if path is not None:
                told[name], told["stages"][name] = read_result(path), path.name
        found["layers"][str(number)] = told
    return found


def write(study: Study, name: str, how: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Writes results.json, report.md, report.html, figures/ and synthesis.*; returns the rows of the latter.

    Args:
        how: what made it, for the last section.
    """
    found = json.loads(as_json(collect(study)))  # as it will be read
    found["name"] = name
    rows = [*lines(found), *others(study.config)]
    report = Report(f"{name}: what predicts difficulty?")
    _opening(report, study, found)
    for layer, told in found["layers"].items():
        if len(found["layers"]) > 1:
            report.heading(f"Layer {layer}")
        _layer(report, study, int(layer), told, found["unit"])
    report.heading("All studies")
    report.paragraph("The difference of latents and raw values is P3 − P2, with p of a paired test, "
                     "corrected for the comparisons of its study. Causal: chosen latents that change the "
                     "loss for sure, and more than all of their controls do. Selective: of the rung that "
                     "cross-validation prefers, the share of the oracle's gain. Cascade − coin: with a "
                     "quarter of the items handed on by that rung, its error less that of a coin of the same "
                     "cost.")
    report.table(rows)
    report.finish(study.out, found, how)
    write_tables(study.out / "synthesis", rows, "All studies")
    return rows


def lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A study's rows in the table of all: one for each layer."""
    rows = []
    for layer, told in found["layers"].items():
        probe, best = told["probe"], preferred(told["probe"])
        rungs = {name: _interval(rung["auroc"]) for name, rung in probe["rungs"].items()}
        row: dict[str, Any] = {
            "study": found["name"], "layer": int(layer), "test items": probe["test"], "hard": probe["hard"],
            **{short: rungs.get(name) for short, name in (
                ("P1 cheap", "P1_cheap"), ("P2 + raw", "P2_cheap_raw"), ("P3 + latents", "P3_cheap_sae"),
                ("C1 length", "C1_length"))}}
        headline: Mapping[str, Any] = next(
            (c for c in probe["comparisons"] if (c["a"], c["b"]) == ("P3_cheap_sae", "P2_cheap_raw")), {})
        row["latents − raw"] = _interval(headline.get("difference"))
        row["p"] = headline.get("p_holm")
        for where in ("all", "boundary"):
            effects = told.get("causal", {}).get("positions", {}).get(where)
            row[f"causal, {where}"] = None if effects is None else (
                f"{0 if probe['groups'] < FEW else sum(e['beyond'] for e in effects['chosen'].values())} of "
                f"{len(effects['chosen'])}")
        row["selective"] = _interval(told["selective"]["rungs"][best]["fraction_of_oracle"])
        handed = told.get("cascade", {"rungs": {}})["rungs"].get(best, {})
        row["cascade − coin"] = _interval(handed.get("0.25"))
        if told.get("sae", {}).get("faults"):
            row["study"] += " (autoencoder forced)"
        rows.append(row)
    return rows


def others(config: StudyConfig) -> list[dict[str, Any]]:
    """The rows of other studies, which the configuration names.

    Raises:
        InputError: one has no results, or they are none of a study of difficulty.
    """
    rows = []
    for path in map(Path, config.also):
        found = read_results(path)
        with as_expected(path / RESULTS):
            rows += [_checked(row) for row in lines(found)]
    return rows


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError or OverflowError where a cell is not of its column's kind: no table takes both."""
    for name, value in row.items():
        is_text = name == "study" or name.startswith("causal")
        for cell in [value.point, value.low, value.high] if isinstance(value, Interval) else [value]:
            if not isinstance(cell, str | None if is_text else float | int | None):
                raise ValueError(f"{name}: expected {'text' if is_text else 'a number'}, found {cell!r:.40}")
            if not is_text:
                float(cell or 0)
    return row


def preferred(probe: Mapping[str, Any]) -> str:
    """The rung of the highest cross-validated AUROC that is no control: chosen without the test rows."""
    rungs = {name: rung["cross_validated"] for name, rung in probe["rungs"].items() if name.startswith("P")}
    return max(rungs, key=lambda name: rungs[name])


# ---------------------------------------------------------------------------------------------


def _opening(report: Report, study: Study, found: Mapping[str, Any]) -> None:
    config, unit = study.config, found["unit"]
    first = next(iter(found["layers"].values()))["probe"]
    hard = ("where the network prefers a wrong ending" if config.data.family == "hellaswag" else
            f"with at least the {unit} of the {config.labels.quantile:.0%} quantile of the "
            + ("items to learn from" if config.labels.of == "train" else "items, test ones among them"))
    report.paragraph(
        f"Of {len(study.subject)} items of `{config.data.family}` ({config.data.source}), {first['train']} "
        f"to learn from and {first['test']} held out in {first['groups']} groups ({first['purged']} left "
        f"out), an item counts as hard {hard}: {first['hard_train']:.1%} of those to learn from, "
        f"{first['hard']:.1%} of those held out. Intervals are of 95 % and resample whole groups; C "
        f"was chosen over {first['folds']} folds.")
    for layer, told in found["layers"].items():
        report.points([f"**Layer {layer}.** {text}" for text in verdicts(told)])
    if first["constant"]:
        report.paragraph("Left out, as they say the same of every item to learn from: " + ", ".join(
            f"`{block}.{name}`" for block, names in first["constant"].items() for name in names) + ".")


def verdicts(told: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and no more than that."""
    probe, best = told["probe"], preferred(told["probe"])
    rungs = {name: _interval(rung["auroc"]) for name, rung in probe["rungs"].items()}
    area = rungs[best]
    assert area is not None
    few = probe["groups"] < FEW
    said = [f"`{best}`, which cross-validation prefers among P1 to P5, has AUROC {conclusions.format_interval(area)}: "
            f"{conclusions.against_chance(area, probe['groups'])}."]
    controls = [f"`{name}` {conclusions.format_interval(found)}" for name in ("C1_length", "C2_cheap_surprise")
                if (found := rungs.get(name)) is not None]
    if controls:
        said.append(f"What needs no activations comes to: {', '.join(controls)}.")
    said += conclusions.too_few(probe["groups"])
    names = {("P3_cheap_sae", "P2_cheap_raw"): "Latents in place of raw values",
             ("P2_cheap_raw", "P1_cheap"): "Raw values beside cheap features",
             ("P4_raw_only", "C1_length"): "Raw values in place of the answer's length",
             ("C3_length_raw", "C1_length"): "Raw values beside the answer's length",
             ("C5_surprise_raw", "C2_cheap_surprise"): "Raw values beside the prompt's surprise"}
    for comparison in probe["comparisons"]:
        name = names.get((comparison["a"], comparison["b"]))
        change, p = _interval(comparison["difference"]), comparison["p_holm"]
        if name is None or change is None or p is None:
            continue
        gain = "a gain" if change.point > 0 else "a loss"
        verdict = gain if conclusions.is_significant(p, probe["groups"]) else "no difference that is sure"
        said.append(f"{name}: {conclusions.format_interval(change, sign=True)}, corrected p {conclusions.format_p(p)}: "
                    f"{verdict}.")
    if causal := told.get("causal"):
        for where, effects in causal["positions"].items():
            chosen = effects["chosen"].values()
            sure, beyond = (0 if few else sum(e[key] for e in chosen) for key in ("sure", "beyond"))
            if not chosen:
                said.append("The probe on latents uses none: nothing is left out.")
                break
            said.append(f"Patched at {where}: leaving out {sure} of {len(chosen)} chosen latents changes the "
                        f"loss for sure; {beyond} of them change it more than all of their controls do.")
    gained = Interval.from_tree(told["selective"]["rungs"][best]["fraction_of_oracle"])
    said.append(f"Answering what `{best}` takes for easy has {conclusions.format_interval(gained)} of what an oracle "
                "gains.")
    if "cascade" in told:
        handed = Interval.from_tree(told["cascade"]["rungs"][best]["0.25"])
        said.append(f"Handing a quarter of the items on by `{best}` errs {conclusions.format_interval(handed)} against "
                    "random routing at equal cost: " + ("not told apart." if few or not handed.excludes_zero else
                                "better." if handed.high < 0 else "worse."))
    for fault in told.get("sae", {}).get("faults", []):
        said.append(f"**The autoencoder should not have been used: {fault}.** `sae.force` was set.")
    return said


def _layer(report: Report, study: Study, layer: int, told: Mapping[str, Any], unit: str) -> None:
    if sae := told.get("sae"):
        report.heading("The autoencoder", 3)
        seen = ("whether it has learned from them is not known" if study.config.sae.path else
                "none that it has learned from")
        report.paragraph(f"On held-out items, {seen}. Variance explained at all positions, where it is "
                         "probed, and by random weights of its shape. Loss recovered: how far the network "
                         "gets with the reconstruction of all of the prompt, from zeros there (0) to what it "
                         "is (1).")
        report.table([{"updates": sae["steps"], "rows": sae["rows"],
                       "variance explained": sae["explained"], "where probed": sae["probed"],
                       "random weights": sae["untrained"], "L0": sae["l0"], "never active": sae["dead"],
                       f"loss, {unit}": sae["natural"], "reconstructed": sae["reconstructed"],
                       "zeros": sae["zeroed"], "loss recovered": sae["recovered"]}])
    _ladder(report, layer, told["probe"])
    scores = read_columns(study.layers[layer].probe / "scores.parquet")
    best = preferred(told["probe"])
    _selective(report, layer, told["selective"], scores, unit, best)
    _calibration(report, layer, told["calibrate"], study, best)
    if "cascade" in told:
        _cascade(report, layer, told["cascade"], scores, study, unit, best)
    if "causal" in told:
        _causal(report, study.config, layer, told["causal"])


def _ladder(report: Report, layer: int, probe: Mapping[str, Any]) -> None:
    report.heading("Ladder", 3)
    rungs = {name: _interval(rung["auroc"]) for name, rung in probe["rungs"].items()}
    report.figure(f"ladder-{layer}", figures.ladder({n: i for n, i in rungs.items() if i is not None}),
                  f"AUROC of each rung on {probe['test']} held-out items. {LEGEND} Intervals are of one "
                  "rung or difference each; p is corrected for all of them.")
    domains = list(dict.fromkeys(d for rung in probe["rungs"].values() for d in rung["domains"]))
    report.table([{"rung": name, "AUROC": rungs[name], "AUPRC": rung["auprc"], "C": rung["C"],
                   "cross-validated": rung["cross_validated"],
                   **({"says": "the same of every item"} if rung["constant"] else {}),
                   **{f"in {domain}": rung["domains"].get(domain) for domain in domains if len(domains) > 1}}
                  for name, rung in probe["rungs"].items()])
    report.table([{"difference": f"{c['a']} − {c['b']}", "AUROC": _interval(c["difference"]), "p": c["p"],
                   "corrected p": c["p_holm"], "DeLong, items alone": c["delong"]}
                  for c in probe["comparisons"]])


def _selective(report: Report, layer: int, told: Mapping[str, Any], scores: Mapping[str, np.ndarray],
               unit: str, best: str) -> None:
    report.heading("Answering only what seems easy", 3)
    curves = {name: selective.RiskCoverage(
        np.asarray(told["coverages"]), np.asarray(rung["risks"]), np.asarray(rung["low"]),
        np.asarray(rung["high"]), Interval.from_tree(rung["aurc"]),
        Interval.from_tree(rung["fraction_of_oracle"]))
        for name, rung in told["rungs"].items()}
    what = _error(scores, unit)
    shown = {name: curve for name, curve in curves.items() if name.startswith("P")}
    report.figure(f"risk-coverage-{layer}",
                  figures.risk_coverage(shown, told["oracle"], told["mean_error"], unit=what),
                  f"{what.capitalize()} of the items answered, those first that a rung takes for easy.")
    half = list(told["coverages"]).index(0.5)
    report.table([{"rung": name, "AURC": curve.aurc, "of the oracle's gain": curve.fraction_of_oracle,
                   f"{what} at half": float(curve.risks[half]), "at all": told["mean_error"]}
                  for name, curve in curves.items()])


def _calibration(report: Report, layer: int, told: Mapping[str, Any], study: Study, best: str) -> None:
    report.heading("Can the probability be believed?", 3)
    table = read_columns(study.layers[layer].calibrate / "probabilities.parquet")
    kinds = list(told["rungs"][best])
    report.figure(f"reliability-{layer}", figures.reliability(
        {kind: metrics.reliability(table["hard"], table[f"{best}.{kind}"]) for kind in kinds}),
        f"`{best}` as it is (trained with balanced classes) and recalibrated out of "
        "fold. A temperature cannot undo the shift that balancing makes where one class is rarer.")
    report.table([{"rung": name, "kind": kind, "ECE": v["ece"], "Brier": v["brier"],
                   "log loss, nats": v["log_loss"], "AUROC": v["auroc"]}
                  for name, kinds in told["rungs"].items() for kind, v in kinds.items()])


def _cascade(report: Report, layer: int, told: Mapping[str, Any], scores: Mapping[str, np.ndarray],
             study: Study, unit: str, best: str) -> None:
    report.heading("Handing hard items on", 3)
    path = study.layers[layer].cascade
    assert path is not None
    errors, options = read_columns(path / "errors.parquet"), study.config.cascade
    what = _error(scores, unit)
    costs = cascade.Costs(options.small, options.large, options.pay_both)
    names = [name for name in rung_names(scores) if name.startswith("P")]
    report.figure(f"pareto-{layer}", figures.pareto(
        {name: cascade.frontier(errors["small"], errors["large"], scores[name], costs) for name in names},
        cascade.oracle_frontier(errors["small"], errors["large"], costs),
        (told["always_small"], told["always_large"]), costs, unit=what),
        f"The larger model costs {options.large:g} where the cheap one costs {options.small:g}"
        + (", and an item handed on costs both." if options.pay_both else "."))
    report.paragraph(f"The larger model is better on {told['large_better']:.1%} of the held-out items: "
                     f"{told['always_large']:.3f} against {told['always_small']:.3f} on average.")
    report.paragraph("With a share of the items handed on that was said beforehand, the error less that of a "
                     "coin of the same cost, which pays for the model that it picks alone (below 0: better "
                     "than the coin).")
    report.table([{"rung": name, **{f"{float(share):.0%} handed on": _interval(gain)
                                    for share, gain in rung.items()}}
                  for name, rung in told["rungs"].items()])


def _causal(report: Report, config: StudyConfig, layer: int, told: Mapping[str, Any]) -> None:
    report.heading("Do the latents cause it?", 3)
    drawn = ""
    if isinstance(config.data, SeriesConfig):
        drawn = (f" Each loss is of {config.causal.samples} futures of "
                 f"{min(config.causal.horizon, config.data.horizon)} values, drawn with the same random "
                 "numbers; the boundary is the end token's position.")
    report.paragraph(f"What leaving one latent out of the reconstruction does to the loss of {told['items']} "
                     f"held-out items, in {told['unit']}; controls are latents drawn at random among those "
                     f"as often active.{drawn}")
    for where, effects in told["positions"].items():
        if not effects["chosen"]:
            report.paragraph("The probe on latents uses none of them.")
            continue
        bars = {f"latent {name}": Interval.from_tree(e["change"]) for name, e in effects["chosen"].items()}
        bars |= {f"control {name}": Interval.from_tree(e["change"])
                 for name, e in list(effects["controls"].items())[:5]}
        report.figure(f"causal-{layer}-{where}", figures.effects(bars, unit=told["unit"]),
                      f"Patched: {where}. Intervals of one latent each, not corrected; the first five "
                      f"controls. The reconstruction alone: "
                      f"{conclusions.format_interval(Interval.from_tree(effects['reconstruction']), 4)}.")
        report.table([{"patched": where, "latent": name, "change": _interval(e["change"]), "p": e["p"],
                       "corrected p": e["p_holm"], "items changed": e["items_changed"],
                       "controls as large": f"{e['as_large']} of {e['controls']}"}
                      for name, e in effects["chosen"].items()])


def _error(scores: Mapping[str, np.ndarray], unit: str) -> str:
    """What an error is called."""
    return "share of wrong answers" if np.isin(scores["error"], (0, 1)).all() else f"mean {unit}"


def _interval(tree: Mapping[str, Any] | None) -> Interval | None:
    return None if tree is None else Interval.from_tree(tree)


def summary(rows: Sequence[Mapping[str, Any]], config: StudyConfig) -> list[list[str]]:
    """The closing table of the terminal."""
    head = ["layer", "P1 cheap", "P2 + raw", "P3 + latents", "latents − raw"]
    own = rows[:len(config.extract.layers)]
    return [head, *([str(row["layer"]), *("–" if row[name] is None else conclusions.format_interval(row[name])
                                          for name in head[1:])] for row in own)]
