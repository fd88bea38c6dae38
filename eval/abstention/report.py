"""What a study of abstention has found, in one report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilelli_jax import config as config_lib
from tilelli_jax.data.village import ANSWERABLE
from tilelli_jax.signals.names import BLOCK, HEAD

from .. import figures
from ..conclusions import format_p
from ..report import Report
from ..stages import read_result
from ..stats import Interval
from ..tables import as_json
from ..tables import write as write_tables
from .decision import IN_DOMAIN
from .statements import (
    COHERENT,
    GARBLED,
    KNOWS,
    Statement,
    answer_v9,
    called,
    head,
    statements,
)
from .study import Study
from .variants import CHAT, VARIANTS

Tree = Mapping[str, Any]
Rows = list[dict[str, Any]]


def collect(study: Study) -> dict[str, Any]:
    """Every stage's result, made if need be: what results.json holds."""
    made = study.evaluation
    fitted = {seed: read_result(study.fitted(seed)) for seed in study.config.seeds} if (
        study.has_fitted) else {}
    return {"config": config_lib.to_dict(study.config), "stage": made.name, "fitted": fitted,
            "of_the_village": study.of_the_village,
            **read_result(made)}


def write(study: Study, out: Path, name: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """Writes results.json, report.md, report.html, figures/ and variants.*; returns what was found.

    Args:
        out: where.
        how: what made it, for the last section.
    """
    found = json.loads(as_json(collect(study) | {"name": name}))  # as it will be read
    report = Report(f"{name}: who can say that it does not know?")
    _opening(report, found)
    _statements(report, found)
    _signals(report, found)
    _rule(report, found)
    _answers(report, found)
    _cost(report, found)
    report.finish(out, found, how)
    write_tables(out / "variants", rows(found), f"{name}: variants")
    return found


def rows(found: Tree) -> Rows:
    """A line for each variant: the abstention, and what became of the chat."""
    lines = []
    for name, one in found["variants"].items():
        heard, gate = one["signals"].get(HEAD), one["abstention"]
        lines.append({
            "variant": name, "what": VARIANTS[name].what,
            "AUROC": heard and Interval.from_tree(heard["cross"]),
            "AUROC, unknown only": heard and Interval.from_tree(heard["unanswerable"]),
            "gibberish declined": gate and Interval.from_tree(gate["calibrated"]["gibberish"]),
            "false positives": gate and Interval.from_tree(gate["calibrated"][IN_DOMAIN]),
            "known in domain": one["known"] and Interval.from_tree(one["known"]),
            "of v4's": one["known_of_start"] and Interval.from_tree(one["known_of_start"]),
            "chat": "the start" if name == CHAT else
                    "as v4, to the bit" if one["same_answers"] and all(one["same_answers"]) else
                    called(found, name),
            "router drift": one["drift"] and float(np.mean(one["drift"])),
            "published": VARIANTS[name].published or None})
    return lines


def of_signals(found: Tree, name: str, what: str = "cross") -> Rows:
    """The signals of a variant, the best first."""
    signals = found["variants"][name]["signals"]
    order = sorted(signals, key=lambda signal: -signals[signal][what]["point"])
    return [{"signal": signal, "cross-regime": Interval.from_tree(signals[signal]["cross"]),
             "unknown against answerable": Interval.from_tree(signals[signal]["unanswerable"]),
             "seeds": " ".join(f"{area:.3f}" for area in signals[signal]["runs"]),
             **{regime: area["point"] for regime, area in signals[signal]["regimes"].items()}}
            for signal in order if not signal.startswith(BLOCK)]


def of_blocks(found: Tree) -> Rows:
    """The cross-regime AUROC of each block's router entropy."""
    return [{"variant": name, **{signal.replace(BLOCK, "block "): one["signals"][signal]["cross"]["point"]
                                 for signal in one["signals"] if signal.startswith(BLOCK)}}
            for name, one in found["variants"].items()
            if any(signal.startswith(BLOCK) for signal in one["signals"])]


def of_heads(found: Tree) -> Rows:
    """Differences of heads, by cross-regime AUROC."""
    return [{"heads": f"{one['a']} − {one['b']}", "difference": Interval.from_tree(one["difference"]),
             "p": format_p(one["p"]), "p, Holm": format_p(one["p_holm"])} for one in found["between"]]


def of_verdicts(found: Tree) -> Rows:
    """The rule, of every variant and signal: regimes won as fixed beforehand, and after correction."""
    return [{"variant": name, "signal": one["signal"], "wins": ", ".join(one["wins"]) or "none",
             "proven": one["proven"], "wins, corrected": ", ".join(one["wins_corrected"]) or "none",
             "proven, corrected": one["proven_corrected"]}
            for name, variant in found["variants"].items()
            if variant["rule"] and VARIANTS[name].kind != "fitted"  # whose signals are v4's
            for one in variant["rule"]["verdicts"]]


def of_abstention(found: Tree) -> Rows:
    """What share of every regime is declined at the calibrated threshold."""
    return [{"variant": name, **{regime: share["point"] for regime, share in
                                 one["abstention"]["calibrated"].items()},
             "above ½ in domain": one["abstention"]["half"][IN_DOMAIN]["point"],
             "above ½, gibberish": one["abstention"]["half"]["gibberish"]["point"]}
            for name, one in found["variants"].items() if one["abstention"]]


def of_health(found: Tree) -> Rows:
    """How sound what is generated is."""
    return [{"variant": name, "chat loss, nats/byte": float(np.mean(one["chat_loss"])),
             "valid UTF-8": one["health"]["valid_utf8"], "loops": one["health"]["loops"],
             "loops in domain": one["regimes"][IN_DOMAIN]["loops"],
             "distinct-1": one["health"]["distinct_1"], "distinct-2": one["health"]["distinct_2"],
             **{f"right, {regime}": share["point"] for regime, share in one["right"].items()},
             } for name, one in found["variants"].items()]


def of_refusals(found: Tree, key: str) -> Rows:
    """What share of the answers refuses or affirms, by regime."""
    return [{"variant": name, **{regime: shares[key] for regime, shares in one["regimes"].items()}}
            for name, one in found["variants"].items()]


def of_costs(found: Tree) -> Rows:
    """What every variant took, the mean over seeds."""
    def whole(mean: float | None) -> int | None:
        return None if mean is None else round(mean)
    return [{"variant": name, "trained parameters": whole(one["cost"]["trained_parameters"]),
             "of": whole(one["cost"]["parameters"]), "updates": whole(one["cost"]["steps"]),
             "positions": whole(one["cost"]["tokens"]), "seconds": one["cost"]["seconds"]}
            for name, one in found["variants"].items() if one["cost"]]


def of_statements(found: Tree) -> Rows:
    """Published, criterion, found, and whether it is reproduced."""
    return [{"variant": one.variant, "published": one.published, "criterion": one.criterion,
             "found": one.found, "reproduced": _verdict(one)} for one in statements(found)]


# ---------------------------------------------------------------------------------------------


def _verdict(one: Statement) -> str:
    return "not to be told" if one.reproduced is None else "yes" if one.reproduced else "**no**"


def _opening(report: Report, found: Tree) -> None:
    seeds, asked = found["seeds"], found["prompts"]
    report.paragraph(
        f"{len(found['variants'])} variants, {len(seeds)} seed{'s' * (len(seeds) > 1)}, "
        f"{sum(asked.values())} prompts in {len(asked)} regimes. Intervals are of 95 % and resample prompts"
        + (" and seeds." if len(seeds) > 1 else "; **one seed says nothing of others**."))
    if texts := answer_v9(found):
        report.heading("v9: the abstain head alone")
        report.points(texts)
    report.table(rows(found))
    report.paragraph(
        f"AUROC: of the abstain head, in_domain against all other regimes, as published; and of the regimes "
        f"that nobody can answer against those that can be answered ({', '.join(ANSWERABLE)}), which is what "
        "abstaining is for. Declined and false positives: at thresholds calibrated on other prompts. Known: "
        "questions in domain answered rightly, of those whose answer does not stand in the question. Chat: "
        f"coherent if that is surely at least {COHERENT:g} of v4's, garbled if surely below {GARBLED:g}; "
        f"not to be told where v4 knows less than {KNOWS:g} itself. Router drift: KL(routing of v4 ‖ its "
        "own), nats.")
    if found["of_the_village"]:
        report.paragraph("**Of the village, of which a given network may know nothing, and prompts of one's "
                         "own may not be:** "
                         f"{', '.join(found['of_the_village'])}. What is learned from and calibrated on such "
                         "data says little of other networks and prompts (`pairs.files`).")
    heads = {name: one for name, one in found["variants"].items() if HEAD in one["signals"]}
    if heads:
        points = {name: (one["known_runs"], one["signals"][HEAD]["runs"]) for name, one in heads.items()
                  if one["known_runs"]}
        start = found["variants"].get(CHAT, {}).get("known_runs")
        if points:
            report.figure("signal-and-chat", figures.tradeoff(
                points, "known in domain", "AUROC of the abstain head, cross-regime",
                mark=float(np.mean(start)) if start else None),
                "A signal, and what it cost: every mark is a seed; the dotted line is v4")
        report.figure("heads", figures.ladder({name: head(found, name) for name in heads}),
                      "Cross-regime AUROC of the abstain heads")
    if found["between"]:
        report.table(of_heads(found))


def _statements(report: Report, found: Tree) -> None:
    report.heading("What was published, and what is found here")
    report.paragraph("Criteria were fixed before the networks were trained. What is not reproduced at this "
                     "scale, on these prompts, may hold at another. Not to be told: the interval has its "
                     "criterion inside, or v4 lacks what the sentence is about.")
    report.table(of_statements(found))


def _signals(report: Report, found: Tree) -> None:
    report.heading("Signals")
    report.paragraph("AUROC of in_domain against each regime. in_domain, "
                     + ", ".join(ANSWERABLE[1:]) + " can be answered: a high AUROC there is no merit.")
    for name in found["variants"]:
        if VARIANTS[name].kind != "fitted":
            report.heading(f"{name}: {VARIANTS[name].what}", 3)
            report.table(of_signals(found, name))
    if blocks := of_blocks(found):
        report.heading("Router entropy, block by block", 3)
        report.table(blocks)
    if found["fitted"]:
        one = next(iter(found["fitted"].values()))
        report.paragraph(f"The heads of pooled and low-rank were fitted to {one['prompts']['heads']} prompts "
                         "of those that v8b and v9 learn from, the probes of v4 to "
                         f"{one['prompts']['probes']} that no network learned from, of layer {one['layer']}, "
                         f"chosen by cross-validation. The {one['rank']} directions of low-rank have "
                         f"{one['variance_of_rank']:.0%} of the variance, and the autoencoder explains "
                         f"{one['autoencoder'].get('explained_variance', np.nan):.0%} (first seed).")


def _rule(report: Report, found: Tree) -> None:
    verdicts = of_verdicts(found)
    if not verdicts:
        return
    report.heading("The pre-registered rule")
    proven = [f"{one['signal']} of {one['variant']}" for one in verdicts if one["proven"]]
    judged = {name: one["rule"] for name, one in found["variants"].items() if one["rule"]}
    report.paragraph(f"Proven by it: {', '.join(proven) or 'none'}. After correction: "
                     + (", ".join(f"{one['signal']} of {one['variant']}" for one in verdicts
                                  if one["proven, corrected"]) or "none")
                     + f". That corrects within a variant; {len(judged)} variants with "
                     f"{sum(len(rule['duels']) for rule in judged.values())} comparisons stand here, and "
                     "those that write as v4 does share its softmax and router. Baselines: "
                     + "; ".join(f"{name}: {', '.join(rule['baselines'])}" for name, rule in judged.items())
                     + ".")
    report.table(verdicts)
    caution = next(one["rule"]["caution"] for one in found["variants"].values() if one["rule"])
    report.paragraph(caution)


def _answers(report: Report, found: Tree) -> None:
    report.heading("Abstention")
    report.table(of_abstention(found))
    report.heading("What they say")
    report.table(of_health(found))
    report.paragraph("Refusals, by regime:")
    report.table(of_refusals(found, "refused"))
    report.paragraph("Affirmations, by regime:")
    report.table(of_refusals(found, "affirmed"))
    shown = [name for name in found["variants"] if not VARIANTS[name].generates_as_before]
    examples = {name: found["variants"][name]["examples"] for name in shown}
    lines = [{"regime": one["regime"], "prompt": one["prompt"],
              **{name: examples[name][i]["answer"] for name in shown}}
             for i, one in enumerate(examples[shown[0]])] if shown else []
    report.heading("Answers of the first seed", 3)
    report.table(lines)


def _cost(report: Report, found: Tree) -> None:
    if lines := of_costs(found):
        report.heading("Cost")
        report.table(lines)


def summary(found: Tree) -> Sequence[Sequence[str]]:
    """The table that the command ends with."""
    def of(value: Any, digits: int = 3) -> str:
        return "–" if value is None else f"{value.point if isinstance(value, Interval) else value:.{digits}f}"
    return [["variant", "AUROC", "unknown only", "gibberish", "false pos.", "known", "chat"], *(
        [one["variant"], of(one["AUROC"]), of(one["AUROC, unknown only"]), of(one["gibberish declined"], 2),
         of(one["false positives"], 2), of(one["known in domain"], 2), one["chat"]] for one in rows(found))]
