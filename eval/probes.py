"""A ladder of probes: which blocks of features predict a label, and does one block add to another?

A probe is logistic regression with an L1 penalty, whose strength C is chosen by cross-validation on
the training rows. The solver is liblinear's coordinate descent: of scikit-learn's it alone takes L1,
sparse columns and no learning rate. Sparse blocks stay sparse (a TopK code of 32 in 4096 is 99 %
zeros; liblinear's time goes with what is not zero), and the probes of a rung are fitted side by side.
liblinear penalises its intercept. Here the intercept is a column of a large constant, so that the
penalty is next to nothing: what scaling without centring leaves to the intercept is then as free as
in centred columns.
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
from .folds import Folds
from .folds import checked as checked_folds
from .metrics import auroc
from .stats import DeLong, Interval, PairedBootstrap, delong, holm

Block: TypeAlias = NDArray[np.floating] | scipy.sparse.csr_array
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclasses.dataclass(frozen=True)
class Rung:
    """A probe's name and the blocks of features that it sees."""

    name: str
    blocks: tuple[str, ...]


LADDER = (Rung("P1_cheap", ("cheap",)), Rung("P2_cheap_raw", ("cheap", "raw")),
          Rung("P3_cheap_sae", ("cheap", "sae")), Rung("P4_raw_only", ("raw",)),
          Rung("P5_sae_only", ("sae",)))


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """How a probe is fitted.

    Attributes:
        strengths: the C to choose from: the larger, the weaker the penalty.
        intercept_scaling: the constant whose column is the intercept; 1 penalises it as any weight.
        scale_once: scale by all training rows, before cross-validation, in place of in each fold.
        max_iter: sweeps of the solver.
        jobs: fits side by side, in processes; −1 takes every core.
    """

    strengths: tuple[float, ...] = STRENGTHS
    intercept_scaling: float = 100.0
    scale_once: bool = False
    max_iter: int = 2000
    seed: int = 42
    jobs: int = -1

    def __post_init__(self) -> None:
        if not self.strengths:
            raise ValueError("strengths: expected one at least, found none")
        for strength in self.strengths:
            checks.positive(strength, "strengths")
        checks.positive(self.intercept_scaling, "intercept_scaling")
        checks.count(self.max_iter, "max_iter")
        checks.seed(self.seed)
        if not checks.count(self.jobs, "jobs", least=-1):
            raise ValueError("jobs: expected 1 at least, or -1 for every core, found 0")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A probe: its pipeline, the C chosen, the mean AUROC over the folds for each C."""

    pipeline: Pipeline
    strength: float
    cross_validated: Mapping[float, float]

    def probabilities(self, features: Block) -> Floats:
        """P(label is 1), `[items]`."""
        return self.pipeline.predict_proba(
            checked_features(features, columns=self.pipeline.n_features_in_))[:, 1]

    @property
    def weights(self) -> Floats:
        """Of the scaled features, `[features]`."""
        return self.pipeline[-1].coef_[0]


def columns(blocks: Mapping[str, Block], names: Sequence[str]) -> Block:
    """The blocks side by side: sparse if one is."""
    for name in names:
        checks.one_of(name, blocks, "blocks")
    chosen = [blocks[name] for name in names]
    if len(rows := {np.shape(block)[0] for block in chosen}) != 1:
        raise ValueError(f"blocks: expected one at least, and as many rows of each, found {sorted(rows)}")
    if len(chosen) == 1:
        return chosen[0]
    if any(scipy.sparse.issparse(block) for block in chosen):
        return scipy.sparse.hstack(chosen, format="csr")
    return np.concatenate(chosen, axis=1)


def checked_features(features: Block, rows: int | None = None, columns: int | None = None) -> Block:
    """Features `[rows, columns]`. Raises ValueError for another shape and numbers that are not finite."""
    if not scipy.sparse.issparse(features):
        return checks.matrix(features, rows, columns, "features")
    if rows not in (None, features.shape[0]) or columns not in (None, features.shape[1]):
        raise ValueError(f"features: expected shape ({'rows' if rows is None else rows}, "
                         f"{'columns' if columns is None else columns}), found {features.shape}")
    checks.finite(features.data, name="features")
    return features


def constant_columns(features: Block) -> list[int]:
    """The columns that say the same of every row: they can tell nothing, and are to be named in a report."""
    if isinstance(features, np.ndarray):
        return np.flatnonzero((features == features[:1]).all(axis=0)).tolist()
    low, high = (np.asarray(ends.todense()).ravel() for ends in (features.min(axis=0), features.max(axis=0)))
    return np.flatnonzero(low == high).tolist()


def make_probe(strength: float, sparse: bool, options: ProbeOptions) -> Pipeline:
    """Scaling, uncentred if centring would fill the zeros, then L1 logistic regression, classes balanced."""
    checks.positive(strength, "strength")
    return make_pipeline(
        StandardScaler(with_mean=not sparse),
        LogisticRegression(C=strength, l1_ratio=1.0, solver="liblinear", class_weight="balanced",
                           intercept_scaling=options.intercept_scaling, max_iter=options.max_iter,
                           random_state=options.seed))


def fit_probe(features: Block, labels: ArrayLike, folds: Folds,
              options: ProbeOptions = ProbeOptions()) -> Fitted:
    """Chooses C by the mean AUROC of the held-out rows (of equals, the smallest), and fits on all rows.

    Args:
        features: `[rows, features]`, of the training rows.
        labels: `[rows]`, 0 or 1.
        folds: pairs of row numbers, one at least, each with both classes.
    """
    labels = checks.labels(labels, both=True).astype(int)
    features = checked_features(features, rows=len(labels))
    folds = checked_folds(folds, len(labels))
    if not folds:
        raise ValueError("folds: expected one at least, found none")
    for number, fold in enumerate(folds):
        if any(len(np.unique(labels[part])) < 2 for part in fold):
            raise ValueError("folds: expected both classes in either part (see folds.usable), found one in a "
                             f"part of fold {number}")
    sparse = scipy.sparse.issparse(features)
    scaler = make_probe(1.0, sparse, options)[0]
    shown = scaler.fit_transform(features) if options.scale_once else features

    def held_out(strength: float, fit: NDArray[np.intp], held: NDArray[np.intp]) -> float:
        probe = make_probe(strength, sparse, options)
        probe = probe[-1] if options.scale_once else probe
        return auroc(labels[held], probe.fit(shown[fit], labels[fit]).decision_function(shown[held]))

    # The slow fits, of weak penalties, first: no thread is left with one at the end.
    tasks = [(strength, fold) for strength in sorted(set(options.strengths), reverse=True) for fold in folds]
    # In processes: liblinear draws from one generator of the whole process, for which threads would race.
    found = Parallel(n_jobs=options.jobs)(
        delayed(held_out)(strength, *fold) for strength, fold in tasks)
    means = {strength: float(np.mean([area for (c, _), area in zip(tasks, found, strict=True)
                                      if c == strength]))
             for strength in sorted(set(options.strengths))}
    chosen = max(means, key=means.__getitem__)
    return Fitted(make_probe(chosen, sparse, options).fit(features, labels), chosen, means)


@dataclasses.dataclass(frozen=True)
class RungResult:
    """What one rung came to on the test rows: P(label is 1) `[items]`, and the AUROC with its interval."""

    probe: Fitted
    probabilities: Floats
    auroc: Interval

    @property
    def is_constant(self) -> bool:
        """Whether the probe says the same of every item: it has found nothing."""
        return bool(np.ptp(self.probabilities) == 0)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The AUROC of rung `a` less that of rung `b`: bootstrap interval and DeLong's test.

    `p_holm` is the p of that test, corrected for the number of comparisons.
    """

    a: str
    b: str
    difference: Interval
    delong: DeLong
    p: float
    p_holm: float


