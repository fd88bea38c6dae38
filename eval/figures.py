"""Figures that remain readable in grey: every line has its own colour, dash pattern and marker.

Each function returns a matplotlib Figure. A name has the same style in every figure that one process draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from .cascade import Costs, Frontier
from .metrics import Reliability
from .selective import RiskCoverage
from .stats import Interval
from .tables import format_number

# The first seven are of Okabe & Ito (2008): distinguishable with colour-vision deficiency; their grey levels
# differ, too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933",
           "#6A3D9A", "#7F7F7F", "#8B4513")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "d", "8", "*")
MAX_INTERVALS = 2  # curves of one figure whose intervals can be distinguished
UNIT_LIMITS = (-0.03, 1.03)  # of an axis from 0 to 1: markers at its ends are not cut
LEGEND_ROW = 0.19  # inches

_style_numbers: dict[str, int] = {}  # name → number, in order of first use


class LineStyle(NamedTuple):
    """Colour, dash pattern and marker of a line."""

    colour: str
    dash: Any
    mark: str


def line_style(n: int) -> LineStyle:
    """Returns the n-th style: colours and markers repeat after 12, dash patterns after 7."""
    return LineStyle(COLOURS[n % len(COLOURS)], DASHES[n % len(DASHES)], MARKS[n % len(MARKS)])


# Names that no figure compares with models or methods, whose styles they must not have.
FIXED_STYLES = {"known": LineStyle("0.1", "-", "p"), "unknown": LineStyle("0.55", "--", "h")}


def style_of(name: str) -> LineStyle:
    """Returns the style of a name: the same in all figures, new names in order of first use."""
    return FIXED_STYLES.get(name) or line_style(_style_numbers.setdefault(name, len(_style_numbers)))


def reserve_styles(names: Sequence[str]) -> None:
    """Gives the names their styles in this order, so that they do not depend on which figure comes first."""
    for name in names:
        style_of(name)


def ladder(intervals: Mapping[str, Interval], title: str = "") -> Figure:
    """Plots the AUROC of each rung with its interval; the vertical line at 0.5 is chance."""
    figure, axes = _figure(height=1.2 + 0.4 * len(intervals))
    for n, (name, interval) in enumerate(intervals.items()):
        style = style_of(name)
        axes.plot([interval.low, interval.high], [n, n], color=style.colour, linewidth=2)
        axes.plot(interval.point, n, marker=style.mark, color=style.colour, markersize=7, clip_on=False,
                  zorder=3)
        axes.annotate(f"{interval.point:.3f}", (interval.point, n), xytext=(0, 7), fontsize=8,
                      textcoords="offset points", ha="center")
    axes.axvline(0.5, color="0.6", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.4, -0.7)  # the first rung at the top
    axes.set_xlabel("AUROC, 95 % interval")
    return _finished(figure, axes, title, legend=False)


def reliability(curves: Mapping[str, Reliability], title: str = "") -> Figure:
    """Plots observed frequency over mean predicted probability; a marker's area grows with its item count."""
    figure, axes = _figure(width=4.6, height=4.4)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1, label="perfectly calibrated")
    for name, bins in curves.items():
        style = style_of(name)
        axes.plot(bins.confidence, bins.accuracy, color=style.colour, linestyle=style.dash)
        axes.scatter(bins.confidence, bins.accuracy, color=style.colour, marker=style.mark, alpha=0.8,
                     edgecolors="white", linewidths=0.5, zorder=3,
                     s=15 + 120 * bins.counts / bins.counts.sum())
        _legend_entry(axes, name, style)
    axes.set(xlabel="mean predicted probability", ylabel="observed frequency", xlim=UNIT_LIMITS,
             ylim=UNIT_LIMITS)
    axes.set_aspect("equal")
    return _finished(figure, axes, title)


