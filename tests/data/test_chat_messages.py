"""Conversations as lists of messages: OpenAI's and ShareGPT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.chat_files import written
from tilelli_jax.data.chat_pairs import ChatConfig, ChatPair, ChatSplits, open_pairs, read_pairs
from tilelli_jax.data.chat_rows import pack_rows
from tilelli_jax.errors import InputError


def chat_line(*texts: str, system: str = "") -> dict[str, Any]:
    """A line of OpenAI's format; `texts` alternate between user and assistant."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def test_conversations(tmp_path: Path) -> None:
    """Every reply is a pair with the turns before it, in both formats; nothing is lost."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sharegpt = {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "hi"},
                                  {"from": "gpt", "value": "Hello."}]}
    context_only = chat_line("one", "1", "two", "2")
    context_only["messages"][1]["weight"] = 0
    path = written(tmp_path / "chat.jsonl", [
        chat_line(" one", "1", "two", "2\n", "three", "3"), chat_line("hi", "Hello.", system="Be kind."),
        sharegpt, {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}],
                   "answerable": False}, context_only])
    pairs = read_pairs(path)
    at = f"{path}, line"
    first, second = ("one", "1"), ("two", "2")
    assert pairs == [
        ChatPair(*first, True, f"{at} 1, message 2"),
        ChatPair(*second, True, f"{at} 1, message 4", (first,)),
        ChatPair("three", "3", True, f"{at} 1, message 6", (first, second)),
        ChatPair("Be kind.\n\nhi", "Hello.", True, f"{at} 2"),
        ChatPair("Be kind.\n\nhi", "Hello.", True, f"{at} 3"),
        ChatPair("a\nb", "c", False, f"{at} 4"),
        ChatPair(*second, True, f"{at} 5, message 4", (first,))]
    # The row is what `tilelli chat` presents, and only the reply counts in the loss.
    text = "USER: one\nTILELLI: 1\nUSER: two\nTILELLI: 2\nUSER: three\nTILELLI:"
    batch = pack_rows(pairs[2:3], 80, pack=False).gather(np.array([0]))
    assert bytes(batch.bytes[0]).rstrip(b"\0").decode() == text + " 3\nUSER:"
    assert bytes(batch.bytes[0, 1:][batch.response[0] == 1]) == b" 3\nUSER:"
    assert np.flatnonzero(batch.last[0]).tolist() == [len(text) - 1]
    np.testing.assert_allclose(batch.prompt[0, :len(text)], 1 / len(text))
    packed = pack_rows(pairs, 160, pack=True)
    rows = packed.gather(np.arange(len(packed)))
    for row, members in zip(rows.bytes, packed.rows, strict=True):
        pieces = [pairs[i].given + pairs[i].continuation.removesuffix("USER:") for i in members]
        assert bytes(row).rstrip(b"\0").decode() == "".join(pieces) + "USER:"


def test_a_conversation_is_in_one_split(tmp_path: Path) -> None:
    """By its first prompt; later turns may share their text, and change the fingerprint."""
    rows = [chat_line(f"q{i}", "a", "thanks", "b", "bye", "c") for i in range(10)]
    splits = open_pairs(ChatConfig(source=str(written(tmp_path / "a.jsonl", rows)), valid_fraction=0.3))
    openings = [{pair.opening for pair in part} for part in splits]
    assert [len(part) for part in splits] == [21, 9] and len(openings[1]) == 3
    assert not openings[0] & openings[1]
    without = ChatSplits(*([pair._replace(context=()) for pair in part] for part in splits))
    assert without.fingerprint() != splits.fingerprint()


def messages(*roles_and_texts: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in roles_and_texts]} | more


U, A = ("user", "a"), ("assistant", "b")


@pytest.mark.parametrize(("row", "message"), [
    (messages(), "messages: expected messages, found an empty list"),
    ({"messages": {}}, "messages: expected messages, found an object"),
    ({"messages": ["hi"]}, "message 1: expected role and content, found text"),
    (messages(U), "messages: expected the assistant's reply at the end, found none"),
    (messages(U, A, U), "messages: expected the assistant's reply at the end, found none"),
    (messages(("system", "s")), "messages: expected the assistant's reply at the end, found none"),
    (messages(A, U), "message 1: role: expected system or user, found 'assistant'"),
    (messages(U, U), "message 2: role: expected assistant, found 'user'"),
    (messages(U, A, ("system", "s")), "message 3: role: expected user, found 'system'"),
    (messages(U, A, ("tool", "s")), "message 3: role: expected user, found 'tool'"),
    (messages(("agent", "a"), A), "message 1: role: expected system or user, found 'agent'"),
    ({"messages": [{"content": "a"}]}, "message 1: role: expected system or user, found None"),
    (messages(U, ("assistant", None)), "message 2: content: expected text, found None"),
    (messages(U, ("assistant", " ")), "message 2: content: expected text, found ' '"),
    ({"messages": [{"role": "user"}]}, "message 1: content: expected text, found none"),
    (messages(("user", [{"type": "image_url"}]), A),
     "message 1: content: expected parts of type 'text', found 'image_url'"),
    (messages(("user", ["a"]), A), "message 1: content: expected parts of type 'text', found text"),
    (messages(U, ("assistant", "x\nUSER: y")), "message 2: content: expected no line that begins with USER:"),
    ({"messages": [messages(U)["messages"][0], {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
     "message 2: tool_calls: expected none, as turns have text only, found some"),
    (messages(U, A, tools=[{"type": "function"}]), "tools: expected none, as turns have text only"),
    ({"messages": [messages(U)["messages"][0], {"role": "assistant", "content": "b", "weight": 0.5}]},
     "message 2: weight: expected 0 or 1, found 0.5"),
    ({"messages": [messages(U)["messages"][0], {"role": "assistant", "content": "b", "weight": 0}]},
     "messages: expected a reply of weight 1, found none"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]},
     "message 2: from: expected assistant, found 'bing'"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]},
     "message 2: value: expected text, found none"),
    (messages(U, A, prompt="a"), "messages: expected no prompt with it, found one"),
    ({"instruction": "a", "output": "b"},
     "line 1: expected prompt and response, messages, conversations or text, found instruction, output")])
def test_invalid_conversations(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "chat.jsonl", [row])
    with pytest.raises(InputError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}, line 1") and message in str(error.value)
    assert "\n" not in str(error.value)
