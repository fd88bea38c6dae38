"""Chats with a network in turns: tilelli chat --model DIR.

A byte-level network gets turns "USER: …" and "TILELLI: …", one line each; its turn ends when it starts
a new USER: line. A pretrained network gets the chat template of its tokenizer. Commands: /reset clears the
conversation, /temp T sets the temperature, /help lists the commands, /quit. Input from a file or a pipe is
printed after USER:, so that the output is a transcript.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.cli import interrupts
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.commands.networks import add_network_options, open_network_options
from tilelli_jax.data.turns import MODEL, STOP, USER, user_turn
from tilelli_jax.errors import InputError
from tilelli_jax.generation import abstain_rule
from tilelli_jax.generation.abstain_rule import AbstainRule
from tilelli_jax.generation.text_stream import stream_text
from tilelli_jax.loading.language import ByteTokenizer, ChatTemplate, LanguageModel
from tilelli_jax.models.causal_lm import CausalLM
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.models.sampling import Sampling, add_options, from_options

Respond = Callable[[str, Sampling], Generator[str, None, bool]]  # see `reply`
COMMANDS = "/reset, /temp T, /help, /quit"
CHUNK = 8  # tokens decoded between two updates of the terminal
TEXT_ONLY = ("(this network was trained on text, not on chat: it does not know where a turn ends. `tilelli "
             "generate --model {model}` continues text; `tilelli train --config sft-demo chat.source=FILE "
             "train.init_from={model} run_dir=DIR` fine-tunes it)")
PROBE = f"{MODEL} Hello.{STOP}"  # no earlier user's turn, from which a network could copy
PROBE_END = STOP[2:]  # what `knows_turns` predicts: "SER:"


@command
def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="tilelli chat", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser)
    add_options(parser, temperature=0.8)
    parser.add_argument("--abstain", action="store_true",
                        help=f"abstain, with the answer of DIR/{abstain_rule.FILE}, if the prompt's signal "
                        "is beyond its threshold")
    options = parser.parse_args(argv)
    sampling = from_options(options)
    language = open_network_options(options)
    conversation, note = _new_conversation(language, sampling, options)
    print(f"{options.model}: {language.model.config.family}. {COMMANDS}; Ctrl-C stops an answer.")
    if note:
        print(note)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # _converse prints the warning itself, once
        return _converse(conversation, sampling, options.model)


def reply(model: Decoder, history: str, sampling: Sampling) -> Generator[str, None, bool]:
    """Yields the model's turn in pieces of text as they are generated; ends before a line that begins USER:.

    Pieces have whole characters. A piece may be empty, which gives the caller a chance to stop. If `max_new`
    ends the turn, an incomplete character or start of a USER: line is dropped. Returns whether the model
    ended the turn.
    """
    return stream_text(model, ByteTokenizer(), list(history.encode()), sampling, stop=[STOP], chunk=CHUNK,
                       keep_partial=False)


def crop(history: str, size: int) -> str:
    """Returns the end of a conversation in at most `size` bytes: whole turns, if the last turn fits."""
    data = history.encode()
    if len(data) <= size:
        return history
    data = data[-size - 1:]
    return data[max(data.find(STOP.encode()), 0) + 1:].decode(errors="ignore")


def knows_turns(model: CausalLM) -> bool:
    """Whether a byte-level network has learned where the user's turn begins.

    After "\\nU" it must predict "SER:" with a probability of at least 1/2. Networks trained on turns have a
    probability near 1, as the start of the user's turn is the end of every response; networks trained on
    other text continue with a word.
    """
    data = np.frombuffer(PROBE.encode(), np.uint8)[None]
    if len(data[0]) > model.config.max_seq_len:
        return True  # the probe does not fit the context window
    logits = nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(data[:, :-1], jnp.int32))
    at = np.arange(len(data[0]) - len(PROBE_END), len(data[0]))
    log_probabilities = jax.nn.log_softmax(logits[0].astype(jnp.float32))[at - 1, data[0, at]]
    return bool(np.exp(np.sum(log_probabilities)) >= 0.5)


# ---------------------------------------------------------------------------------------------


class Conversation(abc.ABC):
    """The turns so far, as the network reads them.

    Attributes:
        label: printed before the network's turn.
        trained: the length in tokens that the network was trained on.
        max_history: the largest length of the turns before the answer.
    """

    label = MODEL

    def __init__(self, model: CausalLM, sampling: Sampling) -> None:
        self.model, self.trained = model, model.config.max_seq_len
        # Leave room for the answer inside the window: the model was never trained beyond it, and with learned
        # positions every byte beyond it costs a pass over the whole window.
        self.max_history = self.trained - min(sampling.max_new, self.trained // 2)

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets all turns."""

    @abc.abstractmethod
    def ask(self, line: str) -> bool:
        """Adds the user's turn. Returns whether the conversation was truncated on the left."""

    @abc.abstractmethod
    def reply(self, sampling: Sampling) -> Generator[str, None, bool]:
        """Yields the network's turn in pieces; returns whether the network ended it."""

    @abc.abstractmethod
    def record(self, answer: str) -> None:
        """Adds the network's turn."""

    @abc.abstractmethod
    def length(self) -> int:
        """Returns the number of tokens of all turns."""

    @abc.abstractmethod
    def knows_turns(self) -> bool:
        """Whether the network has learned turns."""


