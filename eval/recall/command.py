"""Does a network know the answer before it answers?

    tilelli recall --config FILE [--stage build|fit|evaluate|all] [key=value …]
    tilelli recall predict --model DIR --sidecar DIR QUESTION … [--questions FILE]
    tilelli recall app --model DIR --sidecar DIR [--study DIR] [--port N]

A stage makes what it needs of those before it, and takes what is there: the same command again goes on
where it stopped. `all` ends with a report.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.files import write_atomically
from tilelli_jax.json_text import check_text
from tilelli_jax.tables import table

from ..inputs.commands import carry_out, how_made, quiet_logs
from ..inputs.rows import read_rows, text_of
from ..stages import print_to_stderr
from ..tables import shown
from . import report
from .config import RecallConfig
from .predictor import as_row, open_predictor
from .study import SIDECAR, Study

STAGES = ("build", "fit", "evaluate", "all")
PROG = "tilelli recall"


@command
def main(argv: Sequence[str]) -> int:
    quiet_logs()
    options = _options(argv)
    config = config_lib.load(RecallConfig, options.config, options.overrides)
    name = config.name or Path(options.config).stem
    study = Study(config, Path(config.out or Path("runs", Path(options.config).stem)), print_to_stderr)
    study.check()
    said = shlex.join([*PROG.split(), *argv])
    return carry_out(lambda: run(study, options.stage, name, said))


def run(study: Study, stage: str, name: str, said: str) -> int:
    """One stage, or all of them and the report."""
    if stage != "all":
        path = {"build": lambda: study.build, "fit": lambda: study.fitted,
                "evaluate": lambda: study.evaluation}[stage]()
        print(f"{stage}: {path}")
        return 0
    found = report.write(study, name, how_made(said, study.config.fit.seeds))
    sidecar = study.keep_sidecar()
    print(f"\n{_examples(found)}\n\n{table(report.summary(found))}\n")
    print("\n".join(text.replace("`", "").replace("**", "") for text in report.verdicts(found)))
    print(f"\nsidecar: {sidecar}, of the network {study.studied.path}"
          f"\nreport: {study.out / 'report.html'} (and report.md)")
    return 0


def _examples(found: Mapping[str, Any]) -> str:
    """Some of the held-out questions as a table for a terminal."""
    rows = report.of_examples(found)
    return table([list(rows[0]), *([shown(cell) for cell in row.values()] for row in rows)], right=(3,))


@command
def demo(argv: Sequence[str]) -> int:
    """`tilelli demo`: the study of `recall-demo`, and what to do next."""
    parser = ArgumentParser(prog="tilelli demo", description=(
        "Trains a small network on a made-up world of facts, some of which it reads often, some rarely and "
        "some never; asks it 1200 questions; and shows which it knows, what the sidecar said before each "
        "answer, and how far that can be trusted. About two minutes on two CPU cores. The same command "
        "continues where it was interrupted."))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of recall-demo")
    options = parser.parse_args(argv)
    out = Path("runs", "demo-recall")
    status = main(["--config", "recall-demo", f"out={out}", *options.overrides])
    if status == 0:
        network = next((out / "networks").glob("*/model"))
        sidecar = out / SIDECAR
        print(f"\nask it yourself:  tilelli recall predict --model {network} --sidecar {sidecar} QUESTION …"
              f"\nas a page:        tilelli recall app --model {network} --sidecar {sidecar}")
    return status


@command
def predict(argv: Sequence[str]) -> int:
    """`tilelli recall predict`: a table for questions of the command line, JSON lines for those of a file."""
    quiet_logs()
    parser = _parser_with_sidecar("predict", "P(knows) of questions, from one pass of each.")
    parser.add_argument("--questions", type=Path, metavar="FILE",
                        help="rows with a question; prints JSON lines")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines there")
    parser.add_argument("question", nargs="*", help="a question to ask")
    options = parser.parse_intermixed_args(argv)
    questions = list(options.question)
    check_text(questions, "question")
    if options.questions:
        questions += [text_of(row, "question", f"{options.questions}, row {i}")
                      for i, row in enumerate(read_rows(options.questions, 10**9), 1)]
    if not questions:
        raise InputError("expected a question, or --questions FILE")
    predictor = open_predictor(options.model, options.sidecar, tokenizer=options.tokenizer,
                         any_network=options.any_network)
    found = predictor.ask(questions)
    lines = "".join(json.dumps(as_row(told), ensure_ascii=False) + "\n" for told in found)
    if options.out is not None:
        try:
            write_atomically(options.out, lines.encode())
        except OSError as error:
            raise InputError(f"--out: {options.out} cannot be written: {error.strerror}") from None
    elif options.questions:
        sys.stdout.write(lines)
    else:
        print(table([["P(knows)", "verdict", "strongest write", "question"], *(
            [f"{told.p:.3f}", told.verdict or "–", f"layer {told.strongest_layer}: {told.strongest_write!r}",
             told.question] for told in found)], right=(0,)))
    return 0


@command
def app(argv: Sequence[str]) -> int:
    """`tilelli recall app`: serves the page until a signal ends it."""
    quiet_logs()
    parser = _parser_with_sidecar("app", "A page for the browser that asks one network and its sidecar.")
    parser.add_argument("--study", default="", metavar="DIR",
                        help="whose results the page shows [that of the sidecar]")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at [%(default)s]")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="a name for the page besides its address and localhost, as a proxy's")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="0: any [%(default)s]")
    parser.add_argument("--max-new", type=int, default=1024, metavar="N",
                        help="tokens of an answer with its thoughts, at most [%(default)s]")
    options = parser.parse_args(argv)
    if options.max_new < 1:
        raise InputError(f"--max-new: expected 1 at least, found {options.max_new}")
    from . import app as page
    from . import info
    # A network can be large: whatever can be refused is, before it is read.
    study = info.find_study(options.study, options.sidecar)
    with page.open_door(options.host, options.port) as door:
        predictor = open_predictor(options.model, options.sidecar, tokenizer=options.tokenizer,
                             any_network=options.any_network)
        return page.serve(predictor, door, model=options.model, sidecar=options.sidecar, study=study,
                          max_new_tokens=options.max_new, allowed=options.allow_host)


def _parser_with_sidecar(name: str, summary: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"{PROG} {name}", description=summary)
    parser.add_argument("--model", required=True, metavar="DIR", help="the network")
    parser.add_argument("--sidecar", required=True, metavar="DIR", help="a study's, or a converted one")
    parser.add_argument("--tokenizer", default="", metavar="DIR", help="if not the network's own")
    parser.add_argument("--any-network", action="store_true",
                        help="accept a sidecar that was trained on another network")
    return parser


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line(PROG, __doc__, RecallConfig, "recall-demo", "fit.seeds=[0,1,2,3,4]")
    parser.add_argument("--stage", choices=STAGES, default="all", help="[%(default)s]")
    return parser.parse_intermixed_args(argv)