@dataclasses.dataclass(frozen=True)
class Climbed:
    """A ladder's rungs by name, and the comparisons that were asked for."""

    rungs: Mapping[str, RungResult]
    comparisons: Sequence[Comparison]


HEADLINES = (("P2_cheap_raw", "P1_cheap"), ("P3_cheap_sae", "P1_cheap"), ("P3_cheap_sae", "P2_cheap_raw"))


def climb(train: Mapping[str, Block], train_labels: ArrayLike, test: Mapping[str, Block],
          test_labels: ArrayLike, folds: Folds, *, rungs: Sequence[Rung] = LADDER,
          comparisons: Sequence[tuple[str, str]] = HEADLINES, options: ProbeOptions = ProbeOptions(),
          replicates: int = 2000, seed: int = 42, groups: ArrayLike | None = None,
          notify: Callable[[str], None] = lambda rung: None) -> Climbed:
    """Fits every rung and compares them on the same test rows.

    Args:
        train, test: block name → `[rows, features]`.
        folds: of the training rows.
        groups: `[test rows]`, what the bootstrap draws together; None draws rows.
        tell: called with the name of each rung before it is fitted.
    """
    truth = checks.labels(test_labels, name="test_labels")
    if groups is not None:
        checks.groups(groups, len(truth))
    fitted = {}
    for rung in rungs:
        notify(rung.name)
        probe = fit_probe(columns(train, rung.blocks), train_labels, folds, options)
        fitted[rung.name] = probe, probe.probabilities(columns(test, rung.blocks))
    drawn = PairedBootstrap(test_labels, {name: found for name, (_, found) in fitted.items()},
                            replicates=replicates, seed=seed, groups=groups)
    pairs = [(a, b) for a, b in comparisons if a in fitted and b in fitted]
    tests = [delong(test_labels, fitted[a][1], fitted[b][1]) for a, b in pairs]
    p = [test.p if groups is None else drawn.p(a, b) for (a, b), test in zip(pairs, tests, strict=True)]
    return Climbed(
        {name: RungResult(probe, found, drawn.interval(name)) for name, (probe, found) in fitted.items()},
        [Comparison(a, b, drawn.difference(a, b), test, raw, corrected)
         for (a, b), test, raw, corrected in zip(pairs, tests, p, holm(p), strict=True)])
