"""The report of an abstention study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.data.synthetic.village import ANSWERABLE
from tilelli_jax.signals.names import BLOCK, HEAD

from .. import figures
from ..conclusions import format_p
from ..document import Document
from ..stages import read_result
from ..stats import Interval
from ..tables import json_with_nulls
from ..tables import write as write_tables
from .decision import IN_DOMAIN
from .published_claims import (
    ACCURACY,
    COHERENT,
    GARBLED,
    MIN_ACCURACY,
    RELATIVE,
    Statement,
    answer_v9,
    chat_quality,
    head_auroc,
    statements,
)
from .study import AbstentionStudy
from .variants import CHAT, VARIANTS

Tree = Mapping[str, Any]
Rows = list[dict[str, Any]]


def collect(study: AbstentionStudy) -> dict[str, Any]:
    """Returns the content of results.json; runs the stages that are missing."""
    path = study.evaluation
    fitted = {seed: read_result(study.fitted(seed)) for seed in study.config.seeds} if (
        study.has_fitted) else {}
    return {"config": config_lib.to_dict(study.config), "stage": path.name, "fitted": fitted,
            "village_files": study.village_files, **read_result(path)}


def write(study: AbstentionStudy, out: Path, name: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Writes results.json, report.md, report.html, figures/ and variants.*; returns the results.

    Args:
        out: directory to write to.
        name: the study's name, for the title.
        provenance: command, seeds, commit and machine, for the last section.
    """
    # As a reader of results.json gets it.
    results = json.loads(json_with_nulls(collect(study) | {"name": name}))
    report = Document(f"{name}: can a network learn to say that it does not know?")
    _overview(report, results)
    _statements(report, results)
    _signals(report, results)
    _rule(report, results)
    _answers(report, results)
    _cost(report, results)
    report.finish(out, results, provenance)
    write_tables(out / "variants", rows(results), f"{name}: variants")
    return results


def rows(results: Tree) -> Rows:
    """One row per variant: its abstention, and the quality of its chat."""
    table = []
    for name, variant in results["variants"].items():
        head, abstention = variant["signals"].get(HEAD), variant["abstention"]
        table.append({
            "variant": name, "description": VARIANTS[name].description,
            "AUROC": head and Interval.from_tree(head["cross_regime"]),
            "AUROC, unanswerable": head and Interval.from_tree(head["unanswerable"]),
            "abstains on gibberish": abstention and Interval.from_tree(abstention["calibrated"]["gibberish"]),
            "false positives": abstention and Interval.from_tree(abstention["calibrated"][IN_DOMAIN]),
            "closed-book accuracy": variant[ACCURACY] and Interval.from_tree(variant[ACCURACY]),
            "closed-book accuracy, relative to v4": (variant[RELATIVE]
                                                     and Interval.from_tree(variant[RELATIVE])),
            "chat": "reference" if name == CHAT else
                    "identical to v4" if variant["same_answers"] and all(variant["same_answers"]) else
                    chat_quality(results, name),
            "router drift, nats": variant["drift"] and float(np.mean(variant["drift"])),
            "published": VARIANTS[name].published or None})
    return table


def signal_rows(results: Tree, name: str, metric: str = "cross_regime") -> Rows:
    """The signals of a variant, best first."""
    signals = results["variants"][name]["signals"]
    order = sorted(signals, key=lambda signal: -signals[signal][metric]["point"])
    return [{"signal": signal, "AUROC, cross-regime": Interval.from_tree(signals[signal]["cross_regime"]),
             "AUROC, unanswerable": Interval.from_tree(signals[signal]["unanswerable"]),
             **({"cross-regime, by seed": " ".join(f"{auroc:.3f}" for auroc in signals[signal]["by_seed"])}
                if len(results["seeds"]) > 1 else {}),
             **{regime: auroc["point"] for regime, auroc in signals[signal]["regimes"].items()}}
            for signal in order if not signal.startswith(BLOCK)]


