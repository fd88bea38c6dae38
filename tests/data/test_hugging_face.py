"""hf:NAME sources: streamed once, and then read from their shards."""

import concurrent.futures
import json
import os
import sys

import pytest

from tilelli_jax.data import corpus
from tilelli_jax.data.config import DataConfig
from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.errors import InputError
from tilelli_jax.io import files


def text_of(corpus):
    return corpus.read(0, len(corpus)).tobytes().decode()


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets", reason="needs the extra 'hf'")


@pytest.fixture
def rows_of(datasets, monkeypatch):
    """Returns a function that makes `load_dataset` return the given splits: {split: {column: values}}."""
    def serve(**splits):
        def load_dataset(name, subset, revision, streaming):
            assert streaming and (name, subset, revision) == ("some/set", None, None)
            return datasets.IterableDatasetDict({
                split: datasets.Dataset.from_dict(columns).to_iterable_dataset()
                for split, columns in splits.items()})
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return serve


def config(tmp_path, source="hf:some/set", **settings):
    return DataConfig(source=source, cache_dir=str(tmp_path / "cache"), **settings)


def test_a_set_in_a_directory_with_its_own_validation(datasets, tmp_path, monkeypatch):
    directory = tmp_path / "made"
    directory.mkdir()
    for split, n in (("train", 3), ("validation", 2)):
        (directory / f"{split}.jsonl").write_text("".join(
            json.dumps({"id": i, "story": f"{split} é {i}"}) + "\n" for i in range(n)))
    settings = config(tmp_path, f"hf:{directory}:story")
    for _ in range(2):
        splits = open_corpus(settings)
        assert text_of(splits.train) == "train é 0\n\ntrain é 1\n\ntrain é 2"
        assert text_of(splits.valid) == "validation é 0\n\nvalidation é 1"
        monkeypatch.setattr(datasets, "load_dataset", None)  # the second time it is not called
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_without_a_validation_split_the_end_is_held_out(rows_of, tmp_path):
    rows_of(train={"text": ["a" * 30, "b" * 28], "title": ["x", "y"]})
    splits = open_corpus(config(tmp_path, valid_fraction=0.25))
    assert text_of(splits.train) == "a" * 30 + "\n\n" + "b" * 13
    assert text_of(splits.valid) == "b" * 15
    # Another fraction gives another corpus, and the two do not overwrite each other.
    assert len(open_corpus(config(tmp_path, valid_fraction=0.5)).valid) == 30
    assert len(open_corpus(config(tmp_path, valid_fraction=0.25)).valid) == 15


def test_incomplete_shards_are_written_again(rows_of, tmp_path):
    rows_of(train={"text": ["a" * 30]})
    train_text = text_of(open_corpus(config(tmp_path)).train)
    (directory,) = (tmp_path / "cache").iterdir()
    (directory / "meta.json").unlink()  # as of a process that was killed between its renames
    (directory / "train.bin").write_text("torn")
    assert text_of(open_corpus(config(tmp_path)).train) == train_text


def test_no_more_is_read_than_hf_bytes(datasets, monkeypatch, tmp_path):
    def endless():
        for _ in range(1000):
            yield {"text": "ten bytes."}
        raise AssertionError("read on")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": endless()})
    splits = open_corpus(config(tmp_path, hf_bytes=100))
    assert (len(splits.train), len(splits.valid)) == (90, 10)


@pytest.mark.parametrize(("splits", "source", "message"), [
    ({"train": {"a": ["x"], "b": ["y"]}}, "hf:some/set", "which column"),
    ({"train": {"a": ["x"]}}, "hf:some/set:b", "under 'b', found only a"),
    ({"test": {"a": ["x"]}}, "hf:some/set", "a split 'train', found test"),
    ({"train": {"a": [""]}}, "hf:some/set", "no bytes"),
])
def test_unusable_data_sets(rows_of, tmp_path, splits, source, message):
    rows_of(**splits)
    with pytest.raises(InputError, match="hf:some/set.*" + message):
        open_corpus(config(tmp_path, source))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("source", "expected"), [
    ("hf:some/set#sample-10BT", ("some/set", "sample-10BT", None, "text")),
    ("hf:some/set@v1.0/x:title", ("some/set", None, "v1.0/x", "title")),
    ("hf:some/set#a@b:title", ("some/set", "a", "b", "title"))])
def test_subset_revision_and_column(datasets, monkeypatch, tmp_path, source, expected):
    def load_dataset(name, subset, revision, streaming):
        assert streaming and (name, subset, revision) == expected[:3]
        return {"train": [{"text": "a text of text", "title": "a text of title"}]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = open_corpus(config(tmp_path, source, valid_fraction=0.1))
    assert text_of(splits.train) + text_of(splits.valid) == f"a text of {expected[3]}"


@pytest.mark.parametrize("source", ["hf:", "hf:#a", "hf:some/set#", "hf:some/set@", "hf:some/set:"])
def test_malformed_names(datasets, tmp_path, source):
    with pytest.raises(InputError, match=r"expected hf:NAME\[#SUBSET\]\[@REVISION\]\[:COLUMN\]"):
        open_corpus(config(tmp_path, source))
    assert os.listdir(tmp_path) == []


def test_an_unreachable_data_set(datasets, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match="hf:some/set: cannot be opened: no network"):
        open_corpus(config(tmp_path))


def test_an_interrupted_download(datasets, tmp_path, monkeypatch):
    def breaking():
        yield {"text": "some text"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": breaking()})
    with pytest.raises(InputError, match="hf:some/set: reading stopped: gone"):
        open_corpus(config(tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_error_names_a_missing_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets: pip install 'tilelli_jax.hf.'"):
        open_corpus(config(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl: nothing is locked there")
def test_one_of_several_processes_writes_the_shards(rows_of, tmp_path, monkeypatch):
    rows_of(train={"text": ["One day.", "Two days."]})
    settings = config(tmp_path, valid_fraction=0.5)
    (tmp_path / "cache").mkdir()
    first = files.lock(tmp_path / "cache", wait=True)  # another process is writing
    with concurrent.futures.ThreadPoolExecutor() as pool:
        second = pool.submit(open_corpus, settings)
        with pytest.raises(concurrent.futures.TimeoutError):
            second.result(timeout=0.5)
        os.close(first)
        splits = second.result(timeout=60)
    assert len(splits.train) + len(splits.valid) > 0
    monkeypatch.setattr(corpus, "write_shards", None)  # existing shards are not written again
    assert text_of(open_corpus(settings).train) == text_of(splits.train)


def test_a_lone_surrogate_raises_an_error(datasets, tmp_path, monkeypatch):
    """As in JSON lines. Arrow cannot store one, but a data set may be generated by a program."""
    def load_dataset(*_, **__):
        return {"train": [{"text": "fine"}, {"text": "\ud800 a"}]}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="hf:some/set, train row 1: expected text, found a lone surrogate"):
        open_corpus(config(tmp_path))
