"""Does a network know the answer before it answers?

    python -m eval.recall --config FILE [--stage build|fit|evaluate|all] [key=value …]
    python -m eval.recall --predict --model DIR --sidecar DIR QUESTION … [--questions FILE]
    python -m eval.recall --app --model DIR --sidecar DIR [--study DIR] [--port N]

A stage makes what it needs of those before it, and takes what is there: the same command again goes on
where it stopped. `all` ends with a report.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tilelli_jax import config as config_lib
from tilelli_jax.errors import ArgumentParser, InputError, command
from tilelli_jax.files import write_atomically
from tilelli_jax.json_text import check_text
from tilelli_jax.tables import table

from ..inputs.commands import carry_out, how_made, quiet_logs
from ..inputs.rows import read_rows
from ..stages import tell_on_stderr
from . import report
from .config import RecallConfig
from .knower import Knower, as_row, open_knower, question_of
from .study import Study

STAGES = ("build", "fit", "evaluate", "all")
PROG = "python -m eval.recall"


@command
def main(argv: Sequence[str]) -> int:
    quiet_logs()
    if "--predict" in argv or "--app" in argv:
        return _with_sidecar(argv)
    options = _options(argv)
    config = config_lib.load(RecallConfig, options.config, options.overrides)
    name = config.name or Path(options.config).stem
    study = Study(config, Path(config.out or Path("runs", Path(options.config).stem)), tell_on_stderr)
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
    print(f"\n{table(report.summary(found))}\n")
    print("\n".join(text.replace("`", "").replace("**", "") for text in report.verdicts(found)))
    print(f"\nsidecar: {sidecar}, of the network {study.studied.path}"
          f"\nreport: {study.out / 'report.html'} (and report.md)")
    return 0


def predict(knower: Knower, questions: Sequence[str], out: Path | None, as_lines: bool) -> None:
    """A table for questions of the command line, JSON lines for those of a file."""
    found = knower.ask(questions)
    lines = "".join(json.dumps(as_row(told), ensure_ascii=False) + "\n" for told in found)
    if out is not None:
        try:
            write_atomically(out, lines.encode())
        except OSError as error:
            raise InputError(f"--out: {out} cannot be written: {error.strerror}") from None
    elif as_lines:
        sys.stdout.write(lines)
    else:
        print(table([["P(knows)", "verdict", "strongest write", "question"], *(
            [f"{told.p:.3f}", told.verdict or "–", f"layer {told.strongest_layer}: {told.strongest_write!r}",
             told.question] for told in found)], right=(0,)))


def _with_sidecar(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog=PROG, description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predict", action="store_true", help="P(knows) of questions")
    what.add_argument("--app", action="store_true", help="a page for the browser (extra: app)")
    parser.add_argument("--model", required=True, metavar="DIR", help="the network")
    parser.add_argument("--sidecar", required=True, metavar="DIR", help="a study's, or a converted one")
    parser.add_argument("--tokenizer", default="", metavar="DIR", help="if not the network's own")
    parser.add_argument("--any-network", action="store_true",
                        help="a sidecar of another network, all the same")
    parser.add_argument("--questions", type=Path, metavar="FILE",
                        help="rows with a question; prints JSON lines")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines go there")
    parser.add_argument("--study", default="", metavar="DIR",
                        help="whose results the page shows [that of the sidecar]")
    parser.add_argument("--host", default="127.0.0.1", help="where the page is heard [%(default)s]")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="a name for the page besides its address and localhost, as a proxy's")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="0: any [%(default)s]")
    parser.add_argument("--max-new", type=int, default=1024, metavar="N",
                        help="symbols of an answer with its thoughts, at most [%(default)s]")
    parser.add_argument("question", nargs="*", help="to be asked")
    options = parser.parse_intermixed_args(argv)
    if options.app:
        return _app(options)
    given = list(options.question)
    check_text(given, "question")
    if options.questions:
        given += [question_of(row, f"{options.questions}, row {i}")
                  for i, row in enumerate(read_rows(options.questions, 10**9), 1)]
    if not given:
        raise InputError("--predict: expected a question, or --questions FILE")
    knower = open_knower(options.model, options.sidecar, tokenizer=options.tokenizer,
                         any_network=options.any_network)
    predict(knower, given, options.out, options.questions is not None)
    return 0


def _app(options: argparse.Namespace) -> int:
    for name, given in (("question", options.question), ("--questions", options.questions),
                        ("--out", options.out)):
        if given:
            raise InputError(f"--app: asks nothing itself; expected no {name}")
    if options.max_new < 1:
        raise InputError(f"--max-new: expected 1 at least, found {options.max_new}")
    try:
        from . import about, app
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "plotly", "plotly.graph_objects", "plotly.subplots"):
            raise
        raise InputError(f"--app: {error.name} is not there: pip install -e '.[app]'") from None
    # A network can be large: whatever can be refused is, before it is read.
    study = about.find_study(options.study, options.sidecar)
    with app.open_door(options.host, options.port) as door:
        knower = open_knower(options.model, options.sidecar, tokenizer=options.tokenizer,
                             any_network=options.any_network)
        return app.serve(knower, door, model=options.model, sidecar=options.sidecar, study=study,
                         most_new=options.max_new, allowed=options.allow_host)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = config_lib.command_line(PROG, __doc__, RecallConfig, "fit.seeds=[0,1,2,3,4]")
    parser.add_argument("--stage", choices=STAGES, default="all", help="[%(default)s]")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
