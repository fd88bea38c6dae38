"""Windows of a series and the scores of forecasts, by brute force and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.references import STORED, needs
from tilelli_jax.errors import InputError
from tilelli_jax.eval.difficulty import series

ETTH1 = STORED / "data" / "ETTh1.csv"


@needs(ETTH1)
def test_the_windows_of_the_published_study() -> None:
    values = series.read_series(ETTH1, "OT")
    assert values.dtype == np.float64 and len(values) == 17_420 and values[0] == 30.5310001373291
    found = series.windows(values)
    assert found.contexts.shape == (701, 512) and found.futures.shape == (701, 96)
    assert found.starts[[0, 1, -1]].tolist() == [0, 24, 16_800]
    np.testing.assert_array_equal(found.futures[700], values[16_800 + 512:16_800 + 608])
    split = series.split_in_time(found.starts, 608, len(values))
    assert [(split == name).sum() for name in ("train", "test", "purge")] == [483, 167, 51]


@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 7), st.integers(1, 11), st.floats(0, 1))
def test_windows_and_their_split_by_brute_force(length: int, context: int, horizon: int, stride: int,
                                                train: float) -> None:
    values, span = np.random.default_rng(0).standard_normal(length), context + horizon
    if length < span:
        with pytest.raises(InputError, match=rf"values: expected \[time\] with at least {span} values"):
            series.windows(values, context=context, horizon=horizon, stride=stride)
        return
    found = series.windows(values, context=context, horizon=horizon, stride=stride)
    split = series.split_in_time(found.starts, span, length, train)
    cut = int(train * length)
    train_values, gap = set(range(cut)), set(range(cut, cut + span))
    expected = [start for start in range(length) if start % stride == 0 and start + span <= length]
    assert found.starts.tolist() == expected
    for i, start in enumerate(expected):
        piece = [values[start + step] for step in range(span)]
        assert [*found.contexts[i], *found.futures[i]] == piece
        own = set(range(start, start + span))
        is_separate = not own & (train_values | gap)
        assert split[i] == ("train" if own <= train_values else "test" if is_separate else "purge")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_column_survives_the_round_trip(name: str, tmp_path: Path) -> None:
    values = [1.5, -2, 1e30, 0.1]
    write(tmp_path / name, {"date": ["a", "b", "c", "d"], "other": [0, 0, 0, 0], "y z": values})
    np.testing.assert_array_equal(series.read_series(tmp_path / name, "y z"), values)


def write(path: Path, columns: dict[str, list[Any]]) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return
    rows = zip(*columns.values(), strict=True)
    lines = [tuple(columns), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    path.write_text("\ufeff" + "".join(",".join(line) + "\r\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(("column", "cells", "message"), [
    ("y", [], "expected rows, as JSON lines"),
    ("z", [1.0], "expected the column 'z'; the columns here are x, y"),
    ("y", [1.0, None, 2.0], "row 2: y: expected a finite number, found "),
    ("y", [1.0, 2.0, float("nan")], "row 3: y: expected a finite number, found "),
    ("y", [float("inf")], "row 1: y: expected a finite number, found "),
    ("y", ["1", "2", "three"], "row 3: y: expected a finite number, found 'three'")])
def test_invalid_columns_are_rejected(ending: str, column: str, cells: list[Any], message: str,
                                     tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    write(path, {"x": [0] * len(cells), "y": cells})
    with pytest.raises(InputError) as caught:
        series.read_series(path, column)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [
    ("none.csv", None), ("none.parquet", None), ("a.parquet", b"no parquet"), ("a.csv", b"y\n\xff\n"),
    ("b.csv", b"")])
def test_unreadable_files_are_rejected(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        series.read_series(tmp_path / name, "y")
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)


def test_a_short_row_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3\n")
    with pytest.raises(InputError, match="line 3: expected 2 cells, as in the header"):
        series.read_series(tmp_path / "a.csv", "y")


def test_scores_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    samples, contexts, futures = (rng.standard_normal(shape) for shape in ((3, 7, 4), (3, 9), (3, 4)))
    crps, mase = series.scores(samples, contexts, futures, season=2)
    for i in range(3):
        steps = []
        for t in range(4):
            x, y = samples[i, :, t], futures[i, t]
            pairs = [abs(a - b) for a in x for b in x]
            steps.append(sum(abs(a - y) for a in x) / 7 - sum(pairs) / 49 / 2)
        assert crps[i] == pytest.approx(sum(steps) / 4, rel=1e-12)
        error = sum(abs(samples[i, :, t].mean() - futures[i, t]) for t in range(4)) / 4
        naive = sum(abs(contexts[i, t] - contexts[i, t - 2]) for t in range(2, 9)) / 7
        assert mase[i] == pytest.approx(error / naive, rel=1e-12)


def test_scores_in_closed_form() -> None:
    """Equal samples: the CRPS is their distance. A straight line: the seasonal naive error is 24 slopes."""
    contexts = np.stack([0.5 * np.arange(60), np.full(60, 3.0)])
    samples, futures = np.full((2, 5, 8), 2.0), np.full((2, 8), 5.0)
    crps, mase = series.scores(samples.astype(np.float32), contexts, futures)
    np.testing.assert_allclose(crps, 3.0, rtol=1e-12)
    np.testing.assert_allclose(mase, [3 / 12, 3 / 1e-5], rtol=1e-12)
    _, short = series.scores(samples, contexts[:, :24], futures)
    np.testing.assert_allclose(short, 3 / 1e-5, rtol=1e-12)
    assert crps.dtype == mase.dtype == np.float64


@pytest.mark.parametrize("shapes", [
    ((2, 5, 8), (2, 60), (2, 7)), ((2, 5, 8), (3, 60), (2, 8)), ((2, 8), (2, 60), (2, 8)),
    ((2, 0, 8), (2, 60), (2, 8))])
def test_inconsistent_shapes_are_rejected(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InputError, match="samples, contexts, futures: expected "):
        series.scores(*(np.zeros(shape) for shape in shapes))


def test_nonpositive_lengths_are_rejected() -> None:
    for name in ("context", "horizon", "stride"):
        with pytest.raises(InputError, match=f"{name}: expected at least 1, found 0"):
            series.windows(np.zeros(999), **{name: 0})
    with pytest.raises(InputError, match=r"values: expected \[time\]"):
        series.windows(np.zeros((700, 2)))
    with pytest.raises(InputError, match="season: expected at least 1, found 0"):
        series.scores(np.zeros((1, 2, 3)), np.zeros((1, 9)), np.zeros((1, 3)), season=0)
