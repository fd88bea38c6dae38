"""Evaluates all methods on the test split and returns a JSON tree. Does not run the network.

Intervals are 95 % bootstrap intervals that resample whole groups of questions. A method with several runs
(seeds) is reported as the mean over its runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from tilelli_jax.signals.crystallisation import BY_LAYER

from .. import selective
from ..checks import Floats
from ..estimators.panel import PRESETS, SIDECAR
from ..estimators.table import SPLITS, UNANSWERABLE, QuestionTable
from ..metrics import (
    auprc,
    auroc,
    brier,
    expected_calibration_error,
    expected_ece_if_calibrated,
    reliability,
)
from ..stats import Interval, PairedBootstrap, bootstrap_mean, bootstrap_of, exact_fraction, holm
from ..thresholds import Verdict
from .config import BEST_FREE
from .labelling import NEEDED
from .scores import Methods, Scope, Scores, complete_methods
from .verdicts import VerdictRule

Tree = dict[str, Any]
Rows = NDArray[np.intp]
N_BINS = 4  # popularity bins
MIN_PER_LABEL = NEEDED["test"]  # known questions, and as many unknown ones, that an interval needs
N_EXAMPLES = 10  # questions listed in the report
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
IN_FIGURES = (SIDECAR, "layer_probe", "prompt_features", "first_token_entropy", "words")  # in all figures
RANKING: dict[str, Callable[[NDArray, Floats], float]] = {  # (labels, scores of one run) → metric
    "auprc": auprc, "aurc": lambda labels, run: selective.aurc(1.0 - labels, -run),
    "prr": lambda labels, run: selective.prr(1.0 - labels, -run),
    "prr_half": lambda labels, run: selective.prr(1.0 - labels, -run, selective.HALF)}


def evaluate(table: QuestionTable, scores: Mapping[Scope, Methods], run: int, rule: VerdictRule,
             replicates: int, seed: int = 42, primary: Sequence[str] = ()) -> Tree:
    """Returns everything that the report shows, one key for each of its sections.

    Args:
        scores: scores of every method, by the data set that it was trained on.
        run: index of the exported sidecar's run. Verdicts, reliability, risk and examples are of that run.
        rule: the exported sidecar's thresholds.
        primary: see `primary_comparisons`.

    The test split has at least MIN_PER_LABEL known and as many unknown questions (`labelling.check_labels`).
    """
    methods, test = scores[None], table.rows("test")
    labelled = np.flatnonzero(table.split != UNANSWERABLE)
    known, group = table.known[test], table.group[test]
    selected = {name: (log_odds[run if name == SIDECAR else 0, test],
                       probabilities[run if name == SIDECAR else 0, test])
                for name, (log_odds, probabilities) in methods.items()
                if name in complete_methods(methods, test)}
    answered = test[~table.refused[test]]
    free = best_free(table, methods)
    overall = compare(table, methods, test, replicates, seed, free=free, all_metrics=True)
    return {
        "questions": len(labelled), "unanswerable": len(table.known) - len(labelled),
        "test": len(test), "groups": len(np.unique(group)), "known": float(known.mean()),
        "known_all": float(table.known[labelled].mean()), "refused": float(table.refused[labelled].mean()),
        "datasets": {name: _dataset_summary(table, np.flatnonzero(table.dataset == name))
                     for name in table.datasets},
        "splits": {split: int((table.split == split).sum()) for split in SPLITS},
        "methods": overall["methods"], "comparisons": overall["comparisons"],
        "primary": primary_comparisons(table, methods, test, primary, free, replicates, seed),
        "free": free, "comparisons_with_free": overall.get("comparisons_with_free", []),
        "within_dataset": {name: compare(table, methods, table.rows("test", name), replicates, seed)
                           for name in table.datasets if len(table.datasets) > 1},
        "within_category": within_category(table, methods, test, replicates, seed, free),
        "cross_dataset": cross_dataset(table, scores, replicates, seed),
        "answerability": answerability(table, methods, test, replicates, seed),
        "answered_only": compare(table, methods, answered, replicates, seed)
        if len(answered) < len(test) else None,
        "by_popularity": {name: by_popularity(table, methods, test[table.dataset[test] == name], replicates,
                                              seed) for name in table.datasets},
        "verdicts": verdict_precision(known, group, [rule.verdict(score) for score in selected[SIDECAR][0]],
                                      replicates, seed),
        "reliability": {name: reliability(known, probabilities)._asdict()
                        for name, (_, probabilities) in selected.items()
                        if name in IN_FIGURES or name == free},
        "risk": _risks(np.asarray(1 - known, float), group,
                       {name: log_odds for name, (log_odds, _) in selected.items()
                        if name in IN_FIGURES or name == free}, replicates, seed),
        "examples": examples(table, test, *selected[SIDECAR], rule),
        "extremes": extremes(table, test, *selected[SIDECAR], rule),
        "entropy_by_layer": _entropy_by_layer(table, test)}


def examples(table: QuestionTable, rows: Rows, log_odds: Floats, probabilities: Floats, rule: VerdictRule
             ) -> list[Tree]:
    """Returns N_EXAMPLES questions at evenly spaced ranks, from the highest P(knows) to the lowest.

    Args:
        log_odds, probabilities: the sidecar's log odds and P(knows) of these rows.
    """
    order = np.argsort(-probabilities, kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, N_EXAMPLES).round().astype(int))
    return [_example(table, rows[i], log_odds[i], probabilities[i], rule) for i in order[ranks]]


def extremes(table: QuestionTable, rows: Rows, log_odds: Floats, probabilities: Floats, rule: VerdictRule
             ) -> dict[str, list[Tree]]:
    """Returns the N_EXAMPLES questions of the highest and of the lowest P(knows), the most extreme first."""
    order = np.argsort(-probabilities, kind="stable")
    return {name: [_example(table, rows[i], log_odds[i], probabilities[i], rule) for i in chosen]
            for name, chosen in (("highest", order[:N_EXAMPLES]), ("lowest", order[::-1][:N_EXAMPLES]))}


def _example(table: QuestionTable, row: int, log_odds: float, probability: float, rule: VerdictRule) -> Tree:
    return {"question": str(table.text[row]), "answer": str(table.answer[row]),
            "expected": table.answers[row][0] if table.answers[row] else "",
            "correct": bool(table.known[row]), "p": float(probability), "verdict": rule.verdict(log_odds)}


def best_free(table: QuestionTable, methods: Methods) -> str | None:
    """Returns the free score (`panel.PRESETS`) with the best AUROC on the validate split."""
    rows = table.rows("validate")
    areas = {name: auroc(table.known[rows], methods[name].scores[0, rows])
             for name in PRESETS["free"] if name in methods}
    return max(areas, key=lambda name: areas[name]) if areas else None


def answerability(table: QuestionTable, methods: Methods, test: Rows, replicates: int,
                  seed: int) -> Tree | None:
    """Compares the test questions with those that have no answer: do scores of correctness separate them?

    Questions without an answer that share a group with a question used for fitting are left out.

    Returns:
        None without at least MIN_PER_LABEL unanswerable questions; else AUROCs of answerable against
        unanswerable questions, by method.
    """
    fitted = table.group[(table.split != "test") & (table.split != UNANSWERABLE)]
    unanswerable = np.flatnonzero((table.split == UNANSWERABLE) & ~np.isin(table.group, fitted))
    if len(unanswerable) < MIN_PER_LABEL:
        return None
    rows = np.concatenate([test, unanswerable])
    label = (table.split[rows] != UNANSWERABLE).astype(np.int64)
    return compare(dataclasses.replace(table, known=_placed(label, rows, len(table.known))), methods, rows,
                   replicates, seed)


def _placed(values: NDArray, rows: Rows, n: int) -> NDArray:
    placed = np.zeros(n, values.dtype)
    placed[rows] = values
    return placed


def _dataset_summary(table: QuestionTable, rows: Rows) -> Tree:
    labelled = rows[table.split[rows] != UNANSWERABLE]
    known, refused = table.known[labelled], table.refused[labelled]
    return {"questions": len(labelled), "unanswerable": len(rows) - len(labelled),
            "known": float(known.mean()) if len(labelled) else None,
            "refused": float(refused.mean()) if len(labelled) else None,
            "known_among_answered": float(known[~refused].mean()) if (~refused).any() else None}


def has_both_labels(table: QuestionTable, rows: Rows) -> bool:
    """Returns whether these rows have at least MIN_PER_LABEL known and as many unknown questions."""
    return int(np.bincount(table.known[rows], minlength=2).min()) >= MIN_PER_LABEL


def within_category(table: QuestionTable, methods: Methods, rows: Rows, replicates: int, seed: int,
                    free: str | None) -> Tree | None:
    """Compares the methods by the AUROC of pairs of questions of the same category; see `compare`.

    A method that only recognises the category has 0.5. None without several categories, or if none of them
    has known and unknown questions.
    """
    category = table.category[rows]
    if len(np.unique(category)) < 2 or "" in category or not has_both_labels(table, rows):
        return None
    if not _has_pairs(table, rows):
        return None
    return compare(table, methods, rows, replicates, seed, free=free, strata=table.category)


def _has_pairs(table: QuestionTable, rows: Rows) -> bool:
    """Whether some category has known and unknown questions among these rows."""
    return any(0 < table.known[inside].sum() < len(inside) for name in np.unique(table.category[rows])
               for inside in [rows[table.category[rows] == name]])


def compare(table: QuestionTable, methods: Methods, rows: Rows, replicates: int, seed: int, *,
            free: str | None = None, all_metrics: bool = False, strata: NDArray | None = None) -> Tree:
    """Scores every method on these rows and compares the sidecar with each of the others.

    The test is a paired bootstrap over groups; `p_holm` is corrected for all comparisons of this call with
    one reference. A method without a score for some rows is evaluated, and compared with the sidecar, on the
    others; it is omitted if these have too few known or unknown questions.

    Args:
        free: a free score with which every other method is compared too.
        all_metrics: also AUPRC, Brier score, AURC and PRR.
        strata: `[questions]`; AUROCs, and no other metric, are then of pairs of the same stratum.
    """
    result: Tree = {"questions": len(rows), "known": float(table.known[rows].mean()) if len(rows) else None,
                    "groups": len(np.unique(table.group[rows])), "methods": {}, "comparisons": []}
    references = {"comparisons": SIDECAR} | ({} if free is None else {"comparisons_with_free": free})
    result |= {key: [] for key in references}
    if not has_both_labels(table, rows):
        return result
    p_values: dict[str, list[float]] = {key: [] for key in references}
    scored_rows = {name: rows[~np.isnan(scores.scores[0, rows])] for name, scores in methods.items()}
    distinct = {tuple(scored.tolist()): scored for scored in scored_rows.values()
                if has_both_labels(table, scored) and (strata is None or _has_pairs(table, scored))}
    for subset in distinct.values():
        known, group = table.known[subset], table.group[subset]
        names = [name for name, scored in scored_rows.items() if np.array_equal(scored, subset)]
        bootstrap = PairedBootstrap(
            known, {name: methods[name].scores[:, subset] for name in {*references.values(), *names}},
            replicates=replicates, seed=seed, groups=group, strata=None if strata is None else strata[subset])
        for name in names:
            result["methods"][name] = {"questions": len(subset), "auroc": bootstrap.interval(name)}
            if strata is None:
                result["methods"][name] |= _metrics(methods[name], subset, known, group, replicates, seed,
                                                    all_metrics)
            for key, reference in references.items():
                if name != reference:
                    result[key].append({"baseline": name, "questions": len(subset),
                                        "groups": len(np.unique(group)),
                                        "difference": bootstrap.difference(reference, name)})
                    p_values[key].append(bootstrap.p(reference, name))
    for key, of_key in p_values.items():
        for comparison, p, corrected in zip(result[key], of_key, holm(of_key).tolist(), strict=True):
            comparison |= {"p": p, "p_holm": corrected}
    return result


def _metrics(scores: Scores, rows: Rows, known: NDArray, group: NDArray, replicates: int, seed: int,
             all_metrics: bool) -> Tree:
    """The metrics of a method on these rows besides its AUROC; see `compare`."""
    log_odds, probabilities = scores.scores[:, rows], scores.probabilities[:, rows]
    metrics: Tree = {
        "runs": [auroc(known, run) for run in log_odds],
        "ece_if_calibrated": float(np.mean([expected_ece_if_calibrated(run) for run in probabilities]))}
    of_scores = [(metric, statistic, log_odds) for metric, statistic in RANKING.items()]
    for metric, statistic, values in (
            ("ece", expected_calibration_error, probabilities),
            *((("brier", brier, probabilities), *of_scores) if all_metrics else ())):
        metrics[metric] = bootstrap_of(statistic, known, values, replicates=replicates, seed=seed,
                                       groups=group, centred=metric == "ece")
    return metrics


def primary_comparisons(table: QuestionTable, methods: Methods, rows: Rows, primary: Sequence[str],
                        free: str | None, replicates: int, seed: int) -> list[Tree]:
    """Compares pairs of methods by AUROC on the rows that both score; corrected for one another only.

    A comparison that cannot be made keeps its place, with p = 1 and the reason in `missing`.

    Args:
        primary: comparisons "A - B"; BEST_FREE stands for `free`.
    """
    results: list[Tree] = []
    for comparison in primary:
        a, b = (str(free) if name == BEST_FREE else name for name in comparison.split(" - "))
        result: Tree = {"comparison": f"{a} - {b}", "questions": 0, "groups": 0, "auroc": None,
                        "difference": None, "p": 1.0, "missing": None}
        results.append(result)
        absent = [name for name in (a, b) if name not in methods]
        scored = rows if absent else rows[~np.isnan(methods[a].scores[0, rows])
                                          & ~np.isnan(methods[b].scores[0, rows])]
        if absent or a == b or not has_both_labels(table, scored):
            result["missing"] = (f"{' and '.join(absent)} has no scores" if absent else "the same method"
                                 if a == b else "too few known or unknown questions")
            continue
        bootstrap = PairedBootstrap(
            table.known[scored], {name: methods[name].scores[:, scored] for name in (a, b)},
            replicates=replicates, seed=seed, groups=table.group[scored])
        result |= {"questions": len(scored), "groups": len(np.unique(table.group[scored])),
                   "auroc": {name: bootstrap.interval(name) for name in (a, b)},
                   "difference": bootstrap.difference(a, b), "p": bootstrap.p(a, b)}
    for result, corrected in zip(results, holm([result["p"] for result in results]).tolist(), strict=True):
        result["p_holm"] = corrected
    return results


def cross_dataset(table: QuestionTable, scores: Mapping[Scope, Methods], replicates: int, seed: int) -> Tree:
    """Evaluates methods trained on one data set on all questions of another that share no group with it."""
    results = {}
    for scope, methods in scores.items():
        shared = np.isin(table.group, table.group[table.dataset == scope])
        for other in table.datasets if scope is not None else ():
            if other != scope:
                rows = np.flatnonzero((table.dataset == other) & ~shared & (table.split != UNANSWERABLE))
                results[f"{scope} → {other}"] = compare(table, methods, rows, replicates, seed)
    return results


def by_popularity(table: QuestionTable, methods: Methods, rows: Rows, replicates: int,
                  seed: int) -> list[Tree]:
    """Evaluates quartiles of popularity, lowest first; equal popularities share a bin."""
    rows = rows[~np.isnan(table.popularity[rows])]
    if not len(rows):
        return []
    popularity = table.popularity[rows]
    edges = np.unique(np.quantile(popularity, np.linspace(0, 1, N_BINS + 1)[1:-1]))
    bin_of_row = np.searchsorted(edges, popularity, side="left")
    results = []
    for number in np.unique(bin_of_row):
        subset = rows[bin_of_row == number]
        result: Tree = {"from": float(table.popularity[subset].min()),
                        "to": float(table.popularity[subset].max()), "questions": len(subset),
                        "known": float(table.known[subset].mean())}
        if has_both_labels(table, subset):
            known, group, names = table.known[subset], table.group[subset], complete_methods(methods, subset)
            bootstrap = PairedBootstrap(known, {name: methods[name].scores[:, subset] for name in names},
                                        replicates=replicates, seed=seed, groups=group)
            result["methods"] = {name: {"auroc": bootstrap.interval(name)} for name in names}
        results.append(result)
    return results


def verdict_precision(known: NDArray, group: NDArray, verdicts: Sequence[Verdict | None], replicates: int,
                      seed: int) -> Tree:
    """Returns how often each verdict was given and how often it was correct. All inputs: `[questions]`."""
    texts = np.array([verdict or "" for verdict in verdicts])
    results: Tree = {}
    for verdict in VERDICTS:
        mask = texts == verdict
        correct = known[mask] if verdict == VERDICTS[0] else 1 - known[mask]
        results[verdict] = {
            "questions": int(mask.sum()), "fraction": float(mask.mean()),
            "known": float(known[mask].mean()) if mask.any() else None,
            "precision": None if verdict == VERDICTS[1] or not mask.any() else _precision(
                correct, group[mask], replicates, seed)}
    return results


def _precision(correct: NDArray, group: NDArray, replicates: int, seed: int) -> Interval:
    """Returns the union of a group bootstrap interval and an exact binomial interval.

    The bootstrap interval alone has width 0 where all are correct.
    """
    bootstrap = bootstrap_mean(correct, replicates=replicates, seed=seed, groups=group)
    exact = exact_fraction(int(correct.sum()), len(correct))
    return Interval(bootstrap.point, min(bootstrap.low, exact.low), max(bootstrap.high, exact.high))


def _risks(errors: Floats, group: NDArray, scores: Mapping[str, Floats], replicates: int, seed: int) -> Tree:
    """Returns risk–coverage curves: the fraction of wrong answers when the highest scores are answered."""
    curves = {name: selective.risk_coverage(errors, -values, replicates=replicates, seed=seed,
                                            groups=group).to_tree() for name, values in scores.items()}
    return {"coverages": selective.GRID, "mean_error": float(errors.mean()),
            "oracle": selective.Ranking(errors, errors).risks(selective.GRID), "methods": curves}


def _entropy_by_layer(table: QuestionTable, rows: Rows) -> Tree:
    """Returns the mean logit-lens entropy (nats) at the last position, for known and unknown questions."""
    entropy = table.by_layer[rows, :, BY_LAYER.index("a_entropy_final")].astype(float)
    return {name: entropy[table.known[rows] == label].mean(axis=0)
            for name, label in (("known", 1), ("unknown", 0))}