def block_rows(results: Tree) -> Rows:
    """The cross-regime AUROC of the router entropy in each block."""
    return [{"variant": name,
             **{signal.replace(BLOCK, "block "): variant["signals"][signal]["cross_regime"]["point"]
                for signal in variant["signals"] if signal.startswith(BLOCK)}}
            for name, variant in results["variants"].items()
            if any(signal.startswith(BLOCK) for signal in variant["signals"])]


def head_rows(results: Tree) -> Rows:
    """Differences between abstain heads in cross-regime AUROC."""
    return [{"heads": f"{row['a']} − {row['b']}", "difference": Interval.from_tree(row["difference"]),
             "p": format_p(row["p"]), "p, Holm": format_p(row["p_holm"])}
            for row in results["head_comparisons"]]


def verdict_rows(results: Tree) -> Rows:
    """The rule for every variant and signal: regimes won as pre-registered, and after correction."""
    return [{"variant": name, "signal": verdict["signal"], "wins": ", ".join(verdict["wins"]) or "none",
             "proven": verdict["proven"], "wins, corrected": ", ".join(verdict["wins_corrected"]) or "none",
             "proven, corrected": verdict["proven_corrected"]}
            for name, variant in results["variants"].items()
            if variant["rule"] and VARIANTS[name].kind != "fitted"  # their signals are v4's
            for verdict in variant["rule"]["verdicts"]]


def abstention_rows(results: Tree) -> Rows:
    """The fraction of every regime on which the head abstains, at the calibrated threshold."""
    return [{"variant": name, **{regime: rate["point"] for regime, rate in
                                 variant["abstention"]["calibrated"].items()},
             "above ½, in_domain": variant["abstention"]["above_half"][IN_DOMAIN]["point"],
             "above ½, gibberish": variant["abstention"]["above_half"]["gibberish"]["point"]}
            for name, variant in results["variants"].items() if variant["abstention"]]


def answer_rows(results: Tree) -> Rows:
    """The quality of generated answers."""
    return [{"variant": name, "chat loss, nats/byte": float(np.mean(variant["chat_loss"])),
             "valid UTF-8": variant["text_quality"]["valid_utf8"], "loops": variant["text_quality"]["loops"],
             "loops, in_domain": variant["regimes"][IN_DOMAIN]["loops"],
             "distinct-1": variant["text_quality"]["distinct_1"],
             "distinct-2": variant["text_quality"]["distinct_2"],
             **{f"accuracy, {regime}": accuracy["point"] for regime, accuracy in variant["accuracy"].items()},
             } for name, variant in results["variants"].items()]


def detector_rows(results: Tree, key: str) -> Rows:
    """The fraction of answers that a detector finds, by regime; `key` is "refused" or "affirmed"."""
    return [{"variant": name, **{regime: rates[key] for regime, rates in variant["regimes"].items()}}
            for name, variant in results["variants"].items()]


def cost_rows(results: Tree) -> Rows:
    """The training cost of every variant, mean over seeds."""
    def rounded(mean: float | None) -> int | None:
        return None if mean is None else round(mean)
    return [{"variant": name, "trained parameters": rounded(variant["cost"]["trained_parameters"]),
             "parameters": rounded(variant["cost"]["parameters"]),
             "updates": rounded(variant["cost"]["steps"]),
             "tokens": rounded(variant["cost"]["tokens"]), "seconds": variant["cost"]["seconds"]}
            for name, variant in results["variants"].items() if variant["cost"]]


def statement_rows(results: Tree) -> Rows:
    """Each published statement, its criterion, the result, and whether it is reproduced."""
    return [{"variant": statement.variant, "published": statement.published,
             "criterion": statement.criterion, "result": statement.result,
             "reproduced": _outcome(statement)} for statement in statements(results)]


# ---------------------------------------------------------------------------------------------


def _outcome(statement: Statement) -> str:
    return "inconclusive" if statement.reproduced is None else "yes" if statement.reproduced else "**no**"


