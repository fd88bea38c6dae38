"""Continues text: tilelli generate --model DIR --prompt TEXT."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.data.turns import STOP, asked
from tilelli_jax.errors import InputError
from tilelli_jax.generation import abstain_rule, decoding
from tilelli_jax.io import json_text
from tilelli_jax.io.files import read_bytes, write_atomically
from tilelli_jax.loading import store
from tilelli_jax.models import sampling
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.models.sampling import Sampling


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    prompts = _prompts(options)
    sampling_options = sampling.from_options(options)
    if options.out:
        _check_writable(options.out)
    model = store.load(options.model)
    inputs = [_as_turn(prompt) for prompt in prompts] if options.turn else prompts
    abstain = abstain_rule.read(options.model, model) if options.abstain else None
    if abstain and not options.turn:
        print("note: the threshold of --abstain was calibrated on prompts in chat turns, as --turn formats "
              "them; its error rate does not hold for other prompts", file=sys.stderr)
    abstained = ([False] * len(inputs) if abstain is None else
                 abstain.abstains(abstain_rule.reader_of(model, abstain.signal), inputs))
    # Each prompt samples with its own index, so abstentions do not change the other continuations.
    outputs = ([] if all(abstained) else
               _continued(model, inputs, [*options.stop, *([STOP] if options.turn else [])],
                          sampling_options))
    if abstain:
        abstention = decoding.Continuation(abstain.answer.encode(), stopped=True, slid=False)
        outputs = [abstention if abstains else outputs[i] for i, abstains in enumerate(abstained)]
    if options.out or options.prompts_file or len(prompts) > 1:
        rows = ({"prompt": _text(prompt), "text": output.text, "stopped": output.stopped,
                 **({"abstained": abstains} if abstain else {})}
                for prompt, output, abstains in zip(prompts, outputs, abstained, strict=True))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if options.out:
            with _writing(options.out):
                write_atomically(options.out, lines.encode())
        else:
            sys.stdout.write(lines)
    else:
        print(_text(inputs[0] + outputs[0].data))
    return 0


def _continued(model: Decoder, prompts: list[bytes], stop: list[str],
               sampling_options: Sampling) -> list[decoding.Continuation]:
    """Returns the continuations of all prompts; prints warnings on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        outputs = decoding.generate(model, prompts, stop=stop, **dataclasses.asdict(sampling_options))
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return outputs


def _as_turn(prompt: bytes) -> bytes:
    """Formats a prompt as the user's turn; its bytes need not be UTF-8."""
    return asked(prompt.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="tilelli generate", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT",
                        help="text to continue; may be repeated, then prints JSONL")
    source.add_argument("--prompts-file", type=Path, metavar="FILE",
                        help="file with one prompt per line, or .jsonl with a key 'prompt'; prints JSONL")
    sampling.add_options(parser, temperature=0.8)
    parser.add_argument("--stop", action="append", default=[], metavar="STR",
                        help="end a continuation at this string; may be repeated")
    parser.add_argument("--turn", action="store_true",
                        help="treat each prompt as the user's turn, as in chat; end with the model's turn")
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


def _check_writable(path: Path) -> None:
    """Raises InputError if the output cannot be written, before the long generation instead of after it."""
    if path.is_dir():
        raise InputError(f"--out: {path} is a directory, expected a file")
    with _writing(path):
        tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--out: {path} cannot be written: {error.strerror}") from None
