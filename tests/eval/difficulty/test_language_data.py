"""The data of language models: its items, their split, and the network's activations."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.error_lines import assert_one_line
from tests.reference_impl.random_weights import random_network
from tilelli_jax.errors import InputError
from tilelli_jax.eval.difficulty import cheap
from tilelli_jax.eval.difficulty.config import (
    DifficultyConfig,
    ExtractConfig,
    HellaSwagConfig,
    SplitConfig,
    SquadConfig,
    TextConfig,
)
from tilelli_jax.eval.difficulty.extract import Extraction, extract
from tilelli_jax.eval.difficulty.items import make_items, read_items
from tilelli_jax.eval.difficulty.language_data import LanguageData, split_groups
from tilelli_jax.eval.inputs.networks import NetworkConfig
from tilelli_jax.eval.tables import read_columns
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models.gpt_neox import GPTNeoXConfig
from tilelli_jax.nn.hooks import Tap

CONFIG = GPTNeoXConfig(vocab_size=256, d_model=16, n_layers=2, n_heads=2, d_hidden=32)


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(scope="module")
def language() -> LanguageModel:
    return LanguageModel(random_network(CONFIG, 0)[0], SimpleNamespace(encode=encode))


@pytest.fixture(scope="module")
def alone(language: LanguageModel) -> Callable[[list[int]], np.ndarray]:
    """Returns the residual stream of one text alone, `[layers, time, d_model]`."""
    run = jax.jit(lambda ids: language.model.tapped(ids, Tap(record=("resid_post",)))[1]["resid_post"])
    return lambda ids: np.asarray(run(jnp.asarray([ids])))[:, 0]


def study(data: Any, split: SplitConfig | None = None, **options: Any) -> DifficultyConfig:
    options = {"layers": (1, 0), "dtype": "float32", "batch_size": 3, **options}
    return DifficultyConfig(network=NetworkConfig(path="x"), data=data, split=split or SplitConfig(),
                       extract=ExtractConfig(**options), seed=7)


def story(tmp_path: Path, separator: str = "\n\n") -> TextConfig:
    """Writes seven documents of two different pieces each; the last document has one more."""
    rng = np.random.default_rng(0)
    letters = "".join(chr(97 + i) for i in rng.integers(0, 26, 7 * 40 + 20))
    documents = [letters[start:start + 40] for start in range(0, 240, 40)] + [letters[240:]]
    (tmp_path / "text.txt").write_text(separator.join(documents))
    return TextConfig(source=str(tmp_path / "text.txt"), prompt=16, ending=4, separator=separator)


def hellaswag(tmp_path: Path, rows: int = 24) -> HellaSwagConfig:
    made = [{"ctx_a": f"A {'cat' if i % 2 else 'dog'} {i}", "ctx_b": "goes" if i % 3 else "",
             "endings": [f"{word} {i * j}" for j, word in enumerate(("up", "down", "by", "on"))],
             "label": str(i % 4), "activity_label": "Pets",
             "source_id": f"{'wikihow' if i % 2 else 'activitynet'}~{i // 2}"}
            for i in range(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, made)))
    return HellaSwagConfig(source=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("skip", [1, 5])
def test_stored_activations_match_each_text_alone(skip: int, language: LanguageModel, alone: Any,
                                                  tmp_path: Path) -> None:
    """Reads the shards from disk, in order, and compares them with runs of single texts."""
    study_data = LanguageData(study(story(tmp_path), positions="all", skip=skip))
    assert len(study_data) == 15
    extract(tmp_path, study_data, language, range(15), (0, 1), 4)
    found = Extraction(tmp_path)
    assert found.items.tolist() == list(range(15)) and found.positions.tolist() == [16 - skip] * 15
    for layer in (0, 1):
        for i, values in enumerate(found.activations(layer)):
            expected = alone(encode(study_data.questions[i].prompt))[layer, skip:]
            np.testing.assert_allclose(values, expected, atol=1e-5)
    table = read_columns(tmp_path / "metadata.parquet")
    assert table["item"].tolist() == list(range(15))
    assert table["prompt"].tolist() == study_data.metadata["prompt"]
    assert table["prompt_tokens"].tolist() == [16] * 15 and table["answer_tokens"].tolist() == [4] * 15


def test_no_value_depends_on_the_size_of_the_shards(language: LanguageModel, tmp_path: Path) -> None:
    study_data, found = LanguageData(study(story(tmp_path))), []
    for size in (4, 15):
        path = tmp_path / str(size)
        path.mkdir()
        extract(path, study_data, language, range(15), (0, 1), size)
        extraction = Extraction(path)
        found.append([extraction.numbers, list(extraction.activations(0)), list(extraction.activations(1))])
    for name in found[0][0]:
        np.testing.assert_array_equal(found[0][0][name], found[1][0][name])
    for layer in (1, 2):
        np.testing.assert_array_equal(found[0][layer], found[1][layer])


@pytest.mark.parametrize("positions", ["boundary", "all"])
def test_nonfinite_activations_are_reported(positions: Any, tmp_path: Path) -> None:
    """The error names the item number, in a later shard and in a subset of the items."""
    arrays = dict(random_network(CONFIG, 0)[1])
    arrays["embed.kernel"] = arrays["embed.kernel"].copy()
    arrays["embed.kernel"][ord("Z")] = 1e6
    network = LanguageModel(from_arrays(CONFIG, arrays), SimpleNamespace(encode=encode))
    data = story(tmp_path)
    study_data = LanguageData(study(data, positions=positions, dtype="float16"))
    question = study_data.questions[9]
    study_data.questions[9] = question._replace(prompt=question.prompt[:-1] + "Z")
    for items in (range(15), [1, 3, 4, 5, 6, 9, 11]):
        path = tmp_path / str(len(items))
        path.mkdir()
        with pytest.raises(InputError) as caught:
            extract(path, study_data, network, items, (1,), 4)
        assert_one_line(f"error: {caught.value}\n", "item 9, layer 1: activations are not finite as float16")
        assert [file.name for file in sorted(path.iterdir())] == [
            f"shard-{i:05}.safetensors" for i in range(2 if len(items) == 15 else 1)]


def test_activation_rows(language: LanguageModel, alone: Any, tmp_path: Path) -> None:
    """Each text occurs once, with all positions of prompt and answer except the first."""
    study_data = LanguageData(study(story(tmp_path)))
    found = list(study_data.activation_rows(language, [3, 9], 1))
    questions = [study_data.questions[i] for i in (3, 9)]
    expected = [alone(encode(question.prompt + question.endings[0]))[1, 1:] for question in questions]
    order = [0, 1] if np.allclose(found[0], expected[0], atol=1e-5) else [1, 0]
    for values, i in zip(found, order, strict=True):
        np.testing.assert_allclose(values, expected[i], atol=1e-5)


def test_wrong_answers(language: LanguageModel, tmp_path: Path) -> None:
    """An item is hard, and an error, if a wrong ending has the lowest NLL."""
    study_data = LanguageData(study(hellaswag(tmp_path), SplitConfig(max_similarity=2)))
    extract(tmp_path, study_data, language, range(24), (1,), 7)
    found = Extraction(tmp_path)
    assert found.positions.tolist() == [4] * 24
    nats = study_data._scorer(language, (1,)).score(study_data.questions).ending_nll
    right = np.arange(24) % 4
    np.testing.assert_allclose(found.numbers["loss"], nats[np.arange(24), right], atol=1e-6)
    np.testing.assert_array_equal(found.numbers["picked"], nats.argmin(axis=1))
    wrong = nats.argmin(axis=1) != right
    assert 0 < wrong.sum() < 24
    make_items(tmp_path, study_data, found, study_data.config)
    items = read_items(tmp_path)
    assert items.hard.tolist() == wrong.tolist() == items.error.tolist()
    assert items.domain.tolist() == ["activitynet", "wikihow"] * 12
    assert not set(items.groups[items.train]) & set(items.groups[items.test])


def test_blocks(language: LanguageModel, tmp_path: Path) -> None:
    study_data = LanguageData(study(story(tmp_path)))
    numbers = {"prompt_nll": np.arange(15.0), "answer_tokens": np.arange(1, 16)}
    split = np.where(np.arange(15) < 9, "train", "test")
    found = study_data.blocks(numbers, split)
    assert list(found) == ["cheap", "nll", "length"]
    expected = cheap.prompt_statistics(study_data.metadata["prompt"], split == "train",
                                       study_data.groups.tolist())
    assert found["cheap"].names == tuple(expected)
    np.testing.assert_array_equal(found["cheap"].values, np.stack(list(expected.values()), axis=1))
    np.testing.assert_array_equal(found["nll"].values[:, 0], numbers["prompt_nll"])
    np.testing.assert_allclose(found["length"].values[:, 0], np.log(numbers["answer_tokens"]))


def test_splits(tmp_path: Path) -> None:
    data = story(tmp_path)
    numbers = {"prompt_nll": np.array([0.1, *[3.0] * 14])}
    in_order = LanguageData(study(data, SplitConfig(by="order", train=0.6))).split(numbers)
    assert in_order.tolist() == ["purge", *["train"] * 8, *["test"] * 6]
    study_data = LanguageData(study(data, SplitConfig(by="group")))
    found = study_data.split(numbers)
    assert found[0] == "purge" and set(found[1:].tolist()) == {"train", "test"}
    assert not set(study_data.groups[found == "train"]) & set(study_data.groups[found == "test"])
    unpurged = LanguageData(study(data, SplitConfig(by="group", memorized_nll=0.0))).split(numbers)
    assert unpurged[0] != "purge" and unpurged[1:].tolist() == found[1:].tolist()
    with pytest.raises(InputError, match=r"^split.by: expected at least two groups, found 1 \(for"):
        LanguageData(study(data, SplitConfig(by="topic"))).split(numbers)


def test_folds_keep_groups(tmp_path: Path) -> None:
    study_data = LanguageData(study(story(tmp_path)))
    train = np.arange(1, 15)
    labels = np.arange(14) % 2
    folds = study_data.folds(labels, train, 5)
    assert len(folds) >= 2
    for fit, held in folds:
        assert not set(study_data.groups[train[fit]]) & set(study_data.groups[train[held]])
    assert study_data.folds(np.array([0, 1]), train[:2], 5) == []  # too few for two folds
    assert study_data.folds(np.array([0, 0, 0, 1]), train[:4], 5) == []


def test_few_groups_make_few_folds_or_an_error(tmp_path: Path) -> None:
    """The error comes before the extraction."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{word} goes on and on " * 12 for word in ("one", "two", "three", "four")))
    data = TextConfig(source=str(text), prompt=16, ending=4)
    study_data = LanguageData(study(data))
    train = np.flatnonzero(study_data.split({"prompt_nll": np.full(len(study_data), 3.0)}) == "train")
    n_groups = len(set(study_data.groups[train]))
    assert 2 <= n_groups <= 3
    assert len(study_data.folds(np.arange(len(train)) % 2, train, 5)) == n_groups
    text.write_text("\n\n".join(f"{word} goes on and on " * 12 for word in ("one", "two")))
    with pytest.raises(InputError, match=r"^split.by: .* two groups in the train split.*, found 1 "):
        LanguageData(study(data))