def _overview(report: Document, results: Tree) -> None:
    seeds, prompts = results["seeds"], results["prompts"]
    report.paragraph(
        f"{len(results['variants'])} variants, {len(seeds)} seed{'s' * (len(seeds) > 1)}, "
        f"{sum(prompts.values())} prompts in {len(prompts)} regimes. Intervals are 95 % bootstrap intervals "
        + ("over prompts and seeds." if len(seeds) > 1 else
           "over prompts; **with one seed they do not cover the variation between seeds**."))
    if texts := answer_v9(results):
        report.heading("v9: the abstain head alone")
        report.points(texts)
    shown = ("variant", "AUROC", "AUROC, unanswerable", "abstains on gibberish", "false positives",
             "closed-book accuracy", "chat")
    report.table([{name: row[name] for name in shown} for row in rows(results)])
    report.table([{name: cell for name, cell in row.items() if name == "variant" or name not in shown}
                  for row in rows(results)], "What each variant is, and what was published about it")
    report.points([
        "AUROC: the abstain head, all other regimes against in_domain, as in Tilelli's study. AUROC, "
        f"unanswerable: the unanswerable regimes against the answerable ones ({', '.join(ANSWERABLE)}), "
        "which measures what abstention is for.",
        "Abstains on gibberish, false positives (in_domain): abstention rates at thresholds that are "
        "calibrated on other prompts.",
        "Closed-book accuracy: on in-domain questions that do not contain their answer.",
        "Chat: coherent if the interval of closed-book accuracy, relative to v4, is at least "
        f"{COHERENT:g}; garbled if it is below {GARBLED:g}; inconclusive if the interval is too wide, or if "
        f"v4's own closed-book accuracy is below {MIN_ACCURACY:g}.",
        "Router drift: KL divergence of the variant's routing from v4's, KL(v4 ‖ variant), in nats."])
    if results["village_files"]:
        report.paragraph("**Data about the built-in village, which your networks and prompts may not "
                         f"cover:** {', '.join(results['village_files'])}. Training and calibration on these "
                         "data say little about other networks and prompts; set `pairs.files`.")
    heads = {name: variant for name, variant in results["variants"].items() if HEAD in variant["signals"]}
    if heads:
        points = {name: (variant["closed_book_accuracy_by_seed"], variant["signals"][HEAD]["by_seed"])
                  for name, variant in heads.items() if variant["closed_book_accuracy_by_seed"]}
        start = results["variants"].get(CHAT, {}).get("closed_book_accuracy_by_seed")
        if points:
            report.figure("signal-and-chat", figures.tradeoff(
                points, "closed-book accuracy", "AUROC of the abstain head, cross-regime",
                mark=float(np.mean(start)) if start else None),
                "AUROC of the abstain head against the accuracy of the chat. Each mark is one seed; "
                + ("the vertical dotted line is v4's mean accuracy, the horizontal one chance (0.5)." if start
                   else "the dotted line is chance (0.5)."))
        report.figure("heads", figures.ladder({name: head_auroc(results, name) for name in heads}),
                      "Cross-regime AUROC of the abstain heads, with 95 % intervals.")
    if results["head_comparisons"]:
        report.paragraph("Differences between heads in cross-regime AUROC: bootstrap p over prompts and "
                         "seeds, with Holm's correction over all rows.")
        report.table(head_rows(results))


def _statements(report: Document, results: Tree) -> None:
    report.heading("Published statements and results")
    report.paragraph("The criteria were fixed before the networks were trained. A statement that is not "
                     "reproduced at this scale and on these prompts may hold at another scale. Inconclusive: "
                     "the interval includes the limit of the criterion, or v4 lacks what the statement "
                     "needs.")
    report.table(statement_rows(results))


