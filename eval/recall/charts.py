"""What was read of one question, as Plotly figures: P(knows), and how that shows in the depth.

Layers are counted from 0; entropies are in nats. The middle of the depth is shaded.
"""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tilelli_jax.signals.crystallisation import BY_LAYER, band

from ..figures import COLOURS
from ..thresholds import Thresholds
from .predictor import Prediction

GREEN, AMBER, RED = "#8FCFB8", "#F3CE7E", "#EBA98A"  # pale: the bar and the number stand on them
FONT = {"family": "system-ui, sans-serif", "size": 12}
HEIGHT = 300


def gauge(p: float, thresholds: Thresholds) -> go.Figure:
    """P(knows) from 0 to 1, with what is said below red, from green on, and in between.

    Without a threshold its word is never said, and has no colour; without any nothing has.
    """
    figure = go.Figure(go.Indicator(
        mode="gauge+number", value=p, number={"valueformat": ".3f", "font": {"size": 34}},
        gauge={"axis": {"range": [0, 1], "tickvals": [0, 0.25, 0.5, 0.75, 1]},
               "bar": {"color": "#222222", "thickness": 0.22}, "steps": _steps(thresholds)}))
    return _dressed(figure, "P(knows)", {"l": 30, "r": 30, "t": 50, "b": 10})


def crystallisation(told: Prediction) -> go.Figure:
    """Entropy and margin of the next token at the prompt's last position, layer by layer."""
    figure = _two_axes(told, ("a_entropy_final", "entropy, nats"),
                       ("a_margin_final", "margin of the best"))
    return _dressed(figure, "Crystallisation: does an answer take shape?")


def writes(told: Prediction) -> go.Figure:
    """How definite, and how large, the feed-forward writes are at the question's positions."""
    figure = _two_axes(told, ("b_cmax_peak", "peak, nats"),
                       ("b_cmax_rel_norm", "size beside the stream"))
    layer = told.strongest_layer
    figure.add_vline(x=layer, line={"dash": "dot", "color": COLOURS[0], "width": 1.5})
    figure.add_trace(go.Scatter(
        x=[layer], y=[_feature(told, "b_cmax_peak")[layer]], name="strongest", mode="markers",
        marker={"symbol": "star", "size": 15, "color": COLOURS[0]},
        hovertemplate=f"layer {layer}: {_escaped(told.strongest_write)}<extra>strongest</extra>"))
    return _dressed(figure, "Writes: is a fact recalled?")


# ---------------------------------------------------------------------------------------------


def _feature(told: Prediction, name: str) -> list[float]:
    return told.read.crystallisation.by_layer[:, BY_LAYER.index(name)].tolist()


def _steps(thresholds: Thresholds) -> list[dict[str, Any]]:
    green, red = thresholds
    if green is None and red is None:
        return []
    top = 1.0 if green is None else green
    low = 0.0 if red is None else min(red, top)  # where both words could be said, green is
    return [{"range": part, "color": colour} for part, colour in (
        ([0.0, low], RED), ([low, top], AMBER), ([top, 1.0], GREEN)) if part[0] < part[1]]


def _two_axes(told: Prediction, left: tuple[str, str], right: tuple[str, str]) -> go.Figure:
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    n_layers = len(told.read.crystallisation.by_layer)
    for (name, title), second, colour, dash, mark in (
            (left, False, COLOURS[1], "solid", "circle"), (right, True, COLOURS[2], "dash", "square")):
        figure.add_trace(go.Scatter(
            x=list(range(n_layers)), y=_feature(told, name), name=title, mode="lines+markers",
            line={"color": colour, "dash": dash}, marker={"symbol": mark, "size": 6}),
            secondary_y=second)
        figure.update_yaxes(title={"text": title, "font": {"color": colour}}, secondary_y=second,
                            showgrid=not second, rangemode="tozero")
    low, high = band(n_layers)
    # After the lines: a plot without any would not be shaded.
    figure.add_vrect(x0=low - 0.5, x1=high + 0.5, fillcolor="#888888", opacity=0.15, line_width=0,
                     layer="below")
    # Whole layers, however few there are.
    return figure.update_xaxes(title="layer", range=[-0.5, n_layers - 0.5], tickformat="d", tick0=0,
                               dtick=max(1, -(-n_layers // 12)), zeroline=False)


def _dressed(figure: go.Figure, title: str, margin: dict[str, int] | None = None) -> go.Figure:
    return figure.update_layout(
        title={"text": title, "x": 0.5, "font": {"size": 14}}, height=HEIGHT, font=FONT,
        showlegend=False, template="plotly_white", margin=margin or {"l": 55, "r": 55, "t": 40, "b": 45})


def _escaped(text: str) -> str:
    """Quoted, and nothing in it is markup or a place to fill in for Plotly."""
    return html.escape(repr(text), quote=False).replace("%", "&#37;")