def test_line_ends_and_byte_order_marks_make_no_difference(tmp_path: Path) -> None:
    data = story(tmp_path)
    path = Path(data.source)
    ours = LanguageData(study(data))
    for end, mark in (("\r\n", b"\xef\xbb\xbf"), ("\r", b""), ("\n", b"\xef\xbb\xbf")):
        other = tmp_path / "other.txt"
        other.write_bytes(mark + path.read_text().replace("\n", end).encode())
        found = LanguageData(study(dataclasses.replace(data, source=str(other))))
        assert found.questions == ours.questions and found.groups.tolist() == ours.groups.tolist()


def test_sources(tmp_path: Path) -> None:
    data = hellaswag(tmp_path)
    assert len(LanguageData(study(HellaSwagConfig(source=data.source, items=11)))) == 11
    found = LanguageData(study(HellaSwagConfig(source=data.source, items=11, domain="wikihow")))
    assert len(found) == 11 and found.metadata["answer"][1] == " on 9"
    assert set(found.metadata["domain"]) == {"wikihow"}  # eleven items after the filter
    assert found.fingerprint != LanguageData(study(data)).fingerprint == LanguageData(study(data)).fingerprint
    assert len(LanguageData(study(HellaSwagConfig(source=data.source, items=12)))) == 12
    assert len(LanguageData(study(TextConfig(items=30)))) == 30
    long = LanguageData(study(TextConfig(items=40, prompt=600, ending=50)))
    assert len(long) == 40 and {len(question.prompt) for question in long.questions} == {600}


