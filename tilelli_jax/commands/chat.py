"""Talks with a model in turns: tilelli chat --model DIR.

A turn is "USER: …" and the model's is "TILELLI: …", a line each; the model's ends where it begins
a new USER: line. Commands: /reset forgets the conversation, /temp T sets the temperature, /quit.
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

from tilelli_jax import abstain_rule, decoding, interrupts, store
from tilelli_jax.abstain_rule import AbstainRule
from tilelli_jax.data.turns import MODEL, STOP, USER, asked
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.sampling import Sampling, add_options, from_options

CHUNK = 8  # bytes decoded between two looks at the terminal: few enough to read along


@command
def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="tilelli chat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory")
    add_options(parser, temperature=0.8)
    parser.add_argument("--abstain", action="store_true",
                        help=f"decline what is beyond the threshold of DIR/{abstain_rule.FILE}, in its words")
    options = parser.parse_args(argv)
    sampling = from_options(options)
    model = store.load(options.model)
    abstain = abstain_rule.read(options.model, model) if options.abstain else None
    print(f"{options.model}: {model.config.family}. /reset, /temp T, /quit; Ctrl-C stops an answer.")
    if abstain is not None:
        print(f"It declines {abstain.rule}. That was chosen by first turns: of later ones nothing is "
              "promised.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said by _talk, once
        return _talk(model, sampling, abstain)


def reply(model: Decoder, history: str, sampling: Sampling) -> Iterator[str]:
    """The model's turn, in pieces of text as they come; ends before a line that begins USER:.

    Characters come whole. A piece may be empty: it is a moment to stop at. Where `max_new` ends the
    turn, an unfinished character or beginning of a USER: line is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""  # text that may turn out to be the beginning of the stop string
    ids = np.frombuffer(history.encode(), np.uint8)
    for chunk in decoding.stream(model, [ids], chunk=CHUNK, **dataclasses.asdict(sampling)):
        held += decoder.decode(chunk.new[0].tobytes())
        if STOP in held:
            yield held[:held.index(STOP)]
            return
        keep = next(n for n in range(len(STOP) - 1, -1, -1) if held.endswith(STOP[:n]))
        yield held[:len(held) - keep]
        held = held[len(held) - keep:]


def crop(history: str, size: int) -> str:
    """The end of a conversation in at most `size` bytes: whole turns, if the last one fits."""
    data = history.encode()
    if len(data) <= size:
        return history
    data = data[-size - 1:]
    return data[max(data.find(STOP.encode()), 0) + 1:].decode(errors="ignore")


# ---------------------------------------------------------------------------------------------


def _talk(model: Decoder, sampling: Sampling, abstain: AbstainRule | None) -> int:
    speak = functools.partial(reply, model) if abstain is None else _gated(model, abstain)
    # Room to answer inside the window: what is past it was never trained on, and where positions
    # are learned, every byte of it costs a reading of the whole window.
    trained = model.config.max_seq_len
    most = trained - min(sampling.max_new, trained // 2)
    history, turn, cropped, passed = "", 0, False, False
    if sys.stdin is None:
        return 0
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            said = input(USER).strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            interrupts.forget_interrupt()
            print("\n(/quit or Ctrl-D leaves)")
            continue
        match said.partition(" "):
            case "", _, _:
                pass
            case "/quit", _, _:
                return 0
            case "/reset", _, _:
                history, cropped = "", False
                print("(forgotten)")
            case "/temp", _, value:
                sampling = _with_temperature(sampling, value)
            case word, _, _ if word.startswith("/"):
                print("(commands: /reset, /temp T, /quit)")
            case _:
                history += asked(said)
                if len(history.encode()) > most and not cropped:
                    cropped = True
                    print("(the beginning of this conversation is forgotten from here on)")
                history = crop(history, most)
                turn += 1
                seed = (sampling.seed + turn) % 2**32
                history += _answer(speak(history, dataclasses.replace(sampling, seed=seed)))
                if len(history.encode()) - 1 > trained and not passed:
                    passed = True
                    print(f"(past {trained} bytes, for which it was trained"
                          + (f", each sees the last {trained} only)" if model.config.positions == "learned"
                             else ")"))


def _gated(model: Decoder, abstain: AbstainRule) -> Callable[[str, Sampling], Iterator[str]]:
    """As `reply`, but for what is declined."""
    reader = abstain_rule.reader_of(model, abstain.signal)  # one for all turns

    def speak(history: str, sampling: Sampling) -> Iterator[str]:
        if any(abstain.abstains(reader, [history])):
            yield abstain.answer
        else:
            yield from reply(model, history, sampling)
    return speak


def _answer(pieces: Iterator[str]) -> str:
    """Prints the model's turn as it comes, and returns it as a line of the history."""
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
