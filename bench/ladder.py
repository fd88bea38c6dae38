"""Time to fit the probe ladder at the size of a study: python -m bench.ladder [--dense].

3500 rows, 8 cheap features, 1024 features of a residual stream, 4096 latents of which 32 are active; 5 folds
× 9 regularisation strengths. `--dense` also fits the rungs with latents as dense, centred columns, as
scikit-learn's pipelines do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import scipy.sparse

from bench.measure import arguments, machine, tee
from tilelli_jax.cli.tables import table
from tilelli_jax.eval.folds import stratified
from tilelli_jax.eval.probes import LADDER, Block, ProbeOptions, concatenate_blocks, fit_probe

ROWS, CHEAP, STREAM, LATENTS, ACTIVE = 3500, 8, 1024, 4096, 32


def problem() -> tuple[dict[str, Block], np.ndarray]:
    """Correlated activations and sparse codes; the label depends on one stream and one cheap feature."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((ROWS, STREAM // 16)) @ rng.standard_normal((STREAM // 16, STREAM))
    stream = shared + 0.7 * rng.standard_normal((ROWS, STREAM))
    codes = np.where(rng.random((ROWS, LATENTS)) < ACTIVE / LATENTS, rng.exponential(size=(ROWS, LATENTS)), 0)
    cheap = rng.standard_normal((ROWS, CHEAP))
    odds = stream[:, 0] / stream[:, 0].std() + cheap[:, 0] - 1
    labels = (rng.random(ROWS) < 1 / (1 + np.exp(-odds))).astype(int)
    return {"cheap": cheap, "raw": stream, "sae": scipy.sparse.csr_array(codes)}, labels


def compare(dense: bool, print_line: Callable[[str], None]) -> None:
    blocks, labels = problem()
    folds = stratified(labels)
    rows = [("rung", "columns", "seconds", "chosen C")]

    def fit(name: str, features: Block) -> None:
        begin = time.perf_counter()
        probe = fit_probe(features, labels, folds, ProbeOptions())
        kind = "sparse" if scipy.sparse.issparse(features) else "dense"
        rows.append((name, f"{features.shape[1]}, {kind}", f"{time.perf_counter() - begin:.1f}",
                     f"{probe.c_value:g}"))
    for rung in LADDER:
        features = concatenate_blocks(blocks, rung.blocks)
        fit(rung.name, features)
        if dense and not isinstance(features, np.ndarray):
            fit(rung.name, np.asarray(features.todense()))
    print_line(table(rows))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dense", action="store_true", help="also fit sparse rungs with dense columns")
    options = parser.parse_args()
    with tee(options.out) as print_line:
        print_line(f"{machine()}; {ROWS} rows, one run")
        compare(options.dense, print_line)


if __name__ == "__main__":
    main()
