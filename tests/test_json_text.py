"""Texts that no file takes are found wherever they are in a tree."""

from __future__ import annotations

from typing import Any

import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.json_text import check_text


@pytest.mark.parametrize("tree", ["a", "ä", "\U0001f642", {"ä": [1, None, ("b", {"c": "日本"})]}, None, 1.5])
def test_text(tree: Any) -> None:
    check_text(tree, "here")


@pytest.mark.parametrize("tree", ["\ud800", "ä\udfff", ["a", {"b": "\udc80"}], {"\ud800": 1},
                                  ({"a": ["\ud83d"]},)])
def test_half_a_character(tree: Any) -> None:
    with pytest.raises(InputError, match=r"^here: expected text, found half a character") as refused:
        check_text(tree, "here")
    str(refused.value).encode()
