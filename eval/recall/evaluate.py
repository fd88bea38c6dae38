"""What scores come to on held-out questions: a tree of JSON. Nothing here asks a network.

Intervals are of 95 % and resample whole groups of questions. A method of several runs is told by the mean
over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.errors import InputError

from .. import selective
from ..checks import Floats
from ..metrics import (
    auprc,
    auroc,
    brier,
    calibrated_error,
    expected_calibration_error,
    reliability,
)
from ..stats import Interval, PairedBootstrap, bootstrap_mean, bootstrap_of, exact_share, holm
from ..thresholds import Verdict
from .fit import SIDECAR
from .scores import Methods, Scope, heard
from .table import PARTS, Table
from .verdicts import VerdictRule

Tree = dict[str, Any]
Rows = NDArray[np.intp]
SLICES = 4  # of popularity
LEAST = 10  # questions of either kind
EXAMPLES = 10  # questions that are shown
WORDS: tuple[Verdict, ...] = get_args(Verdict)


def evaluate(table: Table, found: Mapping[Scope, Methods], run: int, rule: VerdictRule, replicates: int,
             seed: int = 42) -> Tree:
    """All that the report tells, one key for each of its sections.

    Args:
        found: of every scope, what its methods say.
        run: of the sidecar that was kept, of which verdicts, reliability and risk are told.
        judge: what makes words of its scores.
    """
    methods, test = found[None], table.rows("test")
    if not tells(table, test):
        kinds = np.bincount(table.known[test], minlength=2)
        raise InputError(f"split.test: expected {LEAST} known and {LEAST} unknown questions at least, found "
                         f"{kinds[1]} and {kinds[0]}: ask more questions, or others")
    known, group = table.known[test], table.group[test]
    kept = {name: (scores[run if name == SIDECAR else 0, test], chances[run if name == SIDECAR else 0, test])
            for name, (scores, chances) in methods.items() if name in heard(methods, test)}
    answered = test[~table.refused[test]]
    return {
        "questions": len(table.known), "test": len(test), "groups": len(np.unique(group)),
        "known": float(known.mean()), "known_all": float(table.known.mean()),
        "refused": float(table.refused.mean()),
        "datasets": {name: _about(table, np.flatnonzero(table.dataset == name)) for name in table.datasets},
        "parts": {part: int((table.part == part).sum()) for part in PARTS},
        **{key: value for key, value in compared(table, methods, test, replicates, seed).items()
           if key in ("methods", "comparisons")},
        "within": {name: compared(table, methods, table.rows("test", name), replicates, seed)
                   for name in table.datasets if len(table.datasets) > 1},
        "cross": crossed(table, found, replicates, seed),
        "not_refused": compared(table, methods, answered, replicates, seed)
        if len(answered) < len(test) else None,
        "slices": {name: slices(table, methods, test[table.dataset[test] == name], replicates, seed)
                   for name in table.datasets},
        "verdicts": verdicts(known, group, [rule.word(score) for score in kept[SIDECAR][0]], replicates,
                             seed),
        "reliability": {name: reliability(known, chances)._asdict() for name, (_, chances) in kept.items()},
        "risk": _risks(np.asarray(1 - known, float), group, {name: scores for name, (scores, _) in
                                                             kept.items()}, replicates, seed),
        "examples": examples(table, test, *kept[SIDECAR], rule),
        "by_depth": _by_depth(table, test)}


def examples(table: Table, rows: Rows, scores: Floats, chances: Floats, rule: VerdictRule) -> list[Tree]:
    """Some of the questions, evenly spaced from the highest P(knows) to the lowest: none is chosen by hand.

    Args:
        scores, chances: the sidecar's log odds and P(knows), of these rows.
    """
    order = np.argsort(-chances, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, EXAMPLES).round().astype(int))]
    return [{"question": str(table.text[rows[i]]), "answer": str(table.answer[rows[i]]),
             "right": bool(table.known[rows[i]]), "p": float(chances[i]), "verdict": rule.word(scores[i])}
            for i in chosen]


def _about(table: Table, rows: Rows) -> Tree:
    return {"questions": len(rows), "known": float(table.known[rows].mean()),
            "refused": float(table.refused[rows].mean()),
            "known_of_answered": float(table.known[rows][~table.refused[rows]].mean())
            if (~table.refused[rows]).any() else None}


def tells(table: Table, rows: Rows) -> bool:
    """Whether there are enough of either kind for an interval that means something."""
    return int(np.bincount(table.known[rows], minlength=2).min()) >= LEAST


def compared(table: Table, methods: Methods, rows: Rows, replicates: int, seed: int) -> Tree:
    """Every method on the same questions, and the sidecar against each; p corrected for all of them.

    What a method says nothing of is left out for it, and it is compared with the sidecar on the rest; where
    the rest are too few of a kind, it is not told of.
    """
    told: Tree = {"questions": len(rows), "known": float(table.known[rows].mean()) if len(rows) else None,
                  "groups": len(np.unique(table.group[rows])), "methods": {}, "comparisons": []}
    if not tells(table, rows):
        return told
    raw = []
    heard = {name: rows[~np.isnan(found.scores[0, rows])] for name, found in methods.items()}
    for chosen in {tuple(own.tolist()): own for own in heard.values() if tells(table, own)}.values():
        known, group = table.known[chosen], table.group[chosen]
        names = [name for name, own in heard.items() if np.array_equal(own, chosen)]
        drawn = PairedBootstrap(known, {name: methods[name].scores[:, chosen] for name in {SIDECAR, *names}},
                                replicates=replicates, seed=seed, groups=group)
        for name in names:
            scores, chances = methods[name].scores[:, chosen], methods[name].probabilities[:, chosen]
            of: Tree = {"questions": len(chosen), "auroc": drawn.interval(name),
                        "runs": [auroc(known, run) for run in scores],
                        "ece_of_calibrated": float(np.mean([calibrated_error(run) for run in chances]))}
            for measure, statistic, values in (("auprc", auprc, scores), ("brier", brier, chances),
                                               ("ece", expected_calibration_error, chances)):
                of[measure] = bootstrap_of(statistic, known, values, replicates=replicates, seed=seed,
                                           groups=group, centred=measure == "ece")
            told["methods"][name] = of
            if name != SIDECAR:
                told["comparisons"].append({"against": name, "questions": len(chosen),
                                            "difference": drawn.difference(SIDECAR, name)})
                raw.append(drawn.p(SIDECAR, name))
    for one, p, corrected in zip(told["comparisons"], raw, holm(raw).tolist(), strict=True):
        one |= {"p": p, "p_holm": corrected}
    return told


def crossed(table: Table, found: Mapping[Scope, Methods], replicates: int, seed: int) -> Tree:
    """Learned from one data set alone, compared with all questions of another that share no group with it."""
    told = {}
    for scope, methods in found.items():
        seen = np.isin(table.group, table.group[table.dataset == scope])
        for other in table.datasets if scope is not None else ():
            if other != scope:
                rows = np.flatnonzero((table.dataset == other) & ~seen)
                told[f"{scope} → {other}"] = compared(table, methods, rows, replicates, seed)
    return told


def slices(table: Table, methods: Methods, rows: Rows, replicates: int, seed: int) -> list[Tree]:
    """From the rarest to the most popular: by the quartiles of popularity, equal ones together."""
    rows = rows[~np.isnan(table.popularity[rows])]
    if not len(rows):
        return []
    popularity = table.popularity[rows]
    edges = np.unique(np.quantile(popularity, np.linspace(0, 1, SLICES + 1)[1:-1]))
    which = np.searchsorted(edges, popularity, side="left")
    found = []
    for number in np.unique(which):
        chosen = rows[which == number]
        told: Tree = {"from": float(table.popularity[chosen].min()),
                      "to": float(table.popularity[chosen].max()), "questions": len(chosen),
                      "known": float(table.known[chosen].mean())}
        if tells(table, chosen):
            known, group, names = table.known[chosen], table.group[chosen], heard(methods, chosen)
            drawn = PairedBootstrap(known, {name: methods[name].scores[:, chosen] for name in names},
                                    replicates=replicates, seed=seed, groups=group)
            told["methods"] = {name: {"auroc": drawn.interval(name)} for name in names}
        found.append(told)
    return found


def verdicts(known: NDArray, group: NDArray, said: list[Verdict | None], replicates: int,
             seed: int) -> Tree:
    """What became of the words: how often each was said, and how often rightly. `[questions]` each."""
    words = np.array([word or "" for word in said])
    found: Tree = {}
    for word in WORDS:
        chosen = words == word
        right = known[chosen] if word == WORDS[0] else 1 - known[chosen]
        found[word] = {"questions": int(chosen.sum()), "share": float(chosen.mean()),
                       "known": float(known[chosen].mean()) if chosen.any() else None,
                       "precision": None if word == WORDS[1] or not chosen.any() else _precision(
                           right, group[chosen], replicates, seed)}
    return found


def _precision(right: NDArray, group: NDArray, replicates: int, seed: int) -> Interval:
    """The wider of two intervals: resampled groups, which know nothing where all are right, and exact."""
    drawn = bootstrap_mean(right, replicates=replicates, seed=seed, groups=group)
    exact = exact_share(int(right.sum()), len(right))
    return Interval(drawn.point, min(drawn.low, exact.low), max(drawn.high, exact.high))


def _risks(errors: Floats, group: NDArray, scores: Mapping[str, Floats], replicates: int, seed: int) -> Tree:
    """Wrong answers among those given first that a method takes for known."""
    found = {}
    for name, run in scores.items():
        curve = selective.risk_coverage(errors, -run, replicates=replicates, seed=seed, groups=group)
        found[name] = {"risks": curve.risks, "low": curve.low, "high": curve.high, "aurc": curve.aurc,
                       "fraction_of_oracle": curve.fraction_of_oracle}
    return {"coverages": selective.GRID, "mean_error": float(errors.mean()),
            "oracle": selective.Order(errors, errors).risks(selective.GRID), "methods": found}


def _by_depth(table: Table, rows: Rows) -> Tree:
    """Mean entropy at the last position (nats), layer by layer, of known and of unknown questions."""
    entropy = table.by_layer[rows, :, 0].astype(float)
    return {name: entropy[table.known[rows] == value].mean(axis=0)
            for name, value in (("known", 1), ("unknown", 0))}