def risk_coverage(curves: Mapping[str, RiskCoverage], oracle: Sequence[float], mean_error: float,
                  title: str = "", unit: str = "mean error") -> Figure:
    """Plots the error of the answered items over coverage.

    The interval of the first curve is shaded. Thin lines are the ends of all intervals, unless there are more
    than MAX_INTERVALS curves. The markers of different curves are at different coverages, so that curves
    which coincide do not hide each other.

    Args:
        oracle: risks at the same coverages when items are answered in order of their true errors.
        mean_error: the risk of random answering, which is that of answering everything.
    """
    figure, axes = _figure(height=4.2)
    axes.axhline(mean_error, color="0.6", linestyle=":", linewidth=1, label="random order")
    for n, (name, curve) in enumerate(curves.items()):
        style = style_of(name)
        if n == 0:
            axes.fill_between(curve.coverages, curve.low, curve.high, color=style.colour, alpha=0.1,
                              linewidth=0)
        for end in (curve.low, curve.high) if len(curves) <= MAX_INTERVALS else ():
            axes.plot(curve.coverages, end, color=style.colour, linewidth=0.5, alpha=0.55)
        fraction = curve.prr.point
        gain = ("" if np.isnan(fraction) else
                f": {format_number(100 * fraction, 'z.0f')} % of the oracle's gain")
        axes.plot(curve.coverages, curve.risks, color=style.colour, linestyle=style.dash, marker=style.mark,
                  markersize=5, markevery=(n % len(curve.coverages), len(curves)), zorder=3,
                  label=f"{name}{gain}")
    coverages = next(iter(curves.values())).coverages if curves else np.linspace(0, 1, len(oracle))
    axes.plot(coverages, oracle, color="0.35", linewidth=1, label="oracle")
    axes.set(xlabel="coverage (fraction answered)", ylabel=unit, xlim=UNIT_LIMITS)
    return _finished(figure, axes, title)


def intervals_caption(curves: Mapping[str, RiskCoverage]) -> str:
    """Returns the sentence of a caption that says which intervals `risk_coverage` shows."""
    first = next(iter(curves), "")
    return ("Thin lines and the shaded band are 95 % intervals." if len(curves) <= MAX_INTERVALS else
            f"The shaded band is the 95 % interval of {first}; the intervals of the other curves are left "
            "out, and the table has those of their AURC.")