def _signals(report: Document, results: Tree) -> None:
    report.heading("Signals")
    report.paragraph("AUROC of each regime against in_domain. " + ", ".join(ANSWERABLE[1:])
                     + " can be answered: a high AUROC there is not desirable.")
    for name in results["variants"]:
        if VARIANTS[name].kind != "fitted":
            title = f"{name}: {VARIANTS[name].description}"
            if name == CHAT:
                report.heading(title, 3)
            report.table(signal_rows(results, name), "" if name == CHAT else title)
    if blocks := block_rows(results):
        report.heading("Router entropy by block", 3)
        report.table(blocks)
    if results["fitted"]:
        fitted = next(iter(results["fitted"].values()))
        report.paragraph(
            f"The heads mean-pool-head and pca-head are fitted to {fitted['prompts']['heads']} prompts of "
            f"the training data of v8b and v9. The probes on v4 are fitted to {fitted['prompts']['probes']} "
            f"held-out prompts, at layer {fitted['layer']}, selected by cross-validation. The "
            f"{fitted['rank']} directions of pca-head cover {fitted['variance_of_rank']:.0%} of the "
            f"variance; the autoencoder explains "
            f"{fitted['autoencoder']['held_out']['explained_variance']:.0%} of that of held-out rows (first "
            "seed).")


def _rule(report: Document, results: Tree) -> None:
    verdicts = verdict_rows(results)
    if not verdicts:
        return
    report.heading("The pre-registered rule")
    proven, proven_corrected = (
        ", ".join(f"{verdict['signal']} of {verdict['variant']}" for verdict in verdicts
                  if verdict[key]) or "none"
        for key in ("proven", "proven, corrected"))
    rules = {name: variant["rule"] for name, variant in results["variants"].items() if variant["rule"]}
    report.paragraph(f"Proven by the rule: {proven}. After correction: {proven_corrected}. The correction is "
                     f"within a variant, over its signals and regimes; the table covers {len(rules)} "
                     f"variants with {sum(len(rule['comparisons']) for rule in rules.values())} comparisons "
                     "in total. Variants that generate as v4 does share its softmax and router signals. "
                     "Baselines: "
                     + "; ".join(f"{name}: {', '.join(rule['baselines'])}" for name, rule in rules.items())
                     + ".")
    report.table([verdict for verdict in verdicts if verdict["wins"] != "none"])
    report.table(verdicts, f"All {len(verdicts)} signals, also those that win no regime")
    report.paragraph(next(iter(rules.values()))["caution"])


def _answers(report: Document, results: Tree) -> None:
    report.heading("Abstention rates")
    report.table(abstention_rows(results))
    report.heading("Generated answers")
    report.table(answer_rows(results))
    report.paragraph("Fraction of answers that are refusals, by regime:")
    report.table(detector_rows(results, "refused"))
    report.paragraph("Fraction of answers that are affirmations, by regime:")
    report.table(detector_rows(results, "affirmed"))
    shown = [name for name in results["variants"] if not VARIANTS[name].preserves_generation]
    examples = {name: results["variants"][name]["examples"] for name in shown}
    table = [{"regime": example["regime"], "prompt": example["prompt"],
              **{name: examples[name][i]["answer"] for name in shown}}
             for i, example in enumerate(examples[shown[0]])] if shown else []
    report.heading("Examples, first seed", 3)
    report.table(table)


def _cost(report: Document, results: Tree) -> None:
    if table := cost_rows(results):
        report.heading("Training cost")
        report.table(table)


def summary(results: Tree) -> Sequence[Sequence[str]]:
    """The table that the command prints at the end."""
    def point(value: Any, digits: int = 3) -> str:
        return "–" if value is None else f"{value.point if isinstance(value, Interval) else value:.{digits}f}"
    return [["variant", "AUROC", "unanswerable", "gibberish", "false pos.", "closed-book accuracy", "chat"],
            *([row["variant"], point(row["AUROC"]), point(row["AUROC, unanswerable"]),
               point(row["abstains on gibberish"], 2), point(row["false positives"], 2),
               point(row["closed-book accuracy"], 2), row["chat"]] for row in rows(results))]
