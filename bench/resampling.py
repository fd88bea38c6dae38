"""Bootstrap and permutation tests, compared with one scikit-learn AUROC call per resampled set.

    python -m bench.resampling [--rounds N]

The loops are a common implementation. Both sides use the same random numbers, and the benchmark checks that
their replicates are equal. 1500 items and 5 scores, as for a probe ladder on a test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from bench.measure import arguments, in_turn, machine, milliseconds, ratio, tee
from tilelli_jax.cli.tables import table
from tilelli_jax.eval.stats import PairedBootstrap, permute_labels

ITEMS, SCORES, REPLICATES, PERMUTATIONS = 1500, 5, 2000, 10_000


def looped_bootstrap(labels: np.ndarray, scores: Mapping[str, np.ndarray], replicates: int,
                     seed: int) -> dict[str, np.ndarray]:
    """AUROC of each score on resampled items: name → `[replicates in which both classes occur]`."""
    rng = np.random.default_rng(seed)
    aurocs: dict[str, list[float]] = {name: [] for name in scores}
    for _ in range(replicates):
        resampled = rng.choice(len(labels), len(labels), replace=True)
        if len(np.unique(labels[resampled])) == 2:
            for name, score in scores.items():
                aurocs[name].append(roc_auc_score(labels[resampled], score[resampled]))
    return {name: np.array(values) for name, values in aurocs.items()}


def looped_permutation(labels: np.ndarray, a: np.ndarray, b: np.ndarray, permutations: int,
                       seed: int) -> np.ndarray:
    """Differences of two AUROCs under permuted labels, `[permutations]`."""
    rng = np.random.default_rng(seed)
    resampled = (rng.permutation(labels) for _ in range(permutations))
    return np.array([roc_auc_score(y, a) - roc_auc_score(y, b) for y in resampled])


def compare(rounds: int, print_line: object) -> None:
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
    rows: list[Sequence[str]] = [("test", "ours, ms", "loop, ms", "speed-up")]
    for name, (fast, looped) in pairs.items():
        expected = looped()
        for key, values in fast().items():
            np.testing.assert_allclose(values, expected[key], rtol=0, atol=1e-12)
        seconds = in_turn({"ours": fast, "theirs": looped}, rounds)
        rows.append((name, milliseconds(seconds["ours"]), milliseconds(seconds["theirs"]),
                     f"{ratio(seconds['theirs'], seconds['ours']):.0f}"))
    print_line(table(rows))  # type: ignore[operator]


def main() -> None:
    options = arguments(__doc__, rounds=1).parse_args()
    with tee(options.out) as print_line:
        print_line(f"{machine()}; {ITEMS} items, {options.rounds} alternating rounds")
        compare(options.rounds, print_line)


if __name__ == "__main__":
    main()