@pytest.mark.parametrize(("data", "parts"), [
    (TextConfig(source="no/such.txt"), ["data.source: no/such.txt: no such file"]),
    (SquadConfig(source="no/such.json"), ["no/such.json: no such file"]),
    (TextConfig(items=50, prompt=5000), ["data.source: stories: expected at least 10 items, found 0"])])
def test_invalid_sources_are_rejected(data: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        LanguageData(study(data))
    assert_one_line(f"error: {caught.value}\n", *parts)


def test_an_unknown_place_or_layer_is_rejected(language: LanguageModel, tmp_path: Path) -> None:
    data = story(tmp_path)
    for options, message in (({"hook": "resid_pots"},
                              "^extract.hook: expected one of .*, found 'resid_pots'"),
                          ({"layers": (5,)}, "^extract.layers: expected 0 to 1, found 5$")):
        config = study(data, **options)
        with pytest.raises(InputError, match=message):
            LanguageData(config).measure(language, range(3), config.extract.layers)


# ---------------------------------------------------------------------------------------------


GROUPS = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["", "wikihow", "activitynet"])),
                  min_size=2, max_size=40)


@settings(max_examples=60)
@given(GROUPS, st.floats(0.02, 0.98), st.integers(0, 2**32 - 1), st.randoms())
def test_split_groups(sizes: list[tuple[int, str]], train: float, seed: int, random: Any) -> None:
    """Both splits are non-empty and consist of whole groups."""
    rows = [(f"g{i}", domain) for i, (size, domain) in enumerate(sizes) for _ in range(size)]
    random.shuffle(rows)
    groups, domains = (np.array(column) for column in zip(*rows, strict=True))
    if np.unique(domains, return_counts=True)[1].max() < 2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_groups(groups, domains, train, seed)
    assert split.tolist() == split_groups(groups, domains, train, seed).tolist()
    sides = [set(groups[split == part]) for part in ("train", "test")]
    assert all(sides) and not sides[0] & sides[1] and sides[0] | sides[1] == set(groups)


