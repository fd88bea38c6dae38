"""Continues text: tilelli generate --model DIR --prompt TEXT.

DIR is a model directory, a Hugging Face directory, a GGUF file, or a hub id, with its tokenizer. One
prompt is printed with its continuation as it is decoded; several give a line of JSON each.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.commands.networks import add_network_options, open_network_options
from tilelli_jax.data.turns import STOP, user_turn
from tilelli_jax.errors import InputError
from tilelli_jax.generation import abstain_rule, decoding
from tilelli_jax.generation.text_stream import stream_text, text_after
from tilelli_jax.io import json_text
from tilelli_jax.io.files import check_output, read_bytes, write_atomically, writing_to
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.models import sampling
from tilelli_jax.models.sampling import Sampling

CHUNK = 8  # tokens decoded between two updates of the terminal


class Output(NamedTuple):
    """A continuation, and whether a stop string or an end token ended it."""

    text: str
    stopped: bool


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    prompts = _prompts(options)
    sampling_options = sampling.from_options(options)
    check_output("--out", options.out)
    language = open_network_options(options)
    inputs = _formatted(prompts, language, options)
    stop = [*options.stop, *([STOP] if options.chat and language.model.is_byte_level else [])]
    abstain = _read_rule(language, options)
    abstained = ([False] * len(inputs) if abstain is None else
                 abstain.abstains(abstain_rule.signal_reader(language.model, abstain.signal), inputs))
    if not (options.out or options.prompts_file or len(prompts) > 1):
        if abstain and abstained[0]:
            print(_text(inputs[0]) + abstain.answer)
        else:
            _print(language, inputs[0], stop, sampling_options, options)
        return 0
    # Each prompt samples with its own index, so abstentions do not change the other continuations.
    outputs = [] if all(abstained) else _continued(language, inputs, stop, sampling_options, options)
    if abstain:
        abstention = Output(abstain.answer, stopped=True)
        outputs = [abstention if abstains else outputs[i] for i, abstains in enumerate(abstained)]
    rows = ({"prompt": _text(prompt), "text": output.text, "stopped": output.stopped,
             **({"abstained": abstains} if abstain else {})}
            for prompt, output, abstains in zip(prompts, outputs, abstained, strict=True))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.out:
        with writing_to("--out", options.out):
            write_atomically(options.out, lines.encode())
    else:
        sys.stdout.write(lines)
    return 0


def _formatted(prompts: list[bytes], language: LanguageModel, options: argparse.Namespace) -> list[bytes]:
    """Returns the network's inputs; with --chat, each is the user's turn and the start of the model's."""
    if not options.chat:
        return prompts
    if language.model.is_byte_level:  # the bytes of a prompt need not be UTF-8
        return [user_turn(prompt.decode(errors="surrogateescape")).encode(errors="surrogateescape")
                for prompt in prompts]
    if language.chat_template is None:
        raise InputError(f"--chat: expected a chat template in {options.tokenizer or options.model}, found "
                         "none")
    return [language.chat_template.format_prompt(_text(prompt)).encode() for prompt in prompts]


def _read_rule(language: LanguageModel, options: argparse.Namespace) -> abstain_rule.AbstainRule | None:
    if not options.abstain:
        return None
    if not language.model.is_byte_level:
        raise InputError(f"--abstain: expected a byte-level network, found family "
                         f"{language.model.config.family}")
    rule = abstain_rule.read(options.model, language.model)
    if not options.chat:
        print("note: the threshold of --abstain was calibrated on prompts in chat turns, as --chat formats "
              "them; its error rate does not hold for other prompts", file=sys.stderr)
    return rule


def _token_ids(language: LanguageModel, text: bytes, options: argparse.Namespace) -> list[int]:
    """Returns the ids of an input. A chat template has its own BOS token."""
    if language.model.is_byte_level:
        return list(text)
    return language.tokenizer.encode_with_spans(_text(text), special=not options.chat).ids


def _print(language: LanguageModel, text: bytes, stop: list[str], sampling_options: Sampling,
           options: argparse.Namespace) -> None:
    """Prints an input with its continuation as it is decoded; after a chat template, the reply alone."""
    pieces = stream_text(language.model, language.tokenizer, _token_ids(language, text, options),
                         sampling_options, stop=stop, chunk=CHUNK)
    with _notes():
        first = next(pieces)  # before anything is printed, as this may raise
    is_template = options.chat and not language.model.is_byte_level
    print("" if is_template else _text(text), end="")
    for piece in itertools.chain([first], pieces):
        print(piece, end="", flush=True)
    print()


def _continued(language: LanguageModel, inputs: list[bytes], stop: list[str], sampling_options: Sampling,
               options: argparse.Namespace) -> list[Output]:
    """Returns the continuations of all inputs."""
    settings = dataclasses.asdict(sampling_options)
    with _notes():
        if language.model.is_byte_level:
            results = decoding.generate(language.model, inputs, stop=stop, **settings)
            return [Output(result.text, result.stopped) for result in results]
        prompts = [_token_ids(language, text, options) for text in inputs]
        outputs = []
        for ids, result in zip(prompts, decoding.generate_ids(language.model, prompts, **settings),
                               strict=True):
            text = text_after(language.tokenizer, ids, result.ids.tolist())
            ends = [end for end in map(text.find, stop) if end >= 0]
            outputs.append(Output(text[:min(ends, default=len(text))], bool(ends) or result.ended))
        return outputs


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Prints warnings as notes on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="tilelli generate", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT",
                        help="text to continue; may be repeated, then prints JSONL")
    source.add_argument("--prompts-file", type=Path, metavar="FILE",
                        help="file with one prompt per line, or .jsonl with a key 'prompt'; prints JSONL")
    sampling.add_options(parser, temperature=0.8)
    parser.add_argument("--stop", action="append", default=[], metavar="STR",
                        help="end a continuation at this string; may be repeated. End tokens of a network's "
                        "configuration end it too")
    parser.add_argument("--chat", action="store_true",
                        help="treat each prompt as the user's turn, formatted as in `tilelli chat` or by the "
                        "tokenizer's chat template, and end with the model's turn")
    parser.add_argument("--abstain", action="store_true",
                        help=f"abstain, with the answer of DIR/{abstain_rule.FILE}, if a prompt's signal is "
                        "beyond its threshold")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSONL to this file, do not print")
    options = parser.parse_args(argv)
    if "" in options.stop:
        raise InputError("--stop: expected at least one character")
    return options


def _prompts(options: argparse.Namespace) -> list[bytes]:
    if options.prompt is not None:
        if "" in options.prompt:
            raise InputError("--prompt: expected at least one character")
        return [os.fsencode(prompt) for prompt in options.prompt]   # bytes need not be UTF-8
    path: Path = options.prompts_file
    lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).splitlines()
    prompts = [_prompt(line, f"{path}, line {i}", path.suffix == ".jsonl")
               for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f"{path}: expected at least one prompt, found none")
    return prompts


def _prompt(line: bytes, where: str, is_json: bool) -> bytes:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1}") from None
    if not is_json:
        return line
    row = json_text.parse(text, where)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise InputError(f'{where}: expected an object with a text under "prompt"')
    return row["prompt"].encode("utf-8")


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
