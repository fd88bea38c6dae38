"""The report of a study, and its rows in the summary table of several studies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.io.json_text import as_expected

from .. import cascade, conclusions, figures, metrics, selective
from ..document import Document
from ..stages import RESULTS, read_result
from ..stats import Interval
from ..tables import json_with_nulls, read_columns
from ..tables import write as write_tables
from .config import DifficultyConfig, SeriesConfig
from .ladder import CONTROLS, LADDER
from .measures import rung_names
from .study import DifficultyStudy, read_results

LEGEND = ("P1 to P5 are the rungs of fm-difficulty-probe. C1 to C5 are controls, which use the answer's "
          "length or the prompt's NLL, without and with activations.")


def collect(study: DifficultyStudy) -> dict[str, Any]:
    """Returns the results of all stages, and runs those that are missing: the contents of results.json."""
    study_results: dict[str, Any] = {"config": config_lib.to_dict(study.config), "unit": study.data.unit,
                                     "layers": {}}
    for number, layer in study.layers.items():
        evaluation = layer.evaluation
        results: dict[str, Any] = {"stages": {}}
        if evaluation is not None:
            results["sae"] = {name: getattr(evaluation, name) for name in (
                "steps", "explained", "explained_probed", "explained_random", "dead", "l0", "rows")}
            results["sae"] |= {**evaluation.losses._asdict(), "recovered": evaluation.losses.recovered}
            results["sae"]["faults"] = layer.faults(evaluation)
        for name in ("probe", "selective", "calibrate", "cascade", "causal"):
            path = getattr(layer, name)
            if path is not None:
                results[name], results["stages"][name] = read_result(path), path.name
        study_results["layers"][str(number)] = results
    return study_results


def write(study: DifficultyStudy, name: str, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Writes results.json, report.md, report.html, figures/ and synthesis.*; returns the rows of synthesis.*.

    Args:
        provenance: the command, versions and machine, for the last section.
    """
    study_results = json.loads(json_with_nulls(collect(study)))  # the same types as when read from disk
    study_results["name"] = name
    rows = [*synthesis_rows(study_results), *other_studies(study.config)]
    report = Document(f"{name}: what predicts difficulty?")
    figures.reserve_styles([rung.name for rung in (*LADDER, *CONTROLS)])  # the same in all studies
    _opening(report, study, study_results)
    for layer, results in study_results["layers"].items():
        if len(study_results["layers"]) > 1:
            report.heading(f"Layer {layer}")
        _layer(report, study, int(layer), results, study_results["unit"])
    report.heading("All studies")
    report.paragraph("Latents − raw: the difference of AUROC between P3 and P2. Corrected p: of its paired "
                     "bootstrap test, with Holm's correction for the comparisons of the study. Causal: the "
                     "number of chosen latents whose ablation changes the loss significantly (corrected p < "
                     "0.05) and more than the ablation of any of their controls. PRR: prediction–rejection "
                     "ratio, for the P rung preferred by cross-validation. Cascade − random: "
                     "the error when that rung routes 25 % of the items to the larger model, minus the error "
                     "of random routing at equal cost.")
    report.table(rows if len(rows) > 1 else vertical(rows[0]))
    report.finish(study.out, study_results, provenance)
    write_tables(study.out / "synthesis", rows, "All studies")
    return rows


