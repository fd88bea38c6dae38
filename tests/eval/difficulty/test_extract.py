"""Extraction: it resumes after its last shard, and no value depends on the size of the shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.error_lines import assert_one_line
from tilelli_jax.errors import InputError
from tilelli_jax.eval.difficulty.extract import Extraction, extract
from tilelli_jax.eval.difficulty.study_data import Measurements
from tilelli_jax.eval.tables import read_columns


class FakeStudyData:
    """Data whose values depend on the item number; it is interrupted after `stop` calls."""

    def __init__(self, stop: int = -1, dtype: type = np.float16) -> None:
        self.calls: list[list[int]] = []
        self.stop, self.dtype = stop, dtype
        self.metadata = {"prompt": [f"prompt {i}" for i in range(40)], "start": list(range(0, 80, 2))}

    def measure(self, network: Any, items: Sequence[int], layers: Sequence[int]) -> Measurements:
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append(list(items))
        numbers = {"loss": np.sqrt(np.array(items, float)), "picked": np.array(items) % 4}
        return Measurements(numbers, {layer: [self.values(i, layer) for i in items] for layer in layers})

    def values(self, item: int, layer: int) -> np.ndarray:
        return np.random.default_rng([item, layer]).standard_normal((1 + item % 3, 8)).astype(self.dtype)


def contents(path: Path, layers: Sequence[int]) -> list[Any]:
    found = Extraction(path)
    return [found.items.tolist(), found.positions.tolist(),
            {name: values.tobytes() for name, values in found.numbers.items()},
            [[(values.shape, values.tobytes()) for values in found.activations(layer)] for layer in layers]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_values_survive_the_round_trip(dtype: type, tmp_path: Path) -> None:
    study_data, items = FakeStudyData(dtype=dtype), [3, 7, 4, 20, 21, 1, 0]  # the order of extraction
    extract(tmp_path, study_data, None, items, (5, 2), 3)
    assert study_data.calls == [[3, 7, 4], [20, 21, 1], [0]]
    found = Extraction(tmp_path)
    assert found.items.tolist() == items and found.positions.tolist() == [1 + i % 3 for i in items]
    assert found.numbers["loss"].tolist() == [np.sqrt(i) for i in items]
    assert found.numbers["picked"].tolist() == [i % 4 for i in items]
    for layer in (2, 5):
        values = list(found.activations(layer))
        assert len(values) == len(items)
        for item, value in zip(items, values, strict=True):
            assert value.dtype == dtype
            np.testing.assert_array_equal(value, study_data.values(item, layer))
    table = read_columns(tmp_path / "metadata.parquet")
    assert list(table) == ["item", "prompt", "start", "loss", "picked", "positions", "shard"]
    assert table["item"].tolist() == items and table["shard"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert table["prompt"].tolist() == [f"prompt {i}" for i in items]
    assert table["start"].tolist() == [2 * i for i in items]
    assert table["loss"].tolist() == found.numbers["loss"].tolist()
    assert table["positions"].tolist() == found.positions.tolist()


def test_without_layers_only_numbers_are_stored(tmp_path: Path) -> None:
    extract(tmp_path, FakeStudyData(), None, range(5), (), 2)
    found = Extraction(tmp_path)
    assert found.positions.tolist() == [0] * 5 and found.numbers["picked"].tolist() == [0, 1, 2, 3, 0]
    assert not any(name.startswith("layer.") for shard in found.shards.parts for name in shard)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_extraction_measures_only_the_rest(after: int, tmp_path: Path) -> None:
    whole, first, again = FakeStudyData(), FakeStudyData(stop=after), FakeStudyData()
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    extract(tmp_path / "whole", whole, None, range(14), (0, 1), 4)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "cut", first, None, range(14), (0, 1), 4)
    assert not (tmp_path / "cut" / "metadata.parquet").exists()
    extract(tmp_path / "cut", again, None, range(14), (0, 1), 4)
    assert first.calls + again.calls == whole.calls and len(again.calls) == 4 - after
    assert contents(tmp_path / "cut", (0, 1)) == contents(tmp_path / "whole", (0, 1))
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()
    extract(tmp_path / "cut", again, None, range(14), (0, 1), 4)
    assert len(again.calls) == 4 - after  # nothing remains to measure


def test_no_value_depends_on_the_size_of_the_shards(tmp_path: Path) -> None:
    found = []
    for size in (1, 3, 5, 14, 100):
        path = tmp_path / str(size)
        path.mkdir()
        extract(path, FakeStudyData(), None, range(14), (0, 1), size)
        found.append(contents(path, (0, 1)))
        table = read_columns(path / "metadata.parquet")
        assert table["item"].tolist() == list(range(14))
        assert table["shard"].tolist() == [i // size for i in range(14)]
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("sizes", [(4, 3), (3, 5), (5, 100)])
def test_an_extraction_resumes_after_shards_of_another_size(sizes: tuple[int, int], tmp_path: Path) -> None:
    """The size of the shards is not part of a stage's key."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    extract(whole, FakeStudyData(), None, range(14), (0,), 4)
    first, again = FakeStudyData(stop=2), FakeStudyData()
    with pytest.raises(KeyboardInterrupt):
        extract(cut, first, None, range(14), (0,), sizes[0])
    extract(cut, again, None, range(14), (0,), sizes[1])
    measured = [item for call in (*first.calls, *again.calls) for item in call]
    assert measured == list(range(14)) and contents(cut, (0,)) == contents(whole, (0,))


def test_a_missing_shard_is_recomputed(tmp_path: Path) -> None:
    extract(tmp_path, FakeStudyData(), None, range(14), (0,), 4)
    expected, again = contents(tmp_path, (0,)), FakeStudyData()
    (tmp_path / "shard-00001.safetensors").unlink()
    extract(tmp_path, again, None, range(14), (0,), 4)
    assert again.calls == [[4, 5, 6, 7]] and contents(tmp_path, (0,)) == expected


def test_shards_of_other_items_are_rejected(tmp_path: Path) -> None:
    extract(tmp_path, FakeStudyData(), None, range(14), (0,), 4)
    (tmp_path / "shard-00001.safetensors").unlink()
    for items, size in ((range(14), 3), (range(1, 15), 4), (range(8), 4)):
        with pytest.raises(InputError) as caught:
            extract(tmp_path, FakeStudyData(), None, items, (0,), size)
        assert_one_line(f"error: {caught.value}\n", str(tmp_path), "found shards of other items")


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Extraction(tmp_path)
    assert_one_line(f"error: {caught.value}\n", str(tmp_path), "expected shards of an extraction, found none")
