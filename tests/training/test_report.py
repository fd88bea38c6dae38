"""The report at the end of a run: table, figure and continuations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tilelli_jax.loading.store import build
from tilelli_jax.models import VanillaConfig
from tilelli_jax.training import report
from tilelli_jax.training.loss import NATS, UNEXPLAINED
from tilelli_jax.training.report import ReportConfig

SUMMARY = {"best_step": 20, "best_valid_loss": math.log(2), "steps": 30, "final_valid_loss": 2 * math.log(2),
           "trigram_valid_loss": None}


def test_the_table_has_the_known_losses():
    rows = report.losses_table(SUMMARY, ReportConfig(), NATS).splitlines()
    assert rows[0].split() == ["validation", "loss", "nats/byte", "bits/byte"]
    assert rows[2].split()[-2:] == ["0.6931", "1.0000"] and "best (step 20)" in rows[2]
    assert rows[3].split()[-2:] == ["1.3863", "2.0000"] and "last (step 30)" in rows[3]
    assert len(rows) == 4
    more = report.losses_table(SUMMARY | {"trigram_valid_loss": 1.0},
                               ReportConfig(reference=0.5, reference_name="a rival"), NATS).splitlines()
    assert more[4].startswith("a rival") and more[4].split()[-2:] == ["0.5000", "0.7213"]
    assert more[5].startswith("byte trigrams") and len(more) == 6


def test_a_loss_without_a_second_unit():
    rows = report.losses_table(SUMMARY, ReportConfig(), UNEXPLAINED).splitlines()
    assert rows[0].split(None, 2)[2] == "of the variance unexplained" and rows[2].split()[-1] == "0.6931"


METRICS = [{"step": step, "loss": 5.0 / step, "valid_loss": 5.5 / step} if step % 5 == 0 else
           {"step": step, "loss": 5.0 / step} for step in range(1, 31)]


@pytest.mark.parametrize("rows", [METRICS, METRICS[:1], [{"step": 1, "loss": None}], []],
                         ids=["a run", "one row", "nothing finite", "nothing"])
@pytest.mark.parametrize("loss_unit", [NATS, UNEXPLAINED])
def test_the_figure_is_a_png(tmp_path, rows, loss_unit):
    path = tmp_path / "loss.png"
    report.plot_losses(rows, path, "a title with $ and _ and $", {"byte trigrams": 1.5}, loss_unit)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    from matplotlib import pyplot
    height, width, _ = pyplot.imread(path).shape
    assert (width, height) == (1050, 630)


def test_the_figure_shows_the_curve(tmp_path):
    from matplotlib import pyplot
    images = []
    for rows in (METRICS, METRICS[:15]):
        report.plot_losses(rows, tmp_path / "loss.png", "", {}, NATS)
        images.append(pyplot.imread(tmp_path / "loss.png"))
    assert np.abs(images[0] - images[1]).max() > 0.5


def axes_of(rows, path, monkeypatch, baselines=None):
    """Returns the axes of the figure."""
    from matplotlib import pyplot
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", figures.append)
        report.plot_losses(rows, path, "", baselines or {}, NATS)
    pyplot.close(figures[0])
    return figures[0].axes[0]


def test_the_axis_of_updates_has_integer_ticks(tmp_path, monkeypatch):
    for rows in (METRICS[:3], METRICS[:1], METRICS):
        axes = axes_of(rows, tmp_path / "loss.png", monkeypatch)
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks), ticks


def test_a_curve_above_the_axis_is_marked(tmp_path, monkeypatch):
    """Of 100 updates the first four may be above the axis; the fifth has a loss of 1."""
    steep = [{"step": step, "loss": 5.0 / step} for step in range(1, 101)]
    axes = axes_of(steep, tmp_path / "loss.png", monkeypatch)
    *_, mark = axes.lines
    assert mark.get_label() == "training, above the axis: 5.00 at update 1" and mark.get_marker() == "^"
    assert mark.get_xydata().tolist() == [[1, axes.get_ylim()[1]]] and 1 < axes.get_ylim()[1] < 1.1
    flat = axes_of([row | {"loss": 1.0 + row["loss"] / 100} for row in steep[10:]], tmp_path / "loss.png",
                   monkeypatch)
    assert [line.get_label() for line in flat.lines] == ["training"]
    # All validations are shown.
    higher = axes_of([*steep[:50], {"step": 51, "loss": 0.1, "valid_loss": 9.0}, *steep[51:]],
                     tmp_path / "loss.png", monkeypatch)
    assert higher.get_ylim()[1] > 9 and "above" not in higher.lines[-1].get_label()


def test_one_point_is_a_marker_and_not_a_line(tmp_path, monkeypatch):
    training, validation = axes_of(METRICS[:5], tmp_path / "loss.png", monkeypatch).lines
    assert (training.get_linestyle(), validation.get_linestyle()) == ("-", "None")
    assert validation.get_marker() == "o"
    training, validation = axes_of(METRICS[:10], tmp_path / "loss.png", monkeypatch).lines
    assert validation.get_linestyle() == "-"
    (training,) = axes_of(METRICS[:1], tmp_path / "loss.png", monkeypatch).lines
    assert (training.get_linestyle(), training.get_marker()) == ("None", "o")


def test_continuations(recwarn):
    model = build(VanillaConfig(d_model=8, n_layers=1, max_seq_len=12, n_heads=1, dense_expand=1), 0)
    config = ReportConfig(prompts=("Once", "Twice upon"), sample_bytes=6)
    first, second = report.continuations(model, config, seed=1).split("\n\n[2] ")
    assert first.startswith("[1] Once|") and second.startswith("Twice upon|")
    assert report.continuations(model, config, seed=1) == f"{first}\n\n[2] {second}"
    assert report.continuations(model, config, seed=2) != f"{first}\n\n[2] {second}"
    assert not recwarn.list  # although the second one is longer than the window
