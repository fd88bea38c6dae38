"""Plotly figures for one question: the P(knows) gauge and the signals by layer.

Layers are counted from 0; entropies are in nats. The middle layers (`crystallisation.band`) are shaded.
"""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tilelli_jax.signals.crystallisation import BY_LAYER, band

from ...figures import COLOURS
from ...thresholds import Thresholds
from ..predictor import Prediction

GREEN, AMBER, RED = "#8FCFB8", "#F3CE7E", "#EBA98A"  # pale: the bar and the number are drawn over them
FONT = {"family": "system-ui, sans-serif", "size": 12}
HEIGHT = 300


def gauge(p: float, thresholds: Thresholds) -> go.Figure:
    """Draws P(knows) from 0 to 1, with one colour for each verdict.

    A verdict whose threshold is None has no colour; without thresholds the gauge is plain.
    """
    figure = go.Figure(go.Indicator(
        mode="gauge+number", value=p, number={"valueformat": ".3f", "font": {"size": 34}},
        gauge={"axis": {"range": [0, 1], "tickvals": [0, 0.25, 0.5, 0.75, 1]},
               "bar": {"color": "#222222", "thickness": 0.22}, "steps": _steps(thresholds)}))
    return _with_layout(figure, "P(knows)", {"l": 30, "r": 30, "t": 50, "b": 10})


def crystallisation(prediction: Prediction) -> go.Figure:
    """Draws entropy and margin of the next token at the prompt's last position, by layer."""
    figure = _two_axes(prediction, ("a_entropy_final", "entropy, nats"),
                       ("a_margin_final", "margin of the best token"))
    return _with_layout(figure, "Crystallisation: does an answer take shape?")


def writes(prediction: Prediction) -> go.Figure:
    """Draws peak and relative norm of the MLP writes at the question's positions, by layer."""
    figure = _two_axes(prediction, ("b_cmax_peak", "peak, nats"),
                       ("b_cmax_rel_norm", "norm relative to the stream"))
    layer = prediction.strongest_layer
    figure.add_vline(x=layer, line={"dash": "dot", "color": COLOURS[0], "width": 1.5})
    figure.add_trace(go.Scatter(
        x=[layer], y=[_feature(prediction, "b_cmax_peak")[layer]], name="strongest", mode="markers",
        marker={"symbol": "star", "size": 15, "color": COLOURS[0]},
        hovertemplate=f"layer {layer}: {_escaped(prediction.strongest_write)}<extra>strongest</extra>"))
    return _with_layout(figure, "MLP writes: is a fact recalled?")


# ---------------------------------------------------------------------------------------------


def _feature(prediction: Prediction, name: str) -> list[float]:
    return prediction.outputs.crystallisation.by_layer[:, BY_LAYER.index(name)].tolist()


def _steps(thresholds: Thresholds) -> list[dict[str, Any]]:
    knows_from, unknown_below = thresholds
    if knows_from is None and unknown_below is None:
        return []
    top = 1.0 if knows_from is None else knows_from
    # where the two overlap, knows_from takes precedence
    low = 0.0 if unknown_below is None else min(unknown_below, top)
    return [{"range": bounds, "color": colour} for bounds, colour in (
        ([0.0, low], RED), ([low, top], AMBER), ([top, 1.0], GREEN)) if bounds[0] < bounds[1]]


def _two_axes(prediction: Prediction, left: tuple[str, str], right: tuple[str, str]) -> go.Figure:
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    n_layers = len(prediction.outputs.crystallisation.by_layer)
    for (name, title), secondary, colour, dash, marker in (
            (left, False, COLOURS[1], "solid", "circle"), (right, True, COLOURS[2], "dash", "square")):
        figure.add_trace(go.Scatter(
            x=list(range(n_layers)), y=_feature(prediction, name), name=title, mode="lines+markers",
            line={"color": colour, "dash": dash}, marker={"symbol": marker, "size": 6}),
            secondary_y=secondary)
        figure.update_yaxes(title={"text": title, "font": {"color": colour}}, secondary_y=secondary,
                            showgrid=not secondary, rangemode="tozero")
    low, high = band(n_layers)
    # Added after the lines: Plotly does not shade a plot without traces.
    figure.add_vrect(x0=low - 0.5, x1=high + 0.5, fillcolor="#888888", opacity=0.15, line_width=0,
                     layer="below")
    # Ticks at whole layers, at most 12 of them.
    return figure.update_xaxes(title="layer", range=[-0.5, n_layers - 0.5], tickformat="d", tick0=0,
                               dtick=max(1, -(-n_layers // 12)), zeroline=False)


def _with_layout(figure: go.Figure, title: str, margin: dict[str, int] | None = None) -> go.Figure:
    return figure.update_layout(
        title={"text": title, "x": 0.5, "font": {"size": 14}}, height=HEIGHT, font=FONT,
        showlegend=False, template="plotly_white", margin=margin or {"l": 55, "r": 55, "t": 40, "b": 45})


def _escaped(text: str) -> str:
    """Quotes a token so that Plotly reads neither markup nor `%{…}` placeholders in it."""
    return html.escape(repr(text), quote=False).replace("%", "&#37;")