def synthesis_rows(study_results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a study's rows in the summary table: one for each layer."""
    rows = []
    for layer, results in study_results["layers"].items():
        probe, best = results["probe"], preferred(results["probe"])
        rungs = {name: _interval(rung["auroc"]) for name, rung in probe["rungs"].items()}
        row: dict[str, Any] = {
            "study": study_results["name"], "layer": int(layer), "test items": probe["test"],
            "fraction hard": probe["hard"],
            **{column: rungs.get(name) for column, name in (
                ("P1 cheap", "P1_cheap"), ("P2 + raw", "P2_cheap_raw"), ("P3 + latents", "P3_cheap_sae"),
                ("C1 length", "C1_length"))}}
        headline: Mapping[str, Any] = next(
            (c for c in probe["comparisons"] if (c["a"], c["b"]) == ("P3_cheap_sae", "P2_cheap_raw")), {})
        row["latents − raw"] = _interval(headline.get("difference"))
        row["corrected p"] = headline.get("p_holm")
        for positions in ("all", "boundary"):
            effects = results.get("causal", {}).get("positions", {}).get(positions)
            if effects is None:
                row[f"causal, {positions}"] = None
                continue
            exceeding = sum(e["exceeds_controls"] for e in effects["chosen"].values())
            row[f"causal, {positions}"] = (
                f"{0 if probe['groups'] < conclusions.FEW else exceeding} of {len(effects['chosen'])}")
        row["PRR"] = _interval(results["selective"]["rungs"][best]["prr"])
        routed = results.get("cascade", {"rungs": {}})["rungs"].get(best, {})
        row["cascade − random"] = _interval(routed.get("0.25"))
        if results.get("sae", {}).get("faults"):
            row["study"] += " (autoencoder forced)"
        rows.append(row)
    return rows


def other_studies(config: DifficultyConfig) -> list[dict[str, Any]]:
    """Returns the summary rows of the studies under the key `other_studies`.

    Raises:
        InputError: a study has no results, or they are not those of a difficulty study.
    """
    rows = []
    for path in map(Path, config.other_studies):
        study_results = read_results(path)
        with as_expected(path / RESULTS):
            rows += [_checked(row) for row in synthesis_rows(study_results)]
    return rows


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row. Raises ValueError or OverflowError if a cell has the wrong type for its column."""
    for name, value in row.items():
        is_text = name == "study" or name.startswith("causal")
        for cell in [value.point, value.low, value.high] if isinstance(value, Interval) else [value]:
            if not isinstance(cell, str | None if is_text else float | int | None):
                raise ValueError(f"{name}: expected {'text' if is_text else 'a number'}, found {cell!r:.40}")
            if not is_text:
                float(cell or 0)
    return row


def preferred(probe: Mapping[str, Any]) -> str:
    """Returns the P rung with the highest cross-validated AUROC. The choice does not use the test items."""
    rungs = {name: rung["cross_validated"] for name, rung in probe["rungs"].items() if name.startswith("P")}
    return max(rungs, key=lambda name: rungs[name])


# ---------------------------------------------------------------------------------------------


def _opening(report: Document, study: DifficultyStudy, study_results: Mapping[str, Any]) -> None:
    config, unit = study.config, study_results["unit"]
    first = next(iter(study_results["layers"].values()))["probe"]
    error = "NLL in nats" if unit == "nats" else unit
    hard = ("if the network prefers a wrong ending" if config.data.family == "hellaswag" else
            f"if its {error} is at least the {100 * config.labels.quantile:g} % quantile of "
            + ("the train items" if config.labels.quantile_over == "train" else "all items, including the "
               "test items"))
    report.paragraph(
        f"The study uses {len(study.data)} items of `{config.data.family}` ({config.data.source}): "
        f"{first['train']} train items, {first['test']} test items in {first['groups']} groups, and "
        f"{first['purged']} excluded items. An item counts as hard {hard}: {first['hard_train']:.1%} of the "
        f"train items and {first['hard']:.1%} of the test items. Intervals are 95 % bootstrap intervals that "
        f"resample whole groups; {first['folds']}-fold cross-validation chose C, the inverse penalty of the "
        "probes.")
    for layer, results in study_results["layers"].items():
        report.points([f"**Layer {layer}.** {text}" for text in conclusions_of(results)])
    if first["constant"]:
        report.paragraph("Features removed because they are constant over the train items: " + ", ".join(
            f"`{block}.{name}`" for block, names in first["constant"].items() for name in names) + ".")


def conclusions_of(results: Mapping[str, Any]) -> list[str]:
    """Returns the conclusions for one layer: sentences that claim no more than the tests support."""
    probe, best = results["probe"], preferred(results["probe"])
    rungs = {name: _interval(rung["auroc"]) for name, rung in probe["rungs"].items()}
    area = rungs[best]
    assert area is not None
    few = probe["groups"] < conclusions.FEW
    sentences = [f"`{best}`, preferred by cross-validation among P1 to P5, has AUROC "
                 f"{conclusions.format_interval(area)}: "
                 f"{conclusions.compare_with_chance(area, probe['groups'])}."]
    controls = [f"`{name}` {conclusions.format_interval(interval)}" for name in ("C1_length", "C2_cheap_nll")
                if (interval := rungs.get(name)) is not None]
    if controls:
        sentences.append(f"AUROC of the controls without activations: {', '.join(controls)}.")
    sentences += conclusions.few_groups_warning(probe["groups"])
    names = {("P3_cheap_sae", "P2_cheap_raw"): "Latents instead of raw activations (P3 − P2)",
             ("P2_cheap_raw", "P1_cheap"): "Raw activations in addition to cheap features (P2 − P1)",
             ("P4_raw_only", "C1_length"): "Raw activations instead of the answer's length (P4 − C1)",
             ("C3_length_raw", "C1_length"): "Raw activations in addition to the answer's length (C3 − C1)",
             ("C5_nll_raw", "C2_cheap_nll"): "Raw activations in addition to the prompt's NLL (C5 − C2)"}
    for comparison in probe["comparisons"]:
        name = names.get((comparison["a"], comparison["b"]))
        change, p = _interval(comparison["difference"]), comparison["p_holm"]
        if name is None or change is None or p is None:
            continue
        direction = "a significant gain" if change.point > 0 else "a significant loss"
        is_significant = conclusions.is_significant(p, probe["groups"])
        verdict = "inconclusive" if few else direction if is_significant else "not significant"
        sentences.append(f"{name}: {conclusions.format_difference(change, is_significant)} AUROC, corrected "
                         f"p {conclusions.format_p(p)}: {verdict}.")
    if causal := results.get("causal"):
        for positions, effects in causal["positions"].items():
            chosen = effects["chosen"].values()
            significant, exceeding = (0 if few else sum(e[key] for e in chosen)
                                      for key in ("significant", "exceeds_controls"))
            if not chosen:
                sentences.append("The probe on latents gives no latent a nonzero weight, so none is ablated.")
                break
            never = [name for name, e in effects["chosen"].items() if not e["items_changed"]]
            sentences.append(f"Positions patched: {positions}. The ablation of {significant} of "
                             f"{len(chosen)} chosen latents changes the loss significantly (corrected p < "
                             f"0.05); {exceeding} of them change it more than any of their controls."
                             + (f" Never active at these positions: {', '.join(never)}." if never else ""))
    gain = Interval.from_tree(results["selective"]["rungs"][best]["prr"])
    sentences.append(f"Selective answering, ranked by `{best}`, has a prediction–rejection ratio (PRR) of "
                     f"{conclusions.format_interval(gain)}: the fraction of the oracle's gain.")
    if "cascade" in results:
        routed = Interval.from_tree(results["cascade"]["rungs"][best]["0.25"])
        sentences.append(f"If `{best}` routes 25 % of the items to the larger model, the error differs by "
                         f"{conclusions.format_interval(routed)} from random routing at equal cost: "
                         + ("inconclusive." if few else
                            "not significant (the 95 % interval includes 0)." if not routed.excludes_zero else
                            "better." if routed.high < 0 else "worse."))
    for fault in results.get("sae", {}).get("faults", []):
        sentences.append(f"**The autoencoder fails a quality check: {fault}.** `sae.force` was set.")
    return sentences


def _layer(report: Document, study: DifficultyStudy, layer: int, results: Mapping[str, Any],
           unit: str) -> None:
    if sae := results.get("sae"):
        report.heading("The autoencoder", 3)
        overlap = ("It is not known whether the autoencoder was trained on these "
                   "items." if study.config.sae.path
                   else "The autoencoder was not trained on these items.")
        report.paragraph(f"Quality on held-out items. {overlap} The explained variance is given at all "
                         "positions, at the probed positions, and at all positions for an autoencoder of the "
                         "same shape with random weights. Loss recovered compares the network's loss with "
                         "the reconstruction at all positions of the prompt to zeros at these positions (0) "
                         "and to the unpatched network (1)"
                         + ("; it is undefined here, because zeros give no higher loss than the unpatched "
                            "network." if sae["recovered"] is None else "."))
        report.table(vertical(sae_row(sae, unit)))
    _ladder(report, layer, results["probe"])
    scores = read_columns(study.layers[layer].probe / "scores.parquet")
    best = preferred(results["probe"])
    _selective(report, layer, results["selective"], scores, unit)
    _calibration(report, layer, results["calibrate"], study, best)
    if "cascade" in results:
        _cascade(report, layer, results["cascade"], scores, study, unit)
    if "causal" in results:
        _causal(report, study.config, layer, results["causal"])


def sae_row(sae: Mapping[str, Any], unit: str) -> dict[str, Any]:
    """Returns the quality of an autoencoder on held-out items."""
    return {"updates": sae["steps"], "rows": sae["rows"], "variance explained": sae["explained"],
            "variance explained at probed positions": sae["explained_probed"],
            "variance explained by random weights": sae["explained_random"], "L0": sae["l0"],
            "fraction of dead latents": sae["dead"], f"loss ({unit})": sae["natural"],
            f"loss, reconstructed ({unit})": sae["reconstructed"], f"loss, zeros ({unit})": sae["zeroed"],
            "loss recovered": sae["recovered"]}


def vertical(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a table with one row for each column of a wide row."""
    return [{"quantity": name, "value": value} for name, value in row.items()]


def _ladder(report: Document, layer: int, probe: Mapping[str, Any]) -> None:
    report.heading("The ladder of probes", 3)
    rungs = {name: _interval(rung["auroc"]) for name, rung in probe["rungs"].items()}
    report.figure(f"ladder-{layer}", figures.ladder({n: i for n, i in rungs.items() if i is not None}),
                  f"AUROC of each rung on {probe['test']} test items. {LEGEND} The dotted line is "
                  "chance.")
    domains = list(dict.fromkeys(d for rung in probe["rungs"].values() for d in rung["domains"]))
    report.table([{"rung": name, "AUROC": rungs[name], "AUPRC": rung["auprc"], "C": rung["C"],
                   "cross-validated AUROC": rung["cross_validated"],
                   **({"note": "constant score"} if rung["constant"] else {}),
                   **{f"AUROC, {domain}": rung["domains"].get(domain)
                      for domain in domains if len(domains) > 1}}
                  for name, rung in probe["rungs"].items()])
    report.table([{"difference": f"{c['a']} − {c['b']}", "AUROC": _interval(c["difference"]), "p": c["p"],
                   "corrected p": c["p_holm"], "DeLong p, ungrouped": c["delong"]}
                  for c in probe["comparisons"]])
    report.paragraph(conclusions.CORRECTION)


def _selective(report: Document, layer: int, results: Mapping[str, Any], scores: Mapping[str, np.ndarray],
               unit: str) -> None:
    report.heading("Selective answering", 3)
    curves = {name: selective.RiskCoverage.from_tree(results["coverages"], rung)
              for name, rung in results["rungs"].items()}
    error = _error_name(scores, unit)
    published = {name: curve for name, curve in curves.items() if name.startswith("P")}
    report.figure(f"risk-coverage-{layer}",
                  figures.risk_coverage(published, results["oracle"], results["mean_error"], unit=error),
                  f"Risk–coverage curves: {error} of the answered items, as a function of the fraction "
                  "answered. Each rung answers the items with the lowest predicted probability of being "
                  f"hard. {figures.intervals_caption(published)}")
    half = list(results["coverages"]).index(0.5)
    report.table([{"rung": name, "AURC": curve.aurc,
                   "PRR": conclusions.format_interval(curve.prr),
                   "PRR, half rejected": conclusions.format_interval(curve.prr_half),
                   f"{error} at coverage 0.5": float(curve.risks[half]),
                   "at coverage 1": results["mean_error"]}
                  for name, curve in curves.items()])
    report.paragraph(conclusions.PRR)


def _calibration(report: Document, layer: int, results: Mapping[str, Any], study: DifficultyStudy,
                 best: str) -> None:
    report.heading("Calibration", 3)
    table = read_columns(study.layers[layer].calibrate / "probabilities.parquet")
    kinds = list(results["rungs"][best])
    report.figure(f"reliability-{layer}", figures.reliability(
        {kind: metrics.reliability(table["hard"], table[f"{best}.{kind}"]) for kind in kinds}),
        f"Reliability of `{best}`: raw (trained with balanced class weights) and recalibrated out of fold. A "
        "temperature cannot undo the shift from balanced class weights when one class is rarer.")
    rows = [{"rung": name, "calibration": kind, "ECE": v["ece"], "Brier": v["brier"],
             "log loss, nats": v["log_loss"], "AUROC": v["auroc"]}
            for name, kinds in results["rungs"].items() for kind, v in kinds.items()]
    report.table([row for row in rows if row["rung"] == best])
    report.table(rows, f"Calibration of all {len(results['rungs'])} rungs")


def _cascade(report: Document, layer: int, results: Mapping[str, Any], scores: Mapping[str, np.ndarray],
             study: DifficultyStudy, unit: str) -> None:
    report.heading("Cascade: routing hard items to the larger model", 3)
    path = study.layers[layer].cascade
    assert path is not None
    errors, options = read_columns(path / "errors.parquet"), study.config.cascade
    error = _error_name(scores, unit)
    costs = cascade.Costs(options.small, options.large, options.routed_pays_both)
    names = [name for name in rung_names(scores) if name.startswith("P")]
    report.figure(f"pareto-{layer}", figures.pareto(
        {name: cascade.frontier(errors["small"], errors["large"], scores[name], costs) for name in names},
        cascade.oracle_frontier(errors["small"], errors["large"], costs),
        (results["always_small"], results["always_large"]), costs, unit=error),
        f"Error against mean cost. A call of the larger model costs {options.large:g}, one of the small "
        f"model {options.small:g}" + ("; a routed item costs both." if options.routed_pays_both else "."))
    report.paragraph(f"The larger model has the lower error on {results['large_better']:.1%} of the test "
                     f"items. Mean error ({error}): {results['always_large']:.3f} for the larger model, "
                     f"{results['always_small']:.3f} for the small one.")
    report.paragraph("The table compares each rung with random routing at equal cost: the error of the "
                     "cascade minus that of random routing (below 0: better). The fraction of routed items "
                     "is fixed in advance. Random routing calls, and pays for, only one of the two models "
                     "per item.")
    report.table([{"rung": name, **{f"{float(fraction):.0%} routed": _interval(difference)
                                    for fraction, difference in rung.items()}}
                  for name, rung in results["rungs"].items()])


def _causal(report: Document, config: DifficultyConfig, layer: int, results: Mapping[str, Any]) -> None:
    report.heading("Causal effects of the latents", 3)
    sampling = ""
    if isinstance(config.data, SeriesConfig):
        sampling = (f" Each loss is the CRPS of {config.causal.samples} sampled forecasts of "
                    f"{min(config.causal.horizon, config.data.horizon)} values, with the same random numbers "
                    "for every patch; the boundary is the position of the end token.")
    report.paragraph(f"Change of the loss, in {results['unit']}, when the reconstruction omits one latent, "
                     f"on {results['items']} test items. Controls are random latents of similar activation "
                     "frequency. A latent that is never active at the patched positions changes no item's "
                     f"loss.{sampling}")
    for positions, effects in results["positions"].items():
        if not effects["chosen"]:
            report.paragraph("The probe on latents gives no latent a nonzero weight, so none is ablated.")
            continue
        bars = {f"latent {name}": Interval.from_tree(e["change"]) for name, e in effects["chosen"].items()}
        bars |= {f"control {name}": Interval.from_tree(e["change"])
                 for name, e in list(effects["controls"].items())[:5]}
        reconstruction = conclusions.format_interval(Interval.from_tree(effects["reconstruction"]), 4)
        report.figure(f"causal-{layer}-{positions}", figures.effects(bars, unit=results["unit"]),
                      f"Positions patched: {positions}. Intervals are not corrected for multiple "
                      "comparisons; only the first five controls are shown. The reconstruction alone changes "
                      f"the loss by {reconstruction}.")
        report.table([{"positions": positions, "latent": name, "change of loss": _interval(e["change"]),
                       "p": e["p"], "corrected p": e["p_holm"],
                       "items changed": e["items_changed"] or "0 (never active)",
                       "controls with as large a change": f"{e['controls_as_large']} of {e['controls']}"}
                      for name, e in effects["chosen"].items()])


def _error_name(scores: Mapping[str, np.ndarray], unit: str) -> str:
    """Returns the name of the mean error, with its unit."""
    if np.isin(scores["error"], (0, 1)).all():
        return "fraction of wrong answers"
    return "mean NLL (nats)" if unit == "nats" else f"mean {unit}"


def _interval(tree: Mapping[str, Any] | None) -> Interval | None:
    return None if tree is None else Interval.from_tree(tree)


def summary(rows: Sequence[Mapping[str, Any]], config: DifficultyConfig) -> list[list[str]]:
    """Returns the summary table that the command prints: header and one row per layer."""
    head = ["layer", "P1 cheap", "P2 + raw", "P3 + latents", "latents − raw"]
    return [head, *(
        [str(row["layer"]), *("–" if row[name] is None else conclusions.format_interval(row[name])
                              for name in head[1:])] for row in rows[:len(config.extract.layers)])]