class ByteConversation(Conversation):
    """Turns in the text format of `data.turns`, cropped to whole turns."""

    def __init__(self, model: Decoder, sampling: Sampling,
                 respond: Respond) -> None:
        super().__init__(model, sampling)
        self.history, self._respond = "", respond

    def reset(self) -> None:
        self.history = ""

    def ask(self, line: str) -> bool:
        history = self.history + user_turn(line)
        self.history = crop(history, self.max_history)
        return self.history != history

    def reply(self, sampling: Sampling) -> Generator[str, None, bool]:
        return self._respond(self.history, sampling)

    def record(self, answer: str) -> None:
        self.history += answer.rstrip("\n") + "\n"

    def length(self) -> int:
        return len(self.history.encode()) - 1

    def knows_turns(self) -> bool:
        return knows_turns(self.model)


class TemplateConversation(Conversation):
    """Messages in the chat template of a tokenizer; the first turns are left out if all do not fit."""

    label = "MODEL: "

    def __init__(self, language: LanguageModel, template: ChatTemplate, sampling: Sampling) -> None:
        super().__init__(language.model, sampling)
        self._tokenizer, self._template = language.tokenizer, template
        self.messages: list[dict[str, str]] = []

    def _ids(self) -> list[int]:
        return self._tokenizer.encode(self._template.format_messages(self.messages))

    def reset(self) -> None:
        self.messages = []

    def ask(self, line: str) -> bool:
        self.messages.append({"role": "user", "content": line})
        n_messages = len(self.messages)
        while len(self.messages) > 1 and len(self._ids()) > self.max_history:
            del self.messages[:2]
        return len(self.messages) < n_messages

    def reply(self, sampling: Sampling) -> Generator[str, None, bool]:
        return stream_text(self.model, self._tokenizer, self._ids(), sampling, chunk=CHUNK)

    def record(self, answer: str) -> None:
        self.messages.append({"role": "assistant", "content": answer.strip()})

    def length(self) -> int:
        return len(self._ids())

    def knows_turns(self) -> bool:
        return True  # the chat template defines the turns


