"""Predicts from activations whether an answer will be correct.

    tilelli recall --config FILE [--stage build|fit|evaluate|all] [key=value …]
    tilelli recall predict --model DIR --sidecar DIR QUESTION … [--questions FILE]
    tilelli recall app --model DIR --sidecar DIR [--study DIR] [--port N]
    tilelli recall compare OUT … [--out DIR]
    tilelli recall evaluate --shipped NAME [--out DIR]

Each stage first runs the stages that it depends on and reuses finished results, so the same command
continues where it was interrupted. `all` ends with a report.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tilelli_jax import config as config_lib
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.cli.tables import table
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import write_atomically
from tilelli_jax.io.json_text import check_text
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.loss import NATS
from tilelli_jax.training.report import losses_table
from tilelli_jax.training.run import RunDirectory

from ..document import without_markup
from ..inputs.rows import read_rows, text_of
from ..inputs.study import provenance_rows, quiet_logs, study_command
from ..matching import is_match
from ..tables import format_cell
from . import matrix, report, report_rows, sentences, shipped
from .config import RecallConfig
from .predictor import KnowledgePredictor, as_row
from .questions import ANSWER_COLUMNS, flat, of_rows
from .study import RecallStudy
from .table import QUESTIONS

PROG = "tilelli recall"


@command
def main(argv: Sequence[str]) -> int:
    """`tilelli recall`: runs one stage of a study, or all stages and the report."""
    return study_command(argv, RecallStudy, RecallConfig, write_report, prog=PROG, doc=__doc__,
                         shipped="recall-demo", example="fit.seeds=[0,1,2,3,4]")


def write_report(study: RecallStudy, name: str, provenance: Mapping[str, Any]) -> str:
    """Runs the study and writes its report and the sidecar. Returns the summary to print."""
    results = report.write(report.collect(study, name), study.out, provenance)
    sidecar = study.export_sidecar(provenance["command"])
    conclusions = "\n".join(without_markup(text) for text in sentences.conclusions(results))
    return (f"\n{_examples(results)}\n\n{table(report.summary(results))}\n\n"
            f"{conclusions}\n\n{_losses(study)}questions and answers: {study.build / QUESTIONS}\n"
            f"sidecar: {sidecar}, of the network {study.studied.path}\n"
            f"figures: {study.out / 'figures'}\n\n{_next_steps(study.studied.path, sidecar)}")


def _losses(study: RecallStudy) -> str:
    """Returns the losses of a network that the study trained, as a table; empty for others."""
    if not study.config.network.train:
        return ""
    run = RunDirectory(Path(study.studied.path).parent)
    config = config_lib.load(ExperimentConfig, run.config).report
    return f"{losses_table(run.read_summary(), config, NATS)}\n\n"


def _next_steps(model: Path, sidecar: Path) -> str:
    """Returns the commands that ask the network, ready to paste."""
    # Without the directory of its environment in PATH, as after `make demo`, the command needs its path.
    beside_python = os.path.relpath(Path(sys.executable).with_name("tilelli"))
    tilelli = "tilelli" if shutil.which("tilelli") else beside_python
    arguments = f"--model {shlex.quote(str(model))} --sidecar {shlex.quote(str(sidecar))}"
    return (f"ask your own questions:  {tilelli} recall predict {arguments} QUESTION …\n"
            f"in a browser:            {tilelli} recall app {arguments}")


def _examples(results: Mapping[str, Any]) -> str:
    """Returns a table of some held-out questions for the terminal."""
    rows = report_rows.example_rows(results)
    return table([list(rows[0]), *([format_cell(cell) for cell in row.values()] for row in rows)], right=(3,))


@command
def demo(argv: Sequence[str]) -> int:
    """`tilelli demo`: runs the study `recall-demo`."""
    parser = ArgumentParser(prog="tilelli demo", description=(
        "Trains a small network on a made-up world of facts, some of which it reads often, some rarely and "
        "some never; asks it 1200 questions; and prints which answers are right, the P(knows) that the "
        "sidecar predicted before each answer, and how reliable these predictions are. It takes 2 to 4 "
        "minutes, depending on the CPU. The same command continues where it was interrupted."))
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="settings that take precedence over those of recall-demo")
    options = parser.parse_args(argv)
    overrides = [f"out={Path('runs', 'recall-demo')}", *options.overrides]
    return main(["--config", "recall-demo", *overrides])


@command
def predict(argv: Sequence[str]) -> int:
    """`tilelli recall predict`: prints a table for questions given as arguments, JSON lines for a file's."""
    quiet_logs()
    parser = _parser_with_sidecar("predict", "Predicts P(knows) of questions from one forward pass of each "
                                  "prompt; nothing is generated.")
    parser.add_argument("--questions", type=Path, metavar="FILE",
                        help="JSON lines, JSON, CSV or parquet with a column `question`; prints JSON lines")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write JSON lines to this file instead of printing")
    parser.add_argument("--check", action="store_true",
                        help="also generate the answers as the sidecar's study did, and grade them if the "
                        "file has correct ones")
    parser.add_argument("question", nargs="*", help="a question")
    options = parser.parse_intermixed_args(argv)
    check_text(options.question, "question")
    for question in options.question:
        _check_no_path(question)
    asked = [{"question": question} for question in options.question]
    if options.questions:
        asked += _rows_of(options.questions, with_answers=options.check)
    if not asked:
        raise InputError("expected a question, or --questions FILE")
    questions = [row["question"] for row in asked]
    predictor = KnowledgePredictor.open(options.model, options.sidecar, tokenizer=options.tokenizer,
                                        any_network=options.any_network)
    predictions = predictor.predict(questions)
    rows = [({"id": row["id"]} if "id" in row else {}) | as_row(prediction)
            for row, prediction in zip(asked, predictions, strict=True)]
    if options.check:
        for row, source, given in zip(rows, asked, predictor.answer(questions), strict=True):
            golds, rule = source.get("answers"), predictor.rule.answers.match
            row |= {"answer": given, "correct": is_match(given, golds, rule) if golds else None}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.out is not None:
        try:
            write_atomically(options.out, lines.encode())
        except OSError as error:
            raise InputError(f"--out: {options.out} cannot be written: {error.strerror}") from None
    elif options.questions:
        sys.stdout.write(lines)
    else:
        print(table([["P(knows)", "verdict", "strongest write", "question", *(["answer"] * options.check)], *(
            [f"{prediction.p:.3f}", prediction.verdict or "–",
             f"layer {prediction.strongest_layer}: {prediction.strongest_write!r}", prediction.question,
             *([row["answer"]] if options.check else [])]
            for prediction, row in zip(predictions, rows, strict=True))], right=(0,)))
    return 0


