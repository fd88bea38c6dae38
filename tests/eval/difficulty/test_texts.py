"""Questions from files, from a hub, and from any text; prompts that are left out."""

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
from tilelli_jax.eval.difficulty import labels, texts
from tilelli_jax.eval.inputs.rows import hugging_face, read_rows

from tests.refusals import assert_one_line
from tilelli_jax.data import stories
from tilelli_jax.errors import InputError

SQUAD = {"context": "A cat.", "question": "Who?", "answers": {"text": [" cat "]}, "title": "Cats"}
HELLASWAG = {"ctx_a": "A cat", "ctx_b": "sits", "endings": [" down.", "up", "by", "on"], "label": "1",
             "activity_label": "Cats", "source_id": "wikihow~7"}


def test_rows_become_questions() -> None:
    assert texts.squad([SQUAD], "x") == [texts.Question(
        "Context: A cat.\nQuestion: Who?\nAnswer:", (" cat",), 0, "Cats", "A cat.")]
    plain = {name: value for name, value in HELLASWAG.items() if name != "source_id"} | {"ctx_b": ""}
    assert texts.hellaswag([HELLASWAG, plain], "x") == [
        texts.Question("A cat sits", (" down.", " up", " by", " on"), 1, "Cats", "wikihow~7", "wikihow"),
        texts.Question("A cat", (" down.", " up", " by", " on"), 1, "Cats", "Cats", "")]


@pytest.mark.parametrize("label", ["", "4", -1, None])
def test_a_label_is_of_an_ending(label: Any) -> None:
    with pytest.raises(InputError, match=r"^x: row 1: expected the columns ctx_a"):
        texts.hellaswag([HELLASWAG, HELLASWAG | {"label": label}], "x")


def test_files_of_three_kinds(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    rows = [SQUAD | {"question": f"Who is {i}?"} for i in range(5)]
    (tmp_path / "a.json").write_text("\n" + json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert read_rows(tmp_path / name) == rows
        assert read_rows(tmp_path / name, most=2) == rows[:2]


def test_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, **how: Any) -> Any:
        asked.append((name, how))
        if name == "no/such":
            raise OSError("the hub is away")
        return ({"row": i} for i in range(1000))
    monkeypatch.setitem(sys.modules, "datasets",
                        types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert hugging_face("hf:rajpurkar/squad", 3) == [{"row": 0}, {"row": 1}, {"row": 2}]
    assert asked == [("rajpurkar/squad", {"split": "validation", "streaming": True})]
    with pytest.raises(InputError, match=r"^hf:no/such: cannot be read: the hub is away; a local file"):
        hugging_face("hf:no/such", 3)


def test_a_hub_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return plain(name, *rest)
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
    assert [(one.prompt, *one.endings, one.group) for one in found] == expected
    assert all((one.right, one.topic, one.domain) == (0, "", "") for one in found)


@given(st.text("abc", max_size=200), st.integers(1, 3), st.integers(1, 2))
def test_without_separator_pieces_follow_each_other(text: str, prompt: int, ending: int) -> None:
    found = texts.passages(text, prompt=prompt, ending=ending, separator="")
    whole = prompt + ending
    assert "".join(one.prompt + one.endings[0] for one in found) == text[:len(text) // whole * whole]
    assert [one.group for one in found] == [str(i // texts.BLOCK) for i in range(len(found))]


@pytest.mark.parametrize("whole", [24, 132, 176, 550, 800])
@pytest.mark.parametrize("items", [10, 600])
def test_built_in_stories_are_enough(items: int, whole: int) -> None:
    text = texts.built_in(items, whole)
    found = texts.passages(text, prompt=whole - 4, ending=4, separator=stories.SEPARATOR)
    assert len(found) >= items
    assert text.encode() == stories.generate(len(text), 0, "valid")
    if whole < 200:  # and not told in vain
        assert len(text) == int(1.5 * items * whole) + 10_000


def test_pieces_as_long_as_stories_come_to_an_end() -> None:
    assert len(texts.built_in(10, 5000)) == 85_000  # longer than any
    assert len(texts.built_in(100, 1020)) == 8 * 163_000  # longer than most


def test_prompts_too_alike_are_left_out() -> None:
    prompts = ["the cat sat on the mat", "the dog ran in the park", "a cat and a dog",
               "the cat sat on the mat .", "nothing of the kind"]
    split = np.array(["train", "train", "train", "test", "test"])
    found = labels.purged(split, prompts, np.array([3.0, 0.1, 3.0, 3.0, 3.0]))
    assert found.tolist() == ["train", "purge", "train", "purge", "test"]
    assert split.tolist() == ["train", "train", "train", "test", "test"]


@pytest.mark.parametrize(("content", "parts"), [
    ("[]", ["expected rows"]), ("{", ["line 1: not JSON"]), ('[{"context": "a"}]', ["row 0", "question"])])
def test_refusals(content: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        texts.squad(read_rows(path), str(path))
    assert_one_line(f"error: {caught.value}\n", str(path), *parts)


@pytest.mark.parametrize("label", ["4", -1, "x", None, float("inf"), float("nan"), 10**400])
def test_a_label_of_no_ending(label: Any) -> None:
    row = {"ctx_a": "a", "ctx_b": "", "endings": ["b"] * 4, "activity_label": "c"}
    assert texts.hellaswag([row | {"label": "3"}], "here")[0].right == 3
    with pytest.raises(InputError, match=r"^here: row 1: expected the columns ctx_a, ctx_b, endings"):
        texts.hellaswag([row | {"label": 0}, row | {"label": label}], "here")


def test_a_repeated_prompt_is_left_out() -> None:
    """Also where no word of it occurs twice in what is learned from."""
    split = np.array(["train", "train", "test", "test"])
    prompts = ["alpha", "beta", "beta", "gamma"]
    assert labels.purged(split, prompts, np.full(4, 3.0)).tolist() == ["train", "train", "purge", "test"]
