"""Figures show their data, have distinct line styles without colour, and one style per name."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from tilelli_jax.eval import figures
from tilelli_jax.eval.cascade import Costs, frontier, oracle_frontier
from tilelli_jax.eval.metrics import reliability
from tilelli_jax.eval.selective import GRID, Ranking, risk_coverage
from tilelli_jax.eval.stats import Interval


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = rng.random(80)
    return (rng.random(80) < scores).astype(float), scores


def all_figures(scored: tuple[np.ndarray, np.ndarray]) -> dict[str, figures.Figure]:
    errors, scores = scored
    curve = risk_coverage(errors, scores, replicates=20)
    costs = Costs()
    rungs = {"P1": Interval(0.6, 0.55, 0.65), "P2": Interval(0.4, 0.3, 0.5)}
    return {
        "ladder": figures.ladder(rungs, "AUROC of $5"), "effects": figures.effects(rungs),
        "reliability": figures.reliability({"raw": reliability(errors, scores)}),
        "risk_coverage": figures.risk_coverage({"P1": curve, "P2": curve},
                                               Ranking(errors, errors).risks(GRID), 0.5),
        "pareto": figures.pareto({"P1": frontier(errors, 0 * errors, scores, costs)},
                                 oracle_frontier(errors, 0 * errors, costs), (0.5, 0.0), costs),
        "tradeoff": figures.tradeoff({"v7": ([0.1, 0.2], [0.7, 0.8]), "v9": ([0.9, 0.9], [0.8, 0.7])}, "x",
                                     "AUROC", mark=0.9),
        "dots": figures.dots({"Lite": [1.0, 1.1, 1.05], "vanilla": [1.2, 1.15, 1.3]}),
        "by_depth": figures.by_depth({"known": [1.0, 0.5, 0.2], "unknown": [1.0, 0.9, 0.8]}, (1, 1))}


def test_figures_show_their_data(scored: tuple[np.ndarray, np.ndarray]) -> None:
    drawn = all_figures(scored)
    for figure in drawn.values():
        figure.savefig(content := io.BytesIO())
        assert content.getvalue().startswith(b"\x89PNG")
        assert figure.axes[0].get_xlabel()
    ticks = [tick.get_text() for tick in drawn["ladder"].axes[0].get_yticklabels()]
    assert ticks == ["P1", "P2"] and drawn["ladder"].axes[0].get_ylim() == (1.6, -0.7)
    lines = drawn["tradeoff"].axes[0].lines
    assert [line.get_xdata().tolist() for line in lines[:2]] == [[0.1, 0.2], [0.9, 0.9]] and len(lines) == 4
    assert [tick.get_text() for tick in drawn["dots"].axes[0].get_xticklabels()] == ["Lite", "vanilla"]
    labels = [text.get_text() for text in drawn["risk_coverage"].legends[0].get_texts()]
    assert labels[0] == "random order" and labels[-1] == "oracle" and labels[1].startswith("P1: ")


def test_lines_differ_without_colour() -> None:
    styles = [figures.line_style(n) for n in range(24)]
    assert len({(str(style.dash), style.mark) for style in styles}) == 24


def test_twelve_names_differ_in_colour_and_in_marker() -> None:
    styles = [figures.line_style(n) for n in range(12)]
    fixed = [*figures.FIXED_STYLES.values()]
    assert len({style.colour for style in styles}) == len({style.mark for style in styles}) == 12
    assert not {style.mark for style in styles} & {style.mark for style in fixed}


def test_intervals_of_at_most_two_curves(scored: tuple[np.ndarray, np.ndarray]) -> None:
    """With more curves the first band alone is shown, and markers of equal curves do not cover each other."""
    errors, scores = scored
    curve = risk_coverage(errors, scores, replicates=20)

    def lines(n: int) -> list[Any]:
        curves = {f"curve {i}": curve for i in range(n)}
        figure = figures.risk_coverage(curves, Ranking(errors, errors).risks(GRID), 0.5)
        assert ("Thin lines" in figures.intervals_caption(curves)) is (n < 3)
        return [line for line in figure.axes[0].lines if line.get_linewidth() == 0.5]
    assert [len(lines(n)) for n in (1, 2, 3)] == [2, 4, 0]
    curves = figures.risk_coverage(dict.fromkeys("abc", curve), Ranking(errors, errors).risks(GRID), 0.5)
    starts = [line.get_markevery() for line in curves.axes[0].lines if line.get_label()[1:2] == ":"]
    assert starts == [(0, 3), (1, 3), (2, 3)]


def test_a_name_has_one_style_in_all_figures(scored: tuple[np.ndarray, np.ndarray]) -> None:
    drawn = all_figures(scored)
    colour = figures.style_of("P1").colour
    ladder, curves = drawn["ladder"].axes[0], drawn["risk_coverage"].axes[0]
    assert ladder.lines[1].get_color() == colour
    assert [line.get_color() for line in curves.lines if line.get_label().startswith("P1")] == [colour]


def test_markers_at_the_ends_are_inside_the_axes() -> None:
    axes = figures.reliability({"raw": reliability([0, 1], [0, 1])}).axes[0]
    assert all(low < 0 and high > 1 for low, high in (axes.get_xlim(), axes.get_ylim()))
