"""Parses the bodies of requests in the manner of OpenAI's API.

Fields that this server does not support are errors, unless their value is the one that has no effect. Unknown
fields are errors, as there. One field is our own: `abstain`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from tilelli_jax.errors import InputError
from tilelli_jax.generation.programs import MAX_TOP
from tilelli_jax.io.json_text import kind
from tilelli_jax.models.sampling import Sampling

MAX_CHOICES = 128  # n, and prompts × n
MAX_STOPS = 4
ROLES = ("system", "developer", "user", "assistant")
MIN_TOP_P = 1e-6  # in place of 0: the most likely token
DEFAULT_NEW = 16  # max_tokens of a completion, as in OpenAI's API; a chat's reply may fill the context
TEXT = "I don't know."  # reply of a request that abstains
# Without effect here: who asks, and what a service stores or bills.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention", "parallel_tool_calls")
# Not supported: field → values that have no effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"), "suffix": ("",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "reasoning_effort": ("none",), "verbosity": (), "web_search_options": ()}


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of a chat."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Abstain:
    """Reply with `text` and generate nothing if P(knows) is below this probability."""

    below: float
    text: str = TEXT


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request for completions.

    Attributes:
        messages: of a chat; empty otherwise.
        prompts: texts or token ids; empty for a chat.
        max_new: maximum number of new tokens; None: as many as the context has room for.
        n: choices for each prompt.
        n_top: most likely tokens that each token is reported with; None: no log-probabilities.
        echo: the reply begins with the prompt, and log-probabilities are those of its tokens too.
        abstain: None: as the server is set.
    """

    model: str | None
    messages: tuple[Message, ...]
    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling
    max_new: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    n_top: int | None
    echo: bool
    abstain: Abstain | None

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


class FieldError(InputError):
    """A field of a request is not as expected."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def parse_chat(tree: Any) -> Completion:
    """Parses the body of POST /v1/chat/completions.

    Raises:
        FieldError: a field is not as expected, or not supported.
    """
    fields = _Fields(tree)
    messages = tuple(_message(value, f"messages[{i}]") for i, value in enumerate(
        fields.list_of("messages")))
    logprobs = fields.boolean("logprobs")
    n_top = fields.integer("top_logprobs", None, 0, MAX_TOP)
    if n_top is not None and not logprobs:
        raise FieldError("top_logprobs", "expected logprobs to be true, found false")
    limits = [fields.integer(name, None, 1) for name in ("max_completion_tokens", "max_tokens")]
    return _completion(fields, messages, (), next((limit for limit in limits if limit is not None), None),
                       (n_top or 0) if logprobs else None, echo=False)


def parse_completion(tree: Any) -> Completion:
    """Parses the body of POST /v1/completions.

    Raises:
        FieldError: a field is not as expected, or not supported.
    """
    fields = _Fields(tree)
    echo = fields.boolean("echo")
    max_new = fields.integer("max_tokens", DEFAULT_NEW, 0)
    return _completion(fields, (), _prompts(fields.take("prompt")), max_new,
                       fields.integer("logprobs", None, 0, MAX_TOP), echo)


def parse_questions(tree: Any, limit: int) -> tuple[str | None, list[str]]:
    """Parses the body of POST /v1/knows: `{"questions": [text, …]}`, or one text. Returns model, questions.

    Raises:
        FieldError: a field is not as expected.
    """
    fields = _Fields(tree)
    value, model = fields.take("questions"), _model(fields)
    questions = [value] if isinstance(value, str) else value
    if not isinstance(questions, list) or not 0 < len(questions) <= limit:
        raise FieldError("questions", f"expected a text, or a list of 1 to {limit} texts, found "
                         f"{_found(value)}")
    for i, question in enumerate(questions):
        if not isinstance(question, str) or not question.strip():
            raise FieldError(f"questions[{i}]", f"expected a text, found {_found(question)}")
    fields.finish()
    return model, questions


# ---------------------------------------------------------------------------------------------


class _Fields:
    """The fields of a body; null is the same as a missing field."""

    def __init__(self, tree: Any) -> None:
        if not isinstance(tree, dict):
            raise FieldError("body", f"expected a JSON object, found {kind(tree)}")
        self._tree: dict[str, Any] = {name: value for name, value in tree.items() if value is not None}
        for name, harmless in UNSUPPORTED.items():
            value = self._tree.pop(name, None)
            if value is not None and not any((type(value) is type(good) and value == good) or (
                    value == good == 0) for good in harmless):
                raise FieldError(name, f"not supported by this server, found {_found(value)}")
        for name in IGNORED:
            self._tree.pop(name, None)

    def take(self, name: str) -> Any:
        return self._tree.pop(name, None)

    def finish(self) -> None:
        """Raises FieldError if there are fields that nobody took."""
        for name in self._tree:
            raise FieldError(f"{name:.40}", "unknown field")

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise FieldError(name, f"expected true or false, found {_found(value)}")
        return bool(value)

    def integer(self, name: str, default: int | None, low: int, high: int = 2**63 - 1) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise FieldError(name, f"expected an integer from {low} to {high}, found {_found(value)}")
        return value

    def number(self, name: str, default: float, accepts: Callable[[float], bool], expected: str) -> float:
        value = self.take(name)
        if value is None:
            return default
        return number(name, value, accepts, expected)

    def list_of(self, name: str) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list) or not value:
            raise FieldError(name, f"expected a list with at least one entry, found {_found(value)}")
        return value


def number(name: str, value: Any, accepts: Callable[[float], bool], expected: str) -> float:
    """Returns a field's value as a number. Raises FieldError if it is none, or is not accepted."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (
            abs(value) < math.inf and accepts(value)):  # isfinite fails for whole numbers of 309 digits
        raise FieldError(name, f"expected a number {expected}, found {_found(value)}")
    return float(value)


