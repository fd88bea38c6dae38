"""Bodies of requests: what is read, and what is refused with the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from tilelli_jax.models.sampling import Sampling
from tilelli_jax.serving.requests import (
    Abstain,
    Completion,
    FieldError,
    Message,
    parse_chat,
    parse_completion,
    parse_questions,
)

HELLO = {"role": "user", "content": "Hello"}


def test_a_chat() -> None:
    request = parse_chat({
        "model": "m", "messages": [
            {"role": "developer", "content": "Be brief."}, HELLO,
            {"role": "assistant", "content": "Hi.", "refusal": None},
            {"role": "user", "name": "Mira", "content": [{"type": "text", "text": "a"},
                                                         {"type": "text", "text": "b"}]}],
        "temperature": 0, "top_p": 0.5, "seed": -1, "max_completion_tokens": 7, "n": 2, "stop": "x",
        "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2,
        "user": "u", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0.0, "tools": [],
        "response_format": {"type": "text"}, "logit_bias": {}, "abstain": {"below": 0.3}})
    assert request == Completion(
        "m", (Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi."),
              Message("user", "ab")), (), Sampling(temperature=0.0, top_p=0.5, seed=2**32 - 1), 7, 2, ("x",),
        True, True, 2, False, Abstain(0.3))


def test_a_completion() -> None:
    request = parse_completion({"prompt": ["a", "b"], "n": 3, "stop": ["x", "yz"], "logprobs": 0,
                                "abstain": {"below": 1, "text": "No."}, "model": None})
    assert request == Completion(None, (), ("a", "b"), Sampling(temperature=1.0), 16, 3, ("x", "yz"), False,
                                 False, 0, False, Abstain(1.0, "No."))
    assert parse_completion({"prompt": [1, 2]}).prompts == ((1, 2),)
    assert parse_completion({"prompt": [[1], [2, 3]]}).prompts == ((1,), (2, 3))
    assert parse_completion({"prompt": "a", "echo": True, "max_tokens": 0}).max_new == 0


def test_defaults() -> None:
    request = parse_chat({"messages": [HELLO]})
    assert request.max_new is None and request.n_top is None and request.sampling.temperature == 1
    assert parse_chat({"messages": [HELLO], "logprobs": True}).n_top == 0
    assert parse_questions({"questions": "Who?"}, 2) == (None, ["Who?"])
    assert parse_questions({"questions": ["Who?", "When?"], "model": "m"}, 2) == ("m", ["Who?", "When?"])
    assert parse_completion({"prompt": "a", "max_tokens": 0, "n": 2, "best_of": 2}).max_new == 0
    assert 0 < parse_completion({"prompt": "a", "top_p": 0}).sampling.top_p < 1e-5
    nothing = {"stream": True, "stream_options": {"include_usage": None}}
    assert not parse_completion({"prompt": "a", **nothing}).include_usage


@pytest.mark.parametrize(("change", "message"), [
    ({"messages": None}, "messages: expected a list with at least one entry, found nothing"),
    ({"messages": []}, r"messages: expected a list with at least one entry, found \[\]"),
    ({"messages": ["Hello"]}, r"messages\[0\]: expected an object, found 'Hello'"),
    ({"messages": [{"role": "tool", "content": "a"}]}, r"messages\[0\]\.role: expected one of system, dev"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: expected text, found nothing"),
    ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content: expected text, found 3"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     r"messages\[0\]\.content\[0\]: expected .*, found 'image_url'"),
    ({"messages": [{**HELLO, "tool_calls": [{}]}]}, r"messages\[0\]\.tool_calls: not supported"),
    ({"temperature": 2.1}, "temperature: expected a number from 0 to 2, found 2.1"),
    ({"temperature": "1"}, "temperature: expected a number from 0 to 2, found '1'"),
    ({"temperature": True}, "temperature: expected a number from 0 to 2, found True"),
    ({"temperature": float("nan")}, "temperature: expected a number from 0 to 2, found nan"),
    ({"top_p": -0.1}, "top_p: expected a number from 0 to 1, found -0.1"),
    ({"top_p": 10**400}, "top_p: expected a number from 0 to 1, found 1000"),
    ({"temperature": 10**400}, "temperature: expected a number from 0 to 2, found 1000"),
    ({"abstain": {"below": -10**400}}, "abstain.below: expected a number from 0 to 1, found -1000"),
    ({"max_tokens": 0}, "max_tokens: expected an integer from 1 to"),
    ({"max_tokens": -5}, "max_tokens: expected an integer from 1 to .*, found -5"),
    ({"max_tokens": 10**30}, "max_tokens: expected an integer from 1 to"),
    ({"max_tokens": 1.5}, "max_tokens: expected an integer from 1 to .*, found 1.5"),
    ({"n": 129}, "n: expected an integer from 1 to 128, found 129"),
    ({"seed": "a"}, "seed: expected an integer from"),
    ({"stop": ["a"] * 5}, "stop: expected a text or a list of up to 4"),
    ({"stop": [""]}, "stop: expected a text or a list of up to 4, none empty"),
    ({"stop": [1]}, "stop: expected a text"),
    ({"stream": 1}, "stream: expected true or false, found 1"),
    ({"stream_options": {}}, "stream_options: expected stream to be true, found false"),
    ({"stream": True, "stream_options": {"foo": True}}, r"stream_options\.foo: expected include_usage"),
    ({"top_logprobs": 2}, "top_logprobs: expected logprobs to be true, found false"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: expected an integer from 0 to 20, found 21"),
    ({"presence_penalty": 0.5}, "presence_penalty: not supported by this server, found 0.5"),
    ({"tools": [{}]}, "tools: not supported by this server"),
    ({"response_format": {"type": "json_object"}}, "response_format: not supported"),
    ({"logit_bias": {"1": 2}}, "logit_bias: not supported"),
    ({"audio": {}}, "audio: not supported"),
    ({"unknown": 1}, "unknown: unknown field"),
    ({"prompt": "a"}, "prompt: unknown field"),
    ({"abstain": 0.3}, "abstain: expected .*, found 0.3"),
    ({"abstain": {"below": 2}}, r"abstain\.below: expected a number from 0 to 1, found 2"),
    ({"abstain": {}}, r"abstain\.below: expected a number from 0 to 1, found nothing"),
    ({"abstain": {"below": 0, "text": 1}}, r"abstain\.text: expected text, found 1"),
    ({"abstain": {"below": 0, "when": 1}}, r"abstain\.when: unknown field"),
    ({"model": 3}, "model: expected text, found 3"),
])
def test_invalid_chats_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=f"^{message}") as raised:
        parse_chat({"messages": [HELLO]} | change)
    assert str(raised.value).startswith(f"{raised.value.field}: ")


@pytest.mark.parametrize(("change", "message"), [
    ({"prompt": None}, "prompt: expected a text, .*, found nothing"),
    ({"prompt": []}, r"prompt: expected a text, .*, found \[\]"),
    ({"prompt": {}}, r"prompt: expected a text, .*, found \{\}"),
    ({"prompt": [1, "a"]}, "prompt: expected a text, "),
    ({"prompt": [[]]}, "prompt: expected a text, "),
    ({"prompt": [-1]}, "prompt: expected a text, "),
    ({"prompt": [True]}, "prompt: expected a text, "),
    ({"prompt": [2**31]}, "prompt: expected a text, "),
    ({"prompt": ["a"] * 65, "n": 2}, "prompt: expected at most 128 choices, found 65 prompts with n 2"),
    ({"max_tokens": -1}, "max_tokens: expected an integer from 0 to"),
    ({"best_of": 2}, "best_of: not supported by this server unless it is n, 1"),
    ({"suffix": "a"}, "suffix: not supported"),
    ({"echo": True, "stream": True}, "echo: not supported with stream"),
    ({"messages": [HELLO]}, "messages: unknown field"),
])
def test_invalid_completions_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=f"^{message}"):
        parse_completion({"prompt": "a"} | change)


@pytest.mark.parametrize(("body", "message"), [
    ([], "body: expected a JSON object, found a list"),
    ({}, "questions: expected a text, or a list of 1 to 2"),
    ({"questions": []}, "questions: expected"), ({"questions": ["a"] * 3}, "questions: expected"),
    ({"questions": ["a", " "]}, r"questions\[1\]: expected a text, found ' '"),
    ({"questions": [1]}, r"questions\[0\]: expected a text, found 1"),
    ({"questions": "a", "b": 1}, "b: unknown"),
])
def test_invalid_questions_name_the_field(body: Any, message: str) -> None:
    with pytest.raises(FieldError, match=f"^{message}"):
        parse_questions(body, 2)
