"""Figures that read well in colour and in grey: every line has a colour, a dash and a mark of its own.

Each function returns a matplotlib Figure; `save` writes it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tilelli_jax.files import write_atomically

from .cascade import Costs, Frontier
from .metrics import Reliability
from .selective import RiskCoverage
from .stats import Interval

# Okabe & Ito (2008): told apart by those who see few colours; their greys differ, too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKS = ("o", "s", "^", "D", "v", "P", "X")


class LineStyle(NamedTuple):
    """How the n-th line is drawn."""

    colour: str
    dash: Any
    mark: str


def line_style(n: int) -> LineStyle:
    """After the seventh they come again with another mark."""
    return LineStyle(COLOURS[n % 7], DASHES[n % 7], MARKS[(n + n // 7) % 7])


def save(figure: Figure, path: Path) -> None:
    """As PNG, or what the path ends in; atomically."""
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format=path.suffix[1:] or "png")
    write_atomically(path, content.getvalue())


def ladder(intervals: Mapping[str, Interval], title: str = "") -> Figure:
    """AUROC of each rung with its interval; a line at ½ is chance."""
    figure, axes = _figure(height=1.2 + 0.4 * len(intervals))
    for n, interval in enumerate(intervals.values()):
        shape = line_style(n)
        axes.plot([interval.low, interval.high], [n, n], color=shape.colour, linewidth=2)
        axes.plot(interval.point, n, marker=shape.mark, color=shape.colour, markersize=7)
        axes.annotate(f"{interval.point:.3f}", (interval.point, n), xytext=(0, 7), fontsize=8,
                      textcoords="offset points", ha="center")
    axes.axvline(0.5, color="0.6", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.4, -0.7)  # the first rung at the top
    axes.set_xlabel("AUROC, 95 % interval")
    return _finished(figure, axes, title, legend=False)


def reliability(found: Mapping[str, Reliability], title: str = "") -> Figure:
    """Accuracy over confidence; the size of a mark is its share of the items."""
    figure, axes = _figure(width=4.6, height=4.6)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1, label="calibrated")
    for n, (name, bins) in enumerate(found.items()):
        shape = line_style(n)
        axes.plot(bins.confidence, bins.accuracy, color=shape.colour, linestyle=shape.dash, label=name)
        axes.scatter(bins.confidence, bins.accuracy, color=shape.colour, marker=shape.mark,
                     s=15 + 120 * bins.counts / bins.counts.sum())
    axes.set(xlabel="mean predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    return _finished(figure, axes, title)


def risk_coverage(found: Mapping[str, RiskCoverage], oracle: Sequence[float], mean_error: float,
                  title: str = "", unit: str = "mean error") -> Figure:
    """Error of the items answered over the share answered, with the intervals as bands.

    Args:
        oracle: risks in order of the errors themselves, at the same coverages.
    """
    figure, axes = _figure()
    axes.axhline(mean_error, color="0.6", linestyle=":", linewidth=1, label="at random")
    for n, (name, curve) in enumerate(found.items()):
        shape = line_style(n)
        axes.fill_between(curve.coverages, curve.low, curve.high, color=shape.colour, alpha=0.08, linewidth=0)
        axes.plot(curve.coverages, curve.risks, color=shape.colour, linestyle=shape.dash, marker=shape.mark,
                  markersize=3.5, label=f"{name}: {100 * curve.fraction_of_oracle.point:.0f} % of the oracle")
    coverages = next(iter(found.values())).coverages if found else np.linspace(0, 1, len(oracle))
    axes.plot(coverages, oracle, color="0.35", linewidth=1, label="oracle")
    axes.set(xlabel="coverage (share answered)", ylabel=unit, xlim=(0, 1))
    return _finished(figure, axes, title)


def pareto(found: Mapping[str, Frontier], oracle: Frontier, ends: tuple[float, float], costs: Costs,
           title: str = "", unit: str = "mean error") -> Figure:
    """Error over cost of a cascade: the points that none of the same score beats.

    Args:
        ends: errors of always the cheap model and always the dear one, which chance mixes.
    """
    figure, axes = _figure()
    alone = costs.small, costs.large
    axes.plot(alone, ends, color="0.6", linestyle=":", linewidth=1, label="at random")
    for n, (name, points) in enumerate(found.items()):
        shape, kept = line_style(n), points.pareto()
        order = np.argsort(points.costs[kept])
        axes.step(points.costs[kept][order], points.errors[kept][order], where="post", color=shape.colour,
                  linestyle=shape.dash, label=name)
        axes.plot(points.costs[kept][order], points.errors[kept][order], linestyle="", color=shape.colour,
                  marker=shape.mark, markersize=3, markevery=max(1, int(kept.sum()) // 12))
    axes.plot(oracle.costs, oracle.errors, color="0.35", linewidth=1, label="oracle")
    axes.plot(alone, ends, linestyle="", marker="*", color="0.2", markersize=9)
    axes.set(xlabel="mean cost of an item", ylabel=unit)
    return _finished(figure, axes, title)


def effects(found: Mapping[str, Interval], title: str = "", unit: str = "nats") -> Figure:
    """Mean changes with their intervals; a line at 0 is no effect."""
    figure, axes = _figure(height=1.2 + 0.35 * len(found))
    for n, interval in enumerate(found.values()):
        sure = interval.excludes_zero
        axes.plot([interval.low, interval.high], [n, n], color="0" if sure else "0.55", linewidth=2)
        axes.plot(interval.point, n, marker="o", color="0" if sure else "0.55",
                  markerfacecolor="0" if sure else "white", markersize=6)
    axes.axvline(0, color="0.6", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(f"change, {unit}, 95 % interval (filled: without 0)")
    return _finished(figure, axes, title, legend=False)


def tradeoff(found: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str,
             mark: float | None = None, title: str = "") -> Figure:
    """What is gained over what it costs: for each name its runs as marks, `(xs, ys)`, on scales of 0 to 1.

    Args:
        mark: an x to hold them against.
    """
    figure, axes = _figure()
    for n, (name, (xs, ys)) in enumerate(found.items()):
        shape = line_style(n)
        axes.plot(xs, ys, linestyle="", marker=shape.mark, color=shape.colour, markersize=6, alpha=0.8,
                  label=name)
    axes.axhline(0.5, color="0.6", linestyle=":", linewidth=1)
    if mark is not None:
        axes.axvline(mark, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel=x, ylabel=y, xlim=(-0.03, 1.03))
    return _finished(figure, axes, title)


def dots(found: Mapping[str, Sequence[float]], title: str = "", unit: str = "nats") -> Figure:
    """Every run of each name as a dot, and their mean as a bar; a line joins the n-th runs of all."""
    figure, axes = _figure(width=1.6 + 1.2 * len(found))
    for run in zip(*found.values(), strict=True):
        axes.plot(range(len(found)), run, color="0.8", linewidth=0.8, zorder=1)
    for n, values in enumerate(found.values()):
        shape = line_style(n)
        axes.scatter([n] * len(values), values, color=shape.colour, marker=shape.mark, s=22, zorder=3)
        axes.plot([n - 0.25, n + 0.25], [np.mean(values)] * 2, color=shape.colour, linewidth=2, zorder=2)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.set(xlabel="bar: mean; grey: runs of one seed", ylabel=unit)
    return _finished(figure, axes, title, legend=False)


def by_depth(found: Mapping[str, Sequence[float]], band: tuple[int, int] | None = None, title: str = "",
             unit: str = "nats", line: float | None = None) -> Figure:
    """A number of each layer, one line for each name, and a level to hold them against.

    Args:
        band: the first and the last of the layers that are shaded.
    """
    figure, axes = _figure()
    if band is not None:
        axes.axvspan(band[0] - 0.5, band[1] + 0.5, color="0.93", linewidth=0)
    for n, (name, values) in enumerate(found.items()):
        shape = line_style(n)
        axes.plot(range(len(values)), values, color=shape.colour, linestyle=shape.dash, marker=shape.mark,
                  markersize=4, label=name)
    if line is not None:
        axes.axhline(line, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel="layer", ylabel=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure, axes, title)


def _figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _finished(figure: Figure, axes: Any, title: str, legend: bool = True) -> Figure:
    axes.set_title(title.replace("$", r"\$"), fontsize=10)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8)
    return figure