def _rows_of(path: Path, *, with_answers: bool) -> list[dict[str, Any]]:
    """Returns `id`, `question` and, if wanted and present, `answers` of each row of a file."""
    rows = flat(read_rows(path, 10**9))
    result = []
    for i, row in enumerate(rows, 1):
        question = text_of(row, "question", f"{path}, row {i}")
        golds: tuple[str, ...] = ()
        if with_answers and ANSWER_COLUMNS & set(row):
            golds = of_rows([row], f"{path} (row {i})", path.stem)[0].answers
        result.append({"id": str(row.get("id", i)), "question": question, "answers": golds})
    return result


def _check_no_path(question: str) -> None:
    """Raises InputError if a question is an existing path: a glob after --model may match several."""
    if os.path.isdir(question):
        raise InputError(f"--model and --sidecar: expected one directory each, found another, '{question}', "
                         "as a question; does a pattern match several directories?")
    if os.path.exists(question):
        raise InputError(f"question: expected text, found the file '{question}'; --questions FILE reads "
                         "questions from a file")


@command
def compare(argv: Sequence[str]) -> int:
    """`tilelli recall compare`: one table and one figure of several studies."""
    parser = ArgumentParser(prog=f"{PROG} compare", description=(
        "AUROC of every estimator in several finished studies: of networks, tasks and questions."))
    parser.add_argument("studies", nargs="+", type=Path, metavar="OUT", help="output directory of a study")
    parser.add_argument("--out", type=Path, default=Path("runs", "recall-compare"), metavar="DIR",
                        help="directory of the report [%(default)s]")
    options = parser.parse_args(argv)
    command_line = shlex.join([*PROG.split(), "compare", *argv])
    rows = matrix.write(options.studies, options.out, provenance_rows(command_line, "none", ()))
    print(f"{table(matrix.as_text(rows))}\n\nreport: {options.out / 'report.html'} (and report.md)")
    return 0