def _completion(fields: _Fields, messages: tuple[Message, ...], prompts: tuple[str | tuple[int, ...], ...],
                max_new: int | None, n_top: int | None, echo: bool) -> Completion:
    """The fields that both kinds of requests have."""
    model = _model(fields)
    seed = fields.integer("seed", 0, -2**63)
    assert seed is not None
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0, lambda x: 0 <= x <= 2, "from 0 to 2"),
        top_p=fields.number("top_p", 1.0, lambda x: 0 <= x <= 1, "from 0 to 1") or MIN_TOP_P,
        seed=seed % 2**32)
    n = fields.integer("n", 1, 1, MAX_CHOICES)
    assert n is not None
    if fields.integer("best_of", n, 1) != n:
        raise FieldError("best_of", f"not supported by this server unless it is n, {n}")
    if len(prompts) * n > MAX_CHOICES:
        raise FieldError("prompt", f"expected at most {MAX_CHOICES} choices, found {len(prompts)} prompts "
                         f"with n {n}")
    stream = fields.boolean("stream")
    if echo and stream:
        raise FieldError("echo", "not supported with stream")
    options = fields.take("stream_options")
    include_usage = False
    if options is not None:
        if not stream:
            raise FieldError("stream_options", "expected stream to be true, found false")
        if not isinstance(options, dict):
            raise FieldError("stream_options", f"expected an object, found {_found(options)}")
        include_usage = options.get("include_usage") is True
        for name, value in options.items():
            if name not in ("include_usage", "include_obfuscation") or not isinstance(value, bool | None):
                raise FieldError(f"stream_options.{name:.40}",
                                 f"expected include_usage: true or false, found {_found(value)}")
    request = Completion(model, messages, prompts, sampling, max_new, n, _stops(fields.take("stop")), stream,
                         include_usage, n_top, echo, _abstain(fields.take("abstain")))
    fields.finish()
    return request


def _model(fields: _Fields) -> str | None:
    model = fields.take("model")
    if model is not None and not isinstance(model, str):
        raise FieldError("model", f"expected text, found {_found(model)}")
    return model


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise FieldError(where, f"expected an object, found {_found(value)}")
    if value.get("role") not in ROLES:
        raise FieldError(f"{where}.role", f"expected one of {', '.join(ROLES)}, found "
                         f"{_found(value.get('role'))}")
    for name in value:
        if name not in ("role", "content", "name", "refusal") and value[name] not in (None, []):
            raise FieldError(f"{where}.{name:.40}", "not supported by this server")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise FieldError(f"{where}.content", f"expected text, found {_found(content)}")
    role = "system" if value["role"] == "developer" else value["role"]
    return Message(role, content)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise FieldError(where, 'expected {"type": "text", "text": …}, found '
                         + _found(part.get("type") if isinstance(part, dict) else part))
    return part["text"]


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids, or a list of those."""
    expected = "expected a text, a list of texts, token ids, or a list of token ids"
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise FieldError("prompt", f"{expected}, found {_found(value)}")
    if all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    rows = [value] if all(_is_id(id) for id in value) else value
    for row in rows:
        if not isinstance(row, list) or not row or not all(map(_is_id, row)):
            raise FieldError("prompt", f"{expected}, found {_found(row)}")
    return tuple(tuple(row) for row in rows)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(
            isinstance(stop, str) and stop for stop in stops):
        raise FieldError("stop", f"expected a text or a list of up to {MAX_STOPS}, none empty, found "
                         f"{_found(value)}")
    return tuple(stops)


def _abstain(value: Any) -> Abstain | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FieldError("abstain", f'expected {{"below": probability, "text": text}}, found {_found(value)}')
    for name in value:
        if name not in ("below", "text"):
            raise FieldError(f"abstain.{name:.40}", "unknown field")
    below = number("abstain.below", value.get("below"), lambda x: 0 <= x <= 1, "from 0 to 1")
    text = value.get("text", TEXT)
    if not isinstance(text, str):
        raise FieldError("abstain.text", f"expected text, found {_found(text)}")
    return Abstain(below, text)


def _found(value: Any) -> str:
    """A value for an error message, short and in one line."""
    return "nothing" if value is None else f"{value!r:.40}"
