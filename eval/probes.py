"""The probe ladder: which blocks of features predict a label, and does one block add to another?

A probe is L1-penalised logistic regression. Cross-validation on the training rows selects C, the inverse
strength of the penalty. The solver is liblinear's coordinate descent, the only one of scikit-learn that
supports L1 and sparse columns without a learning rate. Sparse blocks stay sparse: a TopK code with 32 of 4096
latents is 99 % zeros, and liblinear's time grows with the number of nonzeros. The fits of a rung run in
parallel.

liblinear penalises its intercept. Here the intercept is the weight of a column with a large constant, so that
its penalty is negligible. Sparse columns are scaled without centring, and only an unpenalised intercept can
absorb their means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import scipy.sparse
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from . import checks
from .checks import Floats
from .folds import Folds, check_folds
from .metrics import auroc
from .stats import DeLong, Interval, PairedBootstrap, delong, holm

Block: TypeAlias = NDArray[np.floating] | scipy.sparse.csr_array
C_VALUES = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclasses.dataclass(frozen=True)
class Rung:
    """A probe's name and the feature blocks that it uses."""

    name: str
    blocks: tuple[str, ...]


LADDER = (Rung("P1_cheap", ("cheap",)), Rung("P2_cheap_raw", ("cheap", "raw")),
          Rung("P3_cheap_sae", ("cheap", "sae")), Rung("P4_raw_only", ("raw",)),
          Rung("P5_sae_only", ("sae",)))


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """Options of fitting a probe.

    Attributes:
        c_values: candidate values of C, the inverse penalty strength: the larger C, the weaker the penalty.
        intercept_scaling: constant of the intercept's column; 1 penalises the intercept like any weight.
        scale_once: standardise by all training rows before cross-validation, instead of within each fold.
        max_iter: maximum number of sweeps of the solver.
        seed: seed of the solver's coordinate order.
        jobs: number of parallel fits, each in a process; −1 uses every core.
    """

    c_values: tuple[float, ...] = C_VALUES
    intercept_scaling: float = 100.0
    scale_once: bool = False
    max_iter: int = 2000
    seed: int = 42
    jobs: int = -1

    def __post_init__(self) -> None:
        if not self.c_values:
            raise ValueError("c_values: expected at least one, found none")
        for c_value in self.c_values:
            checks.positive(c_value, "c_values")
        checks.positive(self.intercept_scaling, "intercept_scaling")
        checks.count(self.max_iter, "max_iter")
        checks.seed(self.seed)
        if not checks.count(self.jobs, "jobs", min=-1):
            raise ValueError("jobs: expected at least 1, or -1 for every core, found 0")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted probe.

    Attributes:
        pipeline: standardisation and logistic regression, fitted on all training rows.
        c_value: the selected C.
        cross_validated: C → mean AUROC over the folds.
    """

    pipeline: Pipeline
    c_value: float
    cross_validated: Mapping[float, float]

    def probabilities(self, features: Block) -> Floats:
        """Returns P(label is 1), `[items]`."""
        return self.pipeline.predict_proba(
            check_features(features, columns=self.pipeline.n_features_in_))[:, 1]

    @property
    def weights(self) -> Floats:
        """Weights of the standardised features, `[features]`."""
        return self.pipeline[-1].coef_[0]


def concatenate_blocks(blocks: Mapping[str, Block], names: Sequence[str]) -> Block:
    """Concatenates the named blocks along the columns: sparse if any of them is."""
    for name in names:
        checks.one_of(name, blocks, "blocks")
    selected = [blocks[name] for name in names]
    if len(rows := {np.shape(block)[0] for block in selected}) != 1:
        raise ValueError("blocks: expected at least one, all with the same number of rows, found row counts "
                         f"{sorted(rows)}")
    if len(selected) == 1:
        return selected[0]
    if any(scipy.sparse.issparse(block) for block in selected):
        return scipy.sparse.hstack(selected, format="csr")
    return np.concatenate(selected, axis=1)


def check_features(features: Block, rows: int | None = None, columns: int | None = None) -> Block:
    """Returns features `[rows, columns]`. Raises ValueError for another shape or non-finite numbers."""
    if not scipy.sparse.issparse(features):
        return checks.matrix(features, rows, columns, "features")
    if rows not in (None, features.shape[0]) or columns not in (None, features.shape[1]):
        raise ValueError(f"features: expected shape ({'rows' if rows is None else rows}, "
                         f"{'columns' if columns is None else columns}), found {features.shape}")
    checks.finite(features.data, name="features")
    return features


def constant_columns(features: Block) -> list[int]:
    """Returns the columns with one value in all rows: they carry no information, and a report names them."""
    if isinstance(features, np.ndarray):
        return np.flatnonzero((features == features[:1]).all(axis=0)).tolist()
    low, high = (np.asarray(bound.todense()).ravel()
                 for bound in (features.min(axis=0), features.max(axis=0)))
    return np.flatnonzero(low == high).tolist()


def make_probe(c_value: float, sparse: bool, options: ProbeOptions) -> Pipeline:
    """Returns an unfitted probe: standardisation, then L1 logistic regression with balanced class weights.

    Args:
        c_value: C, the inverse penalty strength.
        sparse: scale without centring, which would fill the zeros.
    """
    checks.positive(c_value, "c_value")
    return make_pipeline(
        StandardScaler(with_mean=not sparse),
        LogisticRegression(C=c_value, l1_ratio=1.0, solver="liblinear", class_weight="balanced",
                           intercept_scaling=options.intercept_scaling, max_iter=options.max_iter,
                           random_state=options.seed))


def fit_probe(features: Block, labels: ArrayLike, folds: Folds,
              options: ProbeOptions = ProbeOptions()) -> Fitted:
    """Selects C by the mean AUROC over the folds' held-out rows, then fits on all rows.

    Of equal AUROCs, the smallest C wins.

    Args:
        features: `[rows, features]` of the training rows.
        labels: `[rows]`, 0 or 1.
        folds: at least one pair of row numbers (fit, held out), with both classes in both parts.
    """
    labels = checks.labels(labels, both=True).astype(int)
    features = check_features(features, rows=len(labels))
    folds = check_folds(folds, len(labels))
    if not folds:
        raise ValueError("folds: expected at least one, found none")
    for number, fold in enumerate(folds):
        if any(len(np.unique(labels[part])) < 2 for part in fold):
            raise ValueError("folds: expected both classes in both parts (see folds.usable), found one in a "
                             f"part of fold {number}")
    sparse = scipy.sparse.issparse(features)
    scaler = make_probe(1.0, sparse, options)[0]
    inputs = scaler.fit_transform(features) if options.scale_once else features

    def held_out_auroc(c: float, fit: NDArray[np.intp], held_out: NDArray[np.intp]) -> float:
        probe = make_probe(c, sparse, options)
        probe = probe[-1] if options.scale_once else probe
        scores = probe.fit(inputs[fit], labels[fit]).decision_function(inputs[held_out])
        return auroc(labels[held_out], scores)

    # Weak penalties, which take longest, first: none of them starts last and keeps the others waiting.
    tasks = [(c, fold) for c in sorted(set(options.c_values), reverse=True) for fold in folds]
    # Processes, not threads: liblinear uses one random generator per process, for which threads would race.
    areas = Parallel(n_jobs=options.jobs)(delayed(held_out_auroc)(c, *fold) for c, fold in tasks)
    means = {c: float(np.mean([area for (task_c, _), area in zip(tasks, areas, strict=True) if task_c == c]))
             for c in sorted(set(options.c_values))}
    best = max(means, key=means.__getitem__)
    return Fitted(make_probe(best, sparse, options).fit(features, labels), best, means)


@dataclasses.dataclass(frozen=True)
class RungResult:
    """Result of one rung on the test rows.

    Attributes:
        probabilities: P(label is 1), `[items]`.
        auroc: with its bootstrap interval.
    """

    probe: Fitted
    probabilities: Floats
    auroc: Interval

    @property
    def is_constant(self) -> bool:
        """Whether the probe predicts the same probability for every item: it has learned nothing."""
        return bool(np.ptp(self.probabilities) == 0)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """AUROC of rung `a` minus AUROC of rung `b`.

    Attributes:
        difference: with its bootstrap interval.
        delong: DeLong's test of the difference.
        p: two-sided p: DeLong's, or the bootstrap's if groups were resampled.
        p_holm: `p` after Holm's correction for the number of comparisons.
    """

    a: str
    b: str
    difference: Interval
    delong: DeLong
    p: float
    p_holm: float


@dataclasses.dataclass(frozen=True)
class LadderResult:
    """Results of a ladder: rungs by name, and the requested comparisons."""

    rungs: Mapping[str, RungResult]
    comparisons: Sequence[Comparison]


PUBLISHED_COMPARISONS = (("P2_cheap_raw", "P1_cheap"), ("P3_cheap_sae", "P1_cheap"),
                         ("P3_cheap_sae", "P2_cheap_raw"))


def fit_ladder(train: Mapping[str, Block], train_labels: ArrayLike, test: Mapping[str, Block],
               test_labels: ArrayLike, folds: Folds, *, rungs: Sequence[Rung] = LADDER,
               comparisons: Sequence[tuple[str, str]] = PUBLISHED_COMPARISONS,
               options: ProbeOptions = ProbeOptions(), replicates: int = 2000, seed: int = 42,
               groups: ArrayLike | None = None,
               notify: Callable[[str], None] = lambda rung: None) -> LadderResult:
    """Fits every rung on the training rows and compares the rungs on the same test rows.

    Args:
        train, test: block name → `[rows, features]`.
        folds: splits of the training rows.
        rungs: rungs to fit.
        comparisons: pairs of rung names; pairs with a rung that is not fitted are skipped.
        replicates: number of bootstrap replicates.
        groups: `[test rows]`, group of each row; the bootstrap resamples whole groups. None resamples rows.
        notify: called with the name of each rung before it is fitted.
    """
    truth = checks.labels(test_labels, name="test_labels")
    if groups is not None:
        checks.groups(groups, len(truth))
    fitted = {}  # name → probe, test probabilities
    for rung in rungs:
        notify(rung.name)
        probe = fit_probe(concatenate_blocks(train, rung.blocks), train_labels, folds, options)
        fitted[rung.name] = probe, probe.probabilities(concatenate_blocks(test, rung.blocks))
    bootstrap = PairedBootstrap(test_labels, {name: scores for name, (_, scores) in fitted.items()},
                                replicates=replicates, seed=seed, groups=groups)
    pairs = [(a, b) for a, b in comparisons if a in fitted and b in fitted]
    tests = [delong(test_labels, fitted[a][1], fitted[b][1]) for a, b in pairs]
    p = [test.p if groups is None else bootstrap.p(a, b) for (a, b), test in zip(pairs, tests, strict=True)]
    return LadderResult(
        {name: RungResult(probe, scores, bootstrap.interval(name))
         for name, (probe, scores) in fitted.items()},
        [Comparison(a, b, bootstrap.difference(a, b), test, raw, corrected)
         for (a, b), test, raw, corrected in zip(pairs, tests, p, holm(p), strict=True)])