@command
def evaluate_shipped(argv: Sequence[str]) -> int:
    """`tilelli recall evaluate`: makes the report of a shipped study again, without its network."""
    quiet_logs()
    parser = ArgumentParser(prog=f"{PROG} evaluate", description=(
        "Evaluates a study that comes with the package again, from its scores and labels, and writes its "
        "report. Neither the network nor the questions are needed."))
    parser.add_argument("--shipped", nargs="?", const="", required=True, metavar="NAME",
                        help=f"the study: {', '.join(shipped.names()) or 'none is shipped'}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the report [runs/NAME]")
    options = parser.parse_args(argv)
    name = shipped.check_name(options.shipped)
    out = options.out or Path("runs", name)
    if out.exists() and not (out / report.RESULTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out}: expected a new directory or that of a report, found other files")
    print(f"evaluating {name}, which takes minutes", file=sys.stderr, flush=True)
    command_line = shlex.join([*PROG.split(), "evaluate", *argv])
    results = shipped.write_report(name, out, provenance_rows(command_line, "shipped", ()))
    conclusions = "\n".join(without_markup(text) for text in sentences.conclusions(results))
    print(f"{table(report.summary(results))}\n\n{conclusions}\n\n"
          f"report: {out / 'report.html'} (and report.md)")
    return 0


@command
def app(argv: Sequence[str]) -> int:
    """`tilelli recall app`: serves the page until a signal ends it."""
    quiet_logs()
    parser = _parser_with_sidecar("app", "Serves a page for the browser: P(knows), signals and answers of "
                                  "one network with its sidecar.")
    parser.add_argument("--study", default="", metavar="DIR",
                        help="directory of the study whose results the page shows [the sidecar's parent]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="also accept requests for this host name, e.g. a proxy's; the page's address "
                        "and localhost are always accepted")
    parser.add_argument("--port", type=int, default=7860, metavar="N",
                        help="port to listen on; 0 chooses a free one [%(default)s]")
    parser.add_argument("--max-new", type=int, default=1024, metavar="N",
                        help="maximum number of tokens of an answer with its thought [%(default)s]")
    options = parser.parse_args(argv)
    if options.max_new < 1:
        raise InputError(f"--max-new: expected at least 1, found {options.max_new}")
    from tilelli_jax.serving.listening import open_socket

    from .app import info, server
    # All other options are checked before the network, which can be large, is loaded.
    with open_socket(options.host, options.port) as listener:
        sidecar = str(shipped.find_sidecar(options.sidecar, Path(options.model), options.tokenizer))
        study = info.find_study(options.study, sidecar)
        predictor = KnowledgePredictor.open(options.model, sidecar, tokenizer=options.tokenizer,
                                            any_network=options.any_network)
        return server.serve(predictor, listener, model=options.model, sidecar=sidecar, study=study,
                          max_new_tokens=options.max_new, allowed=options.allow_host)


def _parser_with_sidecar(name: str, summary: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"{PROG} {name}", description=summary)
    parser.add_argument("--model", required=True, metavar="DIR", help="directory of the network")
    parser.add_argument("--sidecar", default="", metavar="DIR|NAME",
                        help="directory of the sidecar (a study's OUT/sidecar, or a converted lrd.pt), or "
                        "name of a study that comes with the package [the one for this network]")
    parser.add_argument("--tokenizer", default="", metavar="DIR",
                        help="tokenizer to use in place of the network's own")
    parser.add_argument("--any-network", action="store_true",
                        help="accept a sidecar that was trained on another network; its probabilities are "
                        "then not calibrated")
    return parser
