"""Runs benchmark tasks of lm_eval: tilelli eval --model PATH --tasks NAME,NAME.

Prints lm_eval's table of results; --out writes them as DIR/results.json. `lm_eval ls tasks` lists the tasks.
`python -m tilelli_jax.eval.harness --model tilelli --model_args path=PATH` has all options of lm_eval.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilelli_jax import extras
from tilelli_jax.cli.command import ArgumentParser, command
from tilelli_jax.commands.networks import add_network_options
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import check_output, write_atomically, writing_to

from ..inputs.study import provenance_rows
from ..tables import json_with_nulls

RESULTS = "results.json"
SEED = 1234  # of few-shot examples and of sampling, as in lm_eval


@command
def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    extras.require("lm_eval", "tilelli eval")
    if options.out:
        _check_directory(options.out)
    results, tables = _evaluate(options)
    if options.out:
        rows = provenance_rows(shlex.join(["tilelli", "eval", *argv]), "", [SEED])
        with writing_to("--out", options.out):
            options.out.mkdir(parents=True, exist_ok=True)
            write_atomically(options.out / RESULTS, json_with_nulls({**results, "how_to_reproduce": rows}))
    print(tables)
    return 0


def _evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The results of lm_eval as plain values, and its tables."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from . import adapter  # noqa: F401 (registers the model)

    class Tasks(TaskManager):
        """Turns what goes wrong with a task, such as a data set that cannot be read, into an InputError."""

        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except Exception as error:  # of lm_eval, of `datasets`, or of the task's own code
                raise InputError(f"--tasks: {', '.join(task_list)}: cannot be loaded: "
                                 f"{type(error).__name__}: {error}") from error

    tasks = Tasks(include_path=options.include_path and str(options.include_path))
    names = _names(options.tasks, tasks)
    arguments = {"path": options.model, "tokenizer": options.tokenizer, "dtype": options.dtype,
                 "batch_size": options.batch_size, "max_length": options.max_length, "seed": SEED}
    results = simple_evaluate(
        model="tilelli", model_args=arguments, tasks=names, task_manager=tasks, limit=options.limit,
        num_fewshot=options.num_fewshot, apply_chat_template=options.chat, log_samples=False,
        fewshot_random_seed=SEED)
    tables = [make_table(results), *([make_table(results, "groups")] if "groups" in results else [])]
    return json.loads(json.dumps(results, default=handle_non_serializable)), "\n".join(tables)


def _check_directory(out: Path) -> None:
    """Raises InputError if the directory, or its first existing parent, is not one or is not writable."""
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise InputError(f"--out: {parent}: expected a directory, found a file")
    check_output("--out", parent / RESULTS)


def _names(tasks: str, known: Any) -> list[str]:
    """The names of all tasks that `--tasks` gives: names, patterns such as mmlu_*, or YAML files."""
    names: list[str] = []
    for name in filter(None, tasks.split(",")):
        found = [name] if name.endswith(".yaml") and Path(name).is_file() else known.match_tasks([name])
        if not found:
            near = difflib.get_close_matches(name, known.all_tasks, 1)
            raise InputError(f"--tasks: {name}: no such task" + (f", did you mean {near[0]}?" if near else "")
                             + " (`lm_eval ls tasks` lists them)")
        names += [task for task in found if task not in names]
    if not names:
        raise InputError(f"--tasks: expected names of tasks, found {tasks!r}")
    return names


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="tilelli eval", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.example = "--model runs/demo/model --tasks lambada_openai"
    add_network_options(parser)
    parser.add_argument("--tasks", required=True, metavar="NAMES", help=(
        "tasks, separated by commas: names, patterns such as 'mmlu_*', or YAML files"))
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="directory with more tasks (YAML)")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N documents of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help=(
        "number of examples before each document [the task's]"))
    parser.add_argument("--chat", action="store_true", help=(
        "format contexts with the network's chat template"))
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help=(
        "number of texts computed together; it does not affect the results [%(default)s]"))
    parser.add_argument("--max-length", type=int, metavar="N", help=(
        "context length in tokens [the network's]"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json into this directory")
    options = parser.parse_args(argv)
    for name, smallest in (("limit", 1), ("num_fewshot", 0)):
        if (value := getattr(options, name)) is not None and value < smallest:
            raise InputError(f"--{name.replace('_', '-')}: expected an integer ≥ {smallest}, found {value}")
    if options.include_path and not options.include_path.is_dir():
        raise InputError(f"--include-path: {options.include_path}: no such directory")
    return options
