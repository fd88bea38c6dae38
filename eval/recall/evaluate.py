"""What scores come to on held-out questions: a tree of JSON. Nothing here asks a network.

Intervals are of 95 % and resample whole groups of questions. A method of several runs is told by the mean
over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from eval import selective
from eval.metrics import Floats, auprc, auroc, brier, expected_calibration_error, reliability
from eval.recall.fit import SIDECAR
from eval.recall.table import Table
from eval.stats import PairedBootstrap, bootstrap_of, holm
from eval.thresholds import verdict

Tree = dict[str, Any]
Rows = NDArray[np.intp]
FEW = 20  # groups: with fewer, intervals are too narrow and p too small
SLICES = 4  # of popularity
LEAST = 8  # questions of a slice
WORDS = ("likely knows", "uncertain", "likely beyond its knowledge")


def column(scope: str | None, method: str, run: int, what: str) -> str:
    """The name of a column of scores.parquet: scope is the data set that was learned from, None for all."""
    return "/".join(["all" if scope is None else f"from {scope}", method, str(run), what])


class Methods:
    """The columns of one scope: scores and P(knows) of every method, `[runs, questions]` each."""

    def __init__(self, columns: Mapping[str, np.ndarray], scope: str | None = None) -> None:
        prefix = column(scope, "", 0, "").partition("/")[0] + "/"
        self.scores: dict[str, Floats] = {}
        self.chances: dict[str, Floats] = {}
        for kept, what in ((self.scores, "score"), (self.chances, "p")):
            found: dict[str, list[np.ndarray]] = {}
            for name, values in columns.items():
                if name.startswith(prefix) and name.endswith(f"/{what}"):
                    found.setdefault(name.removeprefix(prefix).rsplit("/", 2)[0], []).append(values)
            kept |= {name: np.stack(runs) for name, runs in found.items()}

    def heard(self, rows: Rows) -> list[str]:
        """The methods that say something of all these rows."""
        return [name for name, scores in self.scores.items() if not np.isnan(scores[:, rows]).any()]


def evaluate(table: Table, columns: Mapping[str, np.ndarray], fitted: Tree, replicates: int,
             seed: int = 42) -> Tree:
    """All that the report tells.

    Args:
        columns: of scores.parquet.
        fitted: the fit's result.json.
    """
    methods, test = Methods(columns), table.rows("test")
    known, group = table.known[test], table.group[test]
    best = fitted["seeds"].index(fitted["sidecar"])
    return {
        "questions": len(table.known), "test": len(test), "groups": len(np.unique(group)),
        "known": float(known.mean()), "known_all": float(table.known.mean()),
        "refused": float(table.refused.mean()),
        "datasets": {name: _about(table, np.flatnonzero(table.dataset == name)) for name in table.datasets},
        "parts": {part: len(table.rows(part)) for part in ("train", "validate", "calibrate", "test")},
        **_compared(table, methods, test, replicates, seed),
        "within": {name: _areas(table, methods, rows, replicates, seed)
                   for name in table.datasets if _tells(table, rows := table.rows("test", name))
                   and len(table.datasets) > 1},
        "cross": _crossed(table, columns, fitted["scopes"], replicates, seed),
        "not_refused": _areas(table, methods, test[~table.refused[test]], replicates, seed)
        if table.refused[test].any() and _tells(table, test[~table.refused[test]]) else None,
        "slices": {name: _slices(table, methods, test[table.dataset[test] == name], replicates, seed)
                   for name in table.datasets},
        "verdicts": _verdicts(table, methods, test, best, fitted["verdict"], replicates, seed),
        "reliability": {name: _reliability(known, methods.chances[name][best if name == SIDECAR else 0, test])
                        for name in methods.heard(test)},
        "risk": _risks(table, methods, test, best, replicates, seed),
        "by_depth": _by_depth(table, test)}


def _about(table: Table, rows: Rows) -> Tree:
    return {"questions": len(rows), "known": float(table.known[rows].mean()),
            "refused": float(table.refused[rows].mean()),
            "known_of_answered": float(table.known[rows][~table.refused[rows]].mean())
            if (~table.refused[rows]).any() else None}


def _tells(table: Table, rows: Rows) -> bool:
    return np.bincount(table.known[rows], minlength=2).min() >= 2


def _compared(table: Table, methods: Methods, rows: Rows, replicates: int, seed: int) -> Tree:
    """Every method on the same questions, and the sidecar against each; p corrected for all of them."""
    known, group, names = table.known[rows], table.group[rows], methods.heard(rows)
    drawn = PairedBootstrap(known, {name: methods.scores[name][:, rows] for name in names},
                            replicates=replicates, seed=seed, groups=group)
    few = min(replicates, 1000)
    found = {}
    for name in names:
        chances = methods.chances[name][:, rows]
        found[name] = {
            "auroc": drawn.interval(name),
            "runs": [auroc(known, run) for run in methods.scores[name][:, rows]],
            "auprc": bootstrap_of(auprc, known, methods.scores[name][:, rows], replicates=few, seed=seed,
                                  groups=group),
            "ece": bootstrap_of(expected_calibration_error, known, chances, replicates=few, seed=seed,
                                groups=group),
            "brier": bootstrap_of(brier, known, chances, replicates=few, seed=seed, groups=group)}
    rivals = [name for name in names if name != SIDECAR]
    p = [drawn.p(SIDECAR, name) for name in rivals]
    return {"methods": found, "comparisons": [
        {"against": name, "difference": drawn.difference(SIDECAR, name), "p": raw, "p_holm": corrected}
        for name, raw, corrected in zip(rivals, p, holm(p).tolist(), strict=True)]}


def _areas(table: Table, methods: Methods, rows: Rows, replicates: int, seed: int) -> Tree:
    """AUROC and calibration of every method on some rows."""
    known, group, names = table.known[rows], table.group[rows], methods.heard(rows)
    drawn = PairedBootstrap(known, {name: methods.scores[name][:, rows] for name in names},
                            replicates=replicates, seed=seed, groups=group)
    return {"questions": len(rows), "known": float(known.mean()), "groups": len(np.unique(group)),
            "methods": {name: {"auroc": drawn.interval(name), "ece": float(np.mean(
                [expected_calibration_error(known, run) for run in methods.chances[name][:, rows]]))}
                for name in names}}


def _crossed(table: Table, columns: Mapping[str, np.ndarray], scopes: list[str], replicates: int,
             seed: int) -> Tree:
    """Learned from one data set alone, held against all questions of another that share no group with it."""
    found = {}
    for scope in scopes:
        seen = set(table.group[table.dataset == scope].tolist())
        for other in table.datasets:
            rows = np.array([i for i in np.flatnonzero(table.dataset == other) if table.group[i] not in seen],
                            np.intp)
            if other != scope and _tells(table, rows):
                found[f"{scope} → {other}"] = _areas(table, Methods(columns, scope), rows, replicates, seed)
    return found


def _slices(table: Table, methods: Methods, rows: Rows, replicates: int, seed: int) -> list[Tree]:
    """From the rarest to the most popular: by the quartiles of popularity, equal ones together."""
    rows = rows[~np.isnan(table.popularity[rows])]
    if len(rows) < LEAST:
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
        if len(chosen) >= LEAST and _tells(table, chosen):
            told["methods"] = _areas(table, methods, chosen, replicates, seed)["methods"]
        found.append(told)
    return found


def _verdicts(table: Table, methods: Methods, rows: Rows, run: int, judge: Mapping[str, Any],
              replicates: int, seed: int) -> Tree:
    """What became of the words that the kept sidecar says: how often, and how often rightly."""
    chance = expit(methods.scores[SIDECAR][run, rows])
    said = np.array([verdict(one, judge["green"], judge["red"]) for one in chance])
    found = {}
    for word in WORDS:
        chosen = said == word
        right = table.known[rows][chosen] if word == WORDS[0] else 1 - table.known[rows][chosen]
        found[word] = {"questions": int(chosen.sum()), "share": float(chosen.mean()),
                       "known": float(table.known[rows][chosen].mean()) if chosen.any() else None,
                       "precision": None if word == WORDS[1] or not chosen.any() else bootstrap_of(
                           lambda labels, _: float(labels.mean()), right, np.zeros(len(right)),
                           replicates=min(replicates, 1000), seed=seed, groups=table.group[rows][chosen])}
    return found


def _reliability(known: NDArray, chances: Floats) -> Tree:
    found = reliability(known, chances)
    return {"foretold": found.foretold, "happened": found.happened, "counts": found.counts}


def _risks(table: Table, methods: Methods, rows: Rows, run: int, replicates: int, seed: int) -> Tree:
    """Wrong answers among those given first that a method takes for known."""
    errors, group = 1.0 - table.known[rows], table.group[rows]
    found = {}
    for name in methods.heard(rows):
        curve = selective.risk_coverage(errors, -methods.scores[name][run if name == SIDECAR else 0, rows],
                                        replicates=min(replicates, 500), seed=seed, groups=group)
        found[name] = {"risks": curve.risks, "low": curve.low, "high": curve.high, "aurc": curve.aurc,
                       "fraction_of_oracle": curve.fraction_of_oracle}
    return {"coverages": selective.GRID, "mean_error": float(errors.mean()),
            "oracle": selective.Order(errors, errors).risks(selective.GRID), "methods": found}


def _by_depth(table: Table, rows: Rows) -> Tree:
    """Mean entropy at the last position (nats), layer by layer, of known and of unknown questions."""
    entropy = table.by_layer[rows, :, 0].astype(float)
    return {name: entropy[table.known[rows] == value].mean(axis=0)
            for name, value in (("known", 1), ("unknown", 0))}
