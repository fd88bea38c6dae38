"""Questions from files, from the hub, and from any text; excluded prompts."""

from __future__ import annotations

import builtins
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.error_lines import assert_one_line
from tilelli_jax.data.synthetic import stories
from tilelli_jax.errors import InputError
from tilelli_jax.eval.difficulty import labels, texts
from tilelli_jax.eval.inputs.rows import hugging_face, read_rows

SQUAD = {"context": "A cat.", "question": "Who?", "answers": {"text": [" cat "]}, "title": "Cats"}
HELLASWAG = {"ctx_a": "A cat", "ctx_b": "sits", "endings": [" down.", "up", "by", "on"], "label": "1",
             "activity_label": "Cats", "source_id": "wikihow~7"}


def test_rows_become_questions() -> None:
    assert texts.squad([SQUAD], "x") == [texts.TextItem(
        "Context: A cat.\nQuestion: Who?\nAnswer:", (" cat",), 0, "Cats", "A cat.")]
    plain = {name: value for name, value in HELLASWAG.items() if name != "source_id"} | {"ctx_b": ""}
    assert texts.hellaswag([HELLASWAG, plain], "x") == [
        texts.TextItem("A cat sits", (" down.", " up", " by", " on"), 1, "Cats", "wikihow~7", "wikihow"),
        texts.TextItem("A cat", (" down.", " up", " by", " on"), 1, "Cats", "Cats", "")]


@pytest.mark.parametrize("label", ["", "4", -1, None])
def test_a_label_must_be_the_index_of_an_ending(label: Any) -> None:
    with pytest.raises(InputError, match=r"^x: row 2: expected the columns ctx_a"):
        texts.hellaswag([HELLASWAG, HELLASWAG | {"label": label}], "x")


def test_json_json_lines_and_parquet_agree(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    rows = [SQUAD | {"question": f"Who is {i}?"} for i in range(5)]
    (tmp_path / "a.json").write_text("\n" + json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert read_rows(tmp_path / name) == rows
        assert read_rows(tmp_path / name, max_rows=2) == rows[:2]


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(name: str, **options: Any) -> Any:
        calls.append((name, options))
        if name == "no/such":
            raise OSError("the hub is away")
        return ({"row": i} for i in range(1000))
    monkeypatch.setitem(sys.modules, "datasets",
                        types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert hugging_face("hf:rajpurkar/squad", 3) == [{"row": 0}, {"row": 1}, {"row": 2}]
    assert calls == [("rajpurkar/squad", {"split": "validation", "streaming": True})]
    with pytest.raises(InputError, match=r"^hf:no/such: cannot be read: the hub is away; a local file"):
        hugging_face("hf:no/such", 3)


def test_hugging_face_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return original(name, *rest)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError) as caught:
        hugging_face("hf:squad", 3)
    assert_one_line(f"error: {caught.value}\n", "hf:squad", "needs datasets", "pip install")


@given(st.text("ab|", max_size=60), st.integers(1, 5), st.integers(1, 3))
def test_passages_by_brute_force(text: str, prompt: int, ending: int) -> None:
    found = texts.passages(text, prompt=prompt, ending=ending, separator="|")
    expected = []
    for number, document in enumerate(text.split("|")):
        while len(document) >= prompt + ending:
            expected.append((document[:prompt], document[prompt:prompt + ending], str(number)))
            document = document[prompt + ending:]
    assert [(question.prompt, *question.endings, question.group) for question in found] == expected
    assert all((question.right, question.topic, question.domain) == (0, "", "") for question in found)


@given(st.text("abc", max_size=200), st.integers(1, 3), st.integers(1, 2))
def test_without_separator_pieces_are_consecutive(text: str, prompt: int, ending: int) -> None:
    found = texts.passages(text, prompt=prompt, ending=ending, separator="")
    size = prompt + ending
    joined = "".join(question.prompt + question.endings[0] for question in found)
    assert joined == text[:len(text) // size * size]
    assert [question.group for question in found] == [str(i // texts.BLOCK) for i in range(len(found))]


@pytest.mark.parametrize("size", [24, 132, 176, 550, 800])
@pytest.mark.parametrize("items", [10, 600])
def test_built_in_stories_are_enough(items: int, size: int) -> None:
    text = texts.built_in(items, size)
    found = texts.passages(text, prompt=size - 4, ending=4, separator=stories.SEPARATOR)
    assert len(found) >= items
    assert text.encode() == stories.generate(len(text), 0, "valid")
    if size < 200:  # no longer than necessary
        assert len(text) == int(1.5 * items * size) + 10_000


def test_the_built_in_text_is_bounded_for_long_pieces() -> None:
    assert len(texts.built_in(10, 5000)) == 85_000  # longer than any story
    assert len(texts.built_in(100, 1020)) == 8 * 163_000  # longer than most stories


def test_similar_and_memorized_prompts_are_purged() -> None:
    prompts = ["the cat sat on the mat", "the dog ran in the park", "a cat and a dog",
               "the cat sat on the mat .", "nothing of the kind"]
    split = np.array(["train", "train", "train", "test", "test"])
    found = labels.purged(split, prompts, np.array([3.0, 0.1, 3.0, 3.0, 3.0]))
    assert found.tolist() == ["train", "purge", "train", "purge", "test"]
    assert split.tolist() == ["train", "train", "train", "test", "test"]


@pytest.mark.parametrize(("content", "parts"), [
    ("[]", ["expected rows"]), ("{", ["line 1: not JSON"]),
    ('[{"context": "a"}]', ["row 1: question: expected text, found nothing; "]),
    ('[{"context": "a", "question": null}]', ["row 1: question: expected text, found None; "])])
def test_invalid_input(content: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        texts.squad(read_rows(path), str(path))
    assert_one_line(f"error: {caught.value}\n", str(path), *parts)


@pytest.mark.parametrize("label", ["4", -1, "x", None, float("inf"), float("nan"), 10**400])
def test_an_invalid_label_is_rejected(label: Any) -> None:
    row = {"ctx_a": "a", "ctx_b": "", "endings": ["b"] * 4, "activity_label": "c"}
    assert texts.hellaswag([row | {"label": "3"}], "here")[0].right == 3
    with pytest.raises(InputError, match=r"^here: row 2: expected the columns ctx_a, ctx_b, endings"):
        texts.hellaswag([row | {"label": 0}, row | {"label": label}], "here")


def test_a_repeated_prompt_is_purged() -> None:
    """Even if no word occurs in two train prompts."""
    split = np.array(["train", "train", "test", "test"])
    prompts = ["alpha", "beta", "beta", "gamma"]
    assert labels.purged(split, prompts, np.full(4, 3.0)).tolist() == ["train", "train", "purge", "test"]