@pytest.mark.parametrize("train", [
    pytest.param(0.3, marks=pytest.mark.exhaustive), 0.7, pytest.param(0.9, marks=pytest.mark.exhaustive)])
def test_fractions_and_domains(train: float) -> None:
    """200 groups of 1 to 5 items; two thirds of the items belong to one domain."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, 200)
    groups = np.repeat([f"g{i}" for i in range(200)], sizes)
    domains = np.repeat(np.where(np.arange(200) % 3, "wikihow", "activitynet"), sizes)
    for named in (domains, np.full(len(groups), "")):
        split = split_groups(groups, named, train, 3)
        assert abs((split == "train").mean() - train) < 0.03
        for domain in np.unique(named):
            assert abs((split[named == domain] == "train").mean() - train) < 0.03
        assert (split_groups(groups, named, train, 4) != split).any()


def test_few_groups() -> None:
    blank = np.full(6, "")
    for train in (0.05, 0.7, 0.95):  # two groups suffice, for any fraction
        assert set(split_groups(np.array(list("aaaabb")), blank, train, 0).tolist()) == {"train", "test"}
    with pytest.raises(InputError, match=r"^split.by: expected at least two groups, found 1 \(for"):
        split_groups(np.array(list("aaaaaa")), blank, 0.7, 0)
    # Groups of one item; each domain has half of the items.
    split = split_groups(np.arange(10).astype(str), np.array(["a", "b"] * 5), 0.7, 0)
    assert 0 < (split == "test").sum() < 5
