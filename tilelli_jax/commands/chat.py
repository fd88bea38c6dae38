"""Chats with a model in turns: tilelli chat --model DIR.

The user's turn is "USER: …", the model's "TILELLI: …", one line each; the model's turn ends when it starts a
new USER: line. Commands: /reset clears the conversation, /temp T sets the temperature, /quit.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tilelli_jax.cli import interrupts
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.data.turns import MODEL, STOP, USER, asked
from tilelli_jax.errors import InputError
from tilelli_jax.generation import abstain_rule, decoding
from tilelli_jax.generation.abstain_rule import AbstainRule
from tilelli_jax.loading import store
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.models.sampling import Sampling, add_options, from_options

CHUNK = 8  # bytes decoded between two updates of the terminal


@command
def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="tilelli chat", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory")
    add_options(parser, temperature=0.8)
    parser.add_argument("--abstain", action="store_true",
                        help=f"abstain, with the answer of DIR/{abstain_rule.FILE}, if the prompt's signal "
                        "is beyond its threshold")
    options = parser.parse_args(argv)
    sampling = from_options(options)
    model = store.load(options.model)
    abstain = abstain_rule.read(options.model, model) if options.abstain else None
    print(f"{options.model}: {model.config.family}. /reset, /temp T, /quit; Ctrl-C stops an answer.")
    if abstain is not None:
        print(f"It abstains {abstain.rule}. The threshold was calibrated on first turns; its error rate does "
              "not hold for later turns.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # _converse prints the warning itself, once
        return _converse(model, sampling, abstain)


def reply(model: Decoder, history: str, sampling: Sampling) -> Iterator[str]:
    """Yields the model's turn in pieces of text as they are generated; ends before a line that begins USER:.

    Pieces have whole characters. A piece may be empty, which gives the caller a chance to stop. If `max_new`
    ends the turn, an incomplete character or start of a USER: line is dropped.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pending = ""  # text not yet yielded, as it may contain the start of the stop string
    ids = np.frombuffer(history.encode(), np.uint8)
    for chunk in decoding.stream(model, [ids], chunk=CHUNK, **dataclasses.asdict(sampling)):
        pending += decoder.decode(chunk.new[0].tobytes())
        if STOP in pending:
            yield pending[:pending.index(STOP)]
            return
        n_kept = next(n for n in range(len(STOP) - 1, -1, -1) if pending.endswith(STOP[:n]))
        yield pending[:len(pending) - n_kept]
        pending = pending[len(pending) - n_kept:]


def crop(history: str, size: int) -> str:
    """Returns the end of a conversation in at most `size` bytes: whole turns, if the last turn fits."""
    data = history.encode()
    if len(data) <= size:
        return history
    data = data[-size - 1:]
    return data[max(data.find(STOP.encode()), 0) + 1:].decode(errors="ignore")


# ---------------------------------------------------------------------------------------------


def _converse(model: Decoder, sampling: Sampling, abstain: AbstainRule | None) -> int:
    respond = functools.partial(reply, model) if abstain is None else _abstaining_reply(model, abstain)
    # Leave room for the answer inside the window: the model was never trained beyond it, and with learned
    # positions every byte beyond it costs a pass over the whole window.
    trained = model.config.max_seq_len
    most = trained - min(sampling.max_new, trained // 2)
    history, turn, cropped, passed = "", 0, False, False
    if sys.stdin is None:
        return 0
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(USER).strip()
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
                history, cropped = "", False
                print("(conversation cleared)")
            case "/temp", _, value:
                sampling = _with_temperature(sampling, value)
            case word, _, _ if word.startswith("/"):
                print("(commands: /reset, /temp T, /quit)")
            case _:
                history += asked(line)
                if len(history.encode()) > most and not cropped:
                    cropped = True
                    print("(from here on the model no longer sees the start of this conversation)")
                history = crop(history, most)
                turn += 1
                seed = (sampling.seed + turn) % 2**32
                history += _answer(respond(history, dataclasses.replace(sampling, seed=seed)))
                if len(history.encode()) - 1 > trained and not passed:
                    passed = True
                    print(f"(the conversation exceeds the {trained} bytes that the model was trained on"
                          + (f"; each byte sees the last {trained} only)"
                             if model.config.positions == "learned" else ")"))


def _abstaining_reply(model: Decoder, abstain: AbstainRule) -> Callable[[str, Sampling], Iterator[str]]:
    """Returns `reply` with abstention: it yields the rule's answer if the rule says to abstain."""
    reader = abstain_rule.reader_of(model, abstain.signal)  # one for all turns

    def respond(history: str, sampling: Sampling) -> Iterator[str]:
        if any(abstain.abstains(reader, [history])):
            yield abstain.answer
        else:
            yield from reply(model, history, sampling)
    return respond


def _answer(pieces: Iterator[str]) -> str:
    """Prints the model's turn as it is generated, and returns it as a line of the history."""
    answer = ""
    with interrupts.deferred():
        print(MODEL, end="", flush=True)
        for piece in pieces:
            if interrupts.received():
                print(" (stopped)", end="")
                break
            answer += piece
            print(piece, end="", flush=True)
    print()
    interrupts.forget_interrupt()
    interrupts.raise_if_received()
    return answer.rstrip("\n") + "\n"


def _with_temperature(sampling: Sampling, text: str) -> Sampling:
    try:
        sampling = dataclasses.replace(sampling, temperature=float(text))
        print(f"(temperature {sampling.temperature:g})")
    except (InputError, ValueError):
        print(f"(/temp: expected a number from 0, found '{text}')")
    return sampling
