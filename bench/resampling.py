"""Bootstrap and permutation tests against one call of scikit-learn's AUROC for each resampled set.

    python -m bench.resampling [--rounds N]

The loops are those that studies commonly have, and the streams of random numbers are the same, so that
both sides come to the same intervals: it is checked. 1500 items, 5 scores: the shape of a probe ladder
on a test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import roc_auc_score
from tilelli_jax.eval.stats import PairedBootstrap, permute_labels

from bench.measure import arguments, in_turn, machine, milliseconds, ratio, told
from tilelli_jax.tables import table

ITEMS, SCORES, REPLICATES, PERMUTATIONS = 1500, 5, 2000, 10_000


def looped_bootstrap(labels: np.ndarray, scores: Mapping[str, np.ndarray], replicates: int,
                     seed: int) -> dict[str, np.ndarray]:
    """AUROCs of resampled items, one call for each: name → `[replicates of both classes]`."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in scores}
    for _ in range(replicates):
        drawn = rng.choice(len(labels), len(labels), replace=True)
        if len(np.unique(labels[drawn])) == 2:
            for name, score in scores.items():
                found[name].append(roc_auc_score(labels[drawn], score[drawn]))
    return {name: np.array(values) for name, values in found.items()}


def looped_permutation(labels: np.ndarray, a: np.ndarray, b: np.ndarray, permutations: int,
                       seed: int) -> np.ndarray:
    """Differences of two AUROCs under permuted labels, two calls for each: `[permutations]`."""
    rng = np.random.default_rng(seed)
    drawn = (rng.permutation(labels) for _ in range(permutations))
    return np.array([roc_auc_score(y, a) - roc_auc_score(y, b) for y in drawn])


def compare(rounds: int, tell: object) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(ITEMS) < 0.18).astype(int)
    scores = {f"score {i}": rng.standard_normal(ITEMS) + 0.3 * labels for i in range(SCORES)}
    a, b = (scores[f"score {i}"] for i in range(2))
    pairs = {
        f"bootstrap, {REPLICATES} × {SCORES} scores": (
            lambda: PairedBootstrap(labels, scores, replicates=REPLICATES).replicates,
            lambda: looped_bootstrap(labels, scores, REPLICATES, 42)),
        f"permutation, {PERMUTATIONS} × 2 scores": (
            lambda: {"null": permute_labels(labels, a, b, permutations=PERMUTATIONS).null},
            lambda: {"null": looped_permutation(labels, a, b, PERMUTATIONS, 42)})}
    rows: list[Sequence[str]] = [("", "here, ms", "one call for each, ms", "times as fast")]
    for name, (ours, theirs) in pairs.items():
        expected = theirs()
        for key, values in ours().items():
            np.testing.assert_allclose(values, expected[key], rtol=0, atol=1e-12)
        seconds = in_turn({"ours": ours, "theirs": theirs}, rounds)
        rows.append((name, milliseconds(seconds["ours"]), milliseconds(seconds["theirs"]),
                     f"{ratio(seconds['theirs'], seconds['ours']):.0f}"))
    tell(table(rows))  # type: ignore[operator]


def main() -> None:
    options = arguments(__doc__, rounds=1).parse_args()
    with told(options.out) as tell:
        tell(f"{machine()}; {ITEMS} items, {options.rounds} rounds in turn")
        compare(options.rounds, tell)


if __name__ == "__main__":
    main()