def _new_conversation(language: LanguageModel, sampling: Sampling,
                      options: argparse.Namespace) -> tuple[Conversation, str]:
    """Returns an empty conversation, and a note to print."""
    model = language.model
    if model.is_byte_level:
        if not options.abstain:
            return ByteConversation(model, sampling, functools.partial(reply, model)), ""
        abstain = abstain_rule.read(options.model, model)
        note = (f"It abstains {abstain.rule}. The threshold was calibrated on first turns; its error rate "
                "does not hold for later turns.")
        return ByteConversation(model, sampling, _abstaining_reply(model, abstain)), note
    if options.abstain:
        raise InputError("--abstain: expected a byte-level network, found family "
                         f"{model.config.family}")
    if language.chat_template is None:
        raise InputError(f"{options.tokenizer or options.model}: expected a tokenizer with a chat template, "
                         f"found none; `tilelli generate --model {options.model}` continues text")
    return TemplateConversation(language, language.chat_template, sampling), ""


def _converse(conversation: Conversation, sampling: Sampling, model: str) -> int:
    turn, cropped, passed, doubted = 0, False, False, False
    trained = conversation.trained
    if sys.stdin is None:
        return 0
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(USER).strip()
            if not sys.stdin.isatty():
                print(line)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            interrupts.forget_interrupt()
            print("\n(/quit or Ctrl-D leaves)")
            continue
        match line.partition(" "):
            case "", _, _:
                pass
            case "/quit", _, _:
                return 0
            case "/reset", _, _:
                conversation.reset()
                cropped = False
                print("(conversation cleared)")
            case "/temp", _, value:
                sampling = _with_temperature(sampling, value)
            case word, _, _ if word.startswith("/"):
                print(f"(commands: {COMMANDS})")
            case _:
                if conversation.ask(line) and not cropped:
                    cropped = True
                    print("(from here on the model no longer sees the start of this conversation)")
                turn += 1
                seed = (sampling.seed + turn) % 2**32
                ended = _answer(conversation, dataclasses.replace(sampling, seed=seed))
                if ended is False and not doubted:
                    doubted = True
                    if not conversation.knows_turns():
                        print(TEXT_ONLY.format(model=model))
                if conversation.length() > trained and not passed:
                    passed = True
                    unit = "bytes" if conversation.model.is_byte_level else "tokens"
                    print(f"(the conversation exceeds the {trained} {unit} that the model was trained on"
                          + (f"; each byte sees the last {trained} only)"
                             if conversation.model.config.positions == "learned" else ")"))


def _abstaining_reply(model: Decoder, abstain: AbstainRule) -> Respond:
    """Returns `reply` with abstention: it yields the rule's answer if the rule says to abstain."""
    reader = abstain_rule.signal_reader(model, abstain.signal)  # one for all turns

    def respond(history: str, sampling: Sampling) -> Generator[str, None, bool]:
        if any(abstain.abstains(reader, [history])):
            yield abstain.answer
            return True
        return (yield from reply(model, history, sampling))
    return respond


def _answer(conversation: Conversation, sampling: Sampling) -> bool | None:
    """Prints the model's turn as it is generated, and records it.

    Returns whether the model ended its turn, None if it was stopped.
    """
    answer, ended = "", None

    def pieces() -> Iterator[str]:
        nonlocal ended
        ended = yield from conversation.reply(sampling)

    with interrupts.deferred():
        print(conversation.label, end="", flush=True)
        for piece in pieces():
            if interrupts.received():
                print(" (stopped)", end="")
                break
            # The label of a template ends with a space, and not every network begins with one.
            is_start = isinstance(conversation, TemplateConversation) and not answer.strip()
            answer += piece
            print(piece.lstrip() if is_start else piece, end="", flush=True)
    print()
    interrupts.forget_interrupt()
    interrupts.raise_if_received()
    conversation.record(answer)
    return ended


def _with_temperature(sampling: Sampling, text: str) -> Sampling:
    try:
        sampling = dataclasses.replace(sampling, temperature=float(text))
        print(f"(temperature {sampling.temperature:g})")
    except (InputError, ValueError):
        print(f"(/temp: expected a number ≥ 0, found '{text}')")
    return sampling