def pareto(frontiers: Mapping[str, Frontier], oracle: Frontier, ends: tuple[float, float], costs: Costs,
           title: str = "", unit: str = "mean error") -> Figure:
    """Plots the Pareto-optimal points of cascades: mean error over mean cost.

    Args:
        ends: mean errors of always using the small and always using the large model. Random routing lies on
            the line between these two points.
    """
    figure, axes = _figure()
    single_costs = costs.small, costs.large
    axes.plot(single_costs, ends, color="0.6", linestyle=":", linewidth=1, label="random routing")
    for name, points in frontiers.items():
        style, optimal = style_of(name), points.pareto()
        order = np.argsort(points.costs[optimal])
        x, y = points.costs[optimal][order], points.errors[optimal][order]
        axes.step(x, y, where="post", color=style.colour, linestyle=style.dash)
        axes.plot(x, y, linestyle="", color=style.colour, marker=style.mark, markersize=3,
                  markevery=max(1, int(optimal.sum()) // 12))
        _legend_entry(axes, name, style)
    axes.plot(oracle.costs, oracle.errors, color="0.35", linewidth=1, label="oracle")
    axes.plot(single_costs, ends, linestyle="", marker="*", color="0.2", markersize=9,
              label="one model for all")
    axes.set(xlabel="mean cost of an item", ylabel=unit)
    return _finished(figure, axes, title)


def effects(intervals: Mapping[str, Interval], title: str = "", unit: str = "nats") -> Figure:
    """Plots mean changes with their intervals; the vertical line at 0 is no effect."""
    figure, axes = _figure(height=1.2 + 0.35 * len(intervals))
    for n, interval in enumerate(intervals.values()):
        colour = "0" if interval.excludes_zero else "0.55"
        axes.plot([interval.low, interval.high], [n, n], color=colour, linewidth=2)
        axes.plot(interval.point, n, marker="o", color=colour,
                  markerfacecolor=colour if interval.excludes_zero else "white", markersize=6)
    axes.axvline(0, color="0.6", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.4, -0.6)
    axes.set_xlabel(f"change, {unit}, 95 % interval (filled: the interval excludes 0)")
    return _finished(figure, axes, title, legend=False)


def tradeoff(runs: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str,
             mark: float | None = None, title: str = "") -> Figure:
    """Plots a benefit over its cost, both from 0 to 1: one marker per run, `(xs, ys)` of each name.

    The dotted horizontal line at 0.5 is chance.

    Args:
        x, y: axis labels.
        mark: x of a reference, drawn as a dotted vertical line; None draws none.
    """
    figure, axes = _figure()
    for name, (xs, ys) in runs.items():
        style = style_of(name)
        axes.plot(xs, ys, linestyle="", marker=style.mark, color=style.colour, markersize=6, alpha=0.8,
                  label=name)
    axes.axhline(0.5, color="0.6", linestyle=":", linewidth=1)
    if mark is not None:
        axes.axvline(mark, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel=x, ylabel=y, xlim=UNIT_LIMITS)
    return _finished(figure, axes, title)


def dots(runs: Mapping[str, Sequence[float]], title: str = "", unit: str = "nats") -> Figure:
    """Plots every run of each name as a marker, and their mean as a bar; lines join runs of one seed."""
    figure, axes = _figure(width=1.6 + 1.2 * len(runs))
    for run in zip(*runs.values(), strict=True):
        axes.plot(range(len(runs)), run, color="0.8", linewidth=0.8, zorder=1)
    for n, (name, values) in enumerate(runs.items()):
        style = style_of(name)
        axes.scatter([n] * len(values), values, color=style.colour, marker=style.mark, s=22, zorder=3)
        axes.plot([n - 0.25, n + 0.25], [np.mean(values)] * 2, color=style.colour, linewidth=2, zorder=2)
    axes.set_xticks(range(len(runs)), list(runs))
    axes.set_xlim(-0.5, len(runs) - 0.5)
    axes.set(xlabel="bar: mean; grey lines: same seed", ylabel=unit)
    return _finished(figure, axes, title, legend=False)


def by_depth(curves: Mapping[str, Sequence[float]], band: tuple[int, int] | None = None, title: str = "",
             unit: str = "nats", line: float | None = None) -> Figure:
    """Plots one value per layer, one line per name.

    Args:
        band: first and last layer to shade; None shades none.
        line: y of a reference, drawn as a dotted horizontal line; None draws none.
    """
    figure, axes = _figure()
    if band is not None:
        axes.axvspan(band[0] - 0.5, band[1] + 0.5, color="0.93", linewidth=0)
    for name, values in curves.items():
        style = style_of(name)
        axes.plot(range(len(values)), values, color=style.colour, linestyle=style.dash, marker=style.mark,
                  markersize=4, label=name)
    if line is not None:
        axes.axhline(line, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel="layer", ylabel=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure, axes, title)


def cost_benefit(points: Mapping[str, tuple[float, Interval, str]], best: Sequence[str],
                 title: str = "") -> Figure:
    """Plots the AUROC of each estimator over its seconds a question; those that nothing beats are named.

    Args:
        points: (seconds, above 0; AUROC; kind, which gives the style) of each name.
        best: the Pareto set, in order of cost; a line joins it.
    """
    figure, axes = _figure(width=7.2, height=4.6)
    for name, (seconds, interval, kind) in points.items():
        style, chosen = style_of(kind), name in best
        axes.plot([seconds, seconds], [interval.low, interval.high], color=style.colour, linewidth=1,
                  alpha=0.7 if chosen else 0.2)
        axes.plot(seconds, interval.point, marker=style.mark, color=style.colour, linestyle="",
                  markersize=8 if chosen else 5, alpha=1 if chosen else 0.6)
    for kind in dict.fromkeys(kind for _, _, kind in points.values()):
        axes.plot([], [], marker=style_of(kind).mark, color=style_of(kind).colour, linestyle="", label=kind)
    axes.step([points[name][0] for name in best], [points[name][1].point for name in best], where="post",
              color="0.35", linewidth=1)
    for name in best:
        axes.annotate(name, (points[name][0], points[name][1].point), xytext=(6, 6), fontsize=8,
                      textcoords="offset points")
    axes.axhline(0.5, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel="seconds a question, with the prompt's pass", ylabel="AUROC, 95 % interval", xscale="log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 8)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    return _finished(figure, axes, title)


def heat_map(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str = "",
             x: str = "", y: str = "") -> Figure:
    """Plots AUROCs as a table of colours, 0.5 white; NaN stays empty."""
    figure, axes = _figure(width=2.4 + 1.1 * len(columns), height=1.6 + 0.28 * len(rows))
    array = np.asarray(values, float)
    axes.imshow(array, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for i, j in np.argwhere(~np.isnan(array)):
        dark = abs(array[i, j] - 0.5) > 0.33
        axes.text(j, i, f"{array[i, j]:.3f}", ha="center", va="center", fontsize=8,
                  color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), list(columns), fontsize=8, rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set(xlabel=x, ylabel=y)
    _finished(figure, axes, title, legend=False)
    axes.grid(visible=False)
    return figure


def _figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend_entry(axes: Any, name: str, style: LineStyle) -> None:
    axes.plot([], [], color=style.colour, linestyle=style.dash, marker=style.mark, markersize=4, label=name)


def _finished(figure: Figure, axes: Any, title: str, legend: bool = True) -> Figure:
    """Adds title, grid and, below the axes, the legend; the figure grows by the legend's height."""
    axes.set_title(title.replace("$", r"\$"), fontsize=10)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if legend and handles:
        entry_width = 0.6 + 0.06 * max(map(len, labels))  # inches
        columns = max(1, min(4, len(labels), int(figure.get_figwidth() / entry_width)))
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure
