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


def test_continuations(recwarn):
    model = build(VanillaConfig(d_model=8, n_layers=1, max_seq_len=12, n_heads=1, dense_expand=1), 0)
    config = ReportConfig(prompts=("Once", "Twice upon"), sample_bytes=6)
    first, second = report.continuations(model, config, seed=1).split("\n\n[2] ")
    assert first.startswith("[1] Once|") and second.startswith("Twice upon|")
    assert report.continuations(model, config, seed=1) == f"{first}\n\n[2] {second}"
    assert report.continuations(model, config, seed=2) != f"{first}\n\n[2] {second}"
    assert not recwarn.list  # although the second one is longer than the window
